"""Figures of classifiers: ROC and precision-recall curves, confusion matrix, example cases."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from monai_deqkan._checks import check_int
from monai_deqkan.metrics.classification import stratified_resamples
from monai_deqkan.visualize.learning import (
    COLORS,
    MUTED,
    as_array,
    as_image,
    check_lengths,
    hide_unused,
    new_figure,
    plain_text,
    style_axes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_confusion_matrix", "plot_image_grid", "plot_precision_recall", "plot_roc"]


def plot_roc(
    labels: ArrayLike | Tensor,
    scores: ArrayLike | Tensor,
    class_names: Sequence[str],
    baselines: Mapping[str, ArrayLike | Tensor] | None = None,
    *,
    num_resamples: int = 0,
    title: str = "ROC curves",
) -> Figure:
    """Draw receiver operating characteristics, with the area under each curve (AUC) in the legend.

    With two classes there is one curve, for class 1; with more, one curve for each class against the rest. Where the
    labels hold one side only, there is no curve, and the legend says that the AUC is undefined.

    Args:
        labels: true classes, integers from 0, shape ``(N,)``.
        scores: the higher, the likelier the class, any unit: shape ``(N, C)``; with two classes also ``(N,)`` or
            ``(N, 1)`` for class 1.
        class_names: ``C`` names.
        baselines: scores of other methods by name, drawn dashed.
        num_resamples: number of resamples of a 95 % confidence band around the curves that are not baselines; 0 for
            none. The band is pointwise, from the bootstrap stratified by class.
        title: title of the figure.

    Returns:
        Figure, 900 pixels wide at 100 dpi.

    Raises:
        ValueError: if lengths do not fit together, labels are no classes, or scores are not finite.

    Example:
        >>> figure = plot_roc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8], ["healthy", "lesion"])
        >>> figure.axes[0].get_legend().get_texts()[0].get_text()
        'model: AUC 0.750'
    """
    truth = _as_classes("labels", labels, class_names)
    methods = {"model": _as_scores("scores", scores, len(truth), len(class_names))}
    for name, baseline in (baselines or {}).items():
        if name in methods:
            raise ValueError(f"A baseline must not be called {name!r}: the legend uses that name. Choose another.")
        methods[name] = _as_scores(f"baselines[{name!r}]", baseline, len(truth), len(class_names))
    check_int("num_resamples", num_resamples, minimum=0)
    figure, axes = new_figure(1, 1, 5.4, title)
    panel = axes[0, 0]
    classes = [1] if len(class_names) == 2 else range(len(class_names))
    for method, table in enumerate(methods):
        for index in classes:
            positive = truth == index
            false_rate, true_rate, area = _roc_curve(positive, methods[table][:, index])
            name = table if len(class_names) == 2 else f"{table}, {class_names[index]}"
            value = "AUC undefined (one class only)" if math.isnan(area) else f"AUC {area:.3f}"
            color = COLORS[(method if len(class_names) == 2 else index) % len(COLORS)]
            style = ("-", "--", ":", "-.")[min(method, 3)]
            panel.plot(false_rate, true_rate, style, color=color, linewidth=2, label=plain_text(f"{name}: {value}"))
            if method == 0 and num_resamples and len(false_rate):
                _draw_band(panel, _roc_steps, positive, methods[table][:, index], num_resamples, color)
    panel.plot([0, 1], [0, 1], color=MUTED, linewidth=1, label="chance: AUC 0.500")
    counts = ", ".join(f"{int((truth == index).sum())} {name}" for index, name in enumerate(class_names))
    what = f"{class_names[1]} against {class_names[0]}" if len(class_names) == 2 else "each class against the rest"
    style_axes(panel, f"{what} ({counts})", "false positive rate (1 - specificity)", "true positive rate (sensitivity)")
    panel.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    panel.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.02, 1.0))
    return figure


def _as_classes(name: str, values: ArrayLike | Tensor, class_names: Sequence[str]) -> np.ndarray:
    classes = as_array(name, values, 1)
    if len(class_names) < 2:
        raise ValueError(f"`class_names` must name at least two classes; got {list(class_names)}.")
    if not np.isin(classes, np.arange(len(class_names))).all():
        raise ValueError(
            f"`{name}` must hold class numbers from 0 to {len(class_names) - 1}, one for each of `class_names`; "
            f"got {np.unique(classes)[:10].tolist()}."
        )
    return classes.astype(int)


def _as_scores(name: str, scores: ArrayLike | Tensor, length: int, num_classes: int) -> np.ndarray:
    """Return scores as ``(N, C)``; those for class 1 alone get a column 0 of no use."""
    table = given = as_array(name, scores, np.ndim(scores))
    if num_classes == 2 and given.shape in ((length,), (length, 1)):
        table = np.stack((-given.reshape(length), given.reshape(length)), axis=1)
    if table.shape != (length, num_classes):
        raise ValueError(
            f"`{name}` must have shape ({length}, {num_classes}), one row per label and one column per class"
            f"{' (or one score per label)' if num_classes == 2 else ''}; got {given.shape}."
        )
    return table


def _roc_curve(positive: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Return false and true positive rates from the strictest threshold on, and the area; empty, NaN if undefined."""
    from sklearn.metrics import auc, roc_curve

    if positive.all() or not positive.any():
        return np.empty(0), np.empty(0), math.nan
    false_rate, true_rate, _ = roc_curve(positive, scores, drop_intermediate=False)
    return false_rate, true_rate, float(auc(false_rate, true_rate))


