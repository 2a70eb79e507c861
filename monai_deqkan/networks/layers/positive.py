"""Positive parameters that learn by factors."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["positive", "raw_of_positive"]

# A step of Adam moves each parameter by about the learning rate, which is small for the sake of kernels. Positive
# numbers should be free to change by factors.
_SPEED = 10.0
_LOG_LIMIT = 20.0  # numbers stay within 2e-9 and 5e8


def positive(raw: Tensor) -> Tensor:
    """Return the positive numbers of a parameter, finite whatever its optimizer did."""
    return (_SPEED * raw).clamp(-_LOG_LIMIT, _LOG_LIMIT).exp()


def raw_of_positive(value: float | Tensor) -> Tensor:
    """Return the raw parameter whose `positive` is the value."""
    return torch.as_tensor(value, dtype=torch.get_default_dtype()).log() / _SPEED
