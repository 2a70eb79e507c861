from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from monai_deqkan.networks.layers import (
    KANActivation,
    KANConv2d,
    KANLinear,
    PruningReport,
    certified_spectral_norm,
    compare_outputs,
    kan_lipschitz_bound,
    make_pruning_permanent,
    prune_basis,
    prune_edges,
)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        KANConv2d(2, 4, 3, padding=1), KANActivation(4), KANConv2d(4, 6, 3, stride=2, groups=2, base_activation=None)
    )


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 2, 12, 12, generator=torch.Generator().manual_seed(1))


def loop_importance(layer: KANConv2d, x: Tensor) -> Tensor:
    """Take the root mean square of each edge's function over its channel's values, one after the other."""
    per_group_in, per_group_out = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    found = torch.zeros(layer.out_channels, per_group_in, *layer.kernel_size, dtype=torch.float64)
    for o in range(layer.out_channels):
        for i in range(per_group_in):
            values = x[:, o // per_group_out * per_group_in + i].flatten()
            found[o, i] = layer.edge_functions(values)[:, o, i].double().square().mean(0).sqrt()
    return found


def edges_of(layer: nn.Module) -> Tensor:
    """Tell which edges are nonzero."""
    assert isinstance(layer, (KANConv2d, KANLinear))
    return layer.weight.detach().unflatten(1, (layer.num_features, -1)).ne(0).any(1)


def test_the_least_important_edges_of_each_layer_go() -> None:
    net = network()
    x = images()
    first, last = copy.deepcopy(net[0]), copy.deepcopy(net[2])
    seen = net[:2](x).detach()
    report = prune_edges(net, 0.5, inputs=x, scope="layer")
    for old, new, values in ((first, net[0], x), (last, net[2], seen)):
        importance = loop_importance(old, values)
        kept = edges_of(new)
        assert int(kept.sum()) == kept.numel() // 2
        assert importance[kept].min() >= 0.999 * importance[~kept].max()
        assert torch.equal(new.weight[:, :0], old.weight[:, :0])
    assert [record.layer for record in report.records] == ["0", "2"]
    assert [record.num_after for record in report.records] == [36, 54]


def test_scope_global_compares_shares_of_the_outputs() -> None:
    net = network()
    with torch.no_grad():
        net[0].weight.mul_(1e-3)  # smaller in size, not in its share of its own output
    report = prune_edges(net, 0.5)
    assert sum(record.num_after for record in report.records) == (72 + 108) // 2
    assert report.records[0].num_after > 20
    assert report.output_change is None
    assert report.records[0].output_change is None
    assert "all" in str(report)
    assert "50.0%" in str(report)


def test_changes_are_those_of_the_outputs() -> None:
    net = network()
    x = images()
    before, first = net(x).detach(), net[0](x).detach()
    original = copy.deepcopy(net)
    report = prune_edges(net, 0.3, inputs=[x[:2], (x[2:],)])
    change = (net(x).detach() - before).norm() / before.norm()
    assert report.output_change == pytest.approx(float(change), rel=1e-4)
    change = (net[0](x[:2]).detach() - first[:2]).norm() / first[:2].norm()
    assert report.records[0].output_change == pytest.approx(float(change), rel=1e-4)
    assert compare_outputs(original, net, x).network == pytest.approx(report.output_change, rel=1e-4)


@pytest.mark.parametrize("prune", [prune_edges, prune_basis])
def test_a_kernel_of_a_linear_layer_is_an_edge(prune: Callable[..., PruningReport]) -> None:
    torch.manual_seed(0)
    layer = KANLinear(4, 3)
    other = copy.deepcopy(layer)
    assert prune(layer, 0.5, granularity="kernel") == prune(other, 0.5, granularity="edge")
    assert torch.equal(layer.weight, other.weight)


def test_kernels_go_as_a_whole() -> None:
    net = network()
    report = prune_edges(net, 0.5, granularity="kernel")
    assert [record.num_units for record in report.records] == [8, 12]
    for record in report.records:
        kept = edges_of(net.get_submodule(record.layer)).unflatten(1, (2, -1)).flatten(2)
        assert bool((kept.all(2) == kept.any(2)).all())
        assert int(kept.any(2).sum()) == record.num_after


def test_basis_functions_go_by_their_contribution() -> None:
    torch.manual_seed(0)
    layer = KANLinear(3, 2)
    x = torch.randn(500, 3)
    values = layer.basis.values(x)  # (K, 500, 3)
    contribution = layer.coefficients.abs() * values.square().mean(1).sqrt()[None]
    base = layer.base_weight.detach().clone()
    prune_basis(layer, 0.5, inputs=x)
    kept = layer.coefficients != 0
    assert int(kept.sum()) == kept.numel() // 2
    assert contribution[kept].min() > contribution[~kept].max()
    assert torch.equal(layer.base_weight, base)


def test_a_basis_function_goes_from_a_whole_layer() -> None:
    torch.manual_seed(0)
    net = network()
    report = prune_basis(net, 0.25, granularity="layer", scope="layer", inputs=images())
    assert [(record.num_units, record.num_after) for record in report.records] == [(8, 6), (8, 6)]
    gone = net[2].coefficients.transpose(0, 1).flatten(1).eq(0).all(1)
    assert int(gone.sum()) == 2
    kernels = prune_basis(network(), 0.5, granularity="kernel")
    assert kernels.records[0].num_units == 4 * 8 * 2


def test_amounts_count_all_units_and_pruned_ones_stay_pruned() -> None:
    net = network()
    prune_edges(net, 0.4, inputs=images())
    gone = ~edges_of(net[0])
    with torch.no_grad():
        net[0].parametrizations["weight"].original.add_(5.0)
    report = prune_edges(net, 0.6, inputs=images())
    assert sum(record.num_before for record in report.records) == 108
    assert sum(record.num_after for record in report.records) == 72
    assert not bool(edges_of(net[0])[gone].any())
    assert prune_edges(net, 0.1).records[0].num_after == report.records[0].num_after


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # deprecated, and still asked for by users
def test_zeros_stay_through_training_and_are_permanent_afterwards() -> None:
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    prune_edges(net, 0.5)
    kept = edges_of(net[2])
    start = net[2].weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        net(images()).square().mean().backward()
        optimizer.step()
    assert torch.equal(edges_of(net[2]), kept)
    assert not torch.equal(net[2].weight, start)
    expected = net(images()).detach()
    other = copy.deepcopy(net)
    make_pruning_permanent(net)
    assert torch.equal(net(images()), expected)
    assert torch.equal(other(images()), expected)
    fresh = network(1)
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh(images()), expected)
    torch.testing.assert_close(torch.jit.script(net)(images()), expected)


