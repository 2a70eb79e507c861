"""The reliability diagram of a classifier's probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from monai_deqkan.metrics.calibration import expected_calibration_error, reliability_bins
from monai_deqkan.visualize.learning import COLORS, MUTED, new_figure, plain_text, style_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_reliability"]


def plot_reliability(
    labels: ArrayLike | Tensor,
    probabilities: ArrayLike | Tensor,
    class_names: Sequence[str],
    *,
    num_bins: int = 10,
    title: str = "Reliability of the probabilities",
) -> Figure:
    """Draw how often what was predicted with some probability came true, over a histogram of the probabilities.

    Of two classes it is the probability of the second; of more that of the likeliest. Whiskers are 95 % intervals of
    Clopper and Pearson for the images of each bin.

    Args:
        labels: true classes, integers from 0, shape ``(N,)``.
        probabilities: shape ``(N, C)``.
        class_names: ``C`` names.
        num_bins: number of bins of equal width.
        title: title of the figure.

    Returns:
        Figure, 900 pixels wide at 100 dpi.

    Raises:
        ValueError: for other shapes, labels that are no classes, or values outside ``[0, 1]``.

    Example:
        >>> figure = plot_reliability([0, 1], [[0.9, 0.1], [0.2, 0.8]], ["healthy", "lesion"])
        >>> figure.axes[0].get_title()
        '2 images, expected calibration error 0.150'
    """
    from scipy.stats import beta

    bins = reliability_bins(labels, probabilities, num_bins)
    error = expected_calibration_error(labels, probabilities)
    figure, axes = new_figure(2, 1, 6.4, title, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
    panel, histogram = axes[:, 0]
    filled = bins.num_cases > 0
    count, frequency = bins.num_cases[filled], bins.frequency[filled]
    hits = np.round(count * frequency)
    low = np.where(hits > 0, beta.ppf(0.025, np.maximum(hits, 1), count - hits + 1), 0.0)
    high = np.where(hits < count, beta.ppf(0.975, hits + 1, np.maximum(count - hits, 1)), 1.0)
    panel.plot([0, 1], [0, 1], color=MUTED, linewidth=1, label="perfect calibration")
    panel.errorbar(
        bins.confidence[filled],
        frequency,
        yerr=np.maximum([frequency - low, high - frequency], 0),
        fmt="o-",
        color=COLORS[0],
        capsize=3,
        label="model, 95 % interval of each bin",
    )
    two = len(class_names) == 2
    chance = f"probability of {class_names[1]}" if two else "probability of the predicted class"
    came_true = f"share that is {class_names[1]}" if two else "share predicted rightly"
    style_axes(panel, f"{bins.num_cases.sum()} images, expected calibration error {error:.3f}", "", came_true)
    panel.set(xlim=(-0.01, 1.01), ylim=(-0.02, 1.02))
    panel.legend(fontsize=9, loc="upper left")
    edges = np.linspace(0, 1, num_bins + 1)
    bars = histogram.bar(edges[:-1], bins.num_cases, 1 / num_bins, align="edge", color="#9aa4ae", edgecolor="white")
    histogram.bar_label(bars, [str(n) if n else "" for n in bins.num_cases], fontsize=8)
    style_axes(histogram, "", plain_text(chance), "images")
    histogram.margins(y=0.25)
    return figure
