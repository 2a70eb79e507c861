"""How far probabilities can be believed, and how to mend them on a validation part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_softmax, logit
from torch import Tensor

from monai_deqkan._checks import check_int, check_range

__all__ = ["ReliabilityBins", "choose_threshold", "expected_calibration_error", "fit_temperature", "reliability_bins"]


class ReliabilityBins(NamedTuple):
    """Probabilities in bins of equal width; empty bins have NaN.

    Attributes:
        confidence: mean probability of each bin.
        frequency: share of the bin's cases in which what was predicted is true.
        num_cases: number of cases of each bin.
    """

    confidence: NDArray[np.float64]
    frequency: NDArray[np.float64]
    num_cases: NDArray[np.int64]


def labels_and_probabilities(
    labels: ArrayLike | Tensor, probabilities: ArrayLike | Tensor
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return labels ``(N,)`` and probabilities ``(N, C)`` as arrays.

    Raises:
        ValueError: if shapes do not fit together, a label is no class, or a probability is not finite.
    """
    truth, table = _labels_and_table("probabilities", labels, probabilities)
    if (table < 0).any() or (table > 1).any():
        raise ValueError(
            f"`probabilities` must lie in [0, 1]; got {table.min():g} to {table.max():g}. Apply a softmax to logits."
        )
    return truth, table


