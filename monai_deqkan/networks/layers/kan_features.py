"""Features of KAN layers, their contraction with a weight, and a gradient that recomputes the features."""

# No postponed annotations here: torch.jit.script cannot read them on methods that it leaves out.

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from monai_deqkan.networks.layers.basis import Basis, needs_float32

__all__ = ["Contraction", "FeatureMap", "contract_features"]

# Features made at a time on a CPU: 4 MiB stay in its cache, and glibc keeps such blocks for the next call. All features
# of 8 x 32 x 128 x 128 at once took a training step of a 3x3 convolution 1.8 times as long and 10 times the memory.
_CHUNK = 1 << 20


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """What a layer computes from its input before it contracts: the base term if there is one, then the basis.

    Args:
        basis: the functions.
        has_base: whether feature 0 is SiLU.
        offsets: one number per basis function that is subtracted from it, or nothing.
        scale: what the basis sees is ``scale * x + shift``; shape ``(G, C)`` for ``G`` groups, ``None`` for 1.
        shift: likewise, ``None`` for 0; both or none.
    """

    basis: Basis
    has_base: bool
    offsets: tuple[float, ...] = ()
    scale: Tensor | None = None
    shift: Tensor | None = None

    @property
    def num_features(self) -> int:
        """Number of features per element of the input."""
        return self.basis.num_basis + int(self.has_base)

    def fill(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the features of ``x`` ``(N, C, *)`` as ``(N, F, C, *)`` in ``dtype``, outside of autograd."""
        base = int(self.has_base)
        features = x.new_empty((x.shape[0], base + self.basis.num_basis, *x.shape[1:]), dtype=dtype)
        if base:
            features[:, 0].copy_(F.silu(x))
        self.basis.fill(_flat(self.mapped(x)), features[:, base:].flatten(2))
        for k, offset in enumerate(self.offsets):
            if offset != 0.0:
                features[:, base + k].sub_(offset)
        return features

    def pull_back(self, x: Tensor, grad: Tensor) -> Tensor:
        """Turn the gradient with respect to the features into the one with respect to ``x``."""
        base = int(self.has_base)
        result = self.basis.pull_back(_flat(self.mapped(x)), grad[:, base:].flatten(2)).view(x.shape)
        if self.scale is not None:
            result = _per_channel(result, self.scale)
        if base:
            result += torch.ops.aten.silu_backward(grad[:, 0].to(x.dtype), x)
        return result

    def plain(self, x: Tensor) -> Tensor:
        """Return the features by differentiable operations."""
        values = self.basis.values(self.mapped(x), dim=1).to(x.dtype)
        if self.offsets:
            shape = (1, -1, *[1] * (x.dim() - 1))
            values = values - torch.tensor(self.offsets, dtype=x.dtype, device=x.device).view(shape)
        return torch.cat((F.silu(x).unsqueeze(1), values), dim=1) if self.has_base else values

    def mapped(self, x: Tensor) -> Tensor:
        """Return what the basis sees; for half precision in float32."""
        return x if self.scale is None else _per_channel(x, self.scale, self.shift)


def _per_channel(x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    """Map ``x`` ``(B * G, C, *)`` by numbers of shape ``(G, C)``."""
    groups = scale.shape[0]
    shape = (*scale.shape, *[1] * (x.dim() - 2))
    wide = x.float() if needs_float32(x) else x
    y = wide.unflatten(0, (x.shape[0] // groups, groups)) * scale.to(wide.dtype).view(shape)
    if shift is not None:
        y = y + shift.to(wide.dtype).view(shape)
    return y.flatten(0, 1)


def _flat(x: Tensor) -> Tensor:
    return x.contiguous().view(x.shape[0], math.prod(x.shape[1:]))


class Contraction(ABC):
    """The linear map from features ``(N, F, C, *)`` to the output, with the packed weight; immutable."""

    @property
    def rows_together(self) -> int:
        """Number of rows of the features that one row of the output takes; 0 if they are not to be taken apart."""
        return 0

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
            weight, bias = weight.to(dtype), _cast(bias, dtype)
            parts = [
                contraction.forward(features.fill(x[rows], dtype), weight, bias)
                for rows, _ in _chunks(x, features, contraction)
            ]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight, bias = ctx.saved_tensors
        features, contraction, dtype = ctx.parts
        needs = ctx.needs_input_grad[:3]
        result: list[Tensor | None] = [None, None, None]
        with torch.autocast(x.device.type, enabled=False):
            if torch.is_grad_enabled():  # somebody will differentiate this gradient
                # Views, so that the way from `weight` through `x` is not taken here: autograd takes it itself.
                x, weight = x.view_as(x), weight.view_as(weight)
                bias = None if bias is None else bias.view_as(bias)
                plain = contraction.forward(features.plain(x).to(dtype), weight.to(dtype), _cast(bias, dtype))
                wanted = [t for t, need in zip((x, weight, bias), needs, strict=True) if need]
                found = iter(torch.autograd.grad(plain, wanted, grad, create_graph=True))
                return (*(next(found) if need else None for need in needs), None, None, None)
            grad = grad.to(dtype)
            packed = weight.to(dtype)
            pieces: list[Tensor] = []
            for rows, outputs in _chunks(x, features, contraction):
                part, part_grad = x[rows], grad[outputs]
                if needs[1]:
                    summand = contraction.grad_weight(features.fill(part, dtype), packed, part_grad)
                    result[1] = summand.to(weight.dtype) if result[1] is None else result[1].add_(summand)
                if needs[0]:
                    shape = torch.Size((part.shape[0], features.num_features, *part.shape[1:]))
                    from_features = contraction.grad_features(shape, packed, part_grad)
                    pieces.append(features.pull_back(part, from_features))
            if pieces:
                result[0] = (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).to(x.dtype)
            if needs[2]:
                result[2] = contraction.grad_bias(grad).to(bias.dtype)
        return (*result, None, None, None)


def _chunks(x: Tensor, features: FeatureMap, contraction: Contraction) -> Iterator[tuple[slice, slice]]:
    """Cut the rows of ``x``, and those of the output, on a CPU into parts whose features stay in memory at hand."""
    together = contraction.rows_together if x.device.type == "cpu" else 0
    if not together or not x.numel():
        yield slice(None), slice(None)
        return
    samples = x.shape[0] // together
    each = features.num_features * x.numel() // samples
    step = max(1, _CHUNK // each)
    for first in range(0, samples, step):
        last = min(first + step, samples)
        yield slice(first * together, last * together), slice(first, last)


def _cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)


def contract_features(
    x: Tensor, weight: Tensor, bias: Tensor | None, features: FeatureMap, contraction: Contraction, dtype: torch.dtype
) -> Tensor:
    """Return the contracted features of ``x``, as computed in ``dtype``; the gradient keeps ``x``, not the features.

    A tensor subclass such as MONAI's MetaTensor keeps its class and metadata.
    """
    if has_torch_function((x, weight)):
        return handle_torch_function(contract_features, (x, weight), x, weight, bias, features, contraction, dtype)
    return _Recomputed.apply(x, weight, bias, features, contraction, dtype)
