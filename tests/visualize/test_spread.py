import numpy as np
import pytest
import torch
from scipy.stats import norm

from monai_deqkan.metrics import spread_calibration
from monai_deqkan.visualize import plot_spread_calibration, plot_spread_map


def test_curves_show_the_shares_beside_the_normal_law():
    error = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    curves = {
        "raw": spread_calibration(error, 0.5 * torch.ones(1000)),
        "_times 2": spread_calibration(error[:500], torch.ones(500)),
    }
    figure = plot_spread_calibration(curves)
    lines = figure.axes[0].get_lines()
    k, law = lines[0].get_data()
    np.testing.assert_allclose(law, norm.cdf(k) - norm.cdf(-k), atol=1e-12)
    for line, curve in zip(lines[1:], curves.values(), strict=True):
        np.testing.assert_allclose(line.get_data(), [curve.factors, curve.shares])
    assert [text.get_text().strip() for text in figure.axes[0].get_legend().get_texts()] == [
        "normal law",
        "raw",
        "_times 2",
    ]
    assert figure.axes[0].get_title() == "500 to 1,000 pixels"
    figure.draw_without_rendering()


def test_no_curve_is_refused():
    with pytest.raises(ValueError, match="at least one calibration"):
        plot_spread_calibration({})


def test_spread_and_error_share_a_scale():
    rng = np.random.default_rng(0)
    image, spread, error = rng.random((20, 16)), rng.random((20, 16)), rng.normal(0, 2, (20, 16))
    figure = plot_spread_map(image, spread, error)
    shown = [axes.get_images()[0] for axes in figure.axes[:3]]
    np.testing.assert_allclose(shown[2].get_array(), np.abs(error))
    assert shown[1].get_clim() == shown[2].get_clim() == (0, pytest.approx(np.percentile(np.abs(error), 99.5)))
    figure.draw_without_rendering()


def test_a_spread_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="spread"):
        plot_spread_map(np.ones((4, 4)), np.ones((4, 5)))
