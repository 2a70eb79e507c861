"""The published steps of equilibrium reconstruction: DE-Prox, DE-Grad, and DE-CG. They need not contract."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from monai_deqkan._checks import check_int, check_range
from monai_deqkan.networks.blocks.data_consistency import Measurement, gradient_step, proximal_step
from monai_deqkan.networks.blocks.deq_cell import CertifiedMap, ContractionBound
from monai_deqkan.networks.layers.positive import positive, raw_of_positive

__all__ = ["ConjugateGradientCell", "GradientCell", "ProximalCell"]

Inputs = tuple[Measurement, Tensor]


class _PriorCell(nn.Module):
    """What the cells share: a prior, which may ask for the noise level, and the start.

    Args:
        prior: denoiser ``D`` of two channels ``(B, 2, *space)``; with an attribute ``takes_noise_level`` that is true
            it is called as ``D(image, noise_level)`` with a learned level.
        noise_level: that level to start from, in the unit of the normalized image.
    """

    def __init__(self, prior: Callable[..., Tensor], noise_level: float = 0.1) -> None:
        super().__init__()
        check_range("noise_level", noise_level, 0.0, open_low=True)
        if not callable(prior):
            raise TypeError(f"`prior` must be a module on two channels; got {type(prior).__name__}.")
        self.prior = prior
        self.raw_noise_level: nn.Parameter | None = None
        if getattr(prior, "takes_noise_level", False):
            self.raw_noise_level = nn.Parameter(raw_of_positive(noise_level))

    def initial_state(self, x: Inputs) -> Tensor:
        """Start from the reference image."""
        return x[1]

    @property
    def noise_level(self) -> Tensor | None:
        """The learned noise level of a prior that asks for one; its unit is that of the normalized image."""
        return None if self.raw_noise_level is None else positive(self.raw_noise_level)

    def denoise(self, image: Tensor, measurement: Measurement) -> Tensor:
        """Apply the prior to ``(B, 2, *space)``, or to each map set's image of ``(B, 2, M, *space)``."""
        level = self.noise_level
        return measurement.denoise(self.prior if level is None else lambda x: self.prior(x, level), image)

    @torch.jit.unused
    def certified_contraction(self, x: Inputs | None = None) -> ContractionBound:
        """Say that nothing is certified."""
        return ContractionBound(
            math.inf,
            (
                f"{type(self).__name__} has no certified contraction: its equilibrium need not exist or be unique. "
                "Look at each solve's residual and status.",
            ),
        )


class ProximalCell(_PriorCell):
    r"""DE-Prox: a gradient step on the data, then the denoiser, relaxed.

    .. math:: f(x) = (1 - \theta)\, x + \theta\, D\big(x - \tfrac{s}{L} (A^H A x - A^H y)\big)

    with learned :math:`0 < s < 2` and :math:`0 < \theta < 1`. The relaxation changes the way to the fixed point, not
    the fixed point.

    Args:
        prior: see :class:`ConjugateGradientCell`.
        noise_level: see :class:`ConjugateGradientCell`.

    Reference:
        D. Gilton, G. Ongie and R. Willett, "Deep equilibrium architectures for inverse problems in imaging", IEEE
        Trans. Comput. Imaging 7 (2021) 1123-1133. They have no relaxation and one step size per network. Their
        convergence theorem needs a positive smallest eigenvalue of :math:`A^H A`, which undersampled MRI denies:
        :class:`ReconstructionCell` is the form that contracts without it.
    """

    def __init__(self, prior: Callable[..., Tensor], noise_level: float = 0.1) -> None:
        super().__init__(prior, noise_level)
        self.raw_step_size = nn.Parameter(torch.tensor(0.0))
        self.raw_relaxation = nn.Parameter(torch.tensor(2.0))

    @property
    def step_size(self) -> Tensor:
        """The step size :math:`s` in units of :math:`1 / L`, in ``(0, 2)``."""
        return 2 * torch.sigmoid(self.raw_step_size)

    @property
    def relaxation(self) -> Tensor:
        r"""The share :math:`\theta` of the step, in ``(0, 1)``."""
        return torch.sigmoid(self.raw_relaxation)

    def forward(self, z: Tensor, x: Inputs) -> Tensor:
        """Return the next image; shapes as in :meth:`ConjugateGradientCell.forward`."""
        return torch.lerp(z, self.denoise(gradient_step(z, x[0], self.step_size), x[0]), self.relaxation)


