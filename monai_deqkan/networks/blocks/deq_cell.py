"""Cells ``f(z, x)`` that contract by construction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from monai_deqkan._checks import check_choice, check_int, check_range, check_tensor
from monai_deqkan.networks.blocks.data_consistency import Measurement, gradient_step
from monai_deqkan.networks.layers.kan_conv import KAN_CONVOLUTIONS
from monai_deqkan.networks.layers.kan_linear import KANLinear
from monai_deqkan.networks.layers.kan_norm import SILU_MAX_SLOPE, kan_lipschitz_bound, operator_norm
from monai_deqkan.networks.layers.lipschitz import CertifiedSpectralNorm, certified_spectral_norm

__all__ = ["CertifiedCell", "CertifiedMap", "ContractionBound", "KANCell", "MLPCell", "ReconstructionCell"]


@runtime_checkable
class CertifiedMap(Protocol):
    """A module that knows an upper bound of its own Lipschitz constant in the Euclidean norm."""

    def certified_lipschitz(self) -> float:
        """Return the bound; infinite where there is none."""

    def __call__(self, image: Tensor) -> Tensor:
        """Map ``(B, C, *space)`` to the same shape."""


@dataclass(frozen=True)
class ContractionBound:
    """What a cell can guarantee of itself.

    Attributes:
        factor: upper bound of the Lipschitz constant of ``z -> cell(z, x)`` in the Euclidean norm of the whole state
            of a sample, dimensionless; infinite where there is none.
        assumptions: what it rests on, in plain sentences with numbers.
    """

    factor: float
    assumptions: tuple[str, ...]


@runtime_checkable
class CertifiedCell(Protocol):
    """A cell that knows an upper bound of its own contraction factor."""

    def certified_contraction(self, x: Any = None) -> ContractionBound:
        """Return the bound for its present weights.

        Args:
            x: per-sample data that the cell would be given; None where the bound shall hold for any.
        """


class KANCell(nn.Module):
    r"""A Kolmogorov-Arnold cell with a unique equilibrium for every injection.

    .. math:: f(z, x) = x + \kappa\, \frac{\mathrm{KAN}(z)}{L(\mathrm{KAN})}

    with :math:`L` a certified Lipschitz bound of the KAN layer in the Euclidean norm. ``f`` contracts in ``z``
    with factor :math:`\kappa < 1`, so fixed-point iteration converges from anywhere, and
    :math:`\|(I - J)^{-1}\| \le 1 / (1 - \kappa)` bounds the gradient.

    Args:
        features: number of features :math:`F` of the state.
        contraction: :math:`\kappa`, dimensionless, in ``(0, 1)``.
        spatial_dims: 0 for states ``(B, F)``; 1, 2 or 3 for maps ``(B, F, *space)``, whose KAN layer is a convolution.
        kernel_size: odd size of that convolution. With 1 every place has an equilibrium of its own; the bound of a
            larger one is searched over its frequencies, which takes longer.
        kan_settings: further settings of the :class:`~monai_deqkan.networks.layers.KANLinear` or ``KANConv``.

    Raises:
        ValueError: if ``contraction`` lies outside ``(0, 1)``, or ``kernel_size`` is even.

    Reference:
        The recurrence in the project's founding proposal (no public reference), :math:`z + p + \mathrm{KAN}(z + p)`
        with a residual KAN, has a spectral radius of about 2 and so no fixed point to find. Here the residual terms are
        left out and the KAN is normalized. For the existence and the bound see E. Winston and J. Z. Kolter, "Monotone
        operator equilibrium networks", NeurIPS 2020, who constrain a linear layer.
    """

    def __init__(
        self,
        features: int,
        *,
        contraction: float = 0.9,
        spatial_dims: int = 0,
        kernel_size: int = 1,
        kan_settings: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.contraction = check_range("contraction", contraction, 0.0, 1.0, open_low=True, open_high=True)
        check_choice("spatial_dims", spatial_dims, (0, *KAN_CONVOLUTIONS))
        padding = _same_padding(kernel_size)
        settings = {"bias": False, **(kan_settings or {})}
        layer: nn.Module
        if spatial_dims:
            layer = KAN_CONVOLUTIONS[spatial_dims](features, features, kernel_size, padding=padding, **settings)
        else:
            layer = KANLinear(features, features, **settings)
        self.kan = certified_spectral_norm(layer, bound=self.contraction)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Return the next state.

        Args:
            z: state ``(B, F, *space)``, without space if ``spatial_dims`` is 0.
            x: injection of the same shape.
        """
        return x + self.kan(z)

    @torch.jit.unused
    @torch.no_grad()
    def certified_contraction(self, x: Any = None) -> ContractionBound:
        """Return the certified Lipschitz bound of the KAN layer with its present weights; it holds for any ``x``."""
        factor = float(kan_lipschitz_bound(self.kan))
        kept = "kept so by certified_spectral_norm" if _is_normalized(self.kan) else "not kept in training"
        return ContractionBound(factor, (f"The KAN layer's certified Lipschitz bound is {factor:.4g}: {kept}.",))


