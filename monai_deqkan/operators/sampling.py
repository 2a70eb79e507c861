"""Which k-space samples are measured: the sampling operator, and Cartesian masks."""

from __future__ import annotations

import torch
from torch import Tensor

from monai_deqkan._checks import check_int, check_range, check_spatial_dims, check_tensor
from monai_deqkan.operators.base import LinearOperator, take_rows

__all__ = ["SamplingOperator", "equispaced_mask", "infer_mask", "net_acceleration", "random_mask"]


class SamplingOperator(LinearOperator):
    """Set the k-space samples that were not measured to zero. Self-adjoint, and its own square.

    Args:
        mask: bool or real, every entry other than zero counts as measured; shape ``(B, K, *space)``, where every
            axis may also have size one (``(1, 1, 1, W)``: one mask of columns for all samples).
    """

    def __init__(self, mask: Tensor) -> None:
        if check_tensor("mask", mask).is_complex():
            raise TypeError(f"`mask` must be bool or real; got {mask.dtype}.")
        self.mask = mask if mask.dtype == torch.bool else mask != 0

    def forward(self, x: Tensor) -> Tensor:
        """Keep the measured samples of k-space ``(B, K, *space)``."""
        fits = self.mask.ndim == x.ndim and all(m in (1, n) for m, n in zip(self.mask.shape, x.shape, strict=True))
        if not fits:
            raise ValueError(
                f"`mask` must broadcast to k-space of shape {tuple(x.shape)}, with as many axes; got "
                f"{tuple(self.mask.shape)}. A mask of columns has shape (B or 1, 1, 1, W) in 2-D."
            )
        return x * self.mask

    def adjoint(self, y: Tensor) -> Tensor:
        """Keep the measured samples of k-space ``(B, K, *space)``."""
        return self.forward(y)

    def take(self, rows: Tensor) -> SamplingOperator:
        """Return the operator of some samples of the batch."""
        return SamplingOperator(take_rows(self.mask, rows))


def infer_mask(kspace: Tensor, spatial_dims: int = 2) -> Tensor:
    """Find the measured lines of Cartesian k-space: those with any sample other than zero.

    The first spatial axis is taken as the readout, which is always measured whole; the other one (2-D) or two (3-D) are
    phase encodings.

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


def random_mask(
    num_lines: int,
    acceleration: float = 4.0,
    center_fraction: float = 0.08,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a Cartesian mask of a full centre and uniformly random outer lines.

    The number of lines is ``round(num_lines / acceleration)`` in every draw, so the net acceleration is the nominal one
    (fastMRI's random mask meets it only on average).

    Args:
        num_lines: number of phase-encoding lines.
        acceleration: lines per measured line, at least 1, dimensionless; the centre counts as measured.
        center_fraction: share of all lines that form the fully sampled centre, in ``(0, 1]``.
        generator: source of randomness; None uses torch's global one.

    Returns:
        Bool, shape ``(num_lines,)``.

    Raises:
        ValueError: if the centre alone has more lines than the acceleration allows.

    Example:
        >>> int(random_mask(160, acceleration=4, center_fraction=0.08).sum())
        40
    """
    mask, num_outer = _center_mask(num_lines, acceleration, center_fraction)
    outer = (~mask).nonzero().flatten()
    mask[outer[torch.randperm(len(outer), generator=generator)[:num_outer]]] = True
    return mask


def equispaced_mask(
    num_lines: int,
    acceleration: float = 4.0,
    center_fraction: float = 0.08,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a Cartesian mask of a full centre and evenly spaced outer lines with a random offset.

    The number of lines is ``round(num_lines / acceleration)``, centre included: the spacing outside is widened to pay
    for the centre, and rounded to whole lines. (fastMRI's mask keeps the nominal spacing: its nominal 4 is a net 3.3.)

    Args:
        num_lines: number of phase-encoding lines.
        acceleration: lines per measured line, at least 1, dimensionless; the centre counts as measured.
        center_fraction: share of all lines that form the fully sampled centre, in ``(0, 1]``.
        generator: source of the offset; None uses torch's global one.

    Returns:
        Bool, shape ``(num_lines,)``.

    Raises:
        ValueError: if the centre alone has more lines than the acceleration allows.

    Example:
        >>> net_acceleration(equispaced_mask(320, acceleration=8, center_fraction=0.04))
        8.0
    """
    mask, num_outer = _center_mask(num_lines, acceleration, center_fraction)
    outer = (~mask).nonzero().flatten()
    if num_outer > 0:
        offset = torch.rand(1, generator=generator, dtype=torch.float64)
        positions = (torch.arange(num_outer, dtype=torch.float64) + offset) * (len(outer) / num_outer)
        mask[outer[positions.long()]] = True
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


def _center_mask(num_lines: int, acceleration: float, center_fraction: float) -> tuple[Tensor, int]:
    """Return a mask of the centre lines, and how many more the acceleration allows."""
    check_int("num_lines", num_lines)
    check_range("acceleration", acceleration, 1.0)
    check_range("center_fraction", center_fraction, 0.0, 1.0, open_low=True)
    num_center = max(round(num_lines * center_fraction), 1)
    num_outer = round(num_lines / acceleration) - num_center
    if num_outer < 0:
        raise ValueError(
            f"`center_fraction` {center_fraction:g} of {num_lines} lines is {num_center} lines, more than the "
            f"{num_lines / acceleration:.1f} that `acceleration` {acceleration:g} allows. Lower one of the two."
        )
    mask = torch.zeros(num_lines, dtype=torch.bool)
    start = num_lines // 2 - num_center // 2
    mask[start : start + num_center] = True
    return mask, num_outer
