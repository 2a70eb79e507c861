"""Which k-space samples are measured: the sampling operator, what is measured in k-space, and how much it is."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from monai_deqkan._checks import check_finite, check_spatial_dims, check_tensor
from monai_deqkan.operators.base import LinearOperator, take_rows

__all__ = ["SamplingOperator", "infer_mask", "net_acceleration"]


class SamplingOperator(LinearOperator):
    """Set the k-space samples that were not measured to zero. Self-adjoint, and its own square.

    Args:
        mask: bool or real, every entry other than zero counts as measured; shape ``(B, K, *space)``, where every
            axis may also have size one (``(1, 1, 1, W)``: one mask of columns for all samples).

    Raises:
        TypeError: if ``mask`` is complex.
        ValueError: if it keeps nothing of a sample, or is not finite.
    """

    def __init__(self, mask: Tensor) -> None:
        if check_tensor("mask", mask).is_complex():
            raise TypeError(f"`mask` must be bool or real; got {mask.dtype}.")
        if mask.dtype != torch.bool:
            check_finite("mask", mask, "NaN would count as measured.")
        self.mask = mask if mask.dtype == torch.bool else mask != 0
        empty = ~self.mask.flatten(1).any(dim=1) if mask.ndim > 1 else ~self.mask.any(dim=0, keepdim=True)
        if bool(empty.any()):
            raise ValueError(
                f"`mask` must keep at least one sample of k-space; samples {empty.nonzero().flatten().tolist()} of its "
                "batch keep none. Draw the mask anew."
            )

    def forward(self, x: Tensor) -> Tensor:
        """Keep the measured samples of k-space ``(B, K, *space)``."""
        self.check(x.shape)
        return x * self.mask

    def check(self, shape: Sequence[int]) -> None:
        """Raise an error if the mask does not fit k-space of a shape."""
        fits = self.mask.ndim == len(shape) and all(m in (1, n) for m, n in zip(self.mask.shape, shape, strict=True))
        if not fits:
            raise ValueError(
                f"`mask` must broadcast to k-space of shape {tuple(shape)}, with as many axes; got "
                f"{tuple(self.mask.shape)}. A mask of columns has shape (B or 1, 1, 1, W) in 2-D."
            )

    def adjoint(self, y: Tensor) -> Tensor:
        """Keep the measured samples of k-space ``(B, K, *space)``."""
        return self.forward(y)

    def take(self, rows: Tensor) -> SamplingOperator:
        """Return the operator of some samples of the batch."""
        part = copy(self)  # not built anew: its samples were checked already
        part.mask = take_rows(self.mask, rows)
        return part


def infer_mask(kspace: Tensor, spatial_dims: int = 2) -> Tensor:
    """Find the measured lines of Cartesian k-space: those with any sample other than zero.

    The first spatial axis is taken as the readout, which is always measured whole; the other one (2-D) or two (3-D) are
    phase encodings. So a mask of points in the plane of a 2-D slice cannot be inferred: give it.

    Args:
        kspace: complex, shape ``(B, K, *space)``, zero where nothing was measured.
        spatial_dims: number of spatial axes, 2 or 3.

    Returns:
        Bool, shape ``(B, 1, 1, W)`` in 2-D and ``(B, 1, 1, W, D)`` in 3-D; all true for fully sampled k-space.

    Raises:
        ValueError: if a sample of the batch is zero everywhere.

    Example:
        >>> kspace = torch.zeros(1, 1, 2, 4, dtype=torch.complex64)
        >>> kspace[..., 2] = 1
        >>> infer_mask(kspace)
        tensor([[[[False, False,  True, False]]]])
    """
    if check_tensor("kspace", kspace).ndim != check_spatial_dims(spatial_dims) + 2:
        raise ValueError(
            f"`kspace` must have shape (B, K, *space) with {spatial_dims} spatial axes; got {tuple(kspace.shape)}. "
            "Single-coil k-space needs a coil axis of size 1."
        )
    mask = (kspace != 0).any(dim=1, keepdim=True).any(dim=2, keepdim=True)
    empty = ~mask.flatten(1).any(dim=1)
    if bool(empty.any()):
        raise ValueError(
            f"`kspace` must hold measured samples; samples {empty.nonzero().flatten().tolist()} of the batch are zero "
            "everywhere. Remove them, or give the mask."
        )
    return mask


def net_acceleration(mask: Tensor) -> float:
    """Return the number of all samples per measured sample of a mask of any shape.

    Raises:
        ValueError: if nothing is measured.
    """
    measured = int((check_tensor("mask", mask) != 0).sum())
    if measured == 0:
        raise ValueError(f"`mask` must measure at least one sample; all {mask.numel()} entries are zero.")
    return mask.numel() / measured
