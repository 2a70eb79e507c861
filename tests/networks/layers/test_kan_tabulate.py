from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from scipy.interpolate import BSpline
from torch import Tensor, nn

from monai_deqkan.networks.layers import (
    BASES,
    Basis,
    BSplineBasis,
    KANConv2d,
    KANLinear,
    TabulatedBasis,
    compare_outputs,
    edge_tables,
    prune_edges,
    tabulate_kan,
)


def test_the_table_is_as_near_as_linear_interpolation_can_be() -> None:
    basis = BSplineBasis()
    table = TabulatedBasis(basis, resolution=100)
    x = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    knots = -3 + basis.step * (torch.arange(12) - 3)
    exact = torch.stack(
        [torch.from_numpy(BSpline.basis_element(knots[k : k + 5], False)(x.numpy())) for k in range(8)]
    ).nan_to_num(0.0)
    # the second derivative of a cubic B-spline is at most 2 / step^2
    bound = (0.06**2 / 8) * 2 / basis.step**2
    assert 0.5 * bound < float((table.values(x) - exact).abs().max()) < 1.01 * bound


def test_slopes_are_those_of_the_table_and_bounded() -> None:
    table = TabulatedBasis(BSplineBasis(), resolution=20)
    x = torch.rand(200, dtype=torch.float64) * 20 - 10
    x.requires_grad_()
    slopes = torch.stack([torch.autograd.grad(table.values(x)[k].sum(), x)[0] for k in range(8)])
    torch.testing.assert_close(slopes, table.derivative(x))
    step = 1e-6
    x = x.detach()
    numeric = (table.values(x + step) - table.values(x - step)) / (2 * step)
    assert float((numeric - slopes).abs().median()) < 1e-8
    constants = table.lipschitz_constants()
    grid = torch.linspace(-9, 9, 5001, dtype=torch.float64)
    torch.testing.assert_close(table.derivative(grid).abs().amax(1), constants, rtol=1e-9, atol=0)


