"""Learnable activation functions."""

# No postponed annotations here: torch.jit.script cannot read them on methods that it leaves out.

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from monai_deqkan._checks import check_int
from monai_deqkan.networks.layers.basis import Basis, BasisSpec, blocks
from monai_deqkan.networks.layers.bspline import BSplineBasis
from monai_deqkan.networks.layers.kan_conv import KANConv1d
from monai_deqkan.networks.layers.kan_features import FeatureMap

__all__ = ["KANActivation"]


class _Sums(ABC):
    r"""A way to evaluate :math:`\sum_k c_{rk} B_k(t_r)` and its gradients, one row of points per set of coefficients.

    Points ``t`` have shape ``(R, M)``; ``rows`` ``(R,)`` tells which of the ``C`` sets of coefficients is whose.
    """

    @abstractmethod
    def prepare(self, coefficients: Tensor) -> Tensor:
        """Turn coefficients ``(C, K)`` into what the others take."""

    @abstractmethod
    def values(self, t: Tensor, rows: Tensor, prepared: Tensor) -> Tensor:
        """Return the sums, ``(R, M)``."""

    @abstractmethod
    def pull_back(self, t: Tensor, rows: Tensor, prepared: Tensor, grad: Tensor) -> Tensor:
        """Return ``grad`` times the derivative of the sums, ``(R, M)``."""

    @abstractmethod
    def moments(self, t: Tensor, rows: Tensor, grad: Tensor, total: Tensor) -> None:
        """Add to ``total`` what `grad_coefficients` needs to know; it has the shape of what is prepared."""

    @abstractmethod
    def grad_coefficients(self, total: Tensor) -> Tensor:
        """Return the gradient of the coefficients, ``(C, K)``."""


@dataclass(frozen=True)
class _BasisSums(_Sums):
    """By the values of all functions."""

    basis: Basis

    def prepare(self, coefficients: Tensor) -> Tensor:
        return coefficients

    def values(self, t: Tensor, rows: Tensor, prepared: Tensor) -> Tensor:
        return torch.bmm(prepared[rows][:, None], self._filled(t))[:, 0]

    def pull_back(self, t: Tensor, rows: Tensor, prepared: Tensor, grad: Tensor) -> Tensor:
        return self.basis.pull_back(t, prepared[rows][:, :, None] * grad[:, None])

    def moments(self, t: Tensor, rows: Tensor, grad: Tensor, total: Tensor) -> None:
        total.index_add_(0, rows, torch.bmm(self._filled(t), grad[:, :, None])[:, :, 0].to(total.dtype))

    def grad_coefficients(self, total: Tensor) -> Tensor:
        return total

    def _filled(self, t: Tensor) -> Tensor:
        values = t.new_empty(t.shape[0], self.basis.num_basis, t.shape[1])
        self.basis.fill(t, values)
        return values


