"""From probabilities to a decision."""

from __future__ import annotations

import torch
from torch import Tensor

from monai_deqkan._checks import check_range

__all__ = ["decide"]


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