def test_a_straight_line_goes_on_beyond_the_table() -> None:
    table = TabulatedBasis(BSplineBasis(outside="linear"), resolution=50)
    x = torch.tensor([-40.0, 40.0], dtype=torch.float64)
    torch.testing.assert_close(table.values(x), BSplineBasis(outside="linear").values(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "basis",
    [
        *(BASES.build(name) for name in ("bspline", "gaussian", "mexican_hat", "chebyshev", "fourier")),
        BSplineBasis(grid_size=1, spline_order=5),
        BASES.build(("gaussian", {"outside": "linear"})),
        BASES.build(("chebyshev", {"outside": "linear"})),
    ],
    ids=str,
)
def test_all_kinds_inside_and_far_outside(basis: Basis) -> None:
    x = torch.cat((torch.linspace(-8, 8, 4001), torch.tensor([-70.0, 50.0]))).double()
    table = TabulatedBasis(basis, 512)
    exact = basis.values(x)
    assert float((table.values(x) - exact).abs().max()) < 2e-3 * float(exact.abs().max())
    torch.testing.assert_close(table.module()(x), table.values(x, dim=1), rtol=1e-5, atol=1e-5)


@dataclass(frozen=True)
class Waves(Basis):
    @property
    def num_basis(self) -> int:
        return 1

    def values(self, x: Tensor, dim: int = 0) -> Tensor:
        return torch.sin(x).unsqueeze(dim)

    def derivative(self, x: Tensor, dim: int = 0) -> Tensor:
        return torch.cos(x).unsqueeze(dim)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_float32(dtype: torch.dtype) -> None:
    table = TabulatedBasis(BSplineBasis())
    x = (torch.rand(500) * 8 - 4).to(dtype)
    expected = table.values(x.float())
    assert float((table.values(x, dim=1).T.float() - expected).abs().max()) < torch.finfo(dtype).eps
    assert float((table.module()(x).T.float() - expected).abs().max()) < 2 * torch.finfo(dtype).eps


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # deprecated, and still asked for by users
def test_networks_keep_their_outputs_and_state() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(KANConv2d(2, 4, 3, padding=1), KANConv2d(4, 2, 3, padding=1, padding_mode="reflect"))
    net[0].set_input_map(torch.tensor([0.5, -2.0]), torch.tensor([0.3, 1.0]))
    prune_edges(net, 0.3)
    x = torch.randn(2, 2, 12, 12)
    table = tabulate_kan(net)
    changes = compare_outputs(net, table, x)
    assert 0 < changes.network < 1e-3
    assert set(changes.layers) == {"0", "1"}
    assert compare_outputs(net, tabulate_kan(net, 16), x).network > changes.network
    plain = nn.Sequential(KANConv2d(2, 4, 3, padding=1), KANConv2d(4, 2, 3, padding=1, padding_mode="reflect"))
    plain.load_state_dict(table.state_dict(), strict=True)
    assert compare_outputs(plain, table, x).network == pytest.approx(changes.network, rel=1e-3)
    torch.testing.assert_close(torch.jit.script(table)(x), table(x))
    exported = torch.export.export(table, (x,))
    torch.testing.assert_close(exported.module()(x), table(x))


def test_a_tabulated_layer_learns() -> None:
    torch.manual_seed(0)
    layer = tabulate_kan(KANLinear(3, 2).double(), 64)
    x = torch.rand(5, 3, dtype=torch.float64) * 4 - 2
    assert torch.autograd.gradcheck(lambda w: torch.func.functional_call(layer, {"weight": w}, x), layer.weight)
    z = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(layer(z)[:, 0].sum(), z)
    step = 1e-7
    shifted = torch.stack([layer(x + step * torch.eye(3)[i])[:, 0] for i in range(3)], 1)
    torch.testing.assert_close(grad, (shifted - layer(x)[:, :1]) / step, rtol=1e-4, atol=1e-4)


def test_edge_tables_hold_the_functions() -> None:
    torch.manual_seed(0)
    layer = KANConv2d(2, 3, 3)
    layer.set_input_map(torch.tensor([2.0, 0.5]), torch.tensor([0.0, 0.0]))
    tables = edge_tables(layer)
    assert tables.codes.dtype == torch.int8
    assert tables.codes.shape == (128, 3, 2, 3, 3)
    assert tables.input_range == (-6.0, 6.0)
    points = torch.rand(500) * 12 - 6
    expected = layer.edge_functions(points).detach()
    error = (tables.edge_functions(points) - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert float(error) < 0.01
    ends = tables.edge_functions(torch.tensor([-6.0, 6.0, 60.0]))
    exact = layer.edge_functions(torch.tensor([-6.0, 6.0, 6.0]))
    assert bool(((ends - exact).abs() <= 0.5001 * tables.scale).all())


def test_a_linear_layer_is_the_sum_of_its_tables() -> None:
    torch.manual_seed(0)
    layer = KANLinear(32, 4)
    tables = edge_tables(layer, input_range=(-4.0, 4.0))
    x = torch.randn(200, 32)
    read = tables.edge_functions(x.flatten()).unflatten(0, x.shape)  # (200, 32, out, in)
    y = torch.einsum("pioi->po", read) + layer.bias
    expected = layer(x).detach()
    y = y.detach()
    assert float((y - expected).norm() / expected.norm()) < 0.01


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="neither fade nor go on linearly"):
        TabulatedBasis(Waves())
    with pytest.raises(ValueError, match="resolution"):
        TabulatedBasis(BSplineBasis(), 1)
    with pytest.raises(TypeError, match="table"):
        tabulate_kan(tabulate_kan(KANLinear(2, 2)))
    with pytest.raises(ValueError, match="increasing"):
        edge_tables(KANLinear(2, 2), input_range=(1.0, math.nan))
    with pytest.raises(ValueError, match="at most 8"):
        edge_tables(KANLinear(2, 2), bits=16)


def test_edge_tables_of_what_no_integer_holds() -> None:
    with pytest.raises(ValueError, match="increasing and finite"):
        edge_tables(KANLinear(2, 2), input_range=(0.0, math.inf))
    layer = KANLinear(2, 2)
    nn.init.constant_(layer.weight[0], math.nan)
    with pytest.raises(ValueError, match=r"`layer\.weight` must be finite; 18 of 36"):
        edge_tables(layer)