def test_a_checkpoint_in_pruning_loads_after_an_amount_of_zero() -> None:
    net = network()
    prune_edges(net, 0.5)
    fresh = network(1)
    prune_edges(fresh, 0.0)
    assert bool(edges_of(fresh[0]).all())
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh(images()), net(images()))


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_certified_norm_sees_the_masked_weight(norm_first: bool) -> None:
    torch.manual_seed(0)
    layer = KANLinear(6, 6)
    if norm_first:
        certified_spectral_norm(layer, 0.5)
        prune_edges(layer, 0.5)
    else:
        prune_edges(layer, 0.5)
        certified_spectral_norm(layer, 0.5)
    assert int(edges_of(layer).sum()) == 18
    plain = KANLinear(6, 6)
    plain.load_state_dict({"weight": layer.weight.detach(), "bias": layer.bias.detach()})
    assert float(kan_lipschitz_bound(plain).detach()) == pytest.approx(0.5, rel=1e-4)
    expected = layer(torch.ones(1, 6)).detach()
    make_pruning_permanent(layer)
    torch.testing.assert_close(layer(torch.ones(1, 6)), expected)
    assert len(layer.parametrizations["weight"]) == 1


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="amount"):
        prune_edges(network(), 1.0)
    with pytest.raises(ValueError, match="scope"):
        prune_edges(network(), scope="net")
    with pytest.raises(ValueError, match="granularity"):
        prune_edges(network(), granularity="layer")
    with pytest.raises(ValueError, match="it has none"):
        prune_edges(nn.Sequential(KANActivation(2)))
    with pytest.raises(ValueError, match="empty"):
        prune_edges(network(), inputs=[])
    net = network()
    net.add_module("idle", KANLinear(2, 2))
    net.forward = net[:3].forward  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"not called: idle"):
        prune_edges(net, inputs=images())


@pytest.mark.parametrize("prune", [prune_edges, prune_basis])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(prune: Callable[..., PruningReport], value: float) -> None:
    network = nn.Sequential(KANLinear(3, 2), KANLinear(2, 2))
    network[1].weight.data[0, 0] = value
    with pytest.raises(ValueError, match=r"`1\.weight` must be finite; 1 of 36"):
        prune(network, 0.5)
    assert not parametrize.is_parametrized(network[0], "weight")
