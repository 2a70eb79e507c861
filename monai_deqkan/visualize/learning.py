"""Learning curves and comparisons of methods; also the style and the input checks that the room's figures share."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from monai_deqkan._checks import check_choice

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_bars", "plot_learning_curves"]

# Okabe and Ito, "Color universal design" (2008), without yellow, which is too pale on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MUTED = "#57606a"
WIDTH = 9.0  # inches: 900 pixels in a browser, which shows 100 pixels per inch of figure (see report.py)


def new_figure(
    rows: int,
    columns: int,
    height: float,
    title: str = "",
    *,
    layout: Literal["constrained", "compressed"] = "constrained",
    **grid: Any,
) -> tuple[Figure, np.ndarray]:
    """Return a figure of the common width and its axes ``(rows, columns)``, without pyplot and its global state.

    Args:
        rows: number of rows of panels.
        columns: number of columns of panels.
        height: height of the figure in inches.
        title: title of the whole figure.
        layout: ``"constrained"``, or ``"compressed"`` for images, whose panels keep their shape.
        grid: further arguments of ``matplotlib.figure.Figure.subplots``, such as ``sharex``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), facecolor="white", layout=layout)
    if title:
        figure.suptitle(plain_text(title), fontsize=13, fontweight="bold")
    return figure, figure.subplots(rows, columns, squeeze=False, **grid)


