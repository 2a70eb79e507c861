"""What a KAN basis must keep to."""

from __future__ import annotations

import copy
import pickle

import torch
from torch import Tensor

from monai_deqkan.networks.layers import Basis

__all__ = ["check_basis"]


def check_basis(basis: Basis, low: float = -4.0, high: float = 4.0) -> None:
    r"""Check that a basis keeps to the rules that KAN layers rely on.

    Values are finite, of the right shape and dtype, the same in every layout and on every path; derivatives agree with
    central differences of the values (at 99 % of the points, so that kinks are allowed) and with autograd; ``fill`` and
    ``pull_back`` agree with ``values`` and ``derivative``; the object is hashable, copyable and picklable.

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
