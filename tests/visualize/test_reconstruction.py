from __future__ import annotations

import numpy as np
import pytest
import torch

from monai_deqkan.visualize import plot_reconstruction

RNG = np.random.default_rng(0)
REFERENCE = RNG.uniform(0.5, 1, (12, 10)) * np.exp(1j * RNG.uniform(-3, 3, (12, 10)))


def _panels(figure, rows, columns):
    return np.array(figure.axes[: rows * columns]).reshape(rows, columns)


def test_magnitudes_and_their_errors_are_drawn_on_common_scales():
    images = {"near": torch.tensor(REFERENCE * 1.04), "far": np.abs(REFERENCE) * 0.9}
    figure = plot_reconstruction(REFERENCE, images, {"far": "20.0 dB"})
    panels = _panels(figure, 2, 3)
    np.testing.assert_allclose(panels[0, 0].images[0].get_array(), np.abs(REFERENCE))
    for column, factor in ((1, 1.04), (2, 0.9)):
        np.testing.assert_allclose(panels[0, column].images[0].get_array(), np.abs(REFERENCE) * factor)
        np.testing.assert_allclose(panels[1, column].images[0].get_array(), np.abs(REFERENCE) * abs(factor - 1))
    top = np.percentile(np.abs(REFERENCE), 99.9)
    assert {panel.images[0].get_clim() for panel in panels[0]} == {(0, top)}
    # The worst errors are 10 % of at most 1: they fit a scale magnified 10 times, not 20 times.
    assert {panel.images[0].get_clim() for panel in panels[1, 1:]} == {(0, top / 10)}
    assert "magnified 10x" in panels[1, 0].texts[0].get_text()
    assert [panel.get_title() for panel in panels[0]] == ["Reference", "near", "far\n20.0 dB"]


def test_region_is_cut_out_and_framed_in_the_right_place():
    figure = plot_reconstruction(REFERENCE, {"copy": REFERENCE}, region=(3, 1, 4, 6))
    panels = _panels(figure, 3, 2)
    np.testing.assert_allclose(panels[2, 1].images[0].get_array(), np.abs(REFERENCE)[3:7, 1:7])
    assert panels[0, 1].patches[0].get_bbox().bounds == (0.5, 2.5, 6, 4)


def test_a_perfect_copy_and_an_empty_image_can_be_drawn(tmp_path):
    zeros = np.zeros((4, 4))
    plot_reconstruction(zeros, {"copy": zeros}).savefig(tmp_path / "zeros.png")
    figure = plot_reconstruction(REFERENCE, {"copy": REFERENCE})
    assert "magnified 100x" in _panels(figure, 2, 2)[1, 0].texts[0].get_text()


@pytest.mark.parametrize(
    ("images", "options", "match"),
    [
        ({}, {}, "at least one reconstruction"),
        ({"a": REFERENCE.T}, {}, r"shape \(12, 10\).*got \(10, 12\)"),
        ({"a": REFERENCE * np.nan}, {}, "120 of 120 values"),
        ({"a": REFERENCE}, {"scores": {"b": "20 dB"}}, r"got \['b'\]"),
        ({"a": REFERENCE}, {"region": (0, 0, 13, 2)}, "inside an image"),
        ({"a": REFERENCE}, {"region": (0, 0, 0, 2)}, "inside an image"),
    ],
)
def test_bad_input_is_rejected(images, options, match):
    with pytest.raises(ValueError, match=match):
        plot_reconstruction(REFERENCE, images, **options)