def _roc_steps(positive: np.ndarray, scores: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Return the true positive rate at the false positive rates of ``grid``."""
    false_rate, true_rate, _ = _roc_curve(positive, scores)
    return np.interp(grid, false_rate, true_rate)


def _precision_steps(positive: np.ndarray, scores: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Return the precision at the recalls of ``grid``: that of the first threshold that reaches each."""
    from sklearn.metrics import precision_recall_curve

    precision, recall, _ = precision_recall_curve(positive, scores)
    return precision[::-1][np.searchsorted(recall[::-1], grid - 1e-12)]


def _draw_band(
    panel: Axes,
    curve: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
    positive: np.ndarray,
    scores: np.ndarray,
    num_resamples: int,
    color: str,
) -> None:
    grid = np.linspace(0, 1, 201)
    draws = [curve(positive[rows], scores[rows], grid) for rows in stratified_resamples(positive, num_resamples)]
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    panel.fill_between(grid, low, high, color=color, alpha=0.18, linewidth=0)


def plot_precision_recall(
    labels: ArrayLike | Tensor,
    scores: ArrayLike | Tensor,
    class_names: Sequence[str],
    *,
    num_resamples: int = 0,
    title: str = "Precision-recall curves",
) -> Figure:
    """Draw precision against recall, with the average precision (AP) in the legend.

    With two classes there is one curve, for class 1; with more, one for each class against the rest. A dotted line
    at the share of each class is what chance would give. A class without an image, or with all of them, has no curve.

    Args:
        labels: true classes, integers from 0, shape ``(N,)``.
        scores: as in :func:`plot_roc`.
        class_names: ``C`` names.
        num_resamples: number of resamples of a pointwise 95 % confidence band; 0 for none.
        title: title of the figure.

    Returns:
        Figure, 900 pixels wide at 100 dpi.

    Raises:
        ValueError: if lengths do not fit together, labels are no classes, or scores are not finite.

    Example:
        >>> figure = plot_precision_recall([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8], ["healthy", "lesion"])
        >>> figure.axes[0].get_legend().get_texts()[0].get_text()
        'lesion: AP 0.833'
    """
    from sklearn.metrics import average_precision_score, precision_recall_curve

    truth = _as_classes("labels", labels, class_names)
    table = _as_scores("scores", scores, len(truth), len(class_names))
    check_int("num_resamples", num_resamples, minimum=0)
    figure, axes = new_figure(1, 1, 5.4, title)
    panel = axes[0, 0]
    for index in [1] if len(class_names) == 2 else range(len(class_names)):
        positive, color = truth == index, COLORS[0 if len(class_names) == 2 else index % len(COLORS)]
        if positive.all() or not positive.any():
            panel.plot([], [], color=color, label=plain_text(f"{class_names[index]}: AP undefined"))
            continue
        precision, recall, _ = precision_recall_curve(positive, table[:, index])
        area = average_precision_score(positive, table[:, index])
        label = plain_text(f"{class_names[index]}: AP {area:.3f}")
        panel.step(recall, precision, where="post", color=color, linewidth=2, label=label)
        panel.axhline(positive.mean(), color=color, linestyle=":", linewidth=1)
        if num_resamples:
            _draw_band(panel, _precision_steps, positive, table[:, index], num_resamples, color)
    style_axes(panel, "dotted: the share of the class, which chance would reach", "recall (sensitivity)", "precision")
    panel.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    panel.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.02, 1.0))
    return figure


