from __future__ import annotations

import itertools

import pytest
import torch
from monai.data import MetaTensor
from torch import nn

from monai_deqkan.networks.layers import KANActivation, KANConv2d, KANLinear, record_kan_inputs
from monai_deqkan.networks.layers.kan_importance import (
    KANEdge,
    edge_importance,
    edge_values,
    input_sensitivity,
    rank_edges,
)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layers(dtype=torch.float64):
    torch.manual_seed(0)
    linear = KANLinear(3, 4, dtype=dtype)
    grouped = KANConv2d(4, 6, (1, 2), groups=2, base_activation=None, dtype=dtype)
    mapped = KANConv2d(2, 3, 2, dtype=dtype)
    mapped.set_input_map(torch.tensor([0.5, -2.0], dtype=dtype), torch.tensor([0.3, 1.0], dtype=dtype))
    return {"linear": linear, "grouped": grouped, "mapped": mapped}


SHAPES = {"linear": (7, 5, 3), "grouped": (3, 4, 6, 5), "mapped": (3, 2, 6, 5)}


@pytest.mark.parametrize("name", SHAPES)
def test_importance_is_the_root_mean_square_of_the_function_over_the_inputs_of_its_channel(name):
    layer, x = layers()[name], randn(*SHAPES[name], seed=1, dtype=torch.float64)
    importance = edge_importance(layer, x)
    channels = x.flatten(0, -2).t() if name == "linear" else x.transpose(0, 1).flatten(1)
    for index in itertools.product(*map(range, importance.shape)):
        out, column, *offset = index
        channel = out // (importance.shape[0] // layer.groups) * importance.shape[1] + column
        values = layer.edge_functions(channels[channel]).detach()[(slice(None), *index)]
        assert float(importance[index]) == pytest.approx(float(values.square().mean().sqrt()), rel=1e-10)
        edge = KANEdge(out, channel, tuple(offset), 0.0, 0.0, 0.0)
        torch.testing.assert_close(edge_values(layer, edge, channels[channel]), values)


def test_importance_without_inputs_is_over_the_grid():
    layer = layers()["mapped"]
    t = torch.linspace(-3, 3, 513, dtype=torch.float64)
    for channel, (scale, shift) in enumerate(((0.5, 0.3), (-2.0, 1.0))):
        values = layer.edge_functions((t - shift) / scale)[:, :, channel]
        torch.testing.assert_close(edge_importance(layer)[:, channel], values.detach().square().mean(0).sqrt())


def test_ranking_names_edges_by_group_and_by_the_inputs_they_saw():
    layer, x = layers()["grouped"], randn(3, 4, 6, 5, seed=1, dtype=torch.float64)
    x[0, 3, 0, 0] = 100.0  # an outlier does not set the range: it is 1 of 90, but the 99.9 % quantile of 90 is the end
    edges = rank_edges(layer, x)
    importance = edge_importance(layer, x)
    assert len(edges) == importance.numel()
    assert [edge.importance for edge in edges] == sorted(importance.flatten().tolist(), reverse=True)
    for edge in edges:
        assert edge.in_channel // 2 == edge.out_channel // 3
        assert edge.importance == float(importance[(edge.out_channel, edge.in_channel % 2, *edge.offset)])
        channel = x[:, edge.in_channel]
        assert (edge.low, edge.high) == (float(channel.min()), float(channel.max()))
    assert rank_edges(layer, x, 3) == edges[:3]
    assert str(edges[0]) == f"{edges[0].in_channel} to {edges[0].out_channel} at {edges[0].offset}"


def test_range_leaves_outliers_out():
    layer, x = KANLinear(1, 1), torch.linspace(0, 1, 5001)[:, None]
    x = torch.cat((x, torch.tensor([[1e6], [-1e6]])))
    (edge,) = rank_edges(layer, x)
    assert 0 <= edge.low < 0.002
    assert 0.998 < edge.high <= 1


def test_recorded_inputs_of_a_convolution_fit_the_layer():
    layer, x = layers()["grouped"].float(), randn(3, 4, 6, 5)
    torch.testing.assert_close(edge_importance(layer, record_kan_inputs(layer, x)[""]), edge_importance(layer, x))
    recorded = record_kan_inputs(layer, MetaTensor(x))[""]
    assert type(recorded) is torch.Tensor
    torch.testing.assert_close(edge_importance(layer, recorded), edge_importance(layer, x))
    torch.testing.assert_close(input_sensitivity(layer, MetaTensor(x)), input_sensitivity(layer, x))


def test_sensitivity_of_a_linear_map_is_the_norm_of_its_columns():
    network = nn.Linear(4, 3, dtype=torch.float64)
    exact = torch.linalg.vector_norm(network.weight.detach(), dim=0)
    found = input_sensitivity(network, randn(500, 4, dtype=torch.float64), num_samples=50)
    torch.testing.assert_close(found, exact, rtol=0.02, atol=0)


def test_sensitivity_equals_the_jacobian_for_one_output_per_sample():
    torch.manual_seed(0)
    network = nn.Sequential(KANConv2d(3, 2, 3, dtype=torch.float64), nn.Flatten(), KANLinear(8, 1, dtype=torch.float64))
    x = randn(2, 3, 4, 4, dtype=torch.float64)
    rows = [torch.autograd.functional.jacobian(network, x[i : i + 1])[0, 0, 0] for i in range(2)]
    expected = torch.stack(rows).square().mean(dim=(0, 2, 3)).sqrt()
    torch.testing.assert_close(input_sensitivity(network, x), expected)
    with torch.no_grad():
        network[0].weight.unflatten(1, (9, 3))[:, :, 1] = 0
    assert float(input_sensitivity(network, x)[1]) == 0
    assert all(parameter.grad is None for parameter in network.parameters())


def test_bad_input_is_rejected():
    layer = KANConv2d(2, 2, 3)
    with pytest.raises(ValueError, match=r"shape \(B, 2, 2 spatial axes\); got \(1, 3, 4, 4\)"):
        edge_importance(layer, torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="finite"):
        edge_importance(layer, torch.full((1, 2, 4, 4), torch.nan))
    with pytest.raises(ValueError, match="at least one value"):
        edge_importance(layer, torch.zeros(0, 2, 4, 4))
    with pytest.raises(TypeError, match="Give its `functions`"):
        edge_importance(KANActivation(2))
    with pytest.raises(ValueError, match=r"\(B, C, \*\)"):
        input_sensitivity(layer, torch.zeros(3))
