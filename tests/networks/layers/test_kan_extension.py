import pytest
import torch
from torch import nn

from monai_deqkan.networks.layers import (
    KANActivation,
    KANConv2d,
    KANLinear,
    certified_spectral_norm,
    extend_grid,
    extend_grids,
    prune_edges,
    quantize_kan,
    refit_grid,
    reset_optimizer_state,
)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("factor", [2, 3, 7])
def test_nested_knots_leave_the_function_unchanged(order, factor):
    torch.manual_seed(0)
    layer = KANLinear(3, 4, spline_order=order, dtype=torch.float64)
    x = 6 * torch.rand(500, 3, dtype=torch.float64) - 3
    before = layer(x)
    record = extend_grid(layer, factor)
    assert layer.basis.grid_size == 5 * factor
    assert record.num_basis == 5 * factor + order
    assert float((layer(x) - before).detach().norm() / before.detach().norm()) < 1e-12
    assert record.relative_change < 1e-12


@pytest.mark.parametrize("outside", ["zero", "clamp", "linear"])
def test_outside_of_the_grid_only_what_fades_changes(outside):
    torch.manual_seed(0)
    layer = KANLinear(1, 2, outside=outside, dtype=torch.float64)
    x = torch.linspace(3.0, 4.5, 64, dtype=torch.float64)[:, None]  # a quarter of the width
    x = torch.cat((x, -x))
    before = layer(x)
    record = extend_grid(layer)
    change = float((layer(x) - before).detach().norm())
    assert (change < 1e-10) == (outside != "zero") == (record.outside_change < 1e-10)


def test_change_is_reported_where_knots_do_not_nest():
    torch.manual_seed(0)
    layer = KANLinear(2, 3, base_activation=None, dtype=torch.float64)
    points = torch.linspace(-3, 3, 3001, dtype=torch.float64)
    before = layer.edge_functions(points).detach()
    record = extend_grid(layer, grid_size=8)
    change = float((layer.edge_functions(points) - before).detach().norm() / before.detach().norm())
    assert 1e-4 < change < 0.05
    assert record.relative_change == pytest.approx(change, rel=0.1)


def test_convolution_with_groups_and_an_input_map():
    torch.manual_seed(0)
    layer = KANConv2d(4, 6, 3, groups=2, padding=1, padding_mode="reflect", dtype=torch.float64)
    x = 20 * torch.rand(2, 4, 9, 9, dtype=torch.float64)
    refit_grid(layer, x, margin=0.01)
    scale, weight = layer.input_scale.clone(), layer.weight
    before = layer(x)
    extend_grid(layer)
    assert torch.equal(layer.input_scale, scale)
    assert layer.weight is weight
    assert torch.allclose(layer(x), before, atol=1e-12)


@pytest.mark.parametrize("basis", ["gaussian", "chebyshev", "fourier", "mexican_hat"])
def test_other_bases_hold_their_old_functions(basis):
    torch.manual_seed(0)
    layer = KANLinear(2, 3, basis=basis, dtype=torch.float64)
    x = torch.linspace(*layer.basis.grid_range, 200, dtype=torch.float64)[:, None].expand(-1, 2)
    before = layer(x)
    record = extend_grid(layer)
    assert record.num_basis > record.old_num_basis
    assert torch.allclose(layer(x), before, atol=1e-10)


def test_networks_and_reloading():
    torch.manual_seed(0)

    def build():
        return nn.Sequential(KANLinear(2, 4), KANActivation(4), KANLinear(4, 1, grid_size=12))

    network, x = build(), torch.rand(50, 2)
    before = network(x)
    records = extend_grids(network, grid_size=10)
    assert [record.layer for record in records] == ["0", "1.functions"]
    assert torch.allclose(network(x), before, atol=1e-5)
    fresh = build()
    fresh.load_state_dict(network.state_dict())
    assert torch.equal(fresh(x), network(x))
    assert "8 -> 13 functions" in str(records[0])


@pytest.mark.parametrize("make", [torch.optim.Adam, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)])
def test_optimizer_goes_on_after_its_state_was_dropped(make):
    torch.manual_seed(0)
    network = nn.Sequential(KANLinear(2, 3), nn.Linear(3, 1))
    optimizer = make(network.parameters())

    def step():
        optimizer.zero_grad()
        loss = network(torch.ones(4, 2)).square().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    first = step()
    kept = optimizer.state[network[1].weight]
    extend_grid(network[0])
    assert reset_optimizer_state(optimizer) == 1
    assert network[0].weight not in optimizer.state
    assert optimizer.state[network[1].weight] is kept
    assert reset_optimizer_state(optimizer) == 0
    assert step() < first
    assert step() < first
    assert optimizer.state[network[0].weight]
    assert network[0].weight.grad.shape == network[0].weight.shape
    assert reset_optimizer_state(optimizer, [network[1].weight]) == 1


def test_errors_say_what_to_do():
    layer = KANLinear(2, 2)
    with pytest.raises(ValueError, match="not both"):
        extend_grid(layer, 2, grid_size=10)
    with pytest.raises(ValueError, match="at least the old one, 5"):
        extend_grid(layer, grid_size=4)
    with pytest.raises(ValueError, match="Give `factor`"):
        extend_grid(KANLinear(2, 2, basis="chebyshev"), grid_size=10)
    with pytest.raises(ValueError, match="factor"):
        extend_grid(layer, 0)
    with pytest.raises(TypeError, match="KANLinear"):
        extend_grid(nn.Linear(2, 2))


@pytest.mark.parametrize("change", ["prune", "certify", "quantize"])
def test_an_extended_layer_with_parametrized_weight_says_how_to_load_it(change):
    apply = {
        "prune": lambda layer: (prune_edges(layer, 0.0), layer)[1],
        "certify": certified_spectral_norm,
        "quantize": quantize_kan,
    }[change]
    torch.manual_seed(0)
    layer = KANLinear(3, 2)
    extend_grid(layer)
    saved = apply(layer)
    fresh = KANLinear(3, 2)
    with pytest.raises(RuntimeError, match=r"13 basis functions; this layer has 8.*extend_grid\(layer, grid_size=10\)"):
        apply(fresh).load_state_dict(saved.state_dict())
    fresh = KANLinear(3, 2)
    extend_grid(fresh, grid_size=10)
    fresh = apply(fresh)
    fresh.load_state_dict(saved.state_dict())
    x = torch.randn(5, 3)
    torch.testing.assert_close(fresh(x), saved(x))
