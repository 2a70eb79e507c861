from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from monai_deqkan.networks.layers import (
    ChannelSubset,
    KANActivation,
    KANConv2d,
    KANConv3d,
    KANLinear,
    certified_spectral_norm,
    prune_edges,
    remove_pruned_channels,
)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (KANConv2d(6, 5, 3, stride=2, padding=1, outside="linear"), (2, 6, 9, 8)),
        (
            KANConv2d(6, 5, (1, 3), padding="same", padding_mode="reflect", bias=False, base_activation=None),
            (1, 6, 7, 8),
        ),
        (KANConv3d(6, 2, 3, dilation=2, padding=2, basis="gaussian"), (1, 6, 5, 6, 5)),
        (KANLinear(6, 4), (3, 7, 6)),
    ],
)
@pytest.mark.parametrize("with_map", [False, True])
def test_the_smaller_layer_gives_the_pruned_ones_output(layer: nn.Module, shape: tuple, with_map: bool) -> None:
    torch.manual_seed(0)
    layer = copy.deepcopy(layer).double()
    nn.init.normal_(layer.weight)
    if with_map:
        layer.set_input_map(torch.linspace(0.5, 1.5, 6), torch.linspace(-0.2, 0.3, 6))
    report = prune_edges(layer, 0.5, granularity="input")
    assert (report.records[0].num_units, report.records[0].num_after) == (6, 3)
    x = torch.randn(shape, dtype=torch.float64)
    small = remove_pruned_channels(layer)
    assert isinstance(small, ChannelSubset)
    assert small.layer.weight.numel() * 2 == layer.weight.numel()
    torch.testing.assert_close(small(x), layer(x), rtol=1e-12, atol=1e-12)
    assert layer.weight.shape[1] == 6 * layer.num_features


def test_the_channels_with_the_smallest_functions_go() -> None:
    torch.manual_seed(0)
    layer = KANConv2d(4, 3, 3)
    with torch.no_grad():
        layer.weight.unflatten(1, (layer.num_features, 4))[:, :, [0, 2]] *= 0.1
    prune_edges(layer, 0.5, granularity="input", inputs=torch.randn(2, 4, 8, 8))
    assert remove_pruned_channels(layer).channels.tolist() == [1, 3]


def test_single_edges_stay_zero_and_other_layers_stay_as_they_are() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        KANConv2d(4, 4, 3, padding=1), KANActivation(4), KANConv2d(4, 4, 1, groups=2), KANConv2d(4, 2, 1), nn.ReLU()
    )
    prune_edges(network, 0.25, scope="layer", granularity="input")
    prune_edges(network, 0.5, scope="layer")
    small = remove_pruned_channels(network)
    assert [isinstance(part, ChannelSubset) for part in small] == [True, False, False, True, False]
    x = torch.randn(1, 4, 6, 6)
    torch.testing.assert_close(small(x), network(x))
    before = small[0].layer.weight.detach().clone()
    zeros = before == 0
    assert bool(zeros.any())
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    small(x).square().mean().backward()
    optimizer.step()
    changed = small[0].layer.weight != before
    assert bool(changed.any())
    assert not bool(changed[zeros].any())


def test_a_layer_without_any_edge_left_keeps_one_channel() -> None:
    layer = KANLinear(3, 2)
    nn.init.zeros_(layer.weight)
    nn.init.constant_(layer.bias, 0.5)
    small = remove_pruned_channels(layer)
    assert small.channels.tolist() == [0]
    assert small(torch.randn(4, 3)).tolist() == [[0.5, 0.5]] * 4


def test_a_certified_norm_is_refused() -> None:
    layer = KANLinear(4, 4)
    prune_edges(layer, 0.5, granularity="input")
    certified_spectral_norm(layer)
    with pytest.raises(ValueError, match="parametrization"):
        remove_pruned_channels(layer)


def test_export_keeps_the_values() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(KANConv2d(4, 3, 3, padding=1))
    with torch.no_grad():
        network[0].weight[:, 1::4] = 0.0
    small = remove_pruned_channels(network).eval()
    x = torch.randn(1, 4, 6, 6)
    exported = torch.export.export(small, (x,)).module()
    torch.testing.assert_close(exported(x), network(x))
