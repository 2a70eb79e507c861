"""Figures of the one-dimensional functions that KAN layers learn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from numpy.typing import ArrayLike
from torch import Tensor

from monai_deqkan.visualize.learning import COLORS, MUTED, as_array, check_lengths, hide_unused, new_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_kan_curves"]


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
