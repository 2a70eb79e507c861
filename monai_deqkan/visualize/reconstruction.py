"""Figures of reconstructed images beside their reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from monai_deqkan.visualize.learning import COLORS, WIDTH, as_image, new_figure, plain_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_reconstruction"]


def plot_reconstruction(
    reference: ArrayLike | Tensor,
    images: Mapping[str, ArrayLike | Tensor],
    scores: Mapping[str, str] | None = None,
    region: tuple[int, int, int, int] | None = None,
    *,
    title: str = "Reconstructions",
) -> Figure:
    r"""Draw reconstructions beside the reference, and below them the absolute errors of their magnitudes.

    All images share one grey scale, from 0 to the 99.9th percentile of the reference. All error maps share another,
    finer by the stated magnification: the largest of 1, 2, 5, 10, 20, 50, 100 at which the 99th percentile of
    the worst map still fits.

    Args:
        reference: image ``(H, W)``, rows from top to bottom, columns from left to right; complex ones are shown by
            their magnitude; any unit.
        images: reconstructions by name, each shaped and scaled as the reference.
        scores: what stands under a name, such as ``{"zero-filled": "27.1 dB, SSIM 0.78"}``.
        region: ``(top, left, height, width)`` in pixels of a part that is framed and shown enlarged in a further row.
        title: title of the figure.

    Returns:
        Figure, 900 pixels wide at 100 dpi.

    Raises:
        ValueError: if there is no image, shapes differ, values are not finite, ``scores`` names no image, or
            ``region`` leaves the image.

    Example:
        >>> reference = [[0.0, 1.0], [2.0, 4.0]]
        >>> figure = plot_reconstruction(reference, {"copy": reference}, {"copy": "SSIM 1.00"})
        >>> figure.axes[1].get_title()
        'copy\nSSIM 1.00'
    """
    truth = np.abs(as_image("reference", reference))
    pictures = {name: np.abs(as_image(f"images[{name!r}]", image, truth.shape)) for name, image in images.items()}
    if not pictures:
        raise ValueError("`images` must hold at least one reconstruction; got none.")
    unknown = sorted(set(scores or {}) - set(pictures))
    if unknown:
        raise ValueError(f"`scores` must use the names in `images`, {list(pictures)}; got {unknown}.")
    top = float(np.percentile(truth, 99.9)) or 1.0
    errors = {name: np.abs(picture - truth) for name, picture in pictures.items()}
    magnification = _magnification(top, errors)
    columns, rows = 1 + len(pictures), 2 + (region is not None)
    height = rows * WIDTH / max(columns + 0.4, 3.0) * min(2.0, truth.shape[0] / truth.shape[1]) + 1.2
    figure, axes = new_figure(rows, columns, height, title, layout="compressed")
    _show(axes[0, 0], truth, top, "Reference")
    _note_scales(axes[1, 0], top, magnification)
    for column, (name, picture) in enumerate(pictures.items(), start=1):
        score = (scores or {}).get(name, "")
        _show(axes[0, column], picture, top, f"{name}\n{score}" if score else name)
        shown = axes[1, column].imshow(errors[name], cmap="inferno", vmin=0, vmax=top / magnification)
        axes[1, column].set(xticks=[], yticks=[])
    figure.colorbar(shown, ax=axes[1, :].tolist(), label="absolute error", pad=0.01)
    if region is not None:
        _show_region(axes, [truth, *pictures.values()], top, region)
    return figure


def _magnification(top: float, errors: Mapping[str, np.ndarray]) -> int:
    worst = max(float(np.percentile(error, 99)) for error in errors.values())
    fitting = [factor for factor in (1, 2, 5, 10, 20, 50, 100) if factor * worst <= top]
    return max(fitting, default=1)


def _show(axes: Axes, image: np.ndarray, top: float, title: str = "") -> None:
    axes.imshow(image, cmap="gray", vmin=0, vmax=top)
    axes.set(xticks=[], yticks=[])
    axes.set_title(plain_text(title), fontsize=10)


def _note_scales(axes: Axes, top: float, magnification: int) -> None:
    """Say in the empty place under the reference what the row shows."""
    lines = (
        "Absolute errors",
        f"magnified {magnification}x",
        "",
        f"images: 0 to {top:.3g}",
        f"errors: 0 to {top / magnification:.3g}",
    )
    axes.text(0.5, 0.5, "\n".join(lines), ha="center", va="center", fontsize=10, transform=axes.transAxes)
    axes.axis("off")


def _show_region(axes: np.ndarray, images: list[np.ndarray], top: float, region: tuple[int, int, int, int]) -> None:
    from matplotlib.patches import Rectangle

    first_row, first_column, height, width = region
    rows, columns = images[0].shape
    inside = 0 <= first_row < first_row + height <= rows and 0 <= first_column < first_column + width <= columns
    if not inside:
        raise ValueError(
            f"`region` must be (top, left, height, width) inside an image of {rows, columns}; got {region}."
        )
    for upper, lower, image in zip(axes[0], axes[2], images, strict=True):
        corner = (first_column - 0.5, first_row - 0.5)
        upper.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=COLORS[4], linewidth=1.5))
        _show(lower, image[first_row : first_row + height, first_column : first_column + width], top)
        lower.spines[:].set(color=COLORS[4], linewidth=1.5)
    axes[2, 0].set_ylabel("enlarged part", fontsize=10)
