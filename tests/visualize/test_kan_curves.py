from __future__ import annotations

import numpy as np
import pytest
import torch

from monai_deqkan.visualize import plot_kan_curves

POINTS = np.linspace(-3, 3, 7)
CURVES = torch.stack([torch.sin(torch.tensor(POINTS)), torch.tensor(POINTS) ** 2])


def test_curves_and_histograms_are_those_given():
    histograms = [np.histogram([-1, 0, 0, 2], bins=4), np.histogram([1, 1, 1.5], bins=3)]
    figure = plot_kan_curves(POINTS, CURVES, ["sine", "square"], histograms)
    for panel, curve, (counts, edges) in zip(figure.axes, CURVES, histograms, strict=False):
        zero, line = panel.lines
        np.testing.assert_array_equal(zero.get_ydata(), [0, 0])
        np.testing.assert_array_equal(line.get_xdata(), POINTS)
        np.testing.assert_array_equal(line.get_ydata(), curve.numpy())
        stairs = panel.child_axes[0].patches[0].get_data()
        np.testing.assert_array_equal(stairs.values, counts)
        np.testing.assert_array_equal(stairs.edges, edges)


def test_parameters_with_gradient_are_accepted():
    figure = plot_kan_curves(POINTS, CURVES.clone().requires_grad_(), ["sine", "square"])
    np.testing.assert_array_equal(figure.axes[1].lines[1].get_ydata(), POINTS**2)


@pytest.mark.parametrize(
    ("points", "curves", "titles", "histograms", "match"),
    [
        (POINTS[:3], CURVES, ["a", "b"], None, "P = 3 points"),
        (POINTS, CURVES, ["a"], None, "`titles` has 1"),
        (POINTS, CURVES * np.nan, ["a", "b"], None, "finite"),
        (POINTS, CURVES, ["a", "b"], [([1], [0, 1])], "`input_histograms` has 1"),
        (POINTS, CURVES, ["a", "b"], [([1], [0]), ([1], [0])], "one edge more"),
        (POINTS, CURVES[:0], [], None, "none of them empty"),
    ],
)
def test_bad_input_is_rejected(points, curves, titles, histograms, match):
    with pytest.raises(ValueError, match=match):
        plot_kan_curves(points, curves, titles, histograms)
