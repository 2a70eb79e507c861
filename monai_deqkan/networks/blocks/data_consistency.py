"""Steps that pull an image towards its measured k-space."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from monai_deqkan._complex import channels_to_complex, complex_to_channels
from monai_deqkan.operators import LinearOperator, MRIOperator
from monai_deqkan.solvers import ConjugateGradientSolver, solve_linear

__all__ = ["Measurement", "gradient_step", "proximal_step"]


@dataclass(frozen=True)
class Measurement:
    r"""What the data-consistency steps of one batch need, computed once.

    Attributes:
        operator: forward model :math:`A` of an image ``(B, *space)``, complex.
        back_projection: :math:`A^H y`, complex, shape ``(B, *space)``.
        curvature: upper bound :math:`L` of :math:`\|A^H A\|`, shape ``(B,)``.
        misfit: share of the low-frequency coil images' power that the coil maps do not explain, shape ``(B,)``, see
            :func:`~monai_deqkan.operators.map_misfit`; None where it was not asked for.
    """

    operator: LinearOperator
    back_projection: Tensor
    curvature: Tensor
    misfit: Tensor | None = None

    @classmethod
    def of(cls, operator: MRIOperator, kspace: Tensor, misfit: Tensor | None = None) -> Measurement:
        """Build the measurement of a batch from its k-space, complex ``(B, K, *space)``; ``misfit`` as above."""
        bound = operator.norm_bound.square()
        curvature = bound.clamp_min(torch.finfo(bound.dtype).tiny).expand(kspace.shape[0])
        return cls(operator, operator.adjoint(kspace), curvature, misfit)

    def denoise(self, denoiser: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
        """Apply a denoiser of ``(B, 2, *space)`` to an image, or to that of each map set, ``(B, 2, M, *space)``."""
        clean = denoiser(self.as_images(image))
        if not getattr(self.operator, "has_sets", False):
            return clean
        return clean.unflatten(0, (len(image), -1)).transpose(1, 2)

    def as_images(self, image: Tensor) -> Tensor:
        """Return the images of all map sets as samples ``(B M, 2, *space)``; without sets, the image as it is."""
        return image.transpose(1, 2).flatten(0, 1) if getattr(self.operator, "has_sets", False) else image

    def take(self, rows: Tensor) -> Measurement:
        """Return the measurement of some samples of the batch."""
        misfit = None if self.misfit is None else self.misfit[rows]
        return Measurement(self.operator.take(rows), self.back_projection[rows], self.curvature[rows], misfit)


def gradient_step(image: Tensor, measurement: Measurement, step_size: Tensor | float) -> Tensor:
    r"""Descend on :math:`\tfrac12 \|A x - y\|^2`.

    .. math:: x \mapsto x - \frac{s}{L}\, (A^H A x - A^H y)

    Nonexpansive for :math:`0 \le s \le 2`, for any mask: the eigenvalues of :math:`I - (s / L) A^H A` lie in
    :math:`[1 - s, 1]`.

    Args:
        image: two channels ``(B, 2, *space)``.
        measurement: the batch's measurement.
        step_size: :math:`s`, dimensionless.

    Returns:
        Two channels ``(B, 2, *space)``.
    """
    x = channels_to_complex(image)
    gradient = measurement.operator.normal(x) - measurement.back_projection
    scale = (step_size / measurement.curvature).to(image.dtype).view(-1, *[1] * (x.ndim - 1))
    return complex_to_channels(x - scale * gradient)


def proximal_step(image: Tensor, measurement: Measurement, weight: Tensor, *, rtol: float, max_iter: int) -> Tensor:
    r"""Return the image that fits the measurement best and stays near a given one.

    .. math:: p(x) = \operatorname*{arg\,min}_u \tfrac12 \|A u - y\|^2 + \tfrac{\lambda L}{2} \|u - x\|^2
              = (A^H A + \lambda L)^{-1} (A^H y + \lambda L\, x)

    by conjugate gradients that start at ``x``; differentiable any number of times, by another such solve, so memory
    does not grow with its iterations. Solved exactly it is firmly nonexpansive in ``x`` for any mask. A solve to
    ``rtol`` leaves at most :math:`(1 + \lambda) / \lambda` times ``rtol`` of the change, one that ends at ``max_iter``
    more.

    Args:
        image: two channels ``(B, 2, *space)``.
        measurement: the batch's measurement.
        weight: :math:`\lambda > 0`, dimensionless: a number, shape ``()``.
        rtol: relative tolerance of the solve for the change, against its right-hand side :math:`A^H y - A^H A x`; at
            least ten times the rounding of the dtype is asked for.
        max_iter: most iterations.

    Returns:
        Two channels ``(B, 2, *space)``.
    """
    x = channels_to_complex(image)
    shift = (weight * measurement.curvature).to(image.dtype).view(-1, *[1] * (x.ndim - 1))
    # Solved for the change, smaller than the image: the tolerance then is a part of the change.
    change = measurement.back_projection - measurement.operator.normal(x)
    tolerance = max(rtol, 10 * torch.finfo(image.dtype).eps)
    solver = ConjugateGradientSolver(rtol=tolerance, max_iter=max_iter, on_failure="ignore")
    return complex_to_channels(x + cast(Tensor, _Shifted.apply(change, shift, measurement.operator, solver)))


class _Shifted(torch.autograd.Function):
    """``(A^H A + shift)^-1 b``, whose gradient is the same solve."""

    @staticmethod
    def forward(
        ctx: Any, b: Tensor, shift: Tensor, operator: LinearOperator, solver: ConjugateGradientSolver
    ) -> Tensor:
        x = solve_linear(
            lambda u: operator.normal(cast(Tensor, u)) + shift * cast(Tensor, u), b, solver, recorders=()
        ).z
        ctx.operator, ctx.solver = operator, solver
        ctx.save_for_backward(cast(Tensor, x), shift)
        return cast(Tensor, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, shift = ctx.saved_tensors
        w = cast(Tensor, _Shifted.apply(gradients[0], shift, ctx.operator, ctx.solver))
        of_shift = None
        if ctx.needs_input_grad[1]:
            of_shift = -(w.conj() * x).real.sum(dim=tuple(range(1, x.ndim)), keepdim=True).sum_to_size(shift.shape)
        return w, of_shift, None, None