def style_axes(axes: Axes, title: str = "", x_label: str = "", y_label: str = "") -> None:
    """Give one panel its title and labels, a light grid, and no frame at the top and the right."""
    axes.set_title(plain_text(title), fontsize=11)
    axes.set_xlabel(plain_text(x_label))
    axes.set_ylabel(plain_text(y_label))
    axes.grid(visible=True, color="#d8dee4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def hide_unused(axes: np.ndarray, used: int) -> None:
    """Take the panels after the first ``used`` ones off the figure."""
    for panel in axes.flat[used:]:
        panel.set_visible(False)


def plain_text(text: str) -> str:
    """Return ``text`` so that matplotlib shows it as it is: no formulas from dollar signs, no hidden legend entries."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def as_array(name: str, value: ArrayLike | Tensor, ndim: int, kinds: str = "biuf") -> np.ndarray:
    """Return finite numbers as an array with ``ndim`` axes; ``kinds`` are NumPy's letters for the types it may have.

    Raises:
        TypeError: if ``value`` does not hold numbers.
        ValueError: if it has another number of axes, is empty, or holds NaN or infinity.
    """
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
    array = np.asarray(value)
    if array.size and array.dtype.kind not in kinds:
        raise TypeError(
            f"`{name}` must hold {'' if 'c' in kinds else 'real '}numbers; got dtype {array.dtype}. Convert it first."
        )
    if array.ndim != ndim or array.size == 0:
        raise ValueError(f"`{name}` must have {ndim} axes, none of them empty; got shape {array.shape}.")
    bad = int(np.count_nonzero(~np.isfinite(array)))
    if bad:
        raise ValueError(f"`{name}` must be finite; {bad} of {array.size} values are NaN or infinite. Mend them first.")
    return array


def as_image(name: str, value: ArrayLike | Tensor, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Return an image ``(H, W)`` as real numbers, complex ones by their magnitude.

    Raises:
        TypeError: if ``value`` does not hold numbers.
        ValueError: if it is no finite image ``(H, W)``, or its shape is not ``shape``.
    """
    image = as_array(name, value, 2, kinds="biufc")
    if shape is not None and image.shape != shape:
        raise ValueError(f"`{name}` must have shape {shape}, as the image it belongs to; got {image.shape}.")
    return np.abs(image) if np.iscomplexobj(image) else image.astype(float)


def check_lengths(**values: Sized) -> None:
    """Check that all arguments have one length of at least one.

    Raises:
        ValueError: otherwise; the message gives each length.
    """
    lengths = {name: len(value) for name, value in values.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        got = ", ".join(f"`{name}` has {length}" for name, length in lengths.items())
        raise ValueError(f"{' and '.join(f'`{n}`' for n in lengths)} need one entry per item, at least one; {got}.")


def plot_learning_curves(
    history: Mapping[str, Sequence[tuple[int, float]]], *, x_label: str = "epoch", title: str = "Learning curves"
) -> Figure:
    """Draw how losses and metrics went during a training, with one panel for each kind of value.

    Losses (names with "loss") share a panel; so do names that end in the same unit, such as ``"PSNR (dB)"``; so do
    other values that stay within [-1, 1]. Whatever is left has a panel of its own. Losses over two decades get a
    logarithmic axis. NaN and infinity leave gaps.

    Args:
        history: pairs of step and value for each name; at least one pair each.
        x_label: what the steps count.
        title: title of the figure.

    Returns:
        Figure, 900 pixels wide at 100 dpi.

    Raises:
        ValueError: if there is no curve, a curve has no point, or a point is no pair.

    Example:
        >>> figure = plot_learning_curves({"train loss": [(1, 0.9), (2, 0.4)], "val AUC": [(1, 0.7), (2, 0.8)]})
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['loss', 'score']
    """
    if not history:
        raise ValueError("`history` must hold at least one curve; got none. Record a loss or a metric first.")
    panels: dict[str, dict[str, np.ndarray]] = {}
    for name, points in history.items():
        values = np.asarray(points, dtype=float)
        if values.ndim != 2 or values.shape[1] != 2 or len(values) == 0:
            raise ValueError(f"`history[{name!r}]` must be pairs (step, value), at least one; got {points!r:.80}.")
        values[~np.isfinite(values)] = np.nan
        panels.setdefault(_value_kind(name, values[:, 1]), {})[name] = values
    columns = len(panels) if len(panels) <= 3 else 2
    rows = math.ceil(len(panels) / columns)
    figure, axes = new_figure(rows, columns, 3.4 * rows + 0.4, title)
    for panel, (kind, curves) in zip(axes.flat, panels.items(), strict=False):
        _draw_curves(panel, kind, curves, x_label)
    hide_unused(axes, len(panels))
    return figure


def _value_kind(name: str, values: np.ndarray) -> str:
    if "loss" in name.lower():
        return "loss"
    unit = re.search(r"\(([^()]+)\)\s*$", name)
    if unit:
        return unit[1]
    return "score" if np.all(np.abs(values[np.isfinite(values)]) <= 1) else name


def _draw_curves(axes: Axes, kind: str, curves: Mapping[str, np.ndarray], x_label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    for index, (name, points) in enumerate(curves.items()):
        empty = "" if np.isfinite(points[:, 1]).any() else " (no finite value)"
        axes.plot(
            *points.T,
            color=COLORS[index % len(COLORS)],
            linestyle=("-", "--", ":")[index // len(COLORS) % 3],
            marker="o" if len(points) <= 30 else "",
            markersize=4,
            linewidth=1.8,
            label=plain_text(name) + empty,
        )
    style_axes(axes, "", x_label, kind)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    values = np.concatenate([points[:, 1] for points in curves.values()])
    values = values[np.isfinite(values)]
    if kind == "loss" and values.size and values.min() > 0 and values.max() > 100 * values.min():
        axes.set_yscale("log")
    axes.legend(fontsize=9)


def plot_bars(
    values: Mapping[str, Mapping[str, float]],
    *,
    highlight: str | None = None,
    better: Mapping[str, str] | None = None,
    title: str = "Comparison of methods",
) -> Figure:
    """Compare methods by horizontal bars from zero, with one panel and one scale for each metric.

    Args:
        values: for each method its metrics, such as ``{"KAN-UNet": {"Dice": 0.9}, "thresholds": {"Dice": 0.6}}``;
            put units into the names of the metrics. Missing or non-finite values are shown as "n/a".
        highlight: method drawn in color, the others in grey; all alike by default.
        better: ``"higher"`` or ``"lower"`` for each metric whose panel should say which is better.
        title: title of the figure.

    Returns:
        Figure, 900 pixels wide at 100 dpi.

    Raises:
        ValueError: if there is no method or no metric, ``highlight`` is no method, or ``better`` has another word.

    Example:
        >>> figure = plot_bars({"ours": {"PSNR (dB)": 34.1}, "zero-filled": {"PSNR (dB)": 27.5}}, highlight="ours")
        >>> [float(bar.get_width()) for bar in figure.axes[0].patches]
        [34.1, 27.5]
    """
    metrics = list(dict.fromkeys(metric for numbers in values.values() for metric in numbers))
    if not metrics:
        raise ValueError("`values` must hold at least one method with one metric; got none.")
    if highlight is not None:
        check_choice("highlight", highlight, values)
    columns = min(len(metrics), 3)
    rows = math.ceil(len(metrics) / columns)
    figure, axes = new_figure(rows, columns, rows * (1.1 + 0.36 * len(values)) + 0.4, title, sharey=True)
    for panel, metric in zip(axes.flat, metrics, strict=False):
        note = ""
        if better and metric in better:
            note = f"\n({check_choice(f'better[{metric!r}]', better[metric], ('higher', 'lower'))} is better)"
        _draw_bars(panel, {method: numbers.get(metric, math.nan) for method, numbers in values.items()}, highlight)
        style_axes(panel, metric + note)
        panel.grid(visible=False, axis="y")
    hide_unused(axes, len(metrics))
    return figure


def _draw_bars(axes: Axes, numbers: Mapping[str, float], highlight: str | None) -> None:
    finite = {method: float(number) if math.isfinite(number) else 0.0 for method, number in numbers.items()}
    colors = [COLORS[0] if highlight in (None, method) else "#9aa4ae" for method in numbers]
    bars = axes.barh(range(len(numbers)), list(finite.values()), height=0.68, color=colors)
    labels = [f"{number:.4g}" if math.isfinite(number) else "n/a" for number in numbers.values()]
    axes.bar_label(bars, labels, padding=3, fontsize=10)
    axes.set_yticks(range(len(numbers)), [plain_text(method) for method in numbers])
    axes.set_ylim(len(numbers) - 0.4, -0.6)
    low, high = min(0.0, *finite.values()), max(0.0, *finite.values())
    room = 0.25 * (high - low or 1.0)  # for the numbers beside the bars
    axes.set_xlim(low - (room if low < 0 else 0), high + room)
