"""What all KAN layers share: features, one packed weight, initialization, and a gradient that recomputes features."""

# No postponed annotations here: torch.jit.script cannot read them on methods that it leaves out.

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from monai_deqkan._checks import check_choice
from monai_deqkan.networks.layers.basis import Basis

__all__ = ["Contraction", "FeatureMap", "KANLayer"]


@dataclass(frozen=True)
class FeatureMap:
    """What a layer computes from its input before it contracts: the base term if there is one, then the basis.

    Args:
        basis: the functions.
        has_base: whether feature 0 is SiLU.
        offsets: one number per basis function that is subtracted from it, or nothing.
    """

    basis: Basis
    has_base: bool
    offsets: tuple[float, ...] = ()

    def fill(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the features of ``x`` ``(N, C, *)`` as ``(N, F, C, *)`` in ``dtype``, outside of autograd."""
        base = int(self.has_base)
        features = x.new_empty((x.shape[0], base + self.basis.num_basis, *x.shape[1:]), dtype=dtype)
        if base:
            features[:, 0].copy_(F.silu(x))
        self.basis.fill(_flat(x), features[:, base:].flatten(2))
        for k, offset in enumerate(self.offsets):
            if offset != 0.0:
                features[:, base + k].sub_(offset)
        return features

    def pull_back(self, x: Tensor, grad: Tensor) -> Tensor:
        """Turn the gradient with respect to the features into the one with respect to ``x``."""
        base = int(self.has_base)
        result = self.basis.pull_back(_flat(x), grad[:, base:].flatten(2)).view_as(x)
        if base:
            result += torch.ops.aten.silu_backward(grad[:, 0].to(x.dtype), x)
        return result

    def plain(self, x: Tensor) -> Tensor:
        """Return the features by differentiable operations."""
        values = self.basis.values(x, dim=1)
        if self.offsets:
            shape = (1, -1, *[1] * (x.dim() - 1))
            values = values - torch.tensor(self.offsets, dtype=x.dtype, device=x.device).view(shape)
        return torch.cat((F.silu(x).unsqueeze(1), values), dim=1) if self.has_base else values


def _flat(x: Tensor) -> Tensor:
    return x.contiguous().view(x.shape[0], math.prod(x.shape[1:]))


class Contraction(ABC):
    """The linear map from features ``(N, F, C, *)`` to the output, with the packed weight; immutable."""

    @abstractmethod
    def forward(self, features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Contract."""

    @abstractmethod
    def grad_weight(self, features: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient with respect to ``weight``; its values are not used."""

    @abstractmethod
    def grad_features(self, shape: torch.Size, weight: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient with respect to features of the given shape."""

    @abstractmethod
    def grad_bias(self, grad: Tensor) -> Tensor:
        """Return the gradient with respect to the bias."""


class _Recomputed(torch.autograd.Function):
    """Features and contraction as one node that keeps the input, not the features: an F-th of the memory."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        features: FeatureMap,
        contraction: Contraction,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.parts = features, contraction, dtype
        with torch.autocast(x.device.type, enabled=False):
            return contraction.forward(features.fill(x, dtype), weight.to(dtype), _cast(bias, dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight, bias = ctx.saved_tensors
        features, contraction, dtype = ctx.parts
        needs = ctx.needs_input_grad[:3]
        result: list[Tensor | None] = [None, None, None]
        with torch.autocast(x.device.type, enabled=False):
            if torch.is_grad_enabled():  # somebody will differentiate this gradient
                plain = contraction.forward(features.plain(x).to(dtype), weight.to(dtype), _cast(bias, dtype))
                wanted = [t for t, need in zip((x, weight, bias), needs, strict=True) if need]
                found = iter(torch.autograd.grad(plain, wanted, grad, create_graph=True))
                return (*(next(found) if need else None for need in needs), None, None, None)
            grad = grad.to(dtype)
            shape = torch.Size((x.shape[0], features.basis.num_basis + int(features.has_base), *x.shape[1:]))
            if needs[1]:
                result[1] = contraction.grad_weight(features.fill(x, dtype), weight.to(dtype), grad).to(weight.dtype)
            if needs[0]:
                result[0] = features.pull_back(x, contraction.grad_features(shape, weight.to(dtype), grad)).to(x.dtype)
            if needs[2]:
                result[2] = contraction.grad_bias(grad).to(bias.dtype)
        return (*result, None, None, None)


def _cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)


def _recomputed(
    x: Tensor, weight: Tensor, bias: Tensor | None, features: FeatureMap, contraction: Contraction, dtype: torch.dtype
) -> Tensor:
    """Apply the node; a tensor subclass such as MONAI's MetaTensor keeps its class and metadata."""
    if has_torch_function((x, weight)):
        return handle_torch_function(_recomputed, (x, weight), x, weight, bias, features, contraction, dtype)
    return _Recomputed.apply(x, weight, bias, features, contraction, dtype)


class KANLayer(nn.Module):
    r"""Base class of the layers whose every weight is a function of one variable.

    A subclass makes ``weight`` of shape ``(out, F * in, *kernel)`` with the :math:`F` features in the outer place:
    SiLU first, if there is a base term, then the :math:`K` functions of the basis. It computes by `_contract` where
    operations must be ordinary ones, and by `_evaluate` elsewhere.

    Args:
        basis: the functions.
        base_activation: ``"silu"`` or ``None`` for no base term.

    Attributes:
        basis: the functions, a settings object.
        base_activation: name of the base term's function, or ``None``.

    Raises:
        ValueError: if ``base_activation`` is unknown.
    """

    weight: Tensor
    bias: Tensor | None
    __jit_unused_properties__: ClassVar[list[str]] = ["num_features", "coefficients", "base_weight"]

    def __init__(self, basis: Basis, base_activation: str | None) -> None:
        super().__init__()
        self.base_activation = check_choice("base_activation", base_activation, ("silu", None))
        self.basis = basis
        self.basis_values = basis.module()
        self.has_base = base_activation is not None

    @property
    def num_features(self) -> int:
        """Number of features per input channel: ``num_basis``, and one more with a base term."""
        return self.basis.num_basis + int(self.has_base)

    @property
    def coefficients(self) -> Tensor:
        """Coefficients of the basis, a view of ``weight`` of shape ``(out, K, in, *kernel)``."""
        return self._unpacked()[:, int(self.has_base) :]

    @property
    def base_weight(self) -> Tensor | None:
        """Weights of the base term, a view of ``weight`` of shape ``(out, in, *kernel)``; ``None`` without one."""
        return self._unpacked()[:, 0] if self.has_base else None

    def _unpacked(self) -> Tensor:
        weight = self.weight
        return weight.unflatten(1, (self.num_features, weight.shape[1] // self.num_features))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        r"""Draw new weights, such that inputs from :math:`N(0, 1)` give outputs of mean square 1; zero the bias.

        With independent weights of mean zero the output's mean square is the sum of those of its terms,
        :math:`n\,(\sigma_b^2\, E[\mathrm{silu}^2] + \sigma_c^2 \sum_k E[B_k^2])` with :math:`n` inputs times kernel
        elements. Base term and basis get one half each, or the basis gets all; the expectations are computed
        numerically. Where hardly any of :math:`N(0, 1)` lies on the grid, inputs are taken as uniform on the grid.
        """
        fan_in = self._unpacked()[0, 0].numel()
        share = 0.5 if self.has_base else 1.0
        base, spline = _second_moments(self.basis)
        nn.init.normal_(self.coefficients, std=math.sqrt(share / (fan_in * spline)))
        if self.base_weight is not None:
            nn.init.normal_(self.base_weight, std=math.sqrt(share / (fan_in * base)))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def edge_functions(self, points: Tensor) -> Tensor:
        """Evaluate the learned function on each edge, bias left out, for plots and analysis.

        Args:
            points: inputs, shape ``(P,)``.

        Returns:
            Shape ``(P, out, in)`` for a linear layer, ``(P, out, in / groups, *kernel)`` for a convolution.

        Raises:
            ValueError: if ``points`` has not one axis.
        """
        if points.dim() != 1:
            raise ValueError(f"`points` must have shape (P,); got {tuple(points.shape)}. Flatten it.")
        features = FeatureMap(self.basis, self.has_base).plain(points[:, None])[..., 0]  # (P, F)
        return torch.tensordot(features, self._unpacked(), dims=([1], [1]))

    def _plain_features(self, x: Tensor) -> Tensor:
        """Return ``(N, F, C, *)`` from ``(N, C, *)`` by operations that can be compiled, traced and scripted."""
        values = self.basis_values(x)
        return torch.cat((F.silu(x).unsqueeze(1), values), dim=1) if self.has_base else values

    @torch.jit.unused
    def _must_be_plain(self) -> bool:
        return torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()

    def _evaluate(
        self, x: Tensor, bias: Tensor | None, contraction: Contraction, offsets: tuple[float, ...] = ()
    ) -> Tensor:
        """Compute the layer with features that are not kept for the gradient."""
        weight = self.weight
        dtype = weight.dtype
        device_type = x.device.type
        if torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device_type)
        elif x.dtype != dtype:
            raise TypeError(
                f"The input must have the weight's dtype {dtype}; got {x.dtype}. Convert one, or use autocast."
            )
        return _recomputed(x, weight, bias, FeatureMap(self.basis, self.has_base, offsets), contraction, dtype)


def _second_moments(basis: Basis) -> tuple[float, float]:
    """Return E[silu^2] for N(0, 1) and sum_k E[B_k^2], there or, where that is too small, uniformly on the grid."""
    x = torch.linspace(-6.0, 6.0, 1201, dtype=torch.float64)
    density = torch.exp(-0.5 * x**2)
    density /= density.sum()
    base = float((F.silu(x) ** 2 * density).sum())
    spline = float((basis.values(x) ** 2 * density).sum())
    low, high = getattr(basis, "grid_range", (-1.0, 1.0))
    uniform = float((basis.values(torch.linspace(low, high, 1201, dtype=torch.float64)) ** 2).sum(0).mean())
    return base, spline if spline > 0.05 * uniform else uniform
