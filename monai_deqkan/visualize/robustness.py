"""How networks fare as images get worse."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from monai_deqkan.visualize.learning import COLORS, as_array, hide_unused, new_figure, plain_text, style_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_robustness"]


def plot_robustness(
    curves: Mapping[str, Mapping[str, ArrayLike]],
    *,
    value_name: str = "AUC",
    x_label: str = "severity (0: clean)",
    title: str = "Robustness",
) -> Figure:
    """Draw a value against the severity of each corruption: one panel per corruption, one line per network.

    Lines are means over the seeds; bands reach from the lowest to the highest seed.

    Args:
        curves: for each network, for each corruption, the values of shape ``(seeds, severities)``; the first severity
            is 0, the clean images.
        value_name: what the values are.
        x_label: what the severities are.
        title: title of the figure.

    Returns:
        Figure, 900 pixels wide at 100 dpi; all panels have the same axes.

    Raises:
        ValueError: if there is no curve, or one has no two axes, is empty, or is not finite.

    Example:
        >>> figure = plot_robustness({"a": {"blur": [[0.9, 0.8], [0.9, 0.6]]}, "b": {"blur": [[0.9, 0.9]]}})
        >>> figure.axes[0].get_title(), [line.get_ydata().round(2).tolist() for line in figure.axes[0].lines]
        ('blur', [[0.9, 0.7], [0.9, 0.9]])
    """
    from matplotlib.ticker import MaxNLocator

    names = list(dict.fromkeys(name for panels in curves.values() for name in panels))
    if not names:
        raise ValueError("`curves` must hold at least one network with one corruption; got none.")
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure, axes = new_figure(rows, columns, 2.7 * rows + 0.8, title, sharex=True, sharey=True)
    for position, (panel, name) in enumerate(zip(axes.flat, names, strict=False)):
        for index, (network, panels) in enumerate(curves.items()):
            if name not in panels:
                continue
            values = as_array(f"curves[{network!r}][{name!r}]", panels[name], 2).astype(float)
            severities = np.arange(values.shape[1])
            color, style = COLORS[index % len(COLORS)], ("-", "--", ":", "-.")[min(index, 3)]
            label = plain_text(f"{network} ({len(values)} seed{'s' * (len(values) > 1)})")
            panel.plot(severities, values.mean(0), style, color=color, marker="o", markersize=4, label=label)
            panel.fill_between(severities, values.min(0), values.max(0), color=color, alpha=0.18, linewidth=0)
        is_lowest = position + columns >= len(names)
        style_axes(
            panel, name.replace("_", " "), x_label if is_lowest else "", value_name if position % columns == 0 else ""
        )
        panel.tick_params(labelbottom=is_lowest)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    hide_unused(axes, len(names))
    labels = {text: line for panel in axes.flat for line, text in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=3, fontsize=9)
    return figure
