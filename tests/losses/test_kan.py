from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from scipy.integrate import quad
from torch import nn

from monai_deqkan.losses import KANL2Loss, KANSmoothnessLoss, KANSparsityLoss, RegularizedLoss
from monai_deqkan.networks.layers import KANConv2d, KANLinear, certified_spectral_norm, edge_importance
from monai_deqkan.networks.nets import KANUNet

PENALTIES = [KANSparsityLoss(), KANSmoothnessLoss(), KANL2Loss()]


def layers():
    torch.manual_seed(0)
    return {
        "linear": KANLinear(3, 4, dtype=torch.float64),
        "grouped": KANConv2d(4, 2, 3, groups=2, base_activation=None, dtype=torch.float64),
    }


@pytest.mark.parametrize("name", ["linear", "grouped"])
def test_sparsity_follows_its_formula_edge_by_edge(name):
    layer = layers()[name]
    magnitudes = []
    coefficients = layer.coefficients.detach().numpy()
    for out, column, *offset in itertools.product(*map(range, (coefficients.shape[0], *coefficients.shape[2:]))):
        weights = list(coefficients[(out, slice(None), column, *offset)])
        if layer.base_weight is not None:
            weights.append(float(layer.base_weight.detach()[(out, column, *offset)]))
        magnitudes.append(math.sqrt(sum(w**2 for w in weights) / len(weights)))
    shares = np.array(magnitudes) / sum(magnitudes)
    entropy = -sum(p * math.log(p) for p in shares) / math.log(len(shares))
    assert KANSparsityLoss(l1=2.0, entropy=0.0)(layer).item() == pytest.approx(2 * np.mean(magnitudes), rel=1e-4)
    assert KANSparsityLoss(l1=0.0, entropy=3.0)(layer).item() == pytest.approx(3 * entropy, rel=1e-4)
    assert KANSparsityLoss(l1=2.0, entropy=3.0)(layer).item() == pytest.approx(
        2 * np.mean(magnitudes) + 3 * entropy, rel=1e-4
    )


def test_entropy_is_one_for_equal_edges_and_zero_for_one():
    layer = KANLinear(5, 4)
    nn.init.constant_(layer.weight, 0.3)
    loss = KANSparsityLoss(l1=0.0)
    assert loss(layer).item() == pytest.approx(1.0, abs=1e-4)
    with torch.no_grad():
        layer.weight *= 1e-3
    assert loss(layer).item() == pytest.approx(1.0, abs=5e-3)
    with torch.no_grad():
        layer.weight.zero_()
        layer.coefficients[1, :, 2] = 0.7
    assert loss(layer).item() == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("penalty", PENALTIES, ids=lambda p: type(p).__name__)
def test_value_does_not_depend_on_the_size_of_layers_or_on_their_number(penalty):
    small, large = KANLinear(32, 48), KANConv2d(24, 16, 3)
    torch.manual_seed(0)
    for layer in (small, large):
        nn.init.normal_(layer.weight)
    assert penalty(large).item() == pytest.approx(penalty(small).item(), rel=0.05)
    assert penalty(nn.Sequential(small, nn.ReLU(), large)).item() == pytest.approx(
        (penalty(small).item() + penalty(large).item()) / 2
    )


