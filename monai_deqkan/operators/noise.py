"""What can be told of the noise in measured k-space, and other samplings that it could have had."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from monai_deqkan._checks import check_range
from monai_deqkan.operators.sampling import infer_mask
from monai_deqkan.operators.sensitivity import center_widths, check_coil_kspace

__all__ = ["drop_lines", "estimate_noise_level"]

_RAYLEIGH_MEDIAN = math.sqrt(2 * math.log(2))  # of |n|, in standard deviations of the real part


def estimate_noise_level(
    kspace: Tensor, mask: Tensor | None = None, *, outer_share: float = 0.2, spatial_dims: int = 2
) -> Tensor:
    r"""Estimate the noise in each coil's k-space from its outermost measured samples.

    .. math:: \sigma = \frac{\mathrm{median}\, |y|}{\sqrt{2 \ln 2}},

    which is exact for samples of white complex Gaussian noise alone, and hardly moved by a few bright ones. What there
    is of the image in the outer k-space is taken for noise: the estimate is too high for sharp or clean images. Samples
    that are zero (padding, partial Fourier) are left out.

    Args:
        kspace: complex, centred, shape ``(B, K, *space)``.
        mask: where it was measured, any axis of size one; None takes all samples that are not zero.
        outer_share: share of the measured samples that is looked at, those farthest from the centre, in ``(0, 1]``;
            distances count in half matrices.
        spatial_dims: number of spatial axes, 2 or 3.

    Returns:
        Standard deviation :math:`\sigma` of the real and of the imaginary part, in the unit of ``kspace``, shape
        ``(B, K)``; 0 for a coil without samples. With an orthonormal transform it is that of each coil image, too.

    Raises:
        ValueError: if k-space is no finite complex tensor of that shape, or the share is out of range.

    Example:
        >>> noise = torch.randn(1, 1, 256, 256, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
        >>> f"{float(estimate_noise_level(3 * 2**0.5 * noise)):.1f}"  # torch's complex noise has E|n|^2 = 1
        '3.0'
    """
    check_coil_kspace(kspace, spatial_dims)
    check_range("outer_share", outer_share, 0.0, 1.0, open_low=True)
    axes = [(torch.arange(n, device=kspace.device) - n // 2) / (n / 2) for n in kspace.shape[2:]]
    radius = torch.stack(torch.meshgrid(*axes, indexing="ij")).square().sum(dim=0).sqrt()
    measured = kspace != 0
    measured = measured if mask is None else measured & (mask != 0)
    levels = torch.zeros(kspace.shape[:2], dtype=kspace.real.dtype, device=kspace.device)
    for sample in range(kspace.shape[0]):
        for coil in range(kspace.shape[1]):
            inside = measured[sample, coil]
            distances, values = radius[inside], kspace[sample, coil][inside].abs()
            if len(values):
                count = max(math.ceil(outer_share * len(values)), 1)
                outer = distances.topk(count).indices
                levels[sample, coil] = values[outer].median() / _RAYLEIGH_MEDIAN
    return levels


def drop_lines(
    kspace: Tensor,
    mask: Tensor | None = None,
    drop_share: float = 0.2,
    *,
    spatial_dims: int = 2,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a mask that lacks some of the measured lines; the fully sampled centre stays.

    Args:
        kspace: complex, shape ``(B, K, *space)``.
        mask: where it was measured, ``(B or 1, 1, *space)`` with axes of space of size one where it does not depend on
            them; None infers it.
        drop_share: share of the measured lines (or points, of a mask in a plane) outside the centre, in ``[0, 1)``,
            that each sample loses, rounded.
        spatial_dims: number of spatial axes, 2 or 3.
        generator: source of the choice, on the CPU; None uses torch's global one.

    Returns:
        Bool, shape of the mask with the batch of ``kspace``.

    Raises:
        ValueError: if the share is out of range, the mask has another shape, or zero frequency is not measured.

    Example:
        >>> int(drop_lines(torch.ones(1, 1, 4, 10, dtype=torch.complex64), torch.ones(1, 1, 1, 10), 0.5).sum())
        10
    """
    check_coil_kspace(kspace, spatial_dims)
    check_range("drop_share", drop_share, 0.0, 1.0, open_high=True)
    mask = infer_mask(kspace, spatial_dims) if mask is None else mask != 0
    widths = center_widths(mask, kspace, spatial_dims)  # (B or 1, spatial_dims)
    central = torch.ones_like(mask)
    for axis, size in enumerate(mask.shape[2:]):
        if size > 1:
            offset = (torch.arange(size, device=mask.device) - size // 2).abs()
            inside = 2 * offset <= widths[:, axis, None].to(offset.device)
            central = central & inside.view(-1, 1, *(size if other == axis else 1 for other in range(spatial_dims)))
    kept = mask.expand(kspace.shape[0], *mask.shape[1:]).clone(memory_format=torch.contiguous_format)
    removable = (mask & ~central).expand_as(kept)
    for sample in range(kept.shape[0]):
        places = removable[sample].flatten().nonzero().flatten()
        order = torch.randperm(len(places), generator=generator).to(places.device)
        kept[sample].view(-1)[places[order[: round(drop_share * len(places))]]] = False
    return kept
