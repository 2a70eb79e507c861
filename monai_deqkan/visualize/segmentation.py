"""Figures of segmentations over their images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from monai_deqkan.visualize.learning import COLORS, as_image, check_lengths, new_figure, plain_text

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_segmentation"]


def plot_segmentation(
    images: Sequence[ArrayLike | Tensor],
    masks: Sequence[ArrayLike | Tensor],
    predictions: Sequence[ArrayLike | Tensor],
    class_names: Sequence[str],
    titles: Sequence[str] | None = None,
    *,
    opacity: float = 0.5,
    outlines: bool = False,
    title: str = "Segmentations",
) -> Figure:
    """Draw one row for each case: the image, the reference over it, the prediction over it.

    Args:
        images: arrays ``(H, W)``, rows from top to bottom, columns from left to right, shown from their darkest to
            their brightest value.
        masks: reference class of each pixel, ``(H, W)``, integers from 0; class 0 is the background.
        predictions: predicted class of each pixel, as ``masks``.
        class_names: name of each class, the background's first.
        titles: what stands above each prediction, such as ``"mean Dice 0.91"``.
        opacity: of the class colors, in ``[0, 1]``.
        outlines: draw the reference's outlines over the first panel too, solid, and the prediction's, dashed.
        title: title of the figure.

    Returns:
        Figure, 900 pixels wide at 100 dpi.

    Raises:
        ValueError: if there is no case, numbers of entries or shapes differ, or a pixel has no class.

    Example:
        >>> figure = plot_segmentation([[[0.0, 1.0]]], [[[0, 1]]], [[[0, 0]]], ["background", "lung"], ["Dice 0.00"])
        >>> figure.axes[2].get_title()
        'Prediction: Dice 0.00'
    """
    check_lengths(images=images, masks=masks, predictions=predictions)
    if titles is not None:
        check_lengths(images=images, titles=titles)
    if len(class_names) < 2:
        raise ValueError(f"`class_names` must name the background and at least one class; got {list(class_names)}.")
    pictures = [as_image(f"images[{index}]", image) for index, image in enumerate(images)]
    row_height = 2.95 * min(1.5, max(picture.shape[0] / picture.shape[1] for picture in pictures))
    figure, axes = new_figure(len(images), 3, len(images) * (row_height + 0.3) + 0.9, title, layout="compressed")
    for index, picture in enumerate(pictures):
        reference = _as_mask(f"masks[{index}]", masks[index], picture.shape, len(class_names))
        prediction = _as_mask(f"predictions[{index}]", predictions[index], picture.shape, len(class_names))
        image_panel, reference_panel, prediction_panel = axes[index]
        _draw_overlay(image_panel, "Outlines" if outlines else f"Image {index + 1}", picture, None, opacity)
        if outlines:
            _draw_outlines(image_panel, reference, "solid")
            _draw_outlines(image_panel, prediction, "dashed")
        _draw_overlay(reference_panel, "Reference", picture, reference, opacity)
        note = "" if titles is None else f": {titles[index]}"
        _draw_overlay(prediction_panel, f"Prediction{note}", picture, prediction, opacity)
    _add_class_legend(figure, class_names, outlines)
    return figure


def class_color(index: int) -> str:
    """Return the color of a foreground class, counted from 1; colors repeat after seven."""
    order = (4, 5, 2, 3, 1, 0, 6)  # light ones first: they show best over grey images
    return COLORS[order[(index - 1) % len(order)]]


def _as_mask(name: str, value: ArrayLike | Tensor, shape: tuple[int, ...], num_classes: int) -> np.ndarray:
    mask = as_image(name, value, shape)
    if not np.isin(mask, np.arange(num_classes)).all():
        raise ValueError(
            f"`{name}` must hold class numbers from 0 to {num_classes - 1}, one for each of `class_names`; "
            f"got {np.unique(mask)[:10].tolist()}."
        )
    return mask.astype(int)


def _draw_overlay(axes: Axes, title: str, image: np.ndarray, mask: np.ndarray | None, opacity: float) -> None:
    from matplotlib.colors import to_rgba

    axes.imshow(image, cmap="gray")
    if mask is not None:
        classes = range(1, int(mask.max()) + 1)
        table = np.array([(0.0, 0.0, 0.0, 0.0), *(to_rgba(class_color(index), opacity) for index in classes)])
        axes.imshow(table[mask], interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.set_title(plain_text(title), fontsize=10)
    axes.spines[:].set_visible(False)


def _draw_outlines(axes: Axes, mask: np.ndarray, style: str) -> None:
    for index in np.unique(mask[mask > 0]).tolist():
        # A frame of background closes outlines at the image's border.
        inside = np.pad(mask == index, 1).astype(float)
        rows, columns = (np.arange(size) - 1 for size in inside.shape)
        axes.contour(columns, rows, inside, levels=[0.5], colors=[class_color(index)], linestyles=style, linewidths=1.2)


def _add_class_legend(figure: Figure, class_names: Sequence[str], outlines: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Artist] = [Patch(color=class_color(index)) for index in range(1, len(class_names))]
    names = [plain_text(name) for name in class_names[1:]]
    if outlines:
        handles += [Line2D([], [], color="black", linestyle=style) for style in ("solid", "dashed")]
        names += ["reference's outline", "prediction's outline"]
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 6), fontsize=10, frameon=False)
