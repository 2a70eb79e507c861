"""Trivial rivals: what a bundle must beat to be worth its training."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from monai.metrics import compute_dice
from monai.networks.utils import one_hot
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from monai_deqkan.metrics import psnr
from monai_deqkan.operators import FourierOperator
from monai_deqkan.variational import cg_sense_path

__all__ = ["best_cg_sense", "fit_thresholds", "linear_model", "mean_dice", "threshold", "zero_filled"]


def linear_model(train: Sequence[dict[str, Any]], test: Sequence[dict[str, Any]]) -> NDArray[np.float64]:
    """Fit a logistic regression on 16 x 16 pixels; return the test images' class probabilities ``(N, C)``.

    Args:
        train: items with ``image`` ``(C, H, W)`` and ``label``.
        test: items with ``image``.
    """

    def pixels(items: Sequence[dict[str, Any]]) -> NDArray[np.float64]:
        images = [torch.as_tensor(item["image"])[None] for item in items]
        small = [torch.nn.functional.adaptive_avg_pool2d(image, 16).flatten() for image in images]
        return torch.stack(small).double().numpy()

    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
    model.fit(pixels(train), [int(item["label"]) for item in train])
    return model.predict_proba(pixels(test))


def threshold(image: Tensor, levels: Sequence[float]) -> Tensor:
    """Return the class of each pixel, the number of levels that it reaches, for an image ``(1, H, W)``."""
    return torch.bucketize(torch.as_tensor(image).contiguous(), torch.tensor(levels), right=True)


def mean_dice(prediction: Tensor, label: Tensor, num_classes: int) -> float:
    """Return the mean Dice over the foreground classes that are there, of masks ``(1, H, W)``."""
    masks = [one_hot(torch.as_tensor(mask)[None].long(), num_classes) for mask in (prediction, label)]
    return float(compute_dice(masks[0], masks[1], include_background=False).nanmean())


def fit_thresholds(images: Sequence[Tensor], labels: Sequence[Tensor], num_classes: int) -> list[float]:
    """Find the intensity thresholds of the best mean Dice, class by class in order of brightness.

    Coordinate ascent over 60 quantiles, from equal shares, until nothing improves: the best that intensities alone can
    do when brighter means a higher class.
    """
    every = torch.cat([torch.as_tensor(image).flatten() for image in images])
    grid = np.unique(np.quantile(every.numpy(), np.linspace(0, 1, 62)[1:-1]))
    truth = torch.cat([torch.as_tensor(label).flatten() for label in labels]).long()
    chosen = [int(i) for i in np.linspace(0, len(grid) - 1, num_classes + 1)[1:-1]]

    def score(indices: Sequence[int]) -> float:
        if any(right <= left for left, right in pairwise(indices)):
            return -1.0
        return mean_dice(threshold(every[None], [float(grid[i]) for i in indices]), truth[None], num_classes)

    best, improved = score(chosen), True
    while improved:
        improved = False
        for position in range(len(chosen)):
            for candidate in range(len(grid)):
                trial = [*chosen[:position], candidate, *chosen[position + 1 :]]
                value = score(trial)
                if value > best:
                    best, chosen, improved = value, trial, True
    return [float(grid[i]) for i in chosen]


def zero_filled(kspace: Tensor) -> Tensor:
    """Return the root sum of squares of zero-filled coil images: ``(B, K, H, W)`` to ``(B, 1, H, W)``."""
    return FourierOperator(2).adjoint(kspace).abs().square().sum(1, keepdim=True).sqrt()


def best_cg_sense(
    kspace: Tensor, mask: Tensor, sensitivity_maps: Tensor, reference: Tensor, max_iter: int = 30
) -> tuple[Tensor, Tensor, Tensor]:
    """Return CG-SENSE at the iteration that is best against the reference: images, their PSNR, and the iteration.

    Shapes ``(B, 1, H, W)``, ``(B,)``, ``(B,)``. The choice looks at the reference: no one could do better by stopping.
    """
    images, scores = [], []
    for image in cg_sense_path(kspace, mask, sensitivity_maps, max_iter=max_iter):
        images.append(image.abs()[:, None])
        scores.append(psnr(images[-1], reference))
    best = torch.stack(scores).argmax(dim=0)
    rows = torch.arange(len(kspace))
    return torch.stack(images)[best, rows], torch.stack(scores)[best, rows], best + 1
