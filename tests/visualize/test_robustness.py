import numpy as np
import pytest

from monai_deqkan.visualize import plot_robustness


def test_lines_are_means_and_bands_reach_from_lowest_to_highest():
    values = np.random.default_rng(0).random((3, 6))
    figure = plot_robustness({"ours": {"blur": values, "gamma": values[:1]}, "other": {"blur": values + 1}})
    blur, gamma = figure.axes[:2]
    assert (blur.get_title(), gamma.get_title()) == ("blur", "gamma")
    np.testing.assert_allclose(blur.lines[0].get_ydata(), values.mean(0))
    band = blur.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(values.min())
    assert band[:, 1].max() == pytest.approx(values.max())
    assert len(gamma.lines) == 1
    assert {line.get_color() for line in blur.lines} == {"#0072B2", "#D55E00"}
    assert {text.get_text() for text in figure.legends[0].get_texts()} >= {"ours (3 seeds)", "other (3 seeds)"}
    figure.draw_without_rendering()


def test_errors():
    with pytest.raises(ValueError, match="at least one network"):
        plot_robustness({})
    with pytest.raises(ValueError, match=r"curves\['a'\]\['blur'\].*2 axes"):
        plot_robustness({"a": {"blur": [0.5, 0.4]}})
