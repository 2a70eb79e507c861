"""Weights and sampling for classes of unequal size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor
from torch.utils.data import WeightedRandomSampler

from monai_deqkan._checks import check_int

__all__ = ["balanced_sampler", "class_weights", "sample_weights"]


def class_weights(items: Sequence[Mapping[str, Any]], num_classes: int, key: str = "label") -> Tensor:
    r"""Return weights that give every class the same share of a loss.

    .. math:: w_c = \frac{n}{C\, n_c}

    Args:
        items: one dictionary per training image.
        num_classes: number :math:`C` of classes.
        key: key of the class index.

    Returns:
        Weights of shape ``(num_classes,)``, float32, mean 1 over the images.

    Raises:
        ValueError: if a class has no image, or an index lies outside ``[0, num_classes)``.

    Example:
        >>> class_weights([{"label": 0}, {"label": 0}, {"label": 0}, {"label": 1}], 2)
        tensor([0.6667, 2.0000])
    """
    labels = _labels(items, num_classes, key)
    return torch.as_tensor(compute_class_weight("balanced", classes=np.arange(num_classes), y=labels)).float()


def sample_weights(items: Sequence[Mapping[str, Any]], num_classes: int, key: str = "label") -> Tensor:
    """Return the weight of each image's class, float64 ``(len(items),)``, for samplers; see `class_weights`."""
    return class_weights(items, num_classes, key).double()[torch.as_tensor(_labels(items, num_classes, key))]


def balanced_sampler(
    items: Sequence[Mapping[str, Any]], num_classes: int, key: str = "label", generator: torch.Generator | None = None
) -> WeightedRandomSampler:
    """Return a sampler that draws all classes equally often, as many images as there are, with replacement.

    Use it or `class_weights`, not both. Arguments and errors are the same.

    Args:
        items: one dictionary per training image.
        num_classes: number of classes.
        key: key of the class index.
        generator: source of chance; by default torch's own.
    """
    weights = sample_weights(items, num_classes, key).tolist()
    return WeightedRandomSampler(weights, len(weights), generator=generator)


def _labels(items: Sequence[Mapping[str, Any]], num_classes: int, key: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    labels = np.array([int(item[key]) for item in items], dtype=np.int64)
    if labels.size and not (labels.min() >= 0 and labels.max() < check_int("num_classes", num_classes)):
        raise ValueError(f"Labels must lie in [0, {num_classes}); got {labels.min()} to {labels.max()}.")
    counts = np.bincount(labels, minlength=num_classes)
    if not counts.all():
        raise ValueError(
            f"Every class needs an image; there is none of {np.flatnonzero(counts == 0).tolist()}. Add images or drop "
            "the class."
        )
    return labels
