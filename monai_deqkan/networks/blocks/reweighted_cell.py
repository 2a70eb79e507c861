"""Equilibrium reconstruction with an explicit learned energy, by iteratively reweighted least squares."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from monai_deqkan._checks import check_int, check_range
from monai_deqkan._complex import channels_to_complex, complex_to_channels
from monai_deqkan.networks.blocks.data_consistency import Measurement
from monai_deqkan.networks.blocks.deq_cell import ContractionBound
from monai_deqkan.networks.blocks.preconditioner import Preconditioner
from monai_deqkan.networks.layers.positive import positive, raw_of_positive
from monai_deqkan.operators import MRIOperator
from monai_deqkan.solvers import ConjugateGradientSolver

__all__ = ["EnergyPrior", "ReweightedCell"]

Inputs = tuple[Measurement, Tensor]

_START_STEPS, _START_FACTOR = 2, 6.0
_LARGEST_FACTOR = 10.0  # maps that are worthless must not leave a constant image


@runtime_checkable
class EnergyPrior(Protocol):
    """An energy of complex images as two channels, with quadratic upper bounds that touch it."""

    def kernels(self) -> list[Tensor]:
        """Return what :meth:`weights` and :meth:`curvature` share."""

    def weights(self, image: Tensor, kernels: list[Tensor]) -> list[Tensor]:
        """Return the weights of the upper bound that touches the energy at an image ``(B, 2, *space)``."""

    def curvature(self, image: Tensor, kernels: list[Tensor], weights: list[Tensor]) -> Tensor:
        """Apply the self-adjoint positive semidefinite matrix of that bound to an image ``(B, 2, *space)``."""

    def diagonals(self, image: Tensor, kernels: list[Tensor], weights: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return about the diagonals of that matrix among pixels and among frequencies, ``(B, *space)`` each.

        They precondition the solves: the better they are, the fewer steps. Ones will do.
        """

    def energy(self, image: Tensor) -> Tensor:
        """Return the energy of each image, ``(B,)``."""