def plot_confusion_matrix(
    labels: ArrayLike | Tensor,
    predictions: ArrayLike | Tensor,
    class_names: Sequence[str],
    *,
    title: str = "Confusion matrix",
) -> Figure:
    """Draw how many cases of each true class (rows) were given each class (columns), and the share of the row.

    Args:
        labels: true classes, integers from 0, shape ``(N,)``.
        predictions: predicted classes, shape ``(N,)``.
        class_names: one name for each class.
        title: title of the figure.

    Returns:
        Figure, 900 pixels wide at 100 dpi.

    Raises:
        ValueError: if lengths differ, or an entry is no class.

    Example:
        >>> figure = plot_confusion_matrix([0, 0, 1], [0, 1, 1], ["healthy", "lesion"])
        >>> figure.axes[0].texts[1].get_text().split()
        ['1', '50%']
    """
    truth = _as_classes("labels", labels, class_names)
    guess = _as_classes("predictions", predictions, class_names)
    check_lengths(labels=truth, predictions=guess)
    size = len(class_names)
    counts = np.bincount(truth * size + guess, minlength=size * size).reshape(size, size)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    accuracy = np.trace(counts) / len(truth)
    figure, axes = new_figure(1, 1, min(8.0, 2.6 + 0.8 * size), title)
    panel = axes[0, 0]
    panel.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(size, size):
        text = f"{counts[row, column]}\n{shares[row, column]:.0%}"
        color = "white" if shares[row, column] > 0.55 else "black"
        panel.text(column, row, text, ha="center", va="center", color=color, fontsize=12 if size < 5 else 9)
    names = [plain_text(name) for name in class_names]
    panel.set_xticks(range(size), names, rotation=30 if size > 4 else 0)
    panel.set_yticks(range(size), names)
    panel.set(xlabel="predicted class", ylabel="true class")
    panel.set_title(f"{len(truth)} cases, accuracy {accuracy:.1%}; percentages are of the true class", fontsize=11)
    return figure


def plot_image_grid(
    images: Sequence[ArrayLike | Tensor],
    titles: Sequence[str],
    *,
    correct: Sequence[bool] | None = None,
    columns: int = 4,
    title: str = "Examples",
) -> Figure:
    r"""Draw example cases side by side in grey, each from its darkest to its brightest value.

    Args:
        images: arrays ``(H, W)``, rows from top to bottom, columns from left to right; sizes may differ.
        titles: what stands above each, such as ``"lesion, predicted lesion (0.97)"``; may have several lines.
        correct: whether each prediction is right: gives a blue frame, or an orange one and the word "wrong".
        columns: number of images in one row.
        title: title of the figure.

    Returns:
        Figure, 900 pixels wide at 100 dpi.

    Raises:
        ValueError: if there is no image, numbers of entries differ, or an image is not 2-D and finite.

    Example:
        >>> figure = plot_image_grid([[[0, 1], [2, 3]]], ["lesion"], correct=[False])
        >>> figure.axes[0].get_title()
        'lesion\nwrong'
    """
    check_lengths(images=images, titles=titles)
    if correct is not None:
        check_lengths(images=images, correct=correct)
    columns = min(check_int("columns", columns), len(images))
    arrays = [as_image(f"images[{index}]", image) for index, image in enumerate(images)]
    rows = math.ceil(len(images) / columns)
    tallest = min(1.5, max(array.shape[0] / array.shape[1] for array in arrays))
    lines = 1 + max(text.count("\n") for text in titles) + (correct is not None)
    figure, axes = new_figure(
        rows, columns, rows * (8.6 / max(columns, 2) * tallest + 0.2 * lines) + 0.5, title, layout="compressed"
    )
    for index, (panel, array) in enumerate(zip(axes.flat, arrays, strict=False)):
        _draw_case(panel, array, titles[index], None if correct is None else bool(correct[index]))
    hide_unused(axes, len(images))
    return figure


def _draw_case(axes: Axes, image: np.ndarray, title: str, correct: bool | None) -> None:
    axes.imshow(image, cmap="gray")
    axes.set(xticks=[], yticks=[])
    verdict = {None: "", True: "\nright", False: "\nwrong"}[correct]
    color = {None: "black", True: COLORS[0], False: "#B34700"}[correct]
    axes.set_title(plain_text(title) + verdict, fontsize=10, color=color)
    axes.spines[:].set(color=color, linewidth=1 if correct is None else 3)
