from __future__ import annotations

import math

import pytest
import torch
from monai.networks.layers.utils import get_norm_layer
from monai.networks.nets import BasicUNet
from torch import nn

from monai_deqkan.networks.layers import NonexpansiveGroupNorm


def wild(num_groups: int = 2, num_channels: int = 4, eps: float = 1.0) -> NonexpansiveGroupNorm:
    layer = NonexpansiveGroupNorm(num_groups, num_channels, eps).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer.requires_grad_(False)


def jacobian_norm(layer: nn.Module, x: torch.Tensor) -> float:
    jacobian = torch.autograd.functional.jacobian(layer, x).reshape(x.numel(), x.numel())
    return float(torch.linalg.matrix_norm(jacobian, ord=2))


@pytest.mark.parametrize("eps", [1e-4, 1.0, 30.0])
@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 1e3])
def test_exact_jacobian_norm_is_at_most_one(eps: float, size: float) -> None:
    layer = wild(eps=eps)
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for shift in (0.0, 100.0):
        assert jacobian_norm(layer, size * x + shift) <= 1 + 1e-9


@pytest.mark.parametrize("eps", [1e-3, 1.0])
def test_bound_is_reached_and_no_search_exceeds_it(eps: float) -> None:
    layer = wild(eps=eps)
    # Constant groups are the worst place, across the channel of the largest weight.
    assert jacobian_norm(layer, torch.full((1, 4, 5, 5), 3.0, dtype=torch.float64)) == pytest.approx(1.0)
    plain = nn.GroupNorm(2, 4, eps=1e-5).double()
    assert jacobian_norm(plain, torch.full((1, 4, 5, 5), 3.0, dtype=torch.float64)) == pytest.approx(316.2, rel=1e-3)
    x = torch.randn(8, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    offset = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    optimizer = torch.optim.Adam([x, offset], lr=0.05)
    ratios = []
    for _ in range(100):  # ascent on the ratio of distances, over pairs of inputs
        ratio = (layer(x + offset) - layer(x)).flatten(1).norm(dim=1) / offset.flatten(1).norm(dim=1)
        ratios.append(ratio.detach())
        optimizer.zero_grad()
        (-ratio.log().sum()).backward()
        optimizer.step()
    assert float(torch.stack(ratios).max()) <= 1 + 1e-9
    assert float(ratios[-1].min()) > float(ratios[0].max())


def test_formula_in_loops() -> None:
    layer = wild(eps=0.5)
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    expected = torch.empty_like(x)
    largest = max(1.0, max(abs(float(weight)) for weight in layer.weight))
    for sample in range(2):
        for group in range(2):
            values = x[sample, 2 * group : 2 * group + 2].flatten().tolist()
            mean = sum(values) / len(values)
            variance = sum((value - mean) ** 2 for value in values) / len(values)
            for channel in (2 * group, 2 * group + 1):
                gamma = float(layer.weight[channel]) / largest * math.sqrt(0.5 / (variance + 0.5))
                expected[sample, channel] = gamma * (x[sample, channel] - mean) + float(layer.bias[channel])
    torch.testing.assert_close(layer(x), expected)


def test_weights_below_one_act_as_they_are_and_large_ones_keep_a_gradient() -> None:
    layer, x = NonexpansiveGroupNorm(1, 2), torch.randn(1, 2, 4, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, -0.25]))
    torch.testing.assert_close(layer(x), nn.functional.group_norm(x, 1, layer.weight, layer.bias, 1.0))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([4.0, -2.0]))
    layer(x).square().sum().backward()
    assert bool((layer.weight.grad.abs() > 1e-3).all())


def test_by_name_in_networks_of_monai_and_exported() -> None:
    layer = get_norm_layer(("nonexpansive_group", {"num_groups": 2}), spatial_dims=3, channels=6)
    assert isinstance(layer, NonexpansiveGroupNorm)
    assert (layer.num_groups, layer.num_channels, layer.eps) == (2, 6, 1.0)
    layer.load_state_dict(nn.GroupNorm(2, 6).state_dict())
    net = BasicUNet(2, 1, 1, features=(8,) * 6, norm=("nonexpansive_group", {"num_groups": 4}))
    assert sum(isinstance(part, NonexpansiveGroupNorm) for part in net.modules()) == 18
    x = torch.randn(2, 6, 3, 4, 5, generator=torch.Generator().manual_seed(6))
    assert torch.equal(torch.export.export(layer, (x,)).module()(3 * x), layer(3 * x))


@pytest.mark.parametrize(
    ("settings", "match"),
    [((3, 4), "multiple of `num_groups`; got 4 channels"), ((0, 4), "num_groups"), ((2, 4, 0.0), "`eps`")],
)
def test_wrong_settings(settings: tuple[float, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        NonexpansiveGroupNorm(*settings)