class ReweightedCell(nn.Module):
    r"""DE-IRLS: the image of least squares whose smoothness is weighted by the present image.

    .. math:: f(x) = \operatorname*{arg\,min}_z \frac{1}{2L} \|A z - y\|^2 + \frac{\lambda}{2} \langle z, C(x) z\rangle
              = \big(A^H A / L + \lambda\, C(x)\big)^{-1} A^H y / L

    with :math:`\lambda > 0` and the prior's curvature :math:`C(x)`, for which
    :math:`C(x)\,x = \nabla R(x)`. Its fixed points are the stationary points of

    .. math:: E(x) = \frac{1}{2L} \|A x - y\|^2 + \lambda R(x)

    and, as the quadratic function bounds the energy from above and touches it at :math:`x`, no step raises
    :math:`E`: not even one whose conjugate gradients, which start at :math:`x`, end early. (A solver that mixes steps,
    such as Anderson's, has no such promise.) The energy may have several stationary points; the one that is found
    depends on the start, see :meth:`initial_state`.

    (The residual of a solve is that of such a step, with conjugate gradients that end early, preconditioned by
    :class:`~monai_deqkan.networks.blocks.preconditioner.Preconditioner`.)

    The weight follows how far the coil maps can be trusted: with the share :math:`m` of the low-frequency coil images'
    power that they do not explain (:func:`~monai_deqkan.operators.map_misfit`; zero for one coil),

    .. math:: \lambda = \lambda_0 \big(1 + \min(m^2 / m_0^2,\, 9)\big), \qquad \lambda_0, m_0 > 0 \text{ learned.}

    Args:
        prior: the energy, such as a :class:`~monai_deqkan.networks.nets.WeaklyConvexRidgeDenoiser`.
        weight: :math:`\lambda_0` to start from, dimensionless.
        unit_misfit: :math:`m_0` to start from, dimensionless.
        cg_rtol: relative tolerance of the conjugate gradients, against the change that they start to look for, in the
            variables of their preconditioner: the fixed points are the same for any. Gradients, which exist once, take
            its square.
        cg_max_iter: most iterations of the conjugate gradients; five times as many for gradients. More of them make
            fewer evaluations of the step.

    Raises:
        TypeError: if the prior has no energy.
        ValueError: for a number out of range.

    Reference:
        D. Geman and G. Reynolds, "Constrained restoration and the recovery of discontinuities", IEEE Trans. Pattern
        Anal. Mach. Intell. 14 (1992) 367-383 (half-quadratic minimization, multiplicative form); as learned
        equilibrium with such weights: S. Neumayer, M. Pourya, A. Goujon and M. Unser, "Boosting weakly convex ridge
        regularizers with spatial adaptivity", NeurIPS workshop 2023, there with masks from a network.
    """

    needs_misfit = True  # of the measurement

    def __init__(
        self,
        prior: nn.Module,
        weight: float = 0.6,
        *,
        unit_misfit: float = 0.01,
        cg_rtol: float = 0.01,
        cg_max_iter: int = 16,
    ) -> None:
        super().__init__()
        if not isinstance(prior, EnergyPrior):
            raise TypeError(
                f"The reweighted form needs a prior with an energy and all methods of EnergyPrior, such as "
                f"WeaklyConvexRidgeDenoiser; got "
                f"{type(prior).__name__}. Take another form, or that prior."
            )
        self.prior = prior
        self.raw_weight = nn.Parameter(raw_of_positive(check_range("weight", weight, 0.0, open_low=True)))
        self.raw_misfit = nn.Parameter(raw_of_positive(check_range("unit_misfit", unit_misfit, 0.0, open_low=True)))
        self.cg_rtol = check_range("cg_rtol", cg_rtol, 0.0, open_low=True)
        self.cg_max_iter = check_int("cg_max_iter", cg_max_iter)

    @property
    def weight(self) -> Tensor:
        r"""The weight :math:`\lambda_0` of the energy against the data, positive."""
        return positive(self.raw_weight)

    @property
    def unit_misfit(self) -> Tensor:
        r"""The misfit :math:`m_0` of coil maps at which the weight is doubled, positive."""
        return positive(self.raw_misfit)

    def weights(self, measurement: Measurement) -> Tensor:
        r"""Return the weight :math:`\lambda` of each sample, ``(B,)``, or ``(1,)`` where no misfit is known."""
        if measurement.misfit is None:
            return self.weight.view(1)
        misfit = measurement.misfit.to(self.weight)
        return self.weight * (1 + (misfit / self.unit_misfit).square().clamp_max(_LARGEST_FACTOR - 1))

    @torch.no_grad()
    def initial_state(self, x: Inputs) -> Tensor:
        """Start from the reference image, after two steps with a weight six times as high.

        Aliasing in the reference looks like edges, which the energy would keep: a smoother start ends lower.
        """
        z = x[1]
        for _ in range(_START_STEPS):
            z = self._step(z, x[0], _START_FACTOR)
        return z

    def forward(self, z: Tensor, x: Inputs) -> Tensor:
        """Return the next image.

        Args:
            z: image as two channels ``(B, 2, *space)``, or ``(B, 2, M, *space)`` with map sets.
            x: the measurement, and the reference image, which only the start needs.
        """
        return self._step(z, x[0], 1.0)

    def _step(self, z: Tensor, measurement: Measurement, factor: float) -> Tensor:
        """Do a step with some times the weight."""
        with torch.autocast(z.device.type, enabled=False):  # conjugate gradients need the precision
            kernels = self.prior.kernels()
            weights = self.prior.weights(measurement.as_images(z), kernels)
            weight = factor * self.weights(measurement).to(z.dtype).view(-1, *[1] * (z.ndim - 1))
            scale = measurement.curvature.to(z.dtype).view(-1, *[1] * (z.ndim - 1))

            def system(image: Tensor, kernels: list[Tensor], weights: list[Tensor]) -> Tensor:
                data = complex_to_channels(measurement.operator.normal(channels_to_complex(image))) / scale
                smoothed = measurement.denoise(lambda u: self.prior.curvature(u, kernels, weights), image)
                return data + weight * smoothed

            target = complex_to_channels(measurement.back_projection) / scale
            with torch.no_grad():
                variables = self._preconditioner(z, measurement, weight, kernels, weights)
                left = target - system(z, kernels, weights)
                image = z + self._solve(lambda u: system(u, kernels, weights), left, variables)
            if not torch.is_grad_enabled():
                return image
            # The gradient of the solution: what is left of the equation at it is zero, and its derivative by all that
            # the equation holds, solved for, is that of the image.
            fixed = [kernel.detach() for kernel in kernels], [weight.detach() for weight in weights]
            left = target - system(image, kernels, weights)
            return image + cast(
                Tensor,
                _Solved.apply(
                    left,
                    lambda b: self._solve(lambda u: system(u, *fixed), b, variables, precise=True),
                    weight,
                    *kernels,
                    *weights,
                ),
            )

    def _preconditioner(
        self, z: Tensor, measurement: Measurement, weight: Tensor, kernels: list[Tensor], weights: list[Tensor]
    ) -> Preconditioner:
        """Return the variables in which the system at an image is solved."""
        operator, sets = measurement.operator, getattr(measurement.operator, "has_sets", False)
        prior = self.prior.diagonals(measurement.as_images(z), kernels, weights)
        one = z.new_ones([1] * (z.ndim - 1))
        known = operator.normal_diagonals() if isinstance(operator, MRIOperator) else (one, one)
        pixels, frequencies = (
            data / _per_sample(measurement.curvature, data)
            + _per_sample(weight, data) * (own.unflatten(0, (len(z), -1)) if sets else own)
            for data, own in zip(known, prior, strict=True)
        )
        return Preconditioner(pixels.to(z.dtype), frequencies.to(z.dtype), z.ndim - 2 - sets)

    def _solve(
        self, matrix: Callable[[Tensor], Tensor], b: Tensor, variables: Preconditioner, *, precise: bool = False
    ) -> Tensor:
        """Solve by conjugate gradients; each sample takes steps until its own residual is small."""
        factor, rtol = (5, self.cg_rtol**2) if precise else (1, self.cg_rtol)
        solver, target = ConjugateGradientSolver(), variables.adjoint(b).flatten(1)
        limit = max(rtol, 10 * torch.finfo(b.dtype).eps) * target.norm(dim=1)
        state = solver.init(torch.zeros_like(target), target)
        found, runs = state.x, limit > 0
        # The last iterate counts, not that of the smallest residual, which `solve_linear` returns: it is the one of the
        # lowest energy, while the residual may rise for more steps than are taken here.
        for _ in range(factor * self.cg_max_iter):
            if not bool(runs.any()):
                break
            state = solver.step(
                lambda row: variables.adjoint(matrix(variables.to_image(row.view(b.shape)))).flatten(1), state
            )
            found = torch.where(runs[:, None], state.x, found)
            runs = runs & (state.residual.norm(dim=1) > limit)
        return variables.to_image(found.view(b.shape))

    def energy(self, image: Tensor, measurement: Measurement, kspace: Tensor) -> Tensor:
        r"""Return :math:`E` of images, ``(B,)``.

        Args:
            image: as ``z`` of :meth:`forward`.
            measurement: the batch's measurement.
            kspace: the k-space that it was made of, complex ``(B, K, *space)``.
        """
        misfit = measurement.operator.forward(channels_to_complex(image)) - kspace
        data = misfit.abs().square().flatten(1).sum(dim=1) / (2 * measurement.curvature)
        prior = self.prior.energy(measurement.as_images(image)).view(len(image), -1).sum(dim=1)
        return data + self.weights(measurement) * prior

    @torch.jit.unused
    def certified_contraction(self, x: Inputs | None = None) -> ContractionBound:
        """Say that nothing is certified."""
        return ContractionBound(
            math.inf,
            (
                "ReweightedCell has no certified contraction: its energy may have several stationary points. No step "
                "raises the energy; look at each solve's residual and status.",
            ),
        )


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Return one value of each sample with as many axes as ``like``."""
    return values.view(-1, *[1] * (like.ndim - 1))


class _Solved(torch.autograd.Function):
    """Zero, with the gradient of ``M^-1 b`` for a self-adjoint matrix, which is made of some tensors."""

    @staticmethod
    def forward(ctx: Any, b: Tensor, solve: Callable[[Tensor], Tensor], *made_of: Tensor) -> Tensor:
        ctx.solve = solve
        ctx.save_for_backward(*made_of)
        return torch.zeros_like(b)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        made_of = ctx.saved_tensors
        marks = [_WithoutDerivative.apply(tensor) for tensor in made_of] if torch.is_grad_enabled() else []
        found = cast(Tensor, _SolvedFor.apply(gradients[0], ctx.solve, *marks))
        return found, None, *[None] * len(made_of)


class _SolvedFor(torch.autograd.Function):
    """``M^-1 b``, to be derived by ``b``; what the matrix is made of gets zeros."""

    @staticmethod
    def forward(ctx: Any, b: Tensor, solve: Callable[[Tensor], Tensor], *made_of: Tensor) -> Tensor:
        ctx.solve = solve
        ctx.save_for_backward(*made_of)
        with torch.no_grad():
            return solve(b)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            found = ctx.solve(gradients[0])
        return found, None, *[torch.zeros_like(tensor) for tensor in ctx.saved_tensors]


class _WithoutDerivative(torch.autograd.Function):
    """A tensor by which nothing can be derived: who tries is told why."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise NotImplementedError(
            "ReweightedCell has first derivatives only, and a Jacobian penalty derives them again. Train it with the "
            "penalty's weight at 0: no step raises its energy, so it needs none. Or take another form."
        )
