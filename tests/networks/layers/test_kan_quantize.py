from __future__ import annotations

import copy
from typing import Any

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
    prune_basis,
    prune_edges,
    quantize_kan,
)

_CASES = {
    "linear": (lambda: KANLinear(24, 12), (64, 24)),
    "linear, no base": (lambda: KANLinear(16, 8, base_activation=None), (256, 16)),
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


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("basis", ["bspline", "gaussian", "chebyshev"])
def test_functions_are_at_least_as_close_as_with_the_nearest_integers(basis: str, bits: int) -> None:
    torch.manual_seed(0)
    layer = KANLinear(20, 3, basis=basis, dtype=torch.float64)
    layer.set_input_map(torch.full((20,), 0.5), torch.linspace(-1, 1, 20))
    low, high = layer.basis.grid_range
    weight = layer.weight.detach().view(3, -1, 20)
    step = weight.abs().amax(2, keepdim=True) / (2 ** (bits - 1) - 1)
    nearest = copy.deepcopy(layer)
    nearest.weight.data = ((weight / step).round() * step).view(3, -1)
    small = quantize_kan(layer, bits)
    codes = small.parametrizations["weight"].original
    assert int(codes.abs().max()) <= 2 ** (bits - 1) - 1
    squares = {}
    bell = torch.exp(-0.5 * torch.linspace(-3, 3, 513, dtype=torch.float64).square())
    weights = 0.5 / 513 + 0.5 * bell / bell.sum()
    for name, other in (("nearest", nearest), ("small", small)):
        total = torch.zeros(3, 20, dtype=torch.float64)
        for i in range(20):  # each channel over its own grid
            points = (torch.linspace(low, high, 513, dtype=torch.float64) - layer.input_shift[i]) / 0.5
            error = (other.edge_functions(points) - layer.edge_functions(points)).detach()[:, :, i].double()
            total[:, i] = (error.square() * weights[:, None]).sum(0)
        squares[name] = total
    assert bool((squares["small"] <= 1.01 * squares["nearest"]).all())
    if bits > 2 and basis != "chebyshev":
        assert squares["small"].sum() < 0.75 * squares["nearest"].sum()


@pytest.mark.parametrize("settings", [{}, {"base_activation": None}, {"basis": "gaussian"}])
def test_correlated_coefficients_of_fresh_layers(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    for layer, shape in (
        (KANLinear(64, 64, **settings), (256, 64)),
        (KANConv2d(16, 32, 3, padding=1, **settings), (2, 16, 16, 16)),
        (KANConv2d(16, 16, 3, padding=1, groups=16, **settings), (2, 16, 16, 16)),
    ):
        x = torch.randn(*shape)
        assert compare_outputs(layer, quantize_kan(layer), x).network < 0.007


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


def test_pruned_basis_functions_stay_zero() -> None:
    torch.manual_seed(0)
    layer = KANLinear(24, 12)
    prune_basis(layer, 0.5)
    small = quantize_kan(layer)
    assert bool((small.weight[layer.weight == 0] == 0).all())
    assert compare_outputs(layer, small, torch.randn(64, 24)).network < 0.01


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
