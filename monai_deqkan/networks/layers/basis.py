"""The functions of one variable that a KAN layer combines: an exchangeable part, see ``BASES``."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from monai_deqkan._checks import check_choice, check_int, check_range
from monai_deqkan.plugins import Registry

__all__ = ["BASES", "BSplineBasis", "Basis", "BasisSpec", "build_basis"]

_BLOCK = 1 << 15  # elements worked on at a time on a CPU: a few buffers of that size fit its second-level cache


class Basis(ABC):
    r"""A finite set of fixed functions :math:`B_1, \dots, B_K` of one variable.

    A basis is a settings object: immutable, hashable, without learnable state. The coefficients belong to the layer.
    A new basis gives `num_basis`, `values` and `derivative`; the other methods follow from them, and are overridden
    for speed or for TorchScript. `monai_deqkan.testing.check_basis` tells whether it keeps to the rules.
    """

    @property
    @abstractmethod
    def num_basis(self) -> int:
        """Number of functions :math:`K`."""

    @abstractmethod
    def values(self, x: Tensor, dim: int = 0) -> Tensor:
        r"""Evaluate all functions at all elements, by differentiable operations.

        Args:
            x: points, real floating-point, any shape. Half precision is computed in float32 and cast back.
            dim: where the new axis of size ``num_basis`` goes; layers ask for 1: ``(N, C, *)`` to ``(N, K, C, *)``.

        Returns:
            :math:`B_k(x)`, of the dtype of ``x``; finite wherever ``x`` is.
        """

    @abstractmethod
    def derivative(self, x: Tensor, dim: int = 0) -> Tensor:
        r"""Evaluate all :math:`B_k'(x)`, with the arguments and the layout of `values`."""

    def fill(self, x: Tensor, out: Tensor) -> None:
        """Write the values at ``x`` ``(N, M)`` into ``out`` ``(N, K, M)``, outside of autograd."""
        out.copy_(self.values(x, dim=1))

    def pull_back(self, x: Tensor, grad: Tensor) -> Tensor:
        """Turn the gradient with respect to the values, ``(N, K, M)``, into one with respect to ``x``, ``(N, M)``."""
        return (self.derivative(x, dim=1) * grad).sum(dim=1)

    def module(self) -> nn.Module:
        """Return a module without parameters whose ``forward(x)`` is ``values(x, dim=1)``.

        Layers call it on their traced, compiled and scripted paths. Override it with a scriptable one for TorchScript.
        """
        return _BasisModule(self)


class _BasisModule(nn.Module):
    def __init__(self, basis: Basis) -> None:
        super().__init__()
        self.basis = basis

    def forward(self, x: Tensor) -> Tensor:
        return self.basis.values(x, dim=1)


BASES: Registry[Basis] = Registry("monai_deqkan.bases", "basis", Basis)

BasisSpec: TypeAlias = str | tuple[str, dict[str, Any]] | Basis

_GRID_DEFAULTS: dict[str, Any] = {"grid_size": 5, "spline_order": 3, "grid_range": (-3.0, 3.0)}


def build_basis(spec: BasisSpec, grid_size: int, spline_order: int, grid_range: tuple[float, float]) -> Basis:
    """Build the basis of a layer from the layer's arguments.

    Args:
        spec: name, pair ``(name, settings)``, or a basis.
        grid_size: setting for a basis given by name, if it has one of this name.
        spline_order: likewise.
        grid_range: likewise.

    Raises:
        ValueError: if the name or a setting is wrong.
        TypeError: if a pair or a basis comes with grid arguments of the layer, which it would not obey.
    """
    grid = {"grid_size": grid_size, "spline_order": spline_order, "grid_range": grid_range}
    if isinstance(spec, str):
        known = inspect.signature(BASES.get(spec)).parameters
        return BASES.build(spec, **{name: value for name, value in grid.items() if name in known})
    changed = [name for name, value in grid.items() if _plain(value) != _plain(_GRID_DEFAULTS[name])]
    if changed:
        raise TypeError(
            f"{', '.join(f'`{name}`' for name in changed)} of a layer only apply to a basis given by name; "
            f"put them into the settings of {spec!r}."
        )
    return BASES.build(spec)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _needs_float32(x: Tensor) -> bool:
    return x.dtype == torch.float16 or x.dtype == torch.bfloat16


def _signed_distance(x: Tensor, spline_order: int, num_basis: int, low: float, step: float, dim: int) -> Tensor:
    """Return the distance of each element from the center of each spline, in knot steps."""
    dim = dim if dim >= 0 else dim + x.dim() + 1
    centers = torch.arange(num_basis, device=x.device, dtype=x.dtype) + 0.5 * (1 - spline_order)
    shape = [1] * (x.dim() + 1)
    shape[dim] = num_basis
    return ((x - low) / step).unsqueeze(dim) - centers.reshape(shape)


def _bspline_values(x: Tensor, spline_order: int, num_basis: int, low: float, step: float, dim: int) -> Tensor:
    dtype = x.dtype
    x = x.float() if _needs_float32(x) else x
    distance = _signed_distance(x, spline_order, num_basis, low, step, dim).abs()
    p = (0.5 * (spline_order + 1) - distance).clamp(min=0.0)
    q = (p - 1.0).clamp(min=0.0)
    if spline_order == 1:
        value = p
    elif spline_order == 2:
        value = (p * p - 3.0 * (q * q)) / 2.0
    else:
        value = (p * p * p - 4.0 * (q * q * q)) / 6.0
    return value.to(dtype)


class _BSplineModule(nn.Module):
    def __init__(self, spline_order: int, num_basis: int, low: float, step: float) -> None:
        super().__init__()
        self.spline_order = spline_order
        self.num_basis = num_basis
        self.low = low
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return _bspline_values(x, self.spline_order, self.num_basis, self.low, self.step, 1)


@BASES.register("bspline")
@dataclass(frozen=True)
class BSplineBasis(Basis):
    r"""B-splines on uniform knots, in closed form.

    With the distance :math:`a` of :math:`x` from the center of a spline in knot steps, :math:`n` the order,
    :math:`p = \max(\tfrac{n+1}{2} - |a|, 0)` and :math:`q = \max(p - 1, 0)`,

    .. math:: B(x) = p \;(n = 1), \quad \tfrac12 (p^2 - 3 q^2) \;(n = 2), \quad \tfrac16 (p^3 - 4 q^3) \;(n = 3).

    The splines sum to 1 on ``grid_range``. **Outside the grid** they fade, and are zero from ``spline_order`` steps
    on: there only the layer's base term is left. Scale or normalize the inputs so that most lie on the grid.

    Args:
        grid_size: number of equal intervals that ``grid_range`` is cut into.
        spline_order: polynomial degree of the pieces: 1, 2 or 3.
        grid_range: first and last knot of the grid, in the unit of the input.

    Raises:
        ValueError: if a setting is out of its range.

    Example:
        >>> BSplineBasis(grid_size=2, spline_order=1, grid_range=(-1.0, 1.0)).values(torch.tensor([-1.0, 0.25]))
        tensor([[1.0000, 0.0000],
                [0.0000, 0.7500],
                [0.0000, 0.2500]])

    Reference:
        C. de Boor, "A Practical Guide to Splines", Springer 1978, chapter IX. Equal to his recursion on uniform knots
        that go on beyond the grid; the closed form of the centered splines replaces it.
    """

    grid_size: int = 5
    spline_order: int = 3
    grid_range: tuple[float, float] = (-3.0, 3.0)

    def __post_init__(self) -> None:
        check_int("grid_size", self.grid_size)
        check_choice("spline_order", self.spline_order, (1, 2, 3))
        if not isinstance(self.grid_range, (tuple, list)) or len(self.grid_range) != 2:
            raise ValueError(f"`grid_range` must be a pair (first knot, last knot); got {self.grid_range!r}.")
        low, high = (check_range("grid_range", end, open_low=True, open_high=True) for end in self.grid_range)
        if low >= high:
            raise ValueError(f"`grid_range` must be increasing; got {self.grid_range!r}. Swap or spread its ends.")
        object.__setattr__(self, "grid_range", (low, high))

    @property
    def num_basis(self) -> int:
        """Number of splines, ``grid_size + spline_order``."""
        return self.grid_size + self.spline_order

    @property
    def step(self) -> float:
        """Distance of neighboring knots, in the unit of the input."""
        return (self.grid_range[1] - self.grid_range[0]) / self.grid_size

    def values(self, x: Tensor, dim: int = 0) -> Tensor:
        """Evaluate all splines."""
        return _bspline_values(x, self.spline_order, self.num_basis, self.grid_range[0], self.step, dim)

    def derivative(self, x: Tensor, dim: int = 0) -> Tensor:
        """Evaluate the derivatives of all splines; zero at the kinks' centers for order 1."""
        order = self.spline_order
        wide = x.float() if _needs_float32(x) else x
        a = _signed_distance(wide, order, self.num_basis, self.grid_range[0], self.step, dim)
        p = (0.5 * (order + 1) - a.abs()).clamp(min=0.0)
        q = (p - 1.0).clamp(min=0.0)
        if order == 1:
            slope = (p > 0).to(wide.dtype)
        elif order == 2:
            slope = p - 3.0 * q
        else:
            slope = 0.5 * (p * p - 4.0 * (q * q))
        return (slope * torch.sign(a) / -self.step).to(x.dtype)

    def fill(self, x: Tensor, out: Tensor) -> None:
        """Write the values, on a CPU by blocks that stay in its cache."""
        if x.device.type != "cpu":
            super().fill(x, out)
            return
        order = self.spline_order
        scale = {1: 1.0, 2: 2.0**-0.5, 3: 6.0 ** (-1 / 3)}[order]  # takes the formula's factor into the distance
        reach = 0.5 * (order + 1) * scale
        for rows, columns in _blocks(x):
            u = self._scaled(x[rows, columns], scale)
            p, q = torch.empty_like(u), torch.empty_like(u)
            for k in range(self.num_basis):
                target = out[rows, k, columns]
                torch.sub(u, (k + 0.5 * (1 - order)) * scale, out=p).abs_().clamp_(max=reach).sub_(reach)
                if order == 1:
                    torch.neg(p, out=target)
                    continue
                torch.add(p, scale, out=q).clamp_(max=0.0)  # p and q are the negative ones of the formula here
                if order == 2:
                    torch.sub(p.mul_(p), q.mul_(q), alpha=3.0, out=target)
                else:
                    torch.sub(q.pow_(3).mul_(4.0), p.pow_(3), out=target)

    def pull_back(self, x: Tensor, grad: Tensor) -> Tensor:
        """Pull the gradient back, on a CPU by blocks that stay in its cache."""
        if x.device.type != "cpu":
            return super().pull_back(x, grad)
        order = self.spline_order
        scale = {1: 1.0, 2: 1.0, 3: 0.5**0.5}[order]
        reach = 0.5 * (order + 1) * scale
        result = torch.empty_like(x)
        for rows, columns in _blocks(x):
            u = self._scaled(x[rows, columns], scale)
            total, a, p, q = (torch.zeros_like(u) for _ in range(4))
            for k in range(self.num_basis):
                torch.sub(u, (k + 0.5 * (1 - order)) * scale, out=a)
                torch.abs(a, out=p).clamp_(max=reach).sub_(reach)
                if order == 1:
                    p.sign_()
                else:
                    torch.add(p, scale, out=q).clamp_(max=0.0)
                    if order == 2:
                        p.sub_(q, alpha=3.0)
                    else:
                        torch.sub(q.mul_(q).mul_(4.0), p.mul_(p), out=p)
                total.addcmul_(p.mul_(a.sign_()), grad[rows, k, columns].to(u.dtype))
            torch.mul(total, 1.0 / self.step, out=result[rows, columns])
        return result

    def module(self) -> nn.Module:
        """Return a scriptable module."""
        return _BSplineModule(self.spline_order, self.num_basis, self.grid_range[0], self.step)

    def _scaled(self, x: Tensor, scale: float) -> Tensor:
        wide = x.float() if _needs_float32(x) else x
        return torch.sub(wide, self.grid_range[0]).mul_(scale / self.step)


def _blocks(x: Tensor) -> Iterator[tuple[slice, slice]]:
    """Cut ``x`` ``(N, M)`` into blocks of about ``_BLOCK`` elements."""
    rows, columns = x.shape
    height = max(1, _BLOCK // max(columns, 1))
    width = max(1, min(columns, _BLOCK))
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            yield slice(top, top + height), slice(left, left + width)
