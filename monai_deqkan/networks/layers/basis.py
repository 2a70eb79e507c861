"""The functions of one variable that a KAN layer combines: an exchangeable part, see ``BASES``."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from monai_deqkan._checks import check_finite, check_range, check_shape, did_you_mean
from monai_deqkan.plugins import Registry

__all__ = ["BASES", "Basis", "BasisSpec", "GridBasis", "build_basis"]

_BLOCK = 1 << 18  # numbers that a buffer holds on a CPU: a few fit its cache, and the calls on them are few


class Basis(ABC):
    r"""A finite set of fixed functions :math:`B_1, \dots, B_K` of one variable.

    A basis is a settings object: immutable, hashable, without learnable state. The coefficients belong to the layer.
    A new basis gives `num_basis`, `values` and `derivative`; the other methods follow from them, and are overridden
    for speed, for TorchScript, or for tighter bounds. `monai_deqkan.testing.check_basis` tells whether it keeps to the
    rules.
    """

    @property
    @abstractmethod
    def num_basis(self) -> int:
        """Number of functions :math:`K`."""

    @property
    def grid_range(self) -> tuple[float, float]:
        """Interval on which the functions are meant to be used, in the unit of the input; (-1, 1) by default."""
        return (-1.0, 1.0)

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
        for rows, columns in blocks(x, self.num_basis):
            out[rows, :, columns].copy_(self.values(x[rows, columns], dim=1))

    def pull_back(self, x: Tensor, grad: Tensor) -> Tensor:
        """Turn the gradient with respect to the values, ``(N, K, M)``, into one with respect to ``x``, ``(N, M)``."""
        result = torch.empty_like(x)
        for rows, columns in blocks(x, self.num_basis):
            part = grad[rows, :, columns]
            result[rows, columns] = (self.derivative(x[rows, columns], dim=1) * part).sum(dim=1)
        return result

    def module(self) -> nn.Module:
        """Return a module without parameters whose ``forward(x)`` is ``values(x, dim=1)``.

        Layers call it on their traced, compiled and scripted paths. Override it with a scriptable one for TorchScript.
        """
        return _BasisModule(self)

    def lipschitz_constants(self) -> Tensor:
        r"""Return an upper bound of each :math:`|B_k'|` on the real line, shape ``(K,)``, float64.

        The default samples `derivative` on four times the grid range, adds what may lie between the samples, and says
        infinity where slopes grow further outside. That is no proof: override it where bounds must hold for certain.
        """
        low, high = self.grid_range
        middle, reach = 0.5 * (low + high), 2.0 * (high - low)
        slopes = self.derivative(torch.linspace(middle - reach, middle + reach, 20001, dtype=torch.float64)).abs()
        bound = slopes.amax(1) + slopes.diff(dim=1).abs().amax(1)
        away = reach * torch.logspace(0.0, 6.0, 601, dtype=torch.float64)
        far = self.derivative(middle + torch.cat((-away, away))).abs().amax(1)
        return torch.where(far > bound, math.inf, bound)

    def slope_coefficients(self, c: Tensor, dim: int) -> Tensor:
        r"""Turn coefficients into those of the derivative in functions that overlap little.

        .. math:: \sum_k c_k B_k'(x) = \sum_m d_m Q_m(x)

        Args:
            c: coefficients, with an axis of size ``num_basis``.
            dim: that axis.

        Returns:
            :math:`d`, linear in ``c``, with its entries along ``dim``. By default :math:`d = c`, :math:`Q_k = B_k'`.
        """
        return c

    @property
    def slope_gain(self) -> float:
        r"""Upper bound of :math:`\sup_x (\sum_m Q_m(x)^2)^{1/2}` for the functions of `slope_coefficients`."""
        return float(self.lipschitz_constants().norm())

    def fit(self, t: Tensor, targets: Tensor, weights: Tensor | None = None, ridge: float = 1e-6) -> Tensor:
        r"""Find the coefficients whose sum comes closest to given values: ridge regression, by a QR decomposition.

        .. math:: \min_c \sum_p w_p \Big(\sum_k c_k B_k(t_p) - y_p\Big)^2
                  + \rho \tfrac1K \sum_{p,k} w_p B_k(t_p)^2 \, \|c\|^2

        Args:
            t: points, shape ``(P,)``.
            targets: values :math:`y` there, shape ``(P, *)``, in any unit.
            weights: :math:`w \ge 0`, shape ``(P,)``; all one by default.
            ridge: :math:`\rho \ge 0`, dimensionless: relative to the mean diagonal of the Gram matrix. With 0 the
                solution of least norm.

        Returns:
            Coefficients, shape ``(K, *)``, float64; finite for any number of points and however they lie.

        Raises:
            ValueError: if shapes differ, a value is not finite, or a weight or ``ridge`` is negative.
        """
        check_shape("t", t, [t.numel()] if t.numel() else ["P"], "Give one point at least.")
        check_shape("targets", targets, [len(t), *targets.shape[1:]])
        check_range("ridge", ridge, low=0.0, high=math.inf, open_high=True)
        points, y = t.detach().double(), targets.detach().double().reshape(len(t), -1)
        w = torch.ones_like(points) if weights is None else weights.detach().double()
        check_shape("weights", w, [len(t)])
        for name, value in (("t", points), ("targets", y), ("weights", w)):
            check_finite(name, value)
        if bool((w < 0).any()):
            raise ValueError(f"`weights` must not be negative; the smallest is {float(w.min()):g}.")
        # Units of one, so that no square overflows.
        root = (w / w.max().clamp_min(torch.finfo(w.dtype).tiny)).sqrt()[:, None]
        matrix = self.values(points, dim=1) * root  # (P, K)
        size, scale = (float(a.abs().max()) if a.numel() and bool(a.any()) else 1.0 for a in (matrix, y))
        q, r = torch.linalg.qr(matrix / size)
        u, s, vh = torch.linalg.svd(r, full_matrices=False)
        squares = s.square()
        shrunk = s / (squares + ridge * squares.sum() / self.num_basis).clamp_min(torch.finfo(s.dtype).tiny)
        shrunk = torch.where(s > 1e-14 * s.max().clamp_min(1e-14), shrunk, 0.0)
        c = vh.mH @ (shrunk[:, None] * (u.mH @ (q.mH @ (y / scale * root))))
        return (c * (scale / size)).reshape(self.num_basis, *targets.shape[1:])

    def resized(self, num_basis: int) -> Basis:
        """Return a basis of the same kind on the same range, with another number of functions.

        Raises:
            ValueError: if the kind has no basis of that size.
            TypeError: if its number of functions is fixed.
        """
        raise TypeError(f"The number of functions of {self!r} is fixed; a kind that can change it overrides `resized`.")

    def refined(self, factor: int = 2) -> Basis:
        """Return a finer basis, whose span on the grid holds this one's where the kind allows it.

        Raises:
            ValueError: if ``factor`` is less than 1.
            TypeError: if the number of functions is fixed, or ``factor`` is no integer.
        """
        raise TypeError(f"The number of functions of {self!r} is fixed; a kind that can change it overrides `refined`.")


class _BasisModule(nn.Module):
    def __init__(self, basis: Basis) -> None:
        super().__init__()
        self.basis = basis

    def forward(self, x: Tensor) -> Tensor:
        return self.basis.values(x, dim=1)


BASES: Registry[Basis] = Registry("monai_deqkan.bases", "basis", Basis)

BasisSpec: TypeAlias = str | tuple[str, dict[str, Any]] | Basis

_GRID_DEFAULTS: dict[str, Any] = {"grid_size": 5, "spline_order": 3, "grid_range": (-3.0, 3.0), "outside": None}


def build_basis(
    spec: BasisSpec,
    grid_size: int = 5,
    spline_order: int = 3,
    grid_range: tuple[float, float] = (-3.0, 3.0),
    outside: str | None = None,
) -> Basis:
    """Build the basis of a layer from the layer's arguments.

    Args:
        spec: name, pair ``(name, settings)``, or a basis.
        grid_size: setting for a basis given by name, if it has one of this name.
        spline_order: likewise.
        grid_range: likewise.
        outside: likewise; ``None`` leaves the choice to the basis.

    Raises:
        ValueError: if the name or a setting is wrong.
        TypeError: if the layer's grid arguments are not their defaults and the basis would not obey them.
    """
    grid = {"grid_size": grid_size, "spline_order": spline_order, "grid_range": grid_range, "outside": outside}
    changed = [name for name, value in grid.items() if _plain(value) != _plain(_GRID_DEFAULTS[name])]
    if isinstance(spec, str):
        known = inspect.signature(BASES.get(spec)).parameters
        unknown = [name for name in changed if name not in known]
        if unknown:
            raise TypeError(
                f"The basis '{spec}' has no {_quoted(unknown)}; its settings are {_quoted(known)}. Leave the layer's "
                f"argument at its default and give settings as basis=('{spec}', {{...}})."
            )
        return BASES.build(spec, **{name: v for name, v in grid.items() if name in known and v is not None})
    if isinstance(spec, (tuple, list)) and len(spec) == 2 and isinstance(spec[0], str) and isinstance(spec[1], dict):
        _check_settings(spec[0], spec[1])
    if changed:
        raise TypeError(
            f"{_quoted(changed)} of a layer only apply to a basis given by name; "
            f"put them into the settings of {spec!r}."
        )
    return BASES.build(spec)


def _check_settings(name: str, settings: dict[str, Any]) -> None:
    known = inspect.signature(BASES.get(name)).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return
    for setting in settings:
        if setting not in known:
            hint = did_you_mean(setting, known)
            raise TypeError(f"The basis '{name}' has no `{setting}`; its settings are {_quoted(known)}.{hint}")


def _quoted(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class GridBasis(Basis):
    r"""Base class of this package's kinds: functions of :math:`u = (x - m) / s` with :math:`m` the middle of the grid.

    A kind gives :math:`s`, the two functions of :math:`u`, and what `_parameter` means to them. Outside of the grid,
    with :math:`e` its nearer end, ``outside="clamp"`` makes :math:`B(e)` of :math:`B(x)`, ``"linear"`` makes
    :math:`B(e) + B'(e)(x - e)` of it, and any other word leaves :math:`B(x)` as it is.
    """

    outside: str

    @staticmethod
    @abstractmethod
    def _raw(u: Tensor, dim: int, count: int, parameter: float, /) -> Tensor:
        """Evaluate the functions of u; a function that TorchScript reads."""

    @staticmethod
    @abstractmethod
    def _raw_slopes(u: Tensor, dim: int, count: int, parameter: float, /) -> Tensor:
        """Evaluate their derivatives with respect to u."""

    @property
    @abstractmethod
    def _unit(self) -> float:
        """Length that is 1 in u."""

    @property
    def _parameter(self) -> float:
        return 0.0

    @property
    def _middle(self) -> float:
        return 0.5 * (self.grid_range[0] + self.grid_range[1])

    @property
    def _bound(self) -> float:
        """Largest u on the grid."""
        return 0.5 * (self.grid_range[1] - self.grid_range[0]) / self._unit

    @property
    def _tangent_bound(self) -> float:
        """Largest u where a slope is taken that holds up to the end of the grid."""
        return self._bound

    def values(self, x: Tensor, dim: int = 0) -> Tensor:
        """Evaluate all functions."""
        dim = dim if dim >= 0 else dim + x.dim() + 1
        u = _scaled(x, self._middle, self._unit, self.outside)
        inner = _inner(u, self._bound, self.outside)
        values = self._raw(inner, dim, self.num_basis, self._parameter)
        if self.outside == "linear":
            end = _inner(u, self._tangent_bound, self.outside)
            slopes = self._raw_slopes(end, dim, self.num_basis, self._parameter)
            values = values + slopes * (u - inner).unsqueeze(dim)
        return _narrowed(values, x.dtype)

    def derivative(self, x: Tensor, dim: int = 0) -> Tensor:
        """Evaluate all derivatives."""
        dim = dim if dim >= 0 else dim + x.dim() + 1
        u = _scaled(x, self._middle, self._unit, self.outside)
        inner = _inner(u, self._tangent_bound if self.outside == "linear" else self._bound, self.outside)
        slopes = self._raw_slopes(inner, dim, self.num_basis, self._parameter) / self._unit
        if self.outside == "clamp":
            slopes = slopes * (u == inner).unsqueeze(dim)
        return slopes.to(x.dtype)

    def module(self) -> nn.Module:
        """Return a scriptable module."""
        return _GridModule(self)


class _GridModule(nn.Module):
    """The values of a `GridBasis`, once more for TorchScript."""

    def __init__(self, basis: GridBasis) -> None:
        super().__init__()
        self.raw = type(basis)._raw
        self.raw_slopes = type(basis)._raw_slopes
        self.num_basis = basis.num_basis
        self.parameter = basis._parameter
        self.middle = basis._middle
        self.unit = basis._unit
        self.bound = basis._bound
        self.tangent_bound = basis._tangent_bound
        self.outside = basis.outside

    def forward(self, x: Tensor) -> Tensor:
        u = _scaled(x, self.middle, self.unit, self.outside)
        inner = _inner(u, self.bound, self.outside)
        values = self.raw(inner, 1, self.num_basis, self.parameter)
        if self.outside == "linear":
            end = _inner(u, self.tangent_bound, self.outside)
            slopes = self.raw_slopes(end, 1, self.num_basis, self.parameter)
            values = values + slopes * (u - inner).unsqueeze(1)
        return _narrowed(values, x.dtype)


def needs_float32(x: Tensor) -> bool:
    """Say whether ``x`` is too coarse to compute with."""
    return x.dtype == torch.float16 or x.dtype == torch.bfloat16


def _scaled(x: Tensor, middle: float, unit: float, outside: str) -> Tensor:
    x = x.float() if needs_float32(x) else x
    u = (x - middle) / unit
    # An overflow would make NaN of a tangent of slope 0, of tangents that cancel, and of a cosine.
    return u.clamp(-1e34, 1e34) if outside == "linear" or outside == "periodic" else u


def _inner(u: Tensor, bound: float, outside: str) -> Tensor:
    return u.clamp(-bound, bound) if outside == "clamp" or outside == "linear" else u


def _narrowed(values: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float16:
        values = values.clamp(-65504.0, 65504.0)  # a tangent may leave the range of float16
    return values.to(dtype)


def distance_from_centers(u: Tensor, dim: int, count: int) -> Tensor:
    """Return the signed distance from ``count`` centers at distance 1, symmetric about 0, along a new axis ``dim``."""
    centers = torch.arange(count, device=u.device, dtype=u.dtype) - 0.5 * (count - 1)
    shape = [1] * (u.dim() + 1)
    shape[dim] = count
    return u.unsqueeze(dim) - centers.reshape(shape)


def check_grid_range(value: Any) -> tuple[float, float]:
    """Return ``value`` as a pair of floats if it is an increasing, finite one.

    Raises:
        ValueError: otherwise.
    """
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"`grid_range` must be a pair (first knot, last knot); got {value!r}.")
    low, high = (check_range("grid_range", end, open_low=True, open_high=True) for end in value)
    if low >= high:
        raise ValueError(f"`grid_range` must be increasing; got {value!r}. Swap or spread its ends.")
    return low, high


def blocks(x: Tensor, num_basis: int = 1) -> Iterator[tuple[slice, slice]]:
    """Cut ``x`` ``(N, M)`` into blocks of about ``_BLOCK / num_basis`` elements on a CPU, into one elsewhere."""
    rows, columns = x.shape
    size = max(_BLOCK // num_basis, 1) if x.device.type == "cpu" else max(x.numel(), 1)
    height = max(1, size // max(columns, 1))
    width = max(1, min(columns, size))
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            yield slice(top, top + height), slice(left, left + width)
