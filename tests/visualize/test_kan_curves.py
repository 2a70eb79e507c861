from __future__ import annotations

import numpy as np
import pytest
import torch

from monai_deqkan.networks.layers import KANConv2d, KANLinear, rank_edges
from monai_deqkan.visualize import plot_kan_curves, plot_kan_layer

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


def test_layer_is_drawn_edge_by_edge_with_its_grid_and_inputs():
    torch.manual_seed(0)
    layer = KANLinear(3, 2, grid_size=4, dtype=torch.float64)
    layer.set_input_map(torch.tensor([1.0, -0.5, 2.0]).double(), torch.tensor([0.0, 1.0, 0.0]).double())
    inputs = torch.randn(2001, 3, dtype=torch.float64)
    inputs[0, 0] = 1e3  # not drawn
    figure = plot_kan_layer(layer, inputs, num_edges=5)
    edges = rank_edges(layer, inputs, 5)
    panels = [panel for panel in figure.axes if panel.get_visible()]
    assert len(panels) == 5
    for panel, edge in zip(panels, edges, strict=True):
        assert panel.get_title() == f"{edge.in_channel} to {edge.out_channel} (RMS {edge.importance:.3g})"
        _, curve, knots = panel.lines
        points = torch.as_tensor(curve.get_xdata())
        values = layer.edge_functions(points)[:, edge.out_channel, edge.in_channel].detach()
        np.testing.assert_allclose(curve.get_ydata(), values)
        low, high = {0: (-3, 3), 1: (-4, 8), 2: (-1.5, 1.5)}[edge.in_channel]
        np.testing.assert_allclose(knots.get_xdata(), np.linspace(low, high, 5))
        assert panel.patches[0].get_x() == low
        assert panel.patches[0].get_width() == high - low
        assert panel.get_xlim()[1] < 20
        counts = panel.child_axes[0].patches[0].get_data().values
        inside = (inputs[:, edge.in_channel] >= edge.low) & (inputs[:, edge.in_channel] <= edge.high)
        assert counts.sum() == int(inside.sum())


def test_layer_of_few_edges_and_other_basis_needs_no_inputs():
    figure = plot_kan_layer(KANConv2d(1, 2, 1, basis="fourier"))
    assert len(figure.axes) == 2
    assert all(len(panel.lines) == 2 and not panel.child_axes for panel in figure.axes)
    with pytest.raises(TypeError, match="KAN layer"):
        plot_kan_layer(torch.nn.Linear(2, 2))
