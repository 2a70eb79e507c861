"""Figures of how equilibrium solves converge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from monai_deqkan._checks import check_range
from monai_deqkan.visualize.learning import COLORS, new_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_residuals"]


def plot_residuals(
    histories: Sequence[ArrayLike | Tensor],
    rtol: float | None = None,
    *,
    title: str = "Convergence of the equilibrium solves",
) -> Figure:
    """Draw the relative residual of each sample against the number of evaluations, and the median of all samples.

    In the median, a sample that has stopped keeps its last residual. NaN and infinity leave gaps and are counted in
    the legend; a residual of zero falls off the lower end of the logarithmic axis.

    Args:
        histories: relative residuals (dimensionless) of each sample, one per evaluation from the first on; the
            lengths may differ.
        rtol: relative tolerance, drawn as a line.
        title: title of the figure.

    Returns:
        Figure, 900 pixels wide at 100 dpi.

    Raises:
        ValueError: if there is no sample, one is empty or not 1-D, a residual is negative, or ``rtol`` not positive.

    Example:
        >>> figure = plot_residuals([[1.0, 0.1, 0.01], [1.0, 0.2]], rtol=0.05)
        >>> figure.axes[0].get_yscale()
        'log'
    """
    from matplotlib.ticker import MaxNLocator

    samples = [_as_history(index, history) for index, history in enumerate(histories)]
    if not samples:
        raise ValueError("`histories` must hold at least one sample; got none. Record the solves first.")
    figure, axes = new_figure(1, 1, 4.2, title)
    panel = axes[0, 0]
    fade = min(0.9, max(0.2, 12 / len(samples)))
    for index, sample in enumerate(samples):
        label = f"one line per sample (n = {len(samples)})" if index == 0 else None
        panel.plot(_evaluations(sample), sample, color=COLORS[5], alpha=fade, linewidth=1.0, label=label)
    median = _median(samples)
    panel.plot(_evaluations(median), median, color=COLORS[0], linewidth=2.6, marker="o", markersize=4, label="median")
    if rtol is not None:
        rtol = check_range("rtol", rtol, 0.0, open_low=True)
        panel.axhline(rtol, color=COLORS[1], linestyle="--", linewidth=1.6, label=f"tolerance (rtol = {rtol:g})")
    broken = sum(bool(np.isnan(sample).any()) for sample in samples)
    if broken:
        panel.plot([], [], linestyle="", label=f"{broken} with non-finite residuals")
    style_axes(panel, "", "evaluations of the cell", "relative residual")
    if any((sample > 0).any() for sample in samples):
        panel.set_yscale("log", nonpositive="clip")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.legend(fontsize=9)
    return figure


def _as_history(index: int, history: ArrayLike | Tensor) -> np.ndarray:
    values = history.detach().cpu().double().numpy() if isinstance(history, Tensor) else history
    array = np.array(values, dtype=float)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"`histories[{index}]` must be 1-D with at least one residual; got shape {array.shape}.")
    if (array < 0).any():
        raise ValueError(f"`histories[{index}]` must hold residuals of at least 0; got {array.min():g}.")
    array[~np.isfinite(array)] = np.nan
    return array


def _evaluations(residuals: np.ndarray) -> np.ndarray:
    return np.arange(1, len(residuals) + 1)


def _median(samples: Sequence[np.ndarray]) -> np.ndarray:
    """Return the median of the finite residuals at each evaluation; NaN where there is none."""
    longest = max(map(len, samples))
    table = np.stack([np.pad(sample, (0, longest - len(sample)), mode="edge") for sample in samples])
    columns = [column[np.isfinite(column)] for column in table.T]
    return np.array([np.median(column) if column.size else np.nan for column in columns])