class GradientCell(_PriorCell):
    r"""DE-Grad: a gradient step on the data and on the prior.

    .. math:: f(x) = x - \eta \big[ \tfrac1L (A^H A x - A^H y) + \lambda\, (x - D(x)) \big],
              \qquad 0 < \eta < \tfrac{1}{1 + \lambda}

    with learned :math:`\eta` and :math:`\lambda > 0`. Where :math:`D` has Lipschitz constant :math:`\epsilon`, it
    contracts with factor :math:`1 - \eta\,(\mu + \lambda (1 - \epsilon))`, :math:`\mu` the smallest eigenvalue of
    :math:`A^H A / L`; also at :math:`\mu = 0`, if :math:`\epsilon < 1`.

    Args:
        prior: see :class:`ConjugateGradientCell`.
        noise_level: see :class:`ConjugateGradientCell`.
        weight: :math:`\lambda` to start from, dimensionless.

    Reference:
        Gilton et al., as in :class:`ProximalCell`; there :math:`\lambda = 1`.
    """

    def __init__(self, prior: Callable[..., Tensor], noise_level: float = 0.1, weight: float = 0.3) -> None:
        super().__init__(prior, noise_level)
        self.raw_weight = nn.Parameter(raw_of_positive(check_range("weight", weight, 0.0, open_low=True)))
        self.raw_step_size = nn.Parameter(torch.tensor(4.0))

    @property
    def weight(self) -> Tensor:
        r"""The weight :math:`\lambda` of the prior, positive."""
        return positive(self.raw_weight)

    @property
    def step_size(self) -> Tensor:
        r"""The step size :math:`\eta` in units of :math:`1 / L`, in :math:`(0, 1 / (1 + \lambda))`."""
        return torch.sigmoid(self.raw_step_size) / (1 + self.weight)

    def forward(self, z: Tensor, x: Inputs) -> Tensor:
        """Return the next image; shapes as in :meth:`ConjugateGradientCell.forward`."""
        step_size = self.step_size
        return gradient_step(z, x[0], step_size) - step_size * self.weight * (z - self.denoise(z, x[0]))


