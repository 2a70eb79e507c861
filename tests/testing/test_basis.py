from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from monai_deqkan.networks.layers import Basis, BSplineBasis, FourierBasis
from monai_deqkan.testing import check_basis


@dataclass(frozen=True)
class Tanh(Basis):
    """By the required methods only."""

    @property
    def num_basis(self) -> int:
        return 2

    def values(self, x: Tensor, dim: int = 0) -> Tensor:
        return torch.stack([torch.tanh(k * x.float() if x.dtype.itemsize < 4 else k * x) for k in (1, 2)], dim).to(x)

    def derivative(self, x: Tensor, dim: int = 0) -> Tensor:
        wide = x.float() if x.dtype.itemsize < 4 else x
        return torch.stack([k / torch.cosh(k * wide.clamp(-40, 40)).square() for k in (1, 2)], dim).to(x)


@dataclass(frozen=True)
class TooSlow(BSplineBasis):
    def lipschitz_constants(self) -> Tensor:
        return 0.99 * super().lipschitz_constants()


@dataclass(frozen=True)
class TooFlat(FourierBasis):
    @property
    def slope_gain(self) -> float:
        return 0.2


@dataclass(frozen=True)
class Jump(Tanh):
    def values(self, x: Tensor, dim: int = 0) -> Tensor:
        return super().values(x, dim) + ((x > 1.0).to(x.dtype) * 0.01).unsqueeze(dim)


@dataclass(frozen=True)
class BadFit(BSplineBasis):
    def fit(self, t: Tensor, targets: Tensor, weights: Tensor | None = None, ridge: float = 1e-6) -> Tensor:
        return super().fit(t, targets, None, ridge)


@dataclass(frozen=True)
class BareFit(BSplineBasis):
    def fit(self, t: Tensor, targets: Tensor, weights: Tensor | None = None, ridge: float = 1e-6) -> Tensor:
        w = torch.ones_like(t) if weights is None else weights
        matrix = self.values(t.double(), 1)
        gram = matrix.T @ (w.double()[:, None] * matrix)
        right = matrix.T @ (w.double()[:, None] * targets.double().reshape(len(t), -1))
        return (torch.linalg.inv_ex(gram).inverse @ right).reshape(-1, *targets.shape[1:])


@dataclass(frozen=True)
class Shifted(BSplineBasis):
    def refined(self, factor: int = 2) -> BSplineBasis:
        return BSplineBasis(self.grid_size * factor, grid_range=(-1.0, 1.0))


def test_the_required_methods_are_enough() -> None:
    check_basis(Tanh())


@pytest.mark.parametrize(
    ("basis", "rule"),
    [
        (TooSlow(), "no slope exceeds its Lipschitz constant"),
        (TooFlat(), "slopes stay below"),
        (Jump(), "no value jumps at a grid's end"),
        (BadFit(), "`fit` passes over points of no weight"),
        (BareFit(), "`fit` stays finite"),
        (Shifted(), "keep the range"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Basis) else "",
)
def test_each_rule_is_enforced(basis: Basis, rule: str) -> None:
    with pytest.raises(AssertionError, match=rule):
        check_basis(basis)
