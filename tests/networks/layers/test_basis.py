from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from monai_deqkan.networks.layers import BASES, Basis, BSplineBasis, KANLinear
from monai_deqkan.networks.layers.basis import build_basis
from monai_deqkan.testing import check_basis


@pytest.mark.parametrize("basis", [BSplineBasis(), BSplineBasis(3, 2, (0.0, 1.0)), BSplineBasis(7, 1)])
def test_keeps_to_the_rules(basis: BSplineBasis) -> None:
    check_basis(basis)


@dataclass(frozen=True)
class Powers(Basis):
    """1, x, x^2: a third party's basis, by the required methods only."""

    num_basis: int = field(default=3)

    def values(self, x: Tensor, dim: int = 0) -> Tensor:
        return torch.stack([x.float().pow(k).to(x.dtype) if x.dtype.itemsize < 4 else x.pow(k) for k in range(3)], dim)

    def derivative(self, x: Tensor, dim: int = 0) -> Tensor:
        return torch.stack([torch.zeros_like(x), torch.ones_like(x), 2 * x], dim)


def test_a_foreign_basis_works_in_a_layer() -> None:
    layer = KANLinear(2, 1, basis=Powers(), base_activation=None, dtype=torch.float64)
    with torch.no_grad():
        layer.coefficients.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])[None])
    x = torch.tensor([[2.0, -1.0]], dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert y.item() == (1 + 3 * 2 + 5 * 4) + (2 - 4 + 6)
    y.backward()
    torch.testing.assert_close(x.grad, torch.tensor([[3.0 + 10 * 2, 4.0 - 12]], dtype=torch.float64))


@dataclass(frozen=True)
class Wrong(BSplineBasis):
    def derivative(self, x: Tensor, dim: int = 0) -> Tensor:
        return 1.01 * super().derivative(x, dim)


def test_check_basis_finds_what_is_wrong() -> None:
    with pytest.raises(AssertionError, match="`derivative` is the slope of `values`"):
        check_basis(Wrong())

    class Local(BSplineBasis):
        pass

    with pytest.raises(AssertionError, match="pickled"):
        check_basis(Local())


def test_registry_and_layer_arguments() -> None:
    assert BASES.build("bspline", grid_size=3) == BSplineBasis(3)
    assert build_basis("bspline", 7, 2, (-1.0, 1.0)) == BSplineBasis(7, 2, (-1.0, 1.0))
    assert build_basis(("bspline", {"grid_size": 9}), 5, 3, (-3.0, 3.0)) == BSplineBasis(9)
    with pytest.raises(TypeError, match="`grid_size` of a layer only apply"):
        build_basis(("bspline", {}), 9, 3, (-3.0, 3.0))
    with pytest.raises(ValueError, match="bspline"):
        build_basis("bsplin", 5, 3, (-3.0, 3.0))
    assert BSplineBasis(grid_range=[-1, 1]) == BSplineBasis(grid_range=(-1.0, 1.0))  # type: ignore[arg-type]  # JSON
    assert BSplineBasis(4, 3, (-1.0, 1.0)).step == 0.5
