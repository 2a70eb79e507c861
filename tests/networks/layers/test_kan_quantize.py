from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from monai_deqkan.networks.layers import (
    KANActivation,
    KANConv1d,
    KANConv2d,
    KANConv3d,
    KANLinear,
    compare_outputs,
    dequantize_kan,
    prune_edges,
    quantize_kan,
)

_CASES = {
    "linear": (lambda: KANLinear(24, 12), (64, 24)),
    "linear, no base": (lambda: KANLinear(6, 3, base_activation=None), (64, 6)),
    "conv1d": (lambda: KANConv1d(4, 8, 3, padding=1), (2, 4, 50)),
    "conv2d": (lambda: KANConv2d(4, 8, 3, padding=1, groups=2), (2, 4, 16, 16)),
    "conv3d": (lambda: KANConv3d(2, 4, 3, padding=1), (1, 2, 8, 8, 8)),
    "activation": (lambda: KANActivation(4), (2, 4, 20)),
}


@pytest.mark.parametrize("name", _CASES)
def test_eight_bits_change_the_output_by_at_most_one_percent(name: str) -> None:
    torch.manual_seed(0)
    make, shape = _CASES[name]
    layer = make()
    if name == "activation":
        with torch.no_grad():
            layer.functions.coefficients.normal_(std=0.3)
    x = torch.randn(*shape)
    small = quantize_kan(layer)
    expected = layer(x).detach()
    error = float((small(x).detach() - expected).norm() / expected.norm())
    assert 0 < error < 0.01
    assert compare_outputs(layer, small, x).network == pytest.approx(error, rel=1e-4)


def test_weights_are_rounded_to_the_nearest_step() -> None:
    torch.manual_seed(0)
    layer = KANLinear(20, 3)
    weight = layer.weight.detach().view(3, 9, 20)
    for bits in (8, 4, 2):
        small = quantize_kan(layer, bits)
        step = weight.abs().amax(2, keepdim=True) / (2 ** (bits - 1) - 1)
        error = (small.weight.view(3, 9, 20) - weight).abs()
        assert bool((error <= 0.5001 * step).all())
        assert len(small.parametrizations["weight"].original.unique()) <= 2**bits - 1


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(KANConv2d(16, 8, 3, padding=1), KANActivation(8), KANConv2d(8, 16, 3))


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # deprecated, and still asked for by users
def test_the_state_dict_is_small_and_loads_strictly() -> None:
    net = network(0)
    small = quantize_kan(net)

    def size(state: dict[str, Tensor]) -> int:
        return sum(value.numel() * value.element_size() for value in state.values())

    assert size(small.state_dict()) < 0.3 * size(net.state_dict())
    assert all(key in net.state_dict() for key in ("0.weight", "0.bias"))  # the original is as it was
    fresh = quantize_kan(network(1))
    fresh.load_state_dict(small.state_dict(), strict=True)
    x = torch.randn(1, 16, 8, 8)
    assert torch.equal(fresh(x), small(x))
    plain = dequantize_kan(small)
    torch.testing.assert_close(torch.jit.script(plain)(x), small(x))
    network(1).load_state_dict(plain.state_dict())


def test_pruned_edges_stay_zero() -> None:
    net = network(0)
    prune_edges(net, 0.5)
    small = quantize_kan(net)
    assert bool((small[0].weight[net[0].weight == 0] == 0).all())
    assert len(net[0].parametrizations["weight"]) == 1


def test_a_weight_of_zeros() -> None:
    layer = KANLinear(4, 2)
    nn.init.zeros_(layer.weight)
    assert torch.equal(quantize_kan(layer)(torch.ones(1, 4)), torch.zeros(1, 2))


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="at most 8"):
        quantize_kan(KANLinear(2, 2), 9)
    with pytest.raises(ValueError, match="at least 2"):
        quantize_kan(KANLinear(2, 2), 1)
    with pytest.raises(ValueError, match="already"):
        quantize_kan(quantize_kan(KANLinear(2, 2)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    network = nn.Sequential(KANLinear(3, 2), KANActivation(2))
    network[0].weight.data[0, 0] = value
    with pytest.raises(ValueError, match=r"`layer\.weight` must be finite; 1 of 54"):
        quantize_kan(network)
