"""Reconstruction with a total variation penalty, by the alternating direction method of multipliers (ADMM)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from monai_deqkan._checks import check_choice, check_range
from monai_deqkan.operators import LinearOperator
from monai_deqkan.solvers import ConjugateGradientSolver, solve_linear
from monai_deqkan.variational.regularized import Problem, Progress, VariationalSolution, like, sample_norm

__all__ = ["tv_sense"]


def tv_sense(
    kspace: Tensor,
    mask: Tensor | None = None,
    sensitivity_maps: Tensor | None = None,
    *,
    operator: LinearOperator | None = None,
    weight: float | Tensor = 2e-3,
    max_iter: int = 300,
    rtol: float = 1e-3,
    relaxation: float = 1.6,
    on_failure: str = "warn",
) -> VariationalSolution:
    r"""Reconstruct an image from undersampled k-space with an isotropic total variation penalty.

    .. math:: \min_x \tfrac12 \|A x - y\|^2 + \lambda s \sum_p \Big(\sum_i |D_i x|_p^2\Big)^{1/2},
        \qquad s = \max_p |A^H y|_p

    with forward differences :math:`D_i` along the axes of space (none beyond the last pixel), of complex images. The
    scale :math:`s` makes :math:`\lambda` independent of the k-space's unit. ADMM on :math:`z = D x`; its image step
    is solved by conjugate gradients to a tenth of its residual, and residual balancing adapts its penalty during the
    first 100 iterations only: proofs of convergence ask for a fixed penalty (and for exact or ever better steps, which
    ours are not; the stopping rule below tells whether a solve converged).

    A sample stops when :math:`\|D x - z\| \le` ``rtol`` :math:`\max(\|D x\|, \|z\|)` and
    :math:`\|A^H (A x - y) + D^H p\| \le` ``rtol`` :math:`\|A^H y\|`, where the dual variable :math:`p` is feasible and
    matches :math:`z`: both zero is optimality.

    Args:
        kspace: :math:`y`, complex, zero where nothing was measured, shape ``(B, K, *space)``.
        mask: see :meth:`MRIOperator.from_kspace`; None infers it.
        sensitivity_maps: see :meth:`MRIOperator.from_kspace`; None estimates them.
        operator: :math:`A` itself, in place of mask and maps.
        weight: :math:`\lambda`, dimensionless, at least 0; one number, or one per sample ``(B,)``.
        max_iter: most iterations, each a few applications of :math:`A^H A`.
        rtol: tolerance of both residuals, dimensionless.
        relaxation: over-relaxation of the split, in ``[1, 2)``.
        on_failure: what to do when a sample does not converge: ``"warn"``, ``"raise"`` or ``"ignore"``.

    Returns:
        The image, the objective and the statistics; the residual is the larger of the two.

    Raises:
        ValueError: if both an operator and mask or maps are given, or an argument lies outside its range.

    Example:
        >>> from monai_deqkan.operators import MRIOperator
        >>> step = torch.cat((torch.zeros(1, 16, 8), torch.ones(1, 16, 8)), -1).to(torch.complex64)
        >>> operator = MRIOperator(torch.ones(1, 1, 1, 16))
        >>> image = tv_sense(operator(step), operator=operator, weight=0.4).image
        >>> round(float(image.abs().max()), 2)
        0.95

    Reference:
        S. Boyd et al., "Distributed optimization and statistical learning via the alternating direction method of
        multipliers", Found. Trends Mach. Learn. 3 (2011) 1-122, sections 3.3 and 3.4. The dual residual here is that
        of the optimality condition itself, so inexact inner solves cannot feign convergence.
    """
    check_range("relaxation", relaxation, 1.0, 2.0, open_high=True)
    check_choice("on_failure", on_failure, ("warn", "raise", "ignore"))
    problem = whole = Problem.of(kspace, mask, sensitivity_maps, operator, weight)
    dims = problem.spatial_dims
    x, penalty = _start(problem)
    progress = Progress(x, max_iter, rtol)
    z = _gradient(x, dims)
    dual, Dx, Nx = torch.zeros_like(z), z, problem.operator.normal(x)
    while progress.running:
        x = x + _image_step(problem, z - dual / like(penalty, z), Dx, Nx, penalty)
        Dx, Nx = _gradient(x, dims), problem.operator.normal(x)
        relaxed = relaxation * Dx + (1 - relaxation) * z
        z = _shrink(relaxed + dual / like(penalty, z), problem.weight / penalty)
        dual = dual + like(penalty, z) * (relaxed - z)
        stationarity = sample_norm(Nx - problem.target + _gradient_adjoint(dual, dims))
        split = sample_norm(Dx - z)
        dual_part = _ratio(stationarity, sample_norm(problem.target))
        split_part = _ratio(split, torch.maximum(sample_norm(Dx), sample_norm(z)))
        keep = progress.update(x, torch.maximum(stationarity, split), torch.maximum(split_part, dual_part))
        if len(progress.history) <= 100:
            penalty = penalty * _balance(split_part, dual_part).to(penalty)
        if keep is not None:
            problem, penalty = problem.take(keep), penalty[keep]
            x, z, dual, Dx, Nx = (part[keep] for part in (x, z, dual, Dx, Nx))
    variation = _magnitude(_gradient(progress.image, dims)).flatten(1).sum(dim=1, dtype=torch.float64)
    objective = whole.data_term(progress.image, kspace) + whole.weight * variation
    return VariationalSolution(progress.image, objective, progress.statistics(on_failure, "TV by ADMM"))


def _start(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return the best multiple of the adjoint image, and the penalty at which edges of a twentieth pass the shrinkage.

    Both follow the operator's norm, so operators need not be normalized.
    """
    b = problem.target
    square = sample_norm(b) ** 2
    factor = _ratio(square, sample_norm(problem.operator.forward(b)) ** 2)
    x = like(factor, b) * b
    brightest = x.abs().flatten(1).amax(dim=1)
    curvature = torch.where(factor > 0, 1 / factor.clamp_min(1e-300), 1.0).to(brightest)
    penalty = _ratio(problem.weight, 0.05 * brightest)
    return x, torch.where(penalty > 0, penalty, curvature)


