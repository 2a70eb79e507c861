"""What a KAN basis must keep to."""

from __future__ import annotations

import copy
import math
import pickle

import torch
from torch import Tensor

from monai_deqkan.networks.layers import Basis

__all__ = ["check_basis"]


def check_basis(basis: Basis, low: float = -4.0, high: float = 4.0) -> None:
    r"""Check that a basis keeps to the rules that KAN layers rely on.

    Values are finite, of the right shape and dtype, the same in every layout and on every path; derivatives agree with
    central differences of the values (at 99 % of the points, so that kinks are allowed) and with autograd; ``fill`` and
    ``pull_back`` agree with ``values`` and ``derivative``; slopes stay below their bounds, and values do not jump at
    the ends of the grid; ``fit`` finds functions of the span and stays finite; another size keeps the range; the
    object is hashable, copyable and picklable.

    Args:
        basis: the basis to check.
        low: where the tested points begin, in the unit of the input.
        high: where they end.

    Raises:
        AssertionError: naming the rule that is broken.

    Example:
        >>> from monai_deqkan.networks.layers import BSplineBasis
        >>> check_basis(BSplineBasis())
    """
    points = low + (high - low) * torch.rand(6, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _check_object(basis)
    _check_layout(basis, points)
    _check_dtypes(basis, points)
    _check_derivative(basis, points)
    _check_fast_paths(basis, points)
    _check_slope_bounds(basis, points)
    _check_fit(basis)
    _check_sizes(basis)


def _require(condition: bool, rule: str, basis: Basis) -> None:
    if not condition:
        raise AssertionError(f"{basis!r} breaks a rule of KAN bases: {rule}.")


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return a.shape == b.shape and bool(((a - b).abs() <= tolerance * (1.0 + b.abs())).all())


def _check_object(basis: Basis) -> None:
    _require(isinstance(basis.num_basis, int) and basis.num_basis >= 1, "`num_basis` is a positive integer", basis)
    try:
        stored = pickle.dumps(basis)
    except (AttributeError, TypeError, pickle.PicklingError) as error:
        raise AssertionError(f"{basis!r} breaks a rule of KAN bases: it can be pickled ({error}).") from error
    for twin in (copy.deepcopy(basis), pickle.loads(stored)):
        _require(twin == basis and hash(twin) == hash(basis), "a copy is equal and has the same hash", basis)


def _check_layout(basis: Basis, points: Tensor) -> None:
    count = basis.num_basis
    for function in (basis.values, basis.derivative):
        first = function(points)
        _require(first.shape == (count, *points.shape), "the new axis comes first by default", basis)
        for dim in (1, 2, -1):
            moved = function(points, dim)
            _require(_close(moved, first.movedim(0, dim), 1e-12), f"dim={dim} moves the new axis there", basis)
    alone = basis.values(points.reshape(-1)[:1])[:, 0]
    _require(_close(alone, basis.values(points)[:, 0, 0], 1e-12), "each element is treated alone", basis)
    empty = basis.values(points[:0])
    _require(empty.shape == (count, 0, points.shape[1]), "an empty input gives an empty output", basis)


def _check_dtypes(basis: Basis, points: Tensor) -> None:
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
        x = points.to(dtype)
        for function in (basis.values, basis.derivative):
            found = function(x)
            _require(found.dtype == dtype, f"{dtype} stays {dtype}", basis)
            exact = function(x.double())
            bound = tolerance * float(1 + exact.abs().max())
            _require(_close(found.double(), exact, bound), f"accurate in {dtype}", basis)
    hostile = torch.tensor([0.0, -1e4, 1e4, 1e-30, -1e-30, 2.0**-24, -(2.0**-24)])
    for x in (hostile, hostile.half(), hostile.double()):
        finite = torch.isfinite(basis.values(x)).all() and torch.isfinite(basis.derivative(x)).all()
        _require(bool(finite), f"finite for finite inputs in {x.dtype}", basis)


def _check_derivative(basis: Basis, points: Tensor) -> None:
    delta = 1e-5
    slopes = basis.derivative(points)
    differences = (basis.values(points + delta) - basis.values(points - delta)) / (2 * delta)
    agree = (slopes - differences).abs() <= 1e-6 * (1 + slopes.abs().max())
    _require(float(agree.double().mean()) >= 0.99, "`derivative` is the slope of `values`", basis)
    x = points.clone().requires_grad_()
    weights = torch.linspace(1.0, 2.0, basis.num_basis, dtype=points.dtype)[:, None, None]
    (found,) = torch.autograd.grad((weights * basis.values(x)).sum(), x)
    _require(_close(found, (weights * slopes).sum(0), 1e-9), "`values` is differentiable by autograd", basis)


def _check_fast_paths(basis: Basis, points: Tensor) -> None:
    values = basis.values(points, dim=1)
    out = torch.full_like(values, float("nan"))
    basis.fill(points, out)
    _require(_close(out, values, 1e-12), "`fill` writes `values`", basis)
    grad = torch.cos(values + 1.0)
    expected = (basis.derivative(points, dim=1) * grad).sum(dim=1)
    _require(_close(basis.pull_back(points, grad), expected, 1e-10), "`pull_back` applies `derivative`", basis)
    _require(_close(basis.module()(points), values, 1e-12), "`module` computes `values`", basis)


def _check_slope_bounds(basis: Basis, points: Tensor) -> None:
    low, high = basis.grid_range
    _require(-math.inf < low < high < math.inf, "`grid_range` is finite and increasing", basis)
    constants, gain = basis.lipschitz_constants(), basis.slope_gain
    right_kind = constants.shape == (basis.num_basis,) and constants.dtype == torch.float64
    _require(right_kind, "`lipschitz_constants` has shape (K,) and is float64", basis)
    x = torch.cat((points.flatten(), torch.linspace(2 * low - high, 2 * high - low, 2001, dtype=torch.float64)))
    slopes = basis.derivative(x)
    _require(
        bool((slopes.abs() <= constants[:, None] * (1 + 1e-9)).all()), "no slope exceeds its Lipschitz constant", basis
    )
    ends = torch.tensor([low, high], dtype=torch.float64)
    delta = 1e-9 * (high - low)
    jumps = (basis.values(ends + delta) - basis.values(ends - delta)).abs()
    _require(bool((jumps <= 3 * delta * constants[:, None] + 1e-12).all()), "no value jumps at a grid's end", basis)

    c = torch.randn(3, basis.num_basis, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    d = basis.slope_coefficients(c, 1)
    moved = basis.slope_coefficients(c.movedim(1, -1), -1).movedim(-1, 1)
    _require(_close(moved, d, 1e-12), "`slope_coefficients` works along any axis", basis)
    scaled = basis.slope_coefficients(c * -2.0, 1)
    _require(_close(scaled, -2.0 * d, 1e-12), "`slope_coefficients` is linear", basis)
    bound = d.norm(dim=1) * gain * (1 + 1e-9)  # (3, 2)
    steepest = torch.einsum("nkm,kp->nmp", c, slopes).abs().amax(2)
    _require(bool((steepest <= bound).all()), "slopes stay below |d| times `slope_gain`", basis)


def _check_fit(basis: Basis) -> None:
    t = torch.linspace(*basis.grid_range, 401, dtype=torch.float64)
    c = torch.randn(basis.num_basis, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    values = basis.values(t, dim=1)
    targets = values @ c
    found = basis.fit(t, targets, ridge=1e-9)
    right_kind = found.shape == c.shape and found.dtype == torch.float64
    _require(right_kind, "`fit` returns (K, *) in float64", basis)
    error = float((values @ found - targets).square().mean() / targets.square().mean())
    _require(error < 1e-6, "`fit` finds a function of the span", basis)
    weights = (torch.arange(401) % 2).double()
    masked = torch.where(weights[:, None] > 0, targets, 1e3)
    error = float((values @ basis.fit(t, masked, weights, ridge=1e-9) - targets)[1::2].square().mean())
    _require(error < 1e-6 * float(targets.square().mean()), "`fit` passes over points of no weight", basis)
    for points, unit in ((t[:1], 1.0), (t[:1].expand(7), 1e30), (t * 1e6, 1e6), (t[:3].float(), 0.0)):
        finite = basis.fit(points, torch.full_like(points, unit)).isfinite().all()
        _require(bool(finite), "`fit` stays finite on hostile points", basis)
    _require(bool(basis.fit(t, targets, 0.0 * t).isfinite().all()), "`fit` stays finite without any weight", basis)


def _check_sizes(basis: Basis) -> None:
    try:
        fine = basis.refined(2)
        again = fine.resized(basis.num_basis)
    except TypeError:
        return  # a basis of fixed size
    _require(fine.num_basis > basis.num_basis, "`refined` has more functions", basis)
    _require(again.num_basis == basis.num_basis, "`resized` has the number of functions asked for", basis)
    same = basis.grid_range == fine.grid_range == again.grid_range
    _require(same, "`refined` and `resized` keep the range", basis)
