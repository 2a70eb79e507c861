import numpy as np
import pytest
from scipy.stats import binomtest

from monai_deqkan.visualize import plot_reliability


def test_points_and_whiskers_are_those_of_the_bins():
    chance = np.repeat([0.15, 0.55, 0.95], [10, 20, 5])
    labels = np.concatenate([[1] * 2 + [0] * 8, [1] * 12 + [0] * 8, [1] * 5])
    figure = plot_reliability(labels, np.stack((1 - chance, chance), axis=1), ["well", "sick"])
    points = figure.axes[0].lines[1]
    np.testing.assert_allclose(points.get_xdata(), [0.15, 0.55, 0.95])
    np.testing.assert_allclose(points.get_ydata(), [0.2, 0.6, 1.0])
    whiskers = figure.axes[0].collections[0].get_segments()
    for segment, (hits, count) in zip(whiskers, ((2, 10), (12, 20), (5, 5)), strict=True):
        interval = binomtest(hits, count).proportion_ci(0.95, "exact")
        np.testing.assert_allclose(segment[:, 1], [interval.low, interval.high], atol=1e-9)
    assert [bar.get_height() for bar in figure.axes[1].patches] == [0, 10, 0, 0, 0, 20, 0, 0, 0, 5]
    gap = (10 * 0.05 + 20 * 0.05 + 5 * 0.05) / 35
    assert figure.axes[0].get_title().endswith(f"error {gap:.3f}")


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="classes from 0 to 1"):
        plot_reliability([0, 5], [[0.5, 0.5], [0.5, 0.5]], ["a", "b"])