class MLPCell(nn.Module):
    r"""The counterpart of :class:`KANCell` without a KAN: one hidden layer, normalized in the same way.

    .. math::
        f(z, x) = x + \kappa\, \frac{W_2}{\|W_2\|}\, \frac{1}{\sigma}\,
        \mathrm{silu}\!\left(\frac{W_1}{\|W_1\|} z + b\right), \qquad \sigma = \max \mathrm{silu}' = 1.0998

    with certified norms, so it contracts with factor :math:`\kappa`. For comparison: what do the functions on the
    edges add?

    Args:
        features: number of features :math:`F` of the state.
        hidden_features: width of the hidden layer.
        contraction: :math:`\kappa`, dimensionless, in ``(0, 1)``.
        spatial_dims: 0 for states ``(B, F)``; 1, 2 or 3 for maps ``(B, F, *space)``.
        kernel_size: odd kernel size of the first layer on maps; the second one's is 1.

    Raises:
        ValueError: if ``contraction`` lies outside ``(0, 1)``, or ``kernel_size`` is even.
    """

    def __init__(
        self,
        features: int,
        hidden_features: int,
        *,
        contraction: float = 0.9,
        spatial_dims: int = 0,
        kernel_size: int = 1,
    ) -> None:
        super().__init__()
        self.contraction = check_range("contraction", contraction, 0.0, 1.0, open_low=True, open_high=True)
        check_choice("spatial_dims", spatial_dims, (0, *KAN_CONVOLUTIONS))
        check_int("hidden_features", hidden_features)
        padding = _same_padding(kernel_size)
        first: nn.Module
        second: nn.Module
        if spatial_dims:
            convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial_dims - 1]
            first = convolution(features, hidden_features, kernel_size, padding=padding)
            second = convolution(hidden_features, features, 1, bias=False)
        else:
            first, second = nn.Linear(features, hidden_features), nn.Linear(hidden_features, features, bias=False)
        self.first = certified_spectral_norm(first, bound=1 / SILU_MAX_SLOPE)
        self.second = certified_spectral_norm(second, bound=self.contraction)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Return the next state; shapes as in :meth:`KANCell.forward`."""
        return x + self.second(nn.functional.silu(self.first(z)))

    @torch.jit.unused
    @torch.no_grad()
    def certified_contraction(self, x: Any = None) -> ContractionBound:
        """Return the product of the bounds of both layers and the activation; it holds for any ``x``."""
        norms = [_linear_bound(layer) for layer in (self.first, self.second)]
        kept = all(map(_is_normalized, (self.first, self.second)))
        return ContractionBound(
            norms[0] * SILU_MAX_SLOPE * norms[1],
            (
                f"The layers' certified norms are {norms[0]:.4g} and {norms[1]:.4g}, SiLU's steepest slope is "
                f"{SILU_MAX_SLOPE:.4g}: {'kept so by certified_spectral_norm' if kept else 'not kept in training'}.",
            ),
        )


class ReconstructionCell(nn.Module):
    r"""One step of an equilibrium reconstruction that contracts for any sampling mask.

    .. math::
        v = x - \tfrac{s}{L}\, (A^H A x - A^H y), \qquad
        f(x) = (1 - \rho)\, x_\mathrm{ref} + \rho\, \big[(1 - \theta)\, v + \theta\, Q(v)\big]

    with a prior :math:`Q` of certified Lipschitz constant :math:`\ell`, a constant reference image
    :math:`x_\mathrm{ref}`, and learned :math:`0 < s < 2`, :math:`0 < \theta < 1` and
    :math:`0 < \rho\,(1 - \theta + \theta \ell) < c`, where :math:`c < 1` is the certified contraction factor.

    Args:
        prior: module :math:`Q` on two channels ``(B, 2, *space)`` with a method ``certified_lipschitz()``.
        contraction: bound :math:`c` of the contraction factor, dimensionless, in ``(0, 1)``.

    Raises:
        ValueError: if ``contraction`` lies outside ``(0, 1)``, or the prior has no finite certified constant.
        TypeError: if the prior cannot tell its constant.

    Reference:
        D. Gilton, G. Ongie and R. Willett, "Deep equilibrium architectures for inverse problems in imaging", IEEE
        Trans. Comput. Imaging 7 (2021) 1123-1133 (DE-Prox). Their convergence theorem needs the smallest
        eigenvalue of :math:`A^H A` to be positive, which undersampled MRI denies; the relaxation by :math:`\theta` and
        the reference image make this form contract without it.
    """

    def __init__(self, prior: CertifiedMap, *, contraction: float = 0.98) -> None:
        super().__init__()
        self.contraction = check_range("contraction", contraction, 0.0, 1.0, open_low=True, open_high=True)
        if not isinstance(prior, CertifiedMap):
            raise TypeError(
                f"The prior must have a method `certified_lipschitz()`; {type(prior).__name__} has none. Use "
                "`ConvexRidgeDenoiser` or `DnCNN(..., spectral_norm='certified')`, or a form without a certificate "
                "such as 'cg'."
            )
        if not math.isfinite(float(prior.certified_lipschitz())):
            raise ValueError(
                "The prior has no finite certified Lipschitz constant, so the equilibrium need not exist. Build it "
                "with `spectral_norm='certified'`."
            )
        self.prior: CertifiedMap = prior
        # Unconstrained parameters; the properties below map them into their intervals.
        self.raw_step_size = nn.Parameter(torch.tensor(0.0))
        self.raw_relaxation = nn.Parameter(torch.tensor(0.0))
        self.raw_weight = nn.Parameter(torch.tensor(3.0))

    @property
    def step_size(self) -> Tensor:
        """The step size :math:`s` in units of :math:`1 / L`, in ``(0, 2)``."""
        return 2 * torch.sigmoid(self.raw_step_size)

    @property
    def relaxation(self) -> Tensor:
        r"""The share :math:`\theta` of the prior, in ``(0, 1)``."""
        return torch.sigmoid(self.raw_relaxation)

    @property
    def weight(self) -> Tensor:
        r"""The weight :math:`\rho` of the step against the reference image, in ``(0, 1)``."""
        lipschitz = 1 - self.relaxation + self.relaxation * float(self.prior.certified_lipschitz())
        return self.contraction * torch.sigmoid(self.raw_weight) / lipschitz.clamp_min(1.0)

    def initial_state(self, x: tuple[Measurement, Tensor]) -> Tensor:
        """Start from the reference image."""
        return x[1]

    def forward(self, z: Tensor, x: tuple[Measurement, Tensor]) -> Tensor:
        """Return the next image.

        Args:
            z: image as two channels ``(B, 2, *space)``.
            x: the measurement, and the reference image as two channels ``(B, 2, *space)``.
        """
        measurement, reference = x
        v = gradient_step(z, measurement, self.step_size)
        step = torch.lerp(v, measurement.denoise(self.prior, v), self.relaxation)
        return torch.lerp(reference, step, self.weight)

    @torch.jit.unused
    @torch.no_grad()
    def certified_contraction(self, x: tuple[Measurement, Tensor] | None = None) -> ContractionBound:
        """Return the product of the bounds of the step's parts; with ``x`` its measurement is checked, too."""
        lipschitz = float(self.prior.certified_lipschitz())
        step_size, relaxation, weight = float(self.step_size), float(self.relaxation), float(self.weight)
        layers = [part for part in _modules(self.prior) if "weight" in part._parameters or _is_normalized(part)]
        descent, measured = 1.0, "the norm of A is not checked"
        norm_bound = None if x is None else getattr(x[0].operator, "norm_bound", None)
        if x is not None and norm_bound is not None:
            ratio = float((norm_bound.square() / x[0].curvature).max())
            descent, measured = max(1.0, step_size * ratio - 1.0), f"sum |S|^2 / L is {ratio:.4g} at most (checked)"
        return ContractionBound(
            weight * descent * (1 - relaxation + relaxation * lipschitz),
            (
                f"The prior's certified Lipschitz constant is {lipschitz:.4g}, as {type(self.prior).__name__} states; "
                f"{sum(map(_is_normalized, layers))} of its {len(layers)} layers are kept normalized.",
                f"The gradient step of size s / L with s = {step_size:.4g} has factor {descent:.4g}; {measured}.",
                f"The step is relaxed by {relaxation:.4g} and weighted by {weight:.4g} against the reference image.",
            ),
        )


def _same_padding(kernel_size: int) -> int:
    if check_int("kernel_size", kernel_size) % 2 == 0:
        raise ValueError(f"`kernel_size` must be odd, so that maps keep their size; got {kernel_size}.")
    return kernel_size // 2


def _linear_bound(layer: Any) -> float:
    norm, weight = operator_norm(layer), check_tensor("layer.weight", layer.weight)
    return norm.find_peak(weight).bound


def _is_normalized(part: nn.Module) -> bool:
    lists = getattr(part, "parametrizations", {})
    return "weight" in lists and any(isinstance(norm, CertifiedSpectralNorm) for norm in lists["weight"])


def _modules(module: Any) -> list[nn.Module]:
    return list(module.modules()) if isinstance(module, nn.Module) else []
