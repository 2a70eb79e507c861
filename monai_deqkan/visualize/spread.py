"""Pictures of per-pixel spreads of reconstructions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import erf
from torch import Tensor

from monai_deqkan.metrics.spread_calibration import SpreadCalibration
from monai_deqkan.visualize.learning import COLORS, MUTED, WIDTH, as_image, new_figure, plain_text, style_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_spread_calibration", "plot_spread_map"]


def plot_spread_calibration(
    curves: Mapping[str, SpreadCalibration], *, title: str = "Calibration of the spread"
) -> Figure:
    """Draw which share of the pixels has an error within k spreads, beside the normal law.

    Below the normal law the spread is too small, above it too large.

    Args:
        curves: calibrations by name.
        title: title of the figure.

    Returns:
        Figure, 900 pixels wide at 100 dpi.

    Raises:
        ValueError: if there is no curve.

    Example:
        >>> import torch
        >>> from monai_deqkan.metrics import spread_calibration
        >>> figure = plot_spread_calibration({"test": spread_calibration(torch.randn(99), torch.ones(99))})
        >>> figure.axes[0].get_xlabel()
        'k: number of spreads'
    """
    if not curves:
        raise ValueError("`curves` must hold at least one calibration; got none.")
    figure, axes = new_figure(1, 1, 4.5, title)
    panel = axes[0, 0]
    largest = max(max(curve.factors) for curve in curves.values())
    k = np.linspace(0, largest, 200)
    panel.plot(k, erf(k / np.sqrt(2)), color=MUTED, linewidth=1.5, linestyle="--", label="normal law")
    for index, (name, curve) in enumerate(curves.items()):
        color = COLORS[index % len(COLORS)]
        panel.plot(curve.factors, curve.shares, "o-", markersize=4, color=color, label=plain_text(name))
    pixels = sorted({curve.num_pixels for curve in curves.values()})
    counted = f"{pixels[0]:,}" if len(pixels) == 1 else f"{pixels[0]:,} to {pixels[-1]:,}"
    style_axes(panel, f"{counted} pixels", "k: number of spreads", "share with error within k spreads")
    panel.set(xlim=(0, 1.02 * largest), ylim=(0, 1.02))
    panel.legend(fontsize=9, loc="best")  # curves below the normal law run through the lower right
    return figure


def plot_spread_map(
    image: ArrayLike | Tensor,
    spread: ArrayLike | Tensor,
    error: ArrayLike | Tensor | None = None,
    *,
    title: str = "Reconstruction and its spread",
) -> Figure:
    """Draw a reconstruction beside its spread and, where known, its absolute error on the spread's scale.

    The scale of spread and error ends at the 99.5th percentile of the spread, or of the error if larger.

    Args:
        image: magnitude ``(H, W)``, any unit.
        spread: standard deviation per pixel, same shape and unit.
        error: reconstruction minus reference, likewise.
        title: title of the figure.

    Returns:
        Figure, 900 pixels wide at 100 dpi.

    Raises:
        ValueError: if shapes differ or values are not finite.

    Example:
        >>> figure = plot_spread_map([[0.0, 1.0], [2.0, 4.0]], [[0.0, 0.1], [0.1, 0.2]])
        >>> figure.axes[1].get_title()
        'spread'
    """
    picture = as_image("image", image)
    maps = {"spread": as_image("spread", spread, picture.shape)}
    if error is not None:
        maps["absolute error"] = np.abs(as_image("error", error, picture.shape))
    top = max(float(np.percentile(values, 99.5)) for values in maps.values()) or 1.0
    columns = 1 + len(maps)
    height = WIDTH / columns * min(1.5, picture.shape[0] / picture.shape[1]) + 0.8
    figure, axes = new_figure(1, columns, height, title, layout="compressed")
    axes[0, 0].imshow(picture, cmap="gray", vmin=0, vmax=float(np.percentile(picture, 99.9)) or 1.0)
    axes[0, 0].set_title("reconstruction", fontsize=11)
    for panel, (name, values) in zip(axes[0, 1:], maps.items(), strict=True):
        shown = panel.imshow(values, cmap="inferno", vmin=0, vmax=top)
        panel.set_title(name, fontsize=11)
    for panel in axes.flat:
        panel.set(xticks=[], yticks=[])
    figure.colorbar(shown, ax=axes[0, 1:].tolist(), pad=0.01, label="unit of the image")
    return figure