@dataclass(frozen=True)
class _PieceSums(_Sums):
    """By the polynomials that B-splines are between knots: a table lookup and Horner's rule, whatever the grid's size.

    What is prepared is the table ``(order + 1, C * P)`` of the ``P`` pieces' coefficients, by powers of the distance
    from the left knot in knot steps. Below the first and above the last piece these go on.
    """

    basis: BSplineBasis

    def prepare(self, coefficients: Tensor) -> Tensor:
        return torch.einsum("pnk,ck->ncp", _pieces(self.basis).to(coefficients), coefficients).flatten(1)

    def values(self, t: Tensor, rows: Tensor, prepared: Tensor) -> Tensor:
        piece, rest = self._locate(t, rows)
        return _horner(list(prepared), piece, rest).view(t.shape)

    def pull_back(self, t: Tensor, rows: Tensor, prepared: Tensor, grad: Tensor) -> Tensor:
        piece, rest = self._locate(t, rows)
        slopes = [prepared[n] * (n / self.basis.step) for n in range(1, len(prepared))]
        return _horner(slopes, piece, rest).view(t.shape).mul_(grad)

    def moments(self, t: Tensor, rows: Tensor, grad: Tensor, total: Tensor) -> None:
        piece, rest = self._locate(t, rows)
        product = grad.flatten()
        for n, row in enumerate(total):
            product = product * rest if n else product
            row += product.new_zeros(row.shape).index_add_(0, piece, product)

    def grad_coefficients(self, total: Tensor) -> Tensor:
        table = _pieces(self.basis).to(total)
        total = total.view(len(total), -1, len(table))
        # The outer pieces are straight: the high powers of far points, maybe infinite, do not count.
        total[2:, :, 0] = total[2:, :, -1] = 0.0
        return torch.einsum("pnk,ncp->ck", table, total)

    def _locate(self, t: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the column in the table and the distance from the left knot, both flat."""
        first, count = -self.basis.spline_order - 1, self.basis.grid_size + 2 * self.basis.spline_order + 2
        rest = torch.sub(t, self.basis.grid_range[0]).mul_(1.0 / self.basis.step)
        knot = torch.floor(rest).clamp_(first, first + count - 1)
        rest.sub_(knot)
        piece = knot.nan_to_num_(nan=first).sub_(first).to(torch.int32)
        return piece.add_((rows.to(torch.int32) * count)[:, None]).flatten(), rest.flatten()


def _horner(table: list[Tensor], piece: Tensor, rest: Tensor) -> Tensor:
    value = table[-1].index_select(0, piece)
    for row in table[-2::-1]:
        value = torch.addcmul(row.index_select(0, piece), value, rest)
    return value


@functools.lru_cache(maxsize=16)
def _pieces(basis: BSplineBasis) -> Tensor:
    """Return the polynomials ``(P, order + 1, K)`` that each spline is between knots, and beyond the outer ones.

    They interpolate the basis' own values; times the order's factorial they are integers: no rounding is left.
    """
    order, low = basis.spline_order, basis.grid_range[0]
    first = torch.arange(-order - 1, basis.grid_size + order + 1, dtype=torch.float64, device="cpu")
    nodes = torch.arange(1, order + 2, dtype=torch.float64, device="cpu") / (order + 2)
    values = basis.values(low + basis.step * (first[:, None] + nodes))  # (K, P, order + 1)
    pieces = torch.linalg.solve(torch.linalg.vander(nodes, N=order + 1), values.permute(1, 2, 0))
    return (pieces * math.factorial(order)).round() / math.factorial(order)


class _Pointwise(torch.autograd.Function):
    """One function per channel, on a CPU by blocks that stay in its cache; keeps the input and the weight only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, features: FeatureMap, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.features = features
        sums, base = _sums_of(features.basis), int(features.has_base)
        wide = weight if weight.dtype == torch.float64 else weight.float()
        prepared = sums.prepare(wide[:, base:])
        result = x.new_empty(x.shape, dtype=dtype)
        flat = result.flatten(0, 1)
        with torch.autocast(x.device.type, enabled=False):
            for spot, rows, part, t in _parts(x, wide.dtype, features):
                value = sums.values(t, rows, prepared)
                if base:
                    value.addcmul_(F.silu(part), wide[rows, :1])
                flat[spot] = value
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        features, needs = ctx.features, ctx.needs_input_grad[:2]
        sums, base = _sums_of(features.basis), int(features.has_base)
        with torch.autocast(x.device.type, enabled=False):
            if torch.is_grad_enabled():  # somebody will differentiate this gradient
                # Views, so that the way from `weight` through `x` is not taken here: autograd takes it itself.
                x, weight = x.view_as(x), weight.view_as(weight)
                plain = _plain(x, weight, features).to(grad.dtype)
                wanted = [t for t, need in zip((x, weight), needs, strict=True) if need]
                found = iter(torch.autograd.grad(plain, wanted, grad, create_graph=True))
                return (*(next(found) if need else None for need in needs), None, None)
            wide = weight if weight.dtype == torch.float64 else weight.float()
            prepared = sums.prepare(wide[:, base:])
            total = torch.zeros_like(prepared, dtype=torch.float64)
            base_total = wide.new_zeros(len(wide), dtype=torch.float64)
            grad = grad.contiguous().flatten(0, 1)
            grad_x = torch.empty_like(x) if needs[0] else None
            for spot, rows, part, t in _parts(x, wide.dtype, features):
                g = grad[spot].to(wide.dtype)
                if needs[1]:
                    sums.moments(t, rows, g, total)
                    if base:
                        base_total.index_add_(0, rows, (g * F.silu(part)).sum(1).double())
                if grad_x is not None:
                    slope = sums.pull_back(t, rows, prepared, g)
                    if features.scale is not None:
                        slope = slope * features.scale.to(slope)[rows]
                    if base:
                        slope += torch.ops.aten.silu_backward(g * wide[rows, :1], part)
                    grad_x.flatten(0, 1)[spot] = slope
            grad_weight = None
            if needs[1]:
                parts = [base_total[:, None]] if base else []
                grad_weight = torch.cat((*parts, sums.grad_coefficients(total)), dim=1).to(weight.dtype)
        return grad_x, grad_weight, None, None


def _sums_of(basis: Basis) -> _Sums:
    return _PieceSums(basis) if isinstance(basis, BSplineBasis) else _BasisSums(basis)


_Part = tuple[tuple[slice, slice], Tensor, Tensor, Tensor]


def _parts(x: Tensor, dtype: torch.dtype, features: FeatureMap) -> Iterator[_Part]:
    """Cut ``x`` ``(B, C, M)`` into blocks: place in ``(B * C, M)``, channels, block, what the basis sees of it."""
    flat = x.flatten(0, 1)
    channels = torch.arange(len(flat), device=x.device) % x.shape[1]
    for spot in blocks(flat, 8):
        part, rows = flat[spot].to(dtype), channels[spot[0]]
        t = part
        if features.scale is not None and features.shift is not None:
            t = part * features.scale.to(dtype)[rows] + features.shift.to(dtype)[rows]
        yield spot, rows, part, t


def _plain(x: Tensor, weight: Tensor, features: FeatureMap) -> Tensor:
    values = features.plain(x.reshape(-1, 1, x.shape[-1])).view(len(x), x.shape[1], -1, x.shape[-1])  # (B, C, F, M)
    return (values * weight[None, :, :, None].to(values.dtype)).sum(2)


def _pointwise(x: Tensor, weight: Tensor, features: FeatureMap, dtype: torch.dtype) -> Tensor:
    """Apply the node; a tensor subclass such as MONAI's MetaTensor keeps its class and metadata."""
    if has_torch_function((x, weight)):
        return handle_torch_function(_pointwise, (x, weight), x, weight, features, dtype)
    return _Pointwise.apply(x, weight, features, dtype)


class _PointwiseConv1d(KANConv1d):
    """One function per channel, as a convolution with kernel size 1 that never makes all feature maps on a CPU."""

    @torch.jit.unused
    def _forward_eager(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super()._forward_eager(x)
        return _pointwise(x.contiguous(), self.weight[:, :, 0], self._feature_map(), self._output_dtype(x))


class KANActivation(nn.Module):
    r"""Apply one learnable function to all elements, or one to each channel: PReLU with a whole function to learn.

    .. math:: \phi_c(t) = w_c\, \mathrm{silu}(t) + \sum_{k=1}^{K} c_{ck}\, B_k(t)

    It starts as SiLU: exactly with a base term (coefficients zero); without one as the best fit of SiLU on the grid.
    In MONAI's networks it is ``act="kan"``. On a CPU a B-spline is evaluated as the polynomial that it is between
    knots, at a cost that does not grow with the grid; the gradient keeps the input only.

    Args:
        num_parameters: number of functions: 1 shared by all, or the number of channels on axis 1.
        basis: the functions :math:`B_k`: a name, a pair ``(name, settings)``, or a `Basis`.
        grid_size: number of intervals of the grid, for a basis given by name.
        spline_order: order of its splines.
        grid_range: first and last knot, in the unit of the input.
        outside: how functions go on beyond the grid, ``"zero"``, ``"clamp"`` (the value at its end) or ``"linear"``
            (the tangent there), for a basis given by name; ``None`` for the basis's own default.
        base_activation: ``"silu"``, or ``None`` to leave the first term out.

    Attributes:
        functions: the layer that holds the functions; its ``coefficients`` have shape ``(num_parameters, K, 1, 1)``.

    Raises:
        ValueError: if a setting is out of its range.
        TypeError: if one is of the wrong kind.

    Example:
        >>> x = torch.linspace(-2, 2, 5)
        >>> torch.allclose(KANActivation()(x), torch.nn.functional.silu(x))
        True
    """

    def __init__(
        self,
        num_parameters: int = 1,
        *,
        basis: BasisSpec = "bspline",
        grid_size: int = 5,
        spline_order: int = 3,
        grid_range: tuple[float, float] = (-3.0, 3.0),
        outside: str | None = None,
        base_activation: str | None = "silu",
    ) -> None:
        super().__init__()
        self.num_parameters = check_int("num_parameters", num_parameters)
        self.functions: KANConv1d = _PointwiseConv1d(
            num_parameters,
            num_parameters,
            1,
            groups=num_parameters,
            bias=False,
            basis=basis,
            grid_size=grid_size,
            spline_order=spline_order,
            grid_range=grid_range,
            outside=outside,
            base_activation=base_activation,
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start as SiLU."""
        functions = self.functions
        if functions.base_weight is not None:
            functions.coefficients.zero_()
            functions.base_weight.fill_(1.0)
            return
        points = torch.linspace(*functions.basis.grid_range, 401, dtype=torch.float64, device="cpu")
        functions.coefficients.copy_(functions.basis.fit(points, F.silu(points))[None, :, None, None])

    def forward(self, input: Tensor) -> Tensor:
        """Apply the functions to ``(B, C, *)``; to a tensor of any shape where one is shared.

        Raises:
            ValueError: if axis 1 is not ``num_parameters`` long and these are more than 1.
        """
        if self.num_parameters == 1:
            return self.functions(input.reshape(1, 1, -1)).reshape(input.shape)
        if input.dim() < 2 or input.shape[1] != self.num_parameters:
            raise ValueError(
                f"KANActivation(num_parameters={self.num_parameters}) needs as many channels on axis 1; "
                f"got shape {list(input.shape)}. Use num_parameters=1 to share one function."
            )
        x = input.flatten(2) if input.dim() > 2 else input.unsqueeze(2)  # not by a size of -1: batches may be empty
        return self.functions(x).reshape(input.shape)
