"""ESPIRiT: coil sensitivity maps as eigenvectors of what the fully sampled centre of k-space predicts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from monai_deqkan._checks import check_int, check_range
from monai_deqkan.operators.sampling import infer_mask
from monai_deqkan.operators.sensitivity import center_widths, check_coil_kspace, estimate_sensitivity_maps

__all__ = ["espirit_maps"]

_PIXELS_AT_ONCE = 8192  # of the image, for which matrices of (K, K) are held at a time


def espirit_maps(
    kspace: Tensor,
    mask: Tensor | None = None,
    *,
    num_sets: int = 1,
    kernel_size: int = 6,
    threshold: float = 0.02,
    crop: float = 0.0,
    max_center_lines: int = 24,
    spatial_dims: int = 2,
) -> Tensor:
    r"""Estimate sensitivity maps by ESPIRiT from the fully sampled centre of k-space.

    All patches of ``kernel_size`` samples of all coils in the central block are the rows of a calibration matrix; the
    conjugates :math:`v_j` of the right singular vectors of its singular values above ``threshold`` span what such
    patches can be. At a pixel :math:`r`, with :math:`\hat v_{jk}` the inverse Fourier transform of coil :math:`k` of a
    vector,

    .. math:: \mathcal G(r)_{kl} = \frac{1}{|\text{patch}|} \sum_j \hat v_{jk}(r)\, \overline{\hat v_{jl}(r)}, \qquad
        \mathcal G(r)\, S(r) = \lambda(r)\, S(r)

    The maps are the eigenvectors of the largest eigenvalues, which are 1 where the model holds: one in an ordinary
    field of view, two where an object larger than the field of view folds over (soft SENSE, ``num_sets=2``). Every set
    has :math:`\sum_k |S_k|^2 = 1` where it is not cropped. Phases are those of :func:`estimate_sensitivity_maps`, so
    images combined with the one or the other have the same phase, zero but for fine structure.

    Args:
        kspace: complex, shape ``(B, K, *space)``; the first spatial axis is the readout, see :func:`infer_mask`.
        mask: bool or real, shape ``(B or 1, 1, 1, W)`` in 2-D and ``(B or 1, 1, 1, W, D)`` in 3-D; None infers it.
        num_sets: number of sets of maps, at most ``K``.
        kernel_size: largest patch width in samples; with few lines, a third of the central block's shorter side.
        threshold: singular values below this share of the largest are taken for noise, in ``(0, 1)``.
        crop: maps are zero where their eigenvalue lies below, in ``[0, 1]``. 0 keeps a first set everywhere; a second
            one is mostly noise where nothing folds over, so give it 0.8 or more.
        max_center_lines: width of the central block along the readout, and its upper limit along phase encodings.
        spatial_dims: number of spatial axes, 2 or 3.

    Returns:
        Complex, dimensionless: ``(B, K, *space)`` for one set, ``(B, M, K, *space)`` for ``M`` sets, the set of the
        largest eigenvalue first. Ones for a single coil, zeros for a sample of zeros.

    Raises:
        ValueError: if zero frequency is not measured, k-space is not finite, shapes disagree, or there are more sets
            than coils.

    Example:
        >>> from monai_deqkan.operators import simulate_kspace, smooth_coil_maps
        >>> truth = smooth_coil_maps((32, 32), 4)
        >>> maps = espirit_maps(simulate_kspace(torch.rand(1, 32, 32), truth))
        >>> agreement = (maps.conj() * truth).sum(1).abs()
        >>> bool(agreement.mean() > 0.99)
        True

    Reference:
        M. Uecker et al., "ESPIRiT - an eigenvalue approach to autocalibrating parallel MRI: where SENSE meets GRAPPA",
        Magn. Reson. Med. 71 (2014) 990-1001, equations 14-20. Ours may take fewer lines along one axis than along
        another, and smaller patches then.
    """
    check_coil_kspace(kspace, spatial_dims)
    coils = kspace.shape[1]
    if check_int("num_sets", num_sets) > coils:
        raise ValueError(f"`num_sets` must be at most the number of coils, {coils}; got {num_sets}.")
    check_int("kernel_size", kernel_size)
    check_range("threshold", threshold, 0.0, 1.0, open_low=True, open_high=True)
    check_range("crop", crop, 0.0, 1.0)
    check_int("max_center_lines", max_center_lines)
    if coils == 1:
        return torch.ones_like(kspace)
    if mask is None:
        mask = infer_mask(kspace, spatial_dims)
    guide = estimate_sensitivity_maps(kspace, mask, max_center_lines=max_center_lines, spatial_dims=spatial_dims)
    widths = center_widths(mask, kspace, spatial_dims)
    # Measured with 8 lines (8x) on simulated 8-coil data: as wide as the lines are many, the block loses 0.4 dB.
    widths[:, 0] = max_center_lines
    blocks = _full_blocks(mask, widths.clamp(max=max_center_lines), kspace)
    maps = []
    for sample, block, phase in zip(kspace, blocks, guide, strict=True):
        center = sample[(slice(None),) + block]  # noqa: RUF005 - Python 3.10 unpacks no index
        scale = center.abs().amax()
        if not bool(scale > 0):
            maps.append(torch.zeros_like(sample).expand(num_sets, *sample.shape))
            continue
        # Measured as above: patches of half the lines lose 0.2 dB.
        width = min(kernel_size, -(-min(center.shape[1:]) // 3))
        kernels = _gram_kernels(center / scale, [width] * spatial_dims, threshold)
        maps.append(_eigenvectors(kernels, sample.shape[1:], num_sets, crop, phase).to(kspace.dtype))
    stacked = torch.stack(maps)  # (B, M, K, *space)
    return stacked[:, 0] if num_sets == 1 else stacked


def _full_blocks(mask: Tensor, widths: Tensor, kspace: Tensor) -> list[tuple[slice, ...]]:
    """Return per sample the central block as slices, narrowed until ``mask`` has measured all of it."""
    axes = range(1 if mask.shape[2] == 1 else 0, kspace.ndim - 2)
    space = kspace.shape[2:]
    measured = (mask != 0)[:, 0].expand(-1, *space)
    blocks = []
    for lines, sample in zip(widths.tolist(), measured, strict=True):
        size = [min(w, n) for w, n in zip(lines, space, strict=True)]
        while not bool(sample[_block(size, space)].all()):
            widest = max(axes, key=lambda axis: size[axis])
            size[widest] -= 1
        blocks.append(_block(size, space))
    return blocks if len(blocks) == len(kspace) else blocks * len(kspace)


def _block(size: list[int], space: torch.Size) -> tuple[slice, ...]:
    starts = [n // 2 - w // 2 for w, n in zip(size, space, strict=True)]
    return tuple(slice(start, start + w) for start, w in zip(starts, size, strict=True))


def _gram_kernels(center: Tensor, patch: list[int], threshold: float) -> Tensor:
    """Return the Fourier coefficients of the matrices of all pixels: ``(K, K, 2 p - 1 per axis)``, complex128."""
    coils, axes = center.shape[0], range(1, center.ndim)
    rows = center.to(torch.complex128)
    for axis, width in zip(axes, patch, strict=True):
        rows = rows.unfold(axis, width, 1)
    rows = rows.movedim(0, len(patch)).reshape(-1, coils * math.prod(patch))
    values, vectors = torch.linalg.eigh(rows.mH @ rows)
    kept = vectors[:, values > threshold**2 * values[-1]].mT.conj()
    # Correlations of the vectors' patches are products in image space.
    full = [2 * width - 1 for width in patch]
    spectrum = torch.fft.fftn(kept.reshape(-1, coils, *patch), s=full, dim=list(range(2, 2 + len(patch))))
    spectrum = spectrum.flatten(2).permute(2, 1, 0)  # (frequencies, K, vectors)
    products = (spectrum @ spectrum.mH).permute(1, 2, 0).reshape(coils, coils, *full)
    kernels = torch.fft.ifftn(products, dim=list(range(2, 2 + len(patch)))) / math.prod(patch)
    return torch.fft.fftshift(kernels, dim=list(range(2, 2 + len(patch))))


def _eigenvectors(kernels: Tensor, space: torch.Size, num_sets: int, crop: float, guide: Tensor) -> Tensor:
    """Return the leading eigenvectors of the matrices of all pixels ``(M, K, *space)``, a block of rows at a time."""
    waves = []  # per axis (n, offsets)
    for n, offsets in zip(space, kernels.shape[2:], strict=True):
        position = torch.arange(n, device=kernels.device, dtype=torch.float64) - n // 2
        offset = torch.arange(offsets, device=kernels.device, dtype=torch.float64) - offsets // 2
        waves.append(torch.exp(2j * math.pi / n * position[:, None] * offset))
    for wave in waves[1:]:  # the axis of offsets goes, one of pixels is appended
        kernels = torch.tensordot(kernels, wave, dims=([3], [1]))
    first = waves[0]
    rows = max(_PIXELS_AT_ONCE // math.prod(space[1:]), 1)
    parts = []
    for start in range(0, space[0], rows):
        gram = torch.tensordot(first[start : start + rows], kernels, dims=([1], [2]))
        gram = gram.movedim((1, 2), (-2, -1)).to(torch.complex64)  # (rows, ..., K, K)
        values, vectors = torch.linalg.eigh(gram)
        values, vectors = values[..., -num_sets:].flip(-1), vectors[..., -num_sets:].flip(-1)
        parts.append((vectors * (values[..., None, :] >= crop)).movedim((-1, -2), (0, 1)))
    maps = torch.cat(parts, dim=2)
    along = (maps * guide.conj().to(maps.dtype)).sum(dim=1, keepdim=True)
    return maps * torch.where(along.abs() > 0, along.conj() / along.abs().clamp_min(1e-30), torch.ones_like(along))
