"""Reconstruction with an l1 penalty on wavelet coefficients, by accelerated proximal gradients (FISTA)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from monai_deqkan._checks import check_choice, check_int
from monai_deqkan.operators import LinearOperator
from monai_deqkan.variational.regularized import (
    Problem,
    Progress,
    VariationalSolution,
    like,
    normal_bound,
    sample_norm,
)

__all__ = ["inverse_wavelet_transform", "wavelet_sense", "wavelet_transform"]

# Daubechies' scaling filter with four vanishing moments ("db4"), from the roots of its polynomial: I. Daubechies, "Ten
# lectures on wavelets" (1992), section 6.1. (Tables in print have 12 digits.)
_LOW = (
    0.23037781330889656,
    0.7148465705529158,
    0.630880767929859,
    -0.027983769416859962,
    -0.1870348117190931,
    0.03084138183556079,
    0.03288301166688521,
    -0.010597401785069039,
)


def wavelet_transform(x: Tensor, levels: int, spatial_dims: int) -> Tensor:
    r"""Transform images to orthonormal wavelet coefficients (Daubechies, four vanishing moments, periodic).

    Args:
        x: real or complex, shape ``(*, *space)``, every axis of space a multiple of ``2 ** levels``.
        levels: number of levels, at least 1.
        spatial_dims: number of trailing axes to transform.

    Returns:
        Coefficients, same shape: after each level the coarse half of every axis stands first.

    Raises:
        ValueError: if an axis has another size.

    Example:
        >>> x = torch.randn(1, 16, 24)
        >>> torch.allclose(inverse_wavelet_transform(wavelet_transform(x, 2, 2), 2, 2), x, atol=1e-5)
        True
    """
    _check_sizes(x, levels, spatial_dims)
    y = x.clone()
    for level in range(levels):
        block = _coarse(y, level, spatial_dims)
        for axis in range(-spatial_dims, 0):
            block.copy_(_analysis(block, axis))
    return y


def inverse_wavelet_transform(coefficients: Tensor, levels: int, spatial_dims: int) -> Tensor:
    """Undo :func:`wavelet_transform`; this is its adjoint too.

    Args:
        coefficients: as :func:`wavelet_transform` returns them.
        levels: number of levels, at least 1.
        spatial_dims: number of trailing axes to transform.

    Returns:
        Images, same shape.
    """
    _check_sizes(coefficients, levels, spatial_dims)
    x = coefficients.clone()
    for level in reversed(range(levels)):
        block = _coarse(x, level, spatial_dims)
        for axis in range(-spatial_dims, 0):
            block.copy_(_synthesis(block, axis))
    return x


def wavelet_sense(
    kspace: Tensor,
    mask: Tensor | None = None,
    sensitivity_maps: Tensor | None = None,
    *,
    operator: LinearOperator | None = None,
    weight: float | Tensor = 2e-3,
    levels: int = 4,
    max_iter: int = 500,
    rtol: float = 1e-3,
    random_shifts: int | None = None,
    on_failure: str = "warn",
) -> VariationalSolution:
    r"""Reconstruct an image from undersampled k-space with an l1 penalty on its wavelet coefficients.

    .. math:: \min_x \tfrac12 \|A x - y\|^2 + \lambda s \|W_\mathrm{detail}\, x\|_1, \qquad s = \max_p |A^H y|_p

    with the transform of :func:`wavelet_transform`, whose coarsest block is not penalized. Axes that are no multiple of
    :math:`2^\mathrm{levels}` are extended at their end by pixels that no data see, which keeps the problem exact. FISTA
    with the step :math:`1/L`, :math:`L \ge \|A\|^2`, and adaptive restart. A sample stops when the gradient mapping
    :math:`L \|x_{k+1} - v_k\| \le` ``rtol`` :math:`\|A^H y\|`: zero is optimality.

    Args:
        kspace: :math:`y`, complex, zero where nothing was measured, shape ``(B, K, *space)``.
        mask: see :meth:`MRIOperator.from_kspace`; None infers it.
        sensitivity_maps: see :meth:`MRIOperator.from_kspace`; None estimates them.
        operator: :math:`A` itself, in place of mask and maps.
        weight: :math:`\lambda`, dimensionless, at least 0; one number, or one per sample ``(B,)``.
        levels: levels of the transform; fewer where an axis would come below eight pixels, but at least one.
        max_iter: most iterations, one application of :math:`A^H A` each.
        rtol: tolerance, dimensionless.
        random_shifts: seed of a random shift of the wavelet grid in every iteration, which removes block artefacts but
            has no fixed problem to converge to: all ``max_iter`` iterations are spent, and none counts as converged
            (k-space of zeros apart).
        on_failure: what to do when a sample does not converge: ``"warn"``, ``"raise"`` or ``"ignore"``.

    Returns:
        The image, the objective and the statistics.

    Raises:
        ValueError: if both an operator and mask or maps are given, or an argument lies outside its range.

    Example:
        >>> from monai_deqkan.operators import MRIOperator
        >>> image = torch.ones(1, 16, 16, dtype=torch.complex64)
        >>> operator = MRIOperator(torch.ones(1, 1, 1, 16))
        >>> bool(wavelet_sense(operator(image), operator=operator).converged)
        True

    Reference:
        A. Beck and M. Teboulle, "A fast iterative shrinkage-thresholding algorithm for linear inverse problems", SIAM
        J. Imaging Sci. 2 (2009) 183-202, with the gradient restart of B. O'Donoghue and E. Candes, "Adaptive restart
        for accelerated gradient schemes", Found. Comput. Math. 15 (2015) 715-732, section 3.2.
    """
    check_int("levels", levels)
    check_choice("on_failure", on_failure, ("warn", "raise", "ignore"))
    problem = whole = Problem.of(kspace, mask, sensitivity_maps, operator, weight)
    dims, space = problem.spatial_dims, problem.target.shape[-problem.spatial_dims :]
    levels = min(levels, *((size // 8).bit_length() - 1 if size >= 16 else 1 for size in space))
    lipschitz = normal_bound(problem.operator, problem.target).clamp_min(1e-12)
    x = _pad(problem.target / like(lipschitz, problem.target), levels, dims)
    v, momentum = x, torch.ones_like(lipschitz)
    progress = Progress(x, max_iter, 0.0 if random_shifts is not None else rtol)
    generator = None if random_shifts is None else torch.Generator().manual_seed(random_shifts)
    while progress.running:
        gradient = _pad(problem.operator.normal(_crop(v, space)) - problem.target, levels, dims)
        moved = v - gradient / like(lipschitz, v)
        new = _shrink(moved, problem.weight / lipschitz, levels, dims, generator)
        residual = sample_norm(new - v) * lipschitz
        keep = progress.update(new, residual, residual / sample_norm(problem.target).clamp_min(1e-30))
        restart = ((v - new).conj() * (new - x)).real.flatten(1).sum(dim=1) > 0
        momentum = torch.where(restart, torch.ones_like(momentum), momentum)
        following = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
        v, x, momentum = new + like((momentum - 1) / following, x) * (new - x), new, following
        if keep is not None:
            problem, x, v = problem.take(keep), x[keep], v[keep]
            lipschitz, momentum = lipschitz[keep], momentum[keep]
    detail = wavelet_transform(progress.image, levels, dims)
    _coarse(detail, levels, dims).zero_()
    image = _crop(progress.image, space)
    objective = whole.data_term(image, kspace) + whole.weight * detail.abs().flatten(1).sum(1, dtype=torch.float64)
    return VariationalSolution(image, objective, progress.statistics(on_failure, "L1-wavelet by FISTA"))


def _shrink(x: Tensor, threshold: Tensor, levels: int, dims: int, generator: torch.Generator | None) -> Tensor:
    """Soft-threshold the details of images, on a grid that is shifted at random where a generator is given."""
    axes = tuple(range(-dims, 0))
    shifts = [0] * dims if generator is None else torch.randint(2**levels, (dims,), generator=generator).tolist()
    if any(shifts):
        x = torch.roll(x, shifts, axes)
    y = wavelet_transform(x, levels, dims)
    kept = _coarse(y, levels, dims).clone()
    size = y.abs()
    y = y * (1 - like(threshold, size) / size.clamp_min(torch.finfo(size.dtype).tiny)).clamp_min(0)
    _coarse(y, levels, dims).copy_(kept)
    x = inverse_wavelet_transform(y, levels, dims)
    return torch.roll(x, [-shift for shift in shifts], axes) if any(shifts) else x


def _coarse(x: Tensor, level: int, dims: int) -> Tensor:
    """Return the coarse block after some levels, a view."""
    for axis in range(-dims, 0):
        x = x.narrow(axis, 0, x.shape[axis] >> level)
    return x


def _filters(x: Tensor) -> Tensor:
    """Return the low and the high pass as columns ``(8, 2)``."""
    low = torch.tensor(_LOW, dtype=torch.float64)
    high = low.flip(0) * torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)
    return torch.stack((low, high), dim=1).to(x)


def _analysis(x: Tensor, axis: int) -> Tensor:
    """Filter along one axis and keep every second sample: the low half, then the high half."""
    line = x.movedim(axis, -1)
    size = line.shape[-1]
    start = torch.arange(0, size, 2, device=x.device)
    windows = line[..., (start[:, None] + torch.arange(8, device=x.device)) % size]  # (..., n / 2, 8)
    halves = windows @ _filters(x)
    return halves.transpose(-1, -2).flatten(-2).movedim(-1, axis)


def _synthesis(y: Tensor, axis: int) -> Tensor:
    """Undo :func:`_analysis`."""
    line = y.movedim(axis, -1)
    spread = line.unflatten(-1, (2, -1)).transpose(-1, -2) @ _filters(y).T  # (..., n / 2, 8)
    pairs = spread.unflatten(-1, (4, 2))
    total = pairs[..., 0, :]
    for tap in range(1, 4):
        total = total + torch.roll(pairs[..., tap, :], tap, dims=-2)
    return total.flatten(-2).movedim(-1, axis)


def _pad(x: Tensor, levels: int, dims: int) -> Tensor:
    """Extend images by zeros at the end of each axis to a multiple of ``2 ** levels``."""
    missing = [-size % 2**levels for size in x.shape[-dims:]]
    return F.pad(x, [n for size in reversed(missing) for n in (0, size)]) if any(missing) else x


def _crop(x: Tensor, space: torch.Size) -> Tensor:
    for axis, size in enumerate(space, start=-len(space)):
        x = x.narrow(axis, 0, size)
    return x


def _check_sizes(x: Tensor, levels: int, spatial_dims: int) -> None:
    check_int("levels", levels)
    sizes = tuple(x.shape[-spatial_dims:])
    if any(size == 0 or size % 2**levels for size in sizes):
        raise ValueError(
            f"Every axis of space must be a multiple of {2**levels} for {levels} levels; got {sizes}. Pad the image, "
            "or take fewer levels."
        )
