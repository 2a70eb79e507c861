from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline
from torch import Tensor

from monai_deqkan.networks.layers import BASES, Basis, BSplineBasis, KANLinear
from monai_deqkan.networks.layers.basis import build_basis
from monai_deqkan.testing import check_basis


def scipy_splines(basis: BSplineBasis, x: np.ndarray, derivative: int = 0) -> np.ndarray:
    order = basis.spline_order
    low = basis.grid_range[0]
    knots = low + basis.step * np.arange(-order, basis.grid_size + order + 1)
    splines = [BSpline.basis_element(knots[k : k + order + 2], extrapolate=False) for k in range(basis.num_basis)]
    return np.nan_to_num(np.stack([spline(x, nu=derivative) for spline in splines]))


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(("grid_size", "grid_range"), [(5, (-3.0, 3.0)), (1, (0.0, 0.5)), (12, (-1.0, 2.0))])
def test_equals_scipy(order: int, grid_size: int, grid_range: tuple[float, float]) -> None:
    basis = BSplineBasis(grid_size, order, grid_range)
    # not on a knot, where scipy's pieces are open on the right
    x = np.random.default_rng(0).uniform(grid_range[0] - 5, grid_range[1] + 5, 2000)
    exact = scipy_splines(basis, x)
    np.testing.assert_allclose(basis.values(torch.from_numpy(x)).numpy(), exact, rtol=0, atol=1e-13)
    slopes = basis.derivative(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(slopes, scipy_splines(basis, x, 1), rtol=0, atol=1e-12)
    rounded = torch.from_numpy(x).float()
    exact = scipy_splines(basis, rounded.double().numpy())
    atol = 1e-6 if order > 1 else 2e-5  # the hats' slope is that of x / step
    np.testing.assert_allclose(basis.values(rounded).numpy(), exact, rtol=0, atol=atol)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_sums_to_one_on_the_grid_and_vanishes_far_outside(order: int) -> None:
    basis = BSplineBasis(grid_size=4, spline_order=order, grid_range=(-2.0, 2.0))
    inside = torch.linspace(-2.0, 2.0, 101, dtype=torch.float64)
    torch.testing.assert_close(basis.values(inside).sum(0), torch.ones_like(inside))
    outside = torch.tensor([-2.0 - order, 2.0 + order, 1e30, float("inf"), float("-inf")])
    assert basis.values(outside).abs().max() < 1e-6
    assert basis.values(torch.tensor([float("nan")])).isnan().all()


@pytest.mark.parametrize("basis", [BSplineBasis(), BSplineBasis(3, 2, (0.0, 1.0)), BSplineBasis(7, 1)])
def test_keeps_to_the_rules(basis: BSplineBasis) -> None:
    check_basis(basis)


def test_fills_in_blocks_smaller_than_a_row_and_of_several_rows() -> None:
    basis = BSplineBasis()
    for shape in ((2, 70_000), (700, 100)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        values = basis.values(x, dim=1)
        out = torch.full_like(values, float("nan"))
        basis.fill(x, out)
        torch.testing.assert_close(out, values)
        torch.testing.assert_close(basis.pull_back(x, values), (basis.derivative(x, 1) * values).sum(1))


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"spline_order": 4}, "`spline_order` must be one of 1, 2, 3"),
        ({"spline_order": 0}, "`spline_order`"),
        ({"grid_size": 0}, "`grid_size` must be at least 1"),
        ({"grid_range": (1.0, -1.0)}, "increasing"),
        ({"grid_range": (0.0, float("inf"))}, "`grid_range`"),
        ({"grid_range": (0.0,)}, "pair"),
    ],
)
def test_wrong_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BSplineBasis(**settings)  # type: ignore[arg-type]
