"""CG-SENSE: least-squares reconstruction by conjugate gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from monai_deqkan._checks import check_int, check_range
from monai_deqkan.operators import LinearOperator
from monai_deqkan.solvers import ConjugateGradientSolver, solve_linear
from monai_deqkan.variational.regularized import operator_of

__all__ = ["cg_sense", "cg_sense_path"]


def cg_sense(
    kspace: Tensor,
    mask: Tensor | None = None,
    sensitivity_maps: Tensor | None = None,
    *,
    operator: LinearOperator | None = None,
    l2_weight: float = 0.0,
    max_iter: int = 10,
    rtol: float = 1e-6,
) -> Tensor:
    r"""Reconstruct an image from undersampled multi-coil k-space by regularized least squares.

    .. math:: (A^H A + \lambda I)\, x = A^H y

    solved by conjugate gradients from zero. At :math:`\lambda = 0` it is the number of iterations that regularizes: the
    error falls, then noise takes over; see :func:`cg_sense_path`. Not converging within ``max_iter`` is no failure.

    Args:
        kspace: :math:`y`, complex, zero where nothing was measured, shape ``(B, K, *space)``.
        mask: see :meth:`MRIOperator.from_kspace`; None infers it.
        sensitivity_maps: see :meth:`MRIOperator.from_kspace`; None estimates them.
        operator: :math:`A` itself, in place of mask and maps; ``kspace`` then has the shape of its outputs. Weigh the
            k-space of a :class:`NUFFTOperator` first, see :meth:`NUFFTOperator.weigh`.
        l2_weight: :math:`\lambda`, dimensionless for normalized maps, at least 0.
        max_iter: most iterations, one application of :math:`A^H A` each.
        rtol: a sample stops when the residual of the equation has fallen to this share of the right-hand side.

    Returns:
        Complex image in the unit of ``kspace``, shape ``(B, *space)``; with map sets one per set, ``(B, M, *space)``,
        for :func:`~monai_deqkan.operators.combine_map_sets` to join.

    Raises:
        ValueError: if both an operator and mask or maps are given, k-space is not finite, or an argument lies outside
            its range.

    Example:
        >>> from monai_deqkan.operators import simulate_kspace, smooth_coil_maps
        >>> maps = smooth_coil_maps((16, 16), 4)
        >>> image = torch.rand(1, 16, 16)
        >>> x = cg_sense(simulate_kspace(image, maps), torch.ones(1, 1, 1, 16), maps[None])
        >>> torch.allclose(x.abs(), image, atol=1e-4)
        True

    Reference:
        K. P. Pruessmann et al., "Advances in sensitivity encoding with arbitrary k-space trajectories", Magn. Reson.
        Med. 46 (2001) 638-651; ours has no intensity correction, which normalized maps make superfluous.
    """
    A, b = _equation(kspace, mask, sensitivity_maps, operator, l2_weight)
    solver = ConjugateGradientSolver(rtol=rtol, max_iter=max_iter, on_failure="ignore")
    x = solve_linear(lambda x: A.normal(cast(Tensor, x)) + l2_weight * cast(Tensor, x), b, solver).z
    return cast(Tensor, x)


def cg_sense_path(
    kspace: Tensor,
    mask: Tensor | None = None,
    sensitivity_maps: Tensor | None = None,
    *,
    operator: LinearOperator | None = None,
    l2_weight: float = 0.0,
    max_iter: int = 30,
) -> Iterator[Tensor]:
    """Yield the image after each iteration of :func:`cg_sense`, to pick the best one against a reference.

    Args:
        kspace: see :func:`cg_sense`.
        mask: see :func:`cg_sense`.
        sensitivity_maps: see :func:`cg_sense`.
        operator: see :func:`cg_sense`.
        l2_weight: see :func:`cg_sense`.
        max_iter: number of images. A sample whose equation is solved to rounding keeps its image: further steps would
            only blow rounding errors up.

    Yields:
        Complex images, shape ``(B, *space)``.
    """
    A, b = _equation(kspace, mask, sensitivity_maps, operator, l2_weight)
    check_int("max_iter", max_iter)

    def image(rows: Tensor) -> Tensor:
        return torch.view_as_complex(rows.reshape(*b.shape, 2))

    def normal(rows: Tensor) -> Tensor:
        x = image(rows)
        return torch.view_as_real(A.normal(x) + l2_weight * x).flatten(1)

    solver = ConjugateGradientSolver()
    start = torch.view_as_real(b).flatten(1)
    state = solver.init(torch.zeros_like(start), start)
    # Measured: rounding leaves a residual of 1 to 2 eps. One coil is there after one step, and diverges in the third.
    rounding = state.squared.sqrt() * 10 * torch.finfo(start.dtype).eps
    running, x = torch.ones_like(rounding, dtype=torch.bool), state.x
    for _ in range(max_iter):
        running = running & (state.squared.sqrt() > rounding)
        state = solver.step(normal, state)
        x = torch.where(running[:, None], state.x, x)
        yield image(x)


def _equation(
    kspace: Tensor,
    mask: Tensor | None,
    sensitivity_maps: Tensor | None,
    operator: LinearOperator | None,
    l2_weight: float,
) -> tuple[LinearOperator, Tensor]:
    """Return the operator and the right-hand side."""
    check_range("l2_weight", l2_weight, 0.0)
    operator = operator_of(kspace, mask, sensitivity_maps, operator)
    return operator, operator.adjoint(kspace)