def _image_step(problem: Problem, anchor: Tensor, Dx: Tensor, Nx: Tensor, penalty: Tensor) -> Tensor:
    """Return the change of the image that (nearly) minimizes the augmented Lagrangian."""
    dims = problem.spatial_dims
    rho = like(penalty, problem.target)
    residual = problem.target - Nx + rho * _gradient_adjoint(anchor - Dx, dims)

    def equation(d: Tensor) -> Tensor:
        return problem.operator.normal(d) + rho * _gradient_adjoint(_gradient(d, dims), dims)

    solver = ConjugateGradientSolver(rtol=0.1, max_iter=10, on_failure="ignore")
    solution = solve_linear(lambda d: equation(cast(Tensor, d)), residual, solver, recorders=())
    return cast(Tensor, solution.z)


def _gradient(x: Tensor, dims: int) -> Tensor:
    """Return forward differences ``(B, *, dims)``, zero at the last pixel of each axis."""
    parts = [torch.zeros_like(x) for _ in range(dims)]
    for part, axis in zip(parts, range(-dims, 0), strict=True):
        size = x.shape[axis]
        part.narrow(axis, 0, size - 1).copy_(x.narrow(axis, 1, size - 1) - x.narrow(axis, 0, size - 1))
    return torch.stack(parts, dim=-1)


def _gradient_adjoint(z: Tensor, dims: int) -> Tensor:
    """Return the adjoint of :func:`_gradient`."""
    x = torch.zeros_like(z[..., 0])
    for part, axis in zip(z.unbind(-1), range(-dims, 0), strict=True):
        inner = part.narrow(axis, 0, part.shape[axis] - 1)
        x.narrow(axis, 1, part.shape[axis] - 1).add_(inner)
        x.narrow(axis, 0, part.shape[axis] - 1).sub_(inner)
    return x


def _magnitude(z: Tensor) -> Tensor:
    return torch.linalg.vector_norm(z, dim=-1)


def _shrink(z: Tensor, threshold: Tensor) -> Tensor:
    size = _magnitude(z).unsqueeze(-1)
    return z * (1 - like(threshold, z) / size.clamp_min(torch.finfo(size.dtype).tiny)).clamp_min(0)


def _balance(split: Tensor, dual: Tensor) -> Tensor:
    """Return the factor of the penalty: stronger where the split lags behind, weaker where optimality does."""
    factor = torch.ones_like(split)
    factor[split > 5 * dual] = 1.5
    factor[dual > 5 * split] = 1 / 1.5
    return factor


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return the ratio, zero where the numerator is."""
    return torch.where(numerator == 0, torch.zeros_like(numerator), numerator / denominator)