@pytest.mark.parametrize("penalty", PENALTIES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("name", ["linear", "grouped"])
def test_zero_weights_give_zero_with_a_finite_gradient(penalty, name):
    for dtype in (torch.float64, torch.float32):
        layer = layers()[name].to(dtype)
        nn.init.zeros_(layer.weight)
        value = penalty(layer)
        value.backward()
        assert value.item() == 0
        assert torch.equal(layer.weight.grad, torch.zeros_like(layer.weight))
        with torch.no_grad():  # some edges at zero, others not, is what training reaches
            layer.weight[0, ::2] = 1.0
        layer.weight.grad = None
        penalty(layer).backward()
        assert bool(layer.weight.grad.isfinite().all())


@pytest.mark.parametrize("penalty", PENALTIES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("basis", ["bspline", "chebyshev"])
def test_gradient_equals_finite_differences(penalty, basis):
    torch.manual_seed(0)
    layer = KANLinear(2, 2, basis=basis, dtype=torch.float64)

    def value(weight):
        layer.weight.data.copy_(weight)
        return penalty(layer)

    weight = layer.weight.detach().clone()
    value(weight).backward()
    for index in itertools.product(range(2), range(layer.weight.shape[1])):
        step = torch.zeros_like(weight)
        step[index] = 1e-5
        slope = (value(weight + step) - value(weight - step)).item() / 2e-5
        assert float(layer.weight.grad[index]) == pytest.approx(slope, rel=1e-4, abs=1e-7)


def test_smoothness_is_zero_for_straight_lines_and_the_curvature_of_parabolas():
    layer = KANLinear(1, 1, base_activation=None, dtype=torch.float64)
    step = layer.basis.step
    centers = -3.0 + step * (torch.arange(8, dtype=torch.float64) - 1.0)
    with torch.no_grad():
        layer.coefficients[0, :, 0] = 2.0 * centers - 1.0
    assert KANSmoothnessLoss()(layer).item() == pytest.approx(0.0, abs=1e-20)
    with torch.no_grad():
        layer.coefficients[0, :, 0] = centers**2  # up to a constant the function x^2, whose f'' is 2
    assert KANSmoothnessLoss(0.5)(layer).item() == pytest.approx(0.5 * (step**2 * 2.0) ** 2)


@pytest.mark.parametrize("basis", ["chebyshev", "fourier", "gaussian", "mexican_hat"])
def test_smoothness_of_other_bases_is_the_integral_of_the_squared_second_derivative(basis):
    torch.manual_seed(0)
    layer = KANLinear(1, 1, basis=basis, base_activation=None, bias=False, dtype=torch.float64)
    (low, high), count = layer.basis.grid_range, layer.basis.num_basis

    def second(x):
        point = torch.tensor([x], dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(layer.edge_functions(point)[0, 0, 0], point, create_graph=True)
        return float(torch.autograd.grad(slope, point)[0])

    integral, _ = quad(lambda x: second(x) ** 2, low, high, limit=100, epsrel=1e-6)
    expected = ((high - low) / count) ** 4 * integral / (high - low)
    assert KANSmoothnessLoss()(layer).item() == pytest.approx(expected, rel=1e-2)


def test_group_sparsity_leaves_the_edges_that_matter():
    torch.manual_seed(0)
    x = 6 * torch.rand(256, 6) - 3
    y = torch.sin(x[:, :1]) + 0.3 * x[:, 1:2] ** 2
    shares = []
    for weight in (0.0, 1.0):
        torch.manual_seed(1)
        network = KANLinear(6, 1)
        loss = RegularizedLoss(nn.MSELoss(), network, sparsity=weight)
        optimizer = torch.optim.Adam(network.parameters(), lr=0.03)
        for _ in range(300):
            optimizer.zero_grad()
            loss(network(x), y).backward()
            optimizer.step()
        importance = edge_importance(network, x)[0]
        shares.append(float(importance[2:].max() / importance[:2].min()))
    assert shares[0] > 0.1  # constants and chance spread over all inputs
    assert shares[1] < 0.02


def test_parametrized_layers_are_penalized_by_the_weight_they_use():
    layer = certified_spectral_norm(KANLinear(3, 3), bound=0.5)
    assert KANL2Loss()(layer).item() == pytest.approx(layer.coefficients.square().mean().item())
    KANL2Loss()(layer).backward()
    assert layer.parametrizations.weight.original.grad is not None


def test_regularized_loss_adds_the_penalties_and_keeps_the_network_out():
    torch.manual_seed(0)
    network = KANLinear(3, 2)
    x, y = torch.randn(5, 3), torch.randn(5, 2)
    weights = {"sparsity": 0.1, "entropy": 0.2, "smoothness": 0.3, "l2": 0.4}
    loss = RegularizedLoss(nn.MSELoss(), network, **weights)
    expected = (
        nn.functional.mse_loss(network(x), y)
        + KANSparsityLoss(0.1, 0.2)(network)
        + KANSmoothnessLoss(0.3)(network)
        + KANL2Loss(0.4)(network)
    )
    torch.testing.assert_close(loss(network(x), y), expected)
    assert not loss.state_dict()
    assert not list(loss.parameters())
    assert not RegularizedLoss(nn.MSELoss(), network).penalties


def test_a_bundle_configuration_trains_with_it():
    config = {
        "network_def": {
            "_target_": "monai_deqkan.networks.nets.KANUNet",
            "spatial_dims": 2,
            "in_channels": 1,
            "out_channels": 2,
            "features": [4, 4],
        },
        "loss": {
            "_target_": "monai_deqkan.losses.RegularizedLoss",
            "loss": {"_target_": "DiceCELoss", "softmax": True, "to_onehot_y": True},
            "network": "@network_def",
            "smoothness": 0.01,
            "sparsity": 0.01,
        },
        "optimizer": {"_target_": "torch.optim.SGD", "params": "$@network_def.parameters()", "lr": 0.1},
        "loader": [{"image": torch.randn(2, 1, 16, 16), "label": torch.randint(0, 2, (2, 1, 16, 16))}],
        "trainer": {
            "_target_": "SupervisedTrainer",
            "device": "$torch.device('cpu')",
            "max_epochs": 1,
            "train_data_loader": "@loader",
            "network": "@network_def",
            "optimizer": "@optimizer",
            "loss_function": "@loss",
        },
    }
    parser = ConfigParser(config)
    trainer = parser.get_parsed_content("trainer")
    network = parser.get_parsed_content("network_def")
    assert isinstance(network, KANUNet)
    before = [p.detach().clone() for p in network.parameters()]
    trainer.run()
    plain = parser.get_parsed_content("loss").loss
    assert trainer.state.output[0]["loss"] > 0
    assert not isinstance(plain, RegularizedLoss)
    assert any(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_bad_input_is_rejected():
    with pytest.raises(ValueError, match="must have KAN layers, such as KANLinear; Linear has none"):
        KANL2Loss()(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="has none"):
        RegularizedLoss(nn.MSELoss(), nn.Linear(2, 2), l2=1.0)
    with pytest.raises(ValueError, match="`smoothness` must lie in"):
        RegularizedLoss(nn.MSELoss(), KANLinear(2, 2), smoothness=-1.0)
    with pytest.raises(TypeError, match="`loss` must be callable"):
        RegularizedLoss("mse", KANLinear(2, 2))
    with pytest.raises(TypeError, match="`network` must be"):
        RegularizedLoss(nn.MSELoss(), "net")


@pytest.mark.parametrize("penalty", PENALTIES, ids=lambda penalty: type(penalty).__name__)
def test_half_precision_neither_overflows_nor_divides_by_zero(penalty):
    layer = KANLinear(3, 4, dtype=torch.float64)
    torch.nn.init.normal_(layer.weight, std=1000.0)
    with torch.no_grad():
        layer.weight[0] = 0.0  # edges of zeros
    half = KANLinear(3, 4)
    half.load_state_dict(layer.state_dict())
    half.half()
    value = penalty(half)
    assert value.item() == pytest.approx(penalty(layer).item(), rel=1e-2)
    value.backward()
    zeros = KANLinear(3, 4).half()
    torch.nn.init.zeros_(zeros.weight)
    penalty(zeros).backward()
    assert torch.isfinite(half.weight.grad).all()
    assert torch.isfinite(zeros.weight.grad).all()
