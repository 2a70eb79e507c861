"""From probabilities to decisions, and how good both are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from monai_deqkan._checks import check_int, check_range
from monai_deqkan.metrics.calibration import expected_calibration_error, labels_and_probabilities

__all__ = ["Interval", "bootstrap_intervals", "classification_scores", "decide", "stratified_resamples"]


class Interval(NamedTuple):
    """A number with its confidence interval.

    Attributes:
        value: the number itself.
        low: lower end.
        high: upper end.
    """

    value: float
    low: float
    high: float


def decide(probabilities: Tensor, threshold: float = 0.5) -> Tensor:
    """Turn class probabilities into a one-hot decision.

    Args:
        probabilities: shape ``(C,)``.
        threshold: of two classes, the second is chosen where its probability is at least this, in ``[0, 1]``; with more
            classes the likeliest is.

    Returns:
        Shape ``(C,)``, zeros and a one, of the dtype of ``probabilities``.

    Raises:
        ValueError: if ``threshold`` lies outside ``[0, 1]`` or ``probabilities`` has another rank.

    Example:
        >>> decide(torch.tensor([0.7, 0.3]), threshold=0.2)
        tensor([0., 1.])
    """
    check_range("threshold", threshold, 0.0, 1.0)
    if probabilities.ndim != 1 or probabilities.numel() < 2:
        raise ValueError(f"`probabilities` must have shape (C,) with C >= 2; got {tuple(probabilities.shape)}.")
    chosen = int(probabilities[1] >= threshold) if probabilities.numel() == 2 else int(probabilities.argmax())
    decision = torch.zeros_like(probabilities)
    decision[chosen] = 1
    return decision


def classification_scores(
    labels: ArrayLike | Tensor, probabilities: ArrayLike | Tensor, threshold: float = 0.5
) -> dict[str, float]:
    """Score the probabilities of a classifier and its decisions.

    Of two classes the second is the positive one. With more, ``auc``, ``average_precision``, ``sensitivity``,
    ``specificity`` and ``f1`` are means over the classes, each against the rest; so ``sensitivity`` is then the
    balanced accuracy. What is undefined of a class does not enter a mean: areas and specificity where it has all
    images, areas and sensitivity where it has none; its F1 score is then 0 if it was predicted.

    Args:
        labels: classes, shape ``(N,)``.
        probabilities: shape ``(N, C)``.
        threshold: of two classes, the second is predicted where its probability is at least this.

    Returns:
        ``accuracy``, ``balanced_accuracy``, ``auc`` (area under the ROC curve), ``average_precision``,
        ``sensitivity``, ``specificity``, ``f1`` and ``ece`` (expected calibration error in 15 bins), all dimensionless
        in ``[0, 1]``; NaN where undefined.

    Raises:
        ValueError: for other shapes, labels that are no classes, or values outside ``[0, 1]``.

    Example:
        >>> scores = classification_scores([0, 0, 1, 1], [[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.2, 0.8]])
        >>> scores["auc"], scores["accuracy"], scores["sensitivity"], scores["specificity"]
        (0.75, 0.75, 0.5, 1.0)
    """
    truth, table = labels_and_probabilities(labels, probabilities)
    check_range("threshold", threshold, 0.0, 1.0)
    size = table.shape[1]
    guess = (table[:, 1] >= threshold).astype(int) if size == 2 else table.argmax(axis=1)
    counts = np.bincount(truth * size + guess, minlength=size * size).reshape(size, size)  # rows are true classes
    hits, actual, predicted = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
    total = len(truth)
    with np.errstate(invalid="ignore"):
        recall = hits / actual
        specificity = (total - actual - predicted + hits) / (total - actual)
        f1 = 2 * hits / (actual + predicted)
    classes = np.array([1]) if size == 2 else np.arange(size)
    areas = [_areas(truth == c, table[:, c]) for c in classes if 0 < actual[c] < total]
    return {
        "accuracy": float(hits.sum() / total),
        "balanced_accuracy": _mean(recall),
        "auc": _mean([auc for auc, _ in areas]),
        "average_precision": _mean([precision for _, precision in areas]),
        "sensitivity": _mean(recall[classes]),
        "specificity": _mean(specificity[classes]),
        "f1": _mean(f1[classes]),
        "ece": expected_calibration_error(truth, table),
    }


def _areas(positive: NDArray[np.bool_], scores: NDArray[np.float64]) -> tuple[float, float]:
    """Return AUC and average precision, equal scores as one step.

    As scikit-learn's, without its checks of arguments, which take nine tenths of a bootstrap's time.
    """
    order = np.argsort(-scores, kind="stable")
    last_of_tie = np.append(np.diff(scores[order]) != 0, True)
    true = np.append(0, np.cumsum(positive[order])[last_of_tie])
    chosen = np.append(0, np.flatnonzero(last_of_tie) + 1)
    gained, false = np.diff(true), chosen - true
    auc = (np.diff(false) * (true[1:] + true[:-1])).sum() / (2 * true[-1] * false[-1])
    return float(auc), float((gained * true[1:] / chosen[1:]).sum() / true[-1])


def _mean(values: ArrayLike) -> float:
    """Return the mean of what is defined."""
    array = np.asarray(values, dtype=float)
    array = array[np.isfinite(array)]
    return float(array.mean()) if array.size else math.nan


def stratified_resamples(labels: ArrayLike | Tensor, num_resamples: int, seed: int = 0) -> list[NDArray[np.int64]]:
    """Draw index lists with replacement that hold as many cases of each class as there are.

    Args:
        labels: classes, shape ``(N,)``.
        num_resamples: number of lists.
        seed: the same seed gives the same lists.
    """
    truth = np.asarray(labels)
    groups = [np.flatnonzero(truth == label) for label in np.unique(truth)]
    generator = np.random.default_rng(seed)
    return [np.concatenate([generator.choice(group, len(group)) for group in groups]) for _ in range(num_resamples)]


def bootstrap_intervals(
    scores: Callable[[NDArray[np.int64], NDArray[np.float64]], Mapping[str, float]],
    labels: ArrayLike | Tensor,
    probabilities: ArrayLike | Tensor,
    *,
    num_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Give scores their confidence intervals by the percentile bootstrap, stratified by class.

    The intervals say how much the scores depend on which images were in the data, those of one class exchanged for each
    other; nothing about other hospitals. With a dozen images of a class or fewer they are too narrow, and that
    of the calibration error is shifted upwards, as the error itself is with few images.

    Args:
        scores: function from labels ``(N,)`` and probabilities ``(N, C)`` to numbers by name.
        labels: classes, shape ``(N,)``.
        probabilities: shape ``(N, C)``.
        num_resamples: number of resamples.
        level: share of resamples inside each interval, in ``(0, 1)``.
        seed: the same seed gives the same intervals.

    Returns:
        For each name the number and its interval; resamples in which it is NaN are left out.

    Raises:
        ValueError: for other shapes, labels that are no classes, or values outside ``[0, 1]``.

    Example:
        >>> found = bootstrap_intervals(classification_scores, [0, 0, 1, 1], [[1, 0], [0.8, 0.2], [0.4, 0.6], [0, 1]])
        >>> found["auc"]
        Interval(value=1.0, low=1.0, high=1.0)
    """
    truth, table = labels_and_probabilities(labels, probabilities)
    check_int("num_resamples", num_resamples)
    check_range("level", level, 0.0, 1.0, open_low=True, open_high=True)
    values = scores(truth, table)
    draws = [scores(truth[rows], table[rows]) for rows in stratified_resamples(truth, num_resamples, seed)]
    intervals = {}
    for name, value in values.items():
        drawn = np.array([draw[name] for draw in draws], dtype=float)
        drawn = drawn[np.isfinite(drawn)]
        ends = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2]) if drawn.size else (math.nan, math.nan)
        intervals[name] = Interval(float(value), float(ends[0]), float(ends[1]))
    return intervals