def _labels_and_table(
    name: str, labels: ArrayLike | Tensor, values: ArrayLike | Tensor
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    truth, table = _as_array(labels), _as_array(values).astype(np.float64)
    if table.ndim != 2 or table.shape[1] < 2 or truth.shape != table.shape[:1] or len(truth) == 0:
        raise ValueError(
            f"`labels` and `{name}` must have shapes (N,) and (N, C) with C >= 2; got {truth.shape} and {table.shape}."
        )
    if not np.isin(truth, np.arange(table.shape[1])).all():
        raise ValueError(
            f"`labels` must be classes from 0 to {table.shape[1] - 1}; got {np.unique(truth)[:10].tolist()}."
        )
    if not np.isfinite(table).all():
        raise ValueError(f"`{name}` must be finite; {int((~np.isfinite(table)).sum())} values are NaN or infinite.")
    return truth.astype(np.int64), table


def _as_array(values: ArrayLike | Tensor) -> NDArray[np.generic]:
    return values.detach().cpu().float().numpy() if isinstance(values, Tensor) else np.asarray(values)


def reliability_bins(
    labels: ArrayLike | Tensor, probabilities: ArrayLike | Tensor, num_bins: int = 10
) -> ReliabilityBins:
    """Sort cases by the probability they were given, and count how often it came true.

    Of two classes it is the probability of the second, which comes true where the second is the label; of more it is
    that of the likeliest class, which comes true where that class is the label.

    Args:
        labels: classes, shape ``(N,)``.
        probabilities: shape ``(N, C)``.
        num_bins: number of bins of equal width in ``[0, 1]``.

    Raises:
        ValueError: for other shapes, labels that are no classes, or values outside ``[0, 1]``.

    Example:
        >>> bins = reliability_bins([0, 1, 1], [[0.8, 0.2], [0.4, 0.6], [0.1, 0.9]], num_bins=2)
        >>> bins.num_cases.tolist(), bins.frequency.tolist()
        ([1, 2], [0.0, 1.0])
    """
    truth, table = labels_and_probabilities(labels, probabilities)
    check_int("num_bins", num_bins)
    chance = table[:, 1] if table.shape[1] == 2 else table.max(axis=1)
    hit = truth == (1 if table.shape[1] == 2 else table.argmax(axis=1))
    index = np.minimum((chance * num_bins).astype(int), num_bins - 1)
    count = np.bincount(index, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(index, chance, num_bins) / count
        frequency = np.bincount(index, hit.astype(float), num_bins) / count
    return ReliabilityBins(confidence, frequency, count)


def expected_calibration_error(
    labels: ArrayLike | Tensor, probabilities: ArrayLike | Tensor, num_bins: int = 15
) -> float:
    r"""Return the expected calibration error, dimensionless, in ``[0, 1]``.

    .. math:: \mathrm{ECE} = \sum_b \frac{n_b}{N} \left| \mathrm{frequency}_b - \mathrm{confidence}_b \right|

    over the bins of :func:`reliability_bins`. It is never negative, so that few images alone make it larger than that
    of the population.

    Args:
        labels: classes, shape ``(N,)``.
        probabilities: shape ``(N, C)``.
        num_bins: number of bins of equal width.

    Reference:
        C. Guo et al., "On calibration of modern neural networks", ICML 2017, eq. 3, who take the likeliest class where
        there are two, too.
    """
    bins = reliability_bins(labels, probabilities, num_bins)
    filled = bins.num_cases > 0
    gaps = np.abs(bins.frequency - bins.confidence)[filled]
    return float((gaps * bins.num_cases[filled]).sum() / bins.num_cases.sum())


def fit_temperature(
    logits: ArrayLike | Tensor,
    labels: ArrayLike | Tensor,
    *,
    bounds: Sequence[float] = (0.25, 4.0),
    prior_spread: float = 0.7,
) -> float:
    r"""Find the temperature :math:`T` by which logits are divided before the softmax.

    It minimizes the negative log-likelihood, summed over images, plus :math:`(\ln T)^2 / (2 s^2)`: a log-normal prior
    around 1, which keeps a handful of images from deciding much and is soon outvoted by more.

    Args:
        logits: shape ``(N, C)``.
        labels: classes, shape ``(N,)``.
        bounds: least and greatest temperature.
        prior_spread: the prior's :math:`s`, dimensionless, above 0; 0.7 is a factor of two.

    Returns:
        The temperature, dimensionless: above 1 where the network was too sure of itself.

    Raises:
        ValueError: for other shapes, labels that are no classes, logits that are not finite, or bounds that do not
            hold 1.

    Reference:
        C. Guo et al., "On calibration of modern neural networks", ICML 2017, section 4.2, which has no prior.
    """
    truth, table = _labels_and_table("logits", labels, logits)
    check_range("prior_spread", prior_spread, 0.0, open_low=True)
    low, high = bounds
    if not 0 < low <= 1 <= high:
        raise ValueError(f"`bounds` must be positive and hold 1 between them; got {tuple(bounds)}.")
    rows = np.arange(len(truth))

    def loss(log_temperature: float) -> float:
        likelihood = log_softmax(table / math.exp(log_temperature), axis=1)[rows, truth]
        return float(-likelihood.sum() + log_temperature**2 / (2 * prior_spread**2))

    found = minimize_scalar(loss, bounds=(math.log(low), math.log(high)), method="bounded", options={"xatol": 1e-6})
    return float(math.exp(found.x))


def choose_threshold(
    labels: ArrayLike | Tensor, probabilities: ArrayLike | Tensor, *, num_standard_errors: float = 1.0
) -> float:
    """Choose the probability of the second of two classes from which on it is to be predicted.

    Of all thresholds whose balanced accuracy (mean of sensitivity and specificity) lies at most a standard error below
    the best one, it is the nearest to 0.5, half-way between two images: what a validation part cannot tell from 0.5 is
    no reason to leave it.

    Args:
        labels: classes 0 and 1, shape ``(N,)``.
        probabilities: shape ``(N, 2)``.
        num_standard_errors: how many standard errors below the best still count as equally good; 0 for the best
            threshold itself.

    Returns:
        The threshold, in ``(0, 1)``; 0.5 where one class has no image.

    Raises:
        ValueError: for other shapes or labels, or values outside ``[0, 1]``.

    Example:
        >>> labels, chance = [0, 0, 0, 1, 1, 1], [0.1, 0.6, 0.7, 0.8, 0.9, 0.9]
        >>> round(choose_threshold(labels, [[1 - p, p] for p in chance], num_standard_errors=0), 3)
        0.753

    Reference:
        The rule of one standard error: L. Breiman, J. H. Friedman, R. A. Olshen and C. J. Stone, "Classification and
        regression trees" (1984), section 3.4.3. Rates are taken as ``(k + 1) / (n + 2)`` in the error, so that a rate
        of 1 in few images does not count as certain.
    """
    truth, table = labels_and_probabilities(labels, probabilities)
    if table.shape[1] != 2:
        raise ValueError(f"A threshold is for two classes; got probabilities of {table.shape[1]}.")
    check_range("num_standard_errors", num_standard_errors, 0.0)
    counts = np.array([(truth == label).sum() for label in (0, 1)])
    if counts.min() == 0:
        return 0.5
    odds = logit(np.clip(table[:, 1], 1e-6, 1 - 1e-6))
    levels = np.unique(odds)
    cuts = (levels[1:] + levels[:-1]) / 2
    # Where 0.5 lies between two images it stands for their gap.
    cuts = np.unique(np.append(cuts[np.searchsorted(levels, cuts) != np.searchsorted(levels, 0.0)], 0.0))
    below = [np.searchsorted(np.sort(odds[truth == label]), cuts) for label in (0, 1)]
    score = below[0] / counts[0] - below[1] / counts[1]  # specificity + sensitivity - 1
    rates = (np.stack(below, axis=1)[score.argmax()] + 1) / (counts + 2)
    error = float(np.sqrt((rates * (1 - rates) / counts).sum()))
    good = cuts[score >= score.max() - num_standard_errors * error - 1e-12]
    return float(expit(good[np.abs(good).argmin()]))
