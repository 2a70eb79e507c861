"""The one place that knows how complex numbers are laid out as real channels: real part first, then imaginary."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["as_complex", "channels_to_complex", "complex_to_channels"]


def complex_to_channels(image: Tensor) -> Tensor:
    """Turn a complex image ``(B, *space)`` into two real channels ``(B, 2, *space)``: real, imaginary."""
    return torch.stack((image.real, image.imag), dim=1)


def channels_to_complex(image: Tensor) -> Tensor:
    """Turn two real channels ``(B, 2, *space)`` into a complex image ``(B, *space)``; bfloat16 into complex64.

    Raises:
        ValueError: if axis 1 does not have two channels.
    """
    if image.ndim < 2 or image.shape[1] != 2:
        raise ValueError(f"A complex image as channels must have shape (B, 2, *space); got {tuple(image.shape)}.")
    if image.dtype == torch.bfloat16:  # which has no complex form
        image = image.float()
    return torch.complex(image[:, 0].contiguous(), image[:, 1].contiguous())


def as_complex(data: Tensor, name: str = "kspace") -> Tensor:
    """Return complex data as it is, and real data with a last axis of two as complex.

    Raises:
        ValueError: if the data are real and their last axis does not have two entries.
    """
    if data.is_complex():
        return data
    if data.ndim < 1 or data.shape[-1] != 2:
        raise ValueError(
            f"`{name}` must be complex, or real with a last axis of 2 (real, imaginary); got {data.dtype} of shape "
            f"{tuple(data.shape)}."
        )
    return torch.view_as_complex(data.contiguous())
