"""Figures of the one-dimensional functions that KAN layers learn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from monai_deqkan._checks import check_int
from monai_deqkan.networks.layers import BSplineBasis, KANLayer, edge_values, rank_edges
from monai_deqkan.networks.layers.kan_channels import grid_ends, input_channels
from monai_deqkan.visualize.learning import COLORS, MUTED, as_array, check_lengths, hide_unused, new_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_kan_curves", "plot_kan_layer"]


def plot_kan_curves(
    points: ArrayLike | Tensor,
    curves: ArrayLike | Tensor,
    titles: Sequence[str],
    input_histograms: Sequence[tuple[ArrayLike | Tensor, ArrayLike | Tensor]] | None = None,
    *,
    title: str = "Learned functions",
) -> Figure:
    """Draw learned functions, each in a panel of its own and on one common vertical scale.

    Args:
        points: inputs at which the functions were evaluated, shape ``(P,)``.
        curves: values of the functions, shape ``(n, P)``.
        titles: ``n`` titles, such as ``"channel 3 to 8"``.
        input_histograms: for each function the pair ``(counts, edges)`` of ``numpy.histogram`` over the inputs that
            it saw, drawn in grey; it shows which part of a curve the data have shaped.
        title: title of the figure.

    Returns:
        Figure, 900 pixels wide at 100 dpi.

    Raises:
        ValueError: if shapes or numbers of entries do not fit together, or values are not finite.

    Example:
        >>> figure = plot_kan_curves([-1, 0, 1], [[1, 0, 1], [-1, 0, 1]], ["square-like", "odd"])
        >>> figure.axes[1].get_title()
        'odd'
    """
    x, functions = as_array("points", points, 1), as_array("curves", curves, 2)
    check_lengths(curves=functions, titles=titles)
    if functions.shape[1] != len(x):
        raise ValueError(f"`curves` must have shape (n, P) with P = {len(x)} points; got {functions.shape}.")
    if input_histograms is not None:
        check_lengths(curves=functions, input_histograms=input_histograms)
    columns = min(len(titles), 4)
    rows = math.ceil(len(titles) / columns)
    figure, axes = new_figure(rows, columns, 2.3 * rows + 0.8, title, sharex=True, sharey=True)
    for index, (panel, function, name) in enumerate(zip(axes.flat, functions, titles, strict=False)):
        style_axes(panel, name)
        panel.axhline(0, color=MUTED, linewidth=0.8)
        panel.plot(x, function, color=COLORS[0], linewidth=2.0)
        panel.label_outer()
        if index + columns >= len(titles):
            panel.tick_params(labelbottom=True)
    if input_histograms is not None:
        for index, histogram in enumerate(input_histograms):
            _draw_histogram(axes.flat[index], index, histogram)
    hide_unused(axes, len(titles))
    note = "" if input_histograms is None else " (grey: how often the data had this input)"
    figure.supxlabel("input" + note, fontsize=10)
    figure.supylabel("learned function", fontsize=10)
    return figure


def plot_kan_layer(
    layer: KANLayer, inputs: Tensor | None = None, num_edges: int = 16, *, title: str = "Most important edges"
) -> Figure:
    """Draw the functions on a layer's most important edges, each in a panel of its own, on one vertical scale.

    Light blue marks the grid, whose ends the functions' continuation starts from; ticks at the bottom of a panel are
    the knots of B-splines. With inputs, grey shows how often the edge saw which value, and the panel spans the grid
    and all inputs but the outermost 0.1 % on either side.

    Args:
        layer: a KAN layer.
        inputs: what it was called with, ``(*, in)`` or ``(B, in, *space)``; see :func:`record_kan_inputs`.
        num_edges: most edges drawn.
        title: title of the figure.

    Returns:
        Figure, 900 pixels wide at 100 dpi.

    Raises:
        TypeError: if ``layer`` is no KAN layer, or ``num_edges`` no integer.
        ValueError: if ``inputs`` do not fit the layer or are not finite.

    Example:
        >>> from monai_deqkan.networks.layers import KANLinear
        >>> figure = plot_kan_layer(KANLinear(3, 2), num_edges=4)
        >>> len(figure.axes)
        4
    """
    edges = rank_edges(layer, inputs, check_int("num_edges", num_edges))
    grids = grid_ends(layer).cpu()
    samples = None if inputs is None else input_channels(layer, inputs).cpu()
    columns = min(len(edges), 4)
    rows = math.ceil(len(edges) / columns)
    figure, axes = new_figure(rows, columns, 2.1 * rows + 0.9, title, sharey=True)
    for panel, edge in zip(axes.flat, edges, strict=False):
        low, high = sorted(grids[edge.in_channel].tolist())
        first, last = min(low, edge.low), max(high, edge.high)
        room = 0.04 * (last - first)
        points = torch.linspace(first - room, last + room, 301, dtype=torch.float64)
        style_axes(panel, f"{edge} (RMS {edge.importance:.3g})")
        panel.title.set_fontsize(9)
        panel.axvspan(low, high, color=COLORS[5], alpha=0.18, linewidth=0, zorder=0)
        panel.axhline(0, color=MUTED, linewidth=0.8)
        panel.plot(points, edge_values(layer, edge, points).cpu(), color=COLORS[0], linewidth=2.0)
        if isinstance(layer.basis, BSplineBasis):
            knots = np.linspace(low, high, layer.basis.grid_size + 1)
            panel.plot(knots, np.zeros_like(knots), "|", color=MUTED, transform=panel.get_xaxis_transform())
        panel.set_xlim(first - room, last + room)
        panel.label_outer(remove_inner_ticks=False)
        panel.tick_params(labelbottom=True, labelsize=8)
        if samples is not None:
            seen = samples[edge.in_channel]
            seen = seen[(seen >= edge.low) & (seen <= edge.high)]
            _draw_histogram(panel, 0, np.histogram(seen.numpy(), bins=40, range=(first - room, last + room)))
            panel.child_axes[0].set_xlim(panel.get_xlim())
    hide_unused(axes, len(edges))
    note = "" if samples is None else "; grey: how often the data had this input"
    figure.supxlabel(f"input (blue: the grid{note})", fontsize=10)
    figure.supylabel("function of edge", fontsize=10)
    return figure


def _draw_histogram(axes: Axes, index: int, histogram: tuple[ArrayLike | Tensor, ArrayLike | Tensor]) -> None:
    name = f"input_histograms[{index}]"
    check_lengths(**{name: histogram, "the pair (counts, edges)": (0, 0)})
    counts, edges = as_array(f"{name}[0]", histogram[0], 1), as_array(f"{name}[1]", histogram[1], 1)
    if len(edges) != len(counts) + 1:
        raise ValueError(f"`{name}` must be (counts, edges) with one edge more; got {len(counts)} and {len(edges)}.")
    # Behind the curve, on a scale of its own: at most the lower third of the panel.
    behind = axes.inset_axes((0, 0, 1, 1), zorder=-1, sharex=axes)
    behind.stairs(counts, edges, fill=True, color="#d0d5da")
    behind.set_ylim(0, 3 * max(float(counts.max()), 1e-12))
    behind.axis("off")
    axes.patch.set_visible(False)