class ConjugateGradientCell(_PriorCell):
    r"""DE-CG: the denoiser, then the image near it that fits the data best, by conjugate gradients.

    .. math:: f(x) = (A^H A + \lambda L)^{-1} \big(A^H y + \lambda L\, D(x)\big)

    with a learned :math:`\lambda > 0`. What was measured is taken at its word to the degree that :math:`\lambda` is
    small; the denoiser decides the rest. It needs fewer evaluations than the gradient forms.

    With ``contraction`` it contracts for any mask: as the data consistency is nonexpansive, a prior of certified
    Lipschitz constant :math:`\ell \le 1` and a constant reference image make

    .. math:: f(x) = (1 - \rho)\, x_\mathrm{ref} + \rho\, (A^H A + \lambda L)^{-1} \big(A^H y + \lambda L\, D(x)\big),
              \qquad \rho\,\ell \le c < 1.

    Args:
        prior: denoiser :math:`D` of two channels ``(B, 2, *space)``. One with an attribute ``takes_noise_level`` that
            is true is called with a learned noise level.
        noise_level: that level to start from, in the unit of the normalized image.
        weight: :math:`\lambda` to start from, dimensionless.
        contraction: bound :math:`c` of the contraction factor, in ``(0, 1)``; None for none.
        cg_rtol: relative tolerance of the conjugate gradients, against what they have to add to :math:`D(x)`; in
            float64, where one wants solutions beyond float32's reach, its square. None takes 1e-4, and 1e-6 with
            ``contraction``, whose proof is about exact data consistency.
        cg_max_iter: most iterations of the conjugate gradients; five times as many in float64. None takes 20, and 100
            with ``contraction``.

    Raises:
        ValueError: for a number out of range, or if ``contraction`` is asked for with a prior that is not certified.

    Reference:
        H. K. Aggarwal, M. P. Mani and M. Jacob, "MoDL: model-based deep learning architecture for inverse problems",
        IEEE Trans. Med. Imaging 38 (2019) 394-405 (the step, unrolled a few times); at its equilibrium: Gilton et al.,
        as in :class:`ProximalCell`, there by ADMM.
    """

    def __init__(
        self,
        prior: Callable[..., Tensor],
        noise_level: float = 0.1,
        weight: float = 0.03,
        *,
        contraction: float | None = None,
        cg_rtol: float | None = None,
        cg_max_iter: int | None = None,
    ) -> None:
        super().__init__(prior, noise_level)
        self.raw_weight = nn.Parameter(raw_of_positive(check_range("weight", weight, 0.0, open_low=True)))
        usual_rtol, usual_iterations = (1e-4, 20) if contraction is None else (1e-6, 100)
        self.cg_rtol = check_range("cg_rtol", usual_rtol if cg_rtol is None else cg_rtol, 0.0, open_low=True)
        self.cg_max_iter = check_int("cg_max_iter", usual_iterations if cg_max_iter is None else cg_max_iter)
        self.contraction = contraction
        if contraction is not None:
            check_range("contraction", contraction, 0.0, 1.0, open_low=True, open_high=True)
            if not isinstance(prior, CertifiedMap) or not math.isfinite(float(prior.certified_lipschitz())):
                raise ValueError(
                    "`contraction` needs a prior with a certified Lipschitz constant, such as ConvexRidgeDenoiser or "
                    "`DnCNN(..., spectral_norm='certified')`. Leave it out, or change the prior."
                )
            # As little of the reference as the contraction allows: its aliasing would stay in the image.
            self.raw_reference = nn.Parameter(torch.tensor(8.0))

    @property
    def weight(self) -> Tensor:
        r"""The weight :math:`\lambda` of the prior against the data, positive."""
        return positive(self.raw_weight)

    @property
    def step_weight(self) -> Tensor:
        r"""The weight :math:`\rho` of the step against the reference image; 1 without ``contraction``."""
        if self.contraction is None:
            return torch.ones_like(self.raw_weight)
        lipschitz = max(float(cast(CertifiedMap, self.prior).certified_lipschitz()), 1.0)
        return self.contraction * torch.sigmoid(self.raw_reference) / lipschitz

    def cg_limits(self, dtype: torch.dtype) -> tuple[float, int]:
        """Return tolerance and most iterations of the conjugate gradients for images of a dtype."""
        rounding = 10 * torch.finfo(dtype).eps
        if dtype == torch.float64:
            return max(self.cg_rtol**2, rounding), 5 * self.cg_max_iter
        return max(self.cg_rtol, rounding), self.cg_max_iter

    @torch.no_grad()
    def cg_error(self, dtype: torch.dtype) -> float:
        r"""Bound what the conjugate gradients leave of their change, relative to it and up to rounding.

        It is :math:`\kappa \max(\tau, 2 q^k)` with tolerance :math:`\tau`, :math:`k` iterations at most, the condition
        number :math:`\kappa \le (1 + \lambda) / \lambda` and :math:`q = (\sqrt\kappa - 1) / (\sqrt\kappa + 1)`: the
        residual ends below :math:`\tau` or, by Chebyshev's bound, :math:`2 q^k` times the largest eigenvalue times the
        change, and the error is at most the residual over the smallest eigenvalue.
        """
        rtol, max_iter = self.cg_limits(dtype)
        condition = 1 + 1 / float(self.weight)
        rate = (condition**0.5 - 1) / (condition**0.5 + 1)
        return condition * max(rtol, 2 * rate**max_iter)

    def forward(self, z: Tensor, x: Inputs) -> Tensor:
        """Return the next image.

        Args:
            z: image as two channels ``(B, 2, *space)``, or ``(B, 2, M, *space)`` with map sets.
            x: the measurement, and the reference image of the shape of ``z``.
        """
        measurement, reference = x
        rtol, max_iter = self.cg_limits(z.dtype)
        image = proximal_step(self.denoise(z, measurement), measurement, self.weight, rtol=rtol, max_iter=max_iter)
        return image if self.contraction is None else torch.lerp(reference, image, self.step_weight)

    @torch.jit.unused
    @torch.no_grad()
    def certified_contraction(self, x: Inputs | None = None) -> ContractionBound:
        """Return the product of the bounds of the step's parts; infinite without ``contraction``.

        It is the factor of the step with an exact solve; :meth:`cg_error` tells what the conjugate gradients leave.
        """
        if self.contraction is None:
            return super().certified_contraction(x)
        lipschitz, weight = float(cast(CertifiedMap, self.prior).certified_lipschitz()), float(self.step_weight)
        return ContractionBound(
            weight * lipschitz,
            (
                f"The prior's certified Lipschitz constant is {lipschitz:.4g}, as {type(self.prior).__name__} states.",
                "The data consistency, solved exactly, is nonexpansive for any mask. Conjugate gradients leave a part "
                f"of {self.cg_error(self.raw_weight.dtype):.1g} of its change at most.",
                f"The step is weighted by {weight:.4g} against the reference image.",
            ),
        )
