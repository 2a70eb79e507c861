from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from monai_deqkan.networks.layers import KANActivation, KANConv2d, KANLinear, certified_spectral_norm, constrain_shape

SHAPES = [
    "increasing",
    "decreasing",
    "convex",
    "concave",
    "increasing_convex",
    "increasing_concave",
    "decreasing_convex",
    "decreasing_concave",
]


def linear(outside="linear", order=3, **settings):
    torch.manual_seed(0)
    return KANLinear(
        3, 4, spline_order=order, grid_range=(-1.0, 2.0), outside=outside, base_activation=None, dtype=torch.float64,
        **settings,
    )  # fmt: skip


def has_shape(layer, shape):
    """Look at the functions on dense points that go far beyond the grid on [-1, 2]."""
    points = torch.linspace(-5, 6, 3001, dtype=torch.float64)
    values = layer.edge_functions(points).detach()
    first, second = values.diff(dim=0), values.diff(n=2, dim=0)
    signs = {"increasing": first, "decreasing": -first, "convex": second, "concave": -second}
    return all(bool((signs[word] > -1e-11).all()) for word in shape.split("_"))


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_random_weights_give_the_shape_everywhere(shape, order):
    layer = constrain_shape(linear(order=order), shape)
    assert has_shape(layer, shape)
    with torch.no_grad():
        layer.parametrizations.weight.original.normal_()
    assert has_shape(layer, shape)
    opposite = {"increasing": "decreasing", "convex": "concave"}
    assert not any(has_shape(layer, opposite.get(word, word)) for word in shape.split("_") if word in opposite)


@pytest.mark.parametrize("shape", ["increasing", "decreasing"])
def test_monotone_functions_may_be_clamped(shape):
    layer = constrain_shape(linear(outside="clamp"), shape)
    assert has_shape(layer, shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_weight_of_the_shape_is_kept(shape):
    k = torch.arange(8, dtype=torch.float64)
    curve = {
        "increasing": torch.tensor([-3.0, -3, -1, 2, 2, 2, 3, 9]),
        "decreasing": -torch.tensor([-3.0, -3, -1, 2, 2, 2, 3, 9]),
        "convex": (k - 3) ** 2,
        "concave": -((k - 3) ** 2),
        "increasing_convex": k**2,
        "increasing_concave": -((k - 8) ** 2),
        "decreasing_convex": (k - 8) ** 2,
        "decreasing_concave": -(k**2),
    }[shape].double()
    layer = linear()
    scale = torch.rand(4, 1, 3, dtype=torch.float64)
    weight = (scale * curve[:, None] + torch.randn(4, 1, 3, dtype=torch.float64)).flatten(1)
    layer.weight.data.copy_(weight)
    constrain_shape(layer, shape)
    torch.testing.assert_close(layer.weight.detach(), weight, atol=1e-9, rtol=0)
    constrained = layer.weight.detach().clone()
    parametrize.remove_parametrizations(layer, "weight")
    assert isinstance(layer.weight, nn.Parameter)
    torch.testing.assert_close(layer.weight.detach(), constrained)


def test_other_weights_keep_their_mean_and_every_number_has_a_gradient():
    layer = linear()
    before = layer.coefficients.detach().mean(dim=1)
    constrain_shape(layer, "increasing_concave")
    torch.testing.assert_close(layer.coefficients.detach().mean(dim=1), before)
    nn.init.zeros_(layer.bias)
    constant = torch.zeros_like(layer.weight)
    layer.weight = constant  # all differences are zero: the corner of the constraint
    layer(torch.linspace(-4, 4, 30, dtype=torch.float64).reshape(10, 3)).square().sum().backward()
    x = torch.linspace(-1, 2, 60, dtype=torch.float64).reshape(20, 3)
    layer.zero_grad()
    (layer(x) - 5 * x.sum(dim=1, keepdim=True)).square().sum().backward()
    assert bool((layer.parametrizations.weight.original.grad != 0).all())


def test_training_from_noise_finds_a_monotone_function():
    layer = constrain_shape(linear(), "increasing").float()
    x = torch.linspace(-1, 2, 50)[:, None].expand(-1, 3)
    target = torch.tanh(2 * x[:, :1] - 1).expand(-1, 4)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(layer(x), target)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 2e-3
    assert has_shape(layer.double(), "increasing")


def test_convolution_activation_and_certificate():
    torch.manual_seed(0)
    conv = KANConv2d(2, 3, 3, padding=1, outside="clamp", base_activation=None)
    conv.set_input_map(torch.tensor([2.0, 0.5]), torch.tensor([0.0, 1.0]))
    certified_spectral_norm(constrain_shape(conv, "increasing"), bound=1.0)
    x = torch.randn(2, 2, 5, 5)
    assert bool((conv(x + torch.rand_like(x)) >= conv(x) - 1e-6).all())
    activation = KANActivation(3, outside="linear", base_activation=None)
    constrain_shape(activation.functions, "convex")
    a, b = torch.randn(2, 4, 3, 7)
    assert bool((activation((a + b) / 2) <= (activation(a) + activation(b)) / 2 + 1e-5).all())


def test_bad_layers_are_rejected():
    with pytest.raises(ValueError, match=r"`shape` must be one of .* Did you mean 'increasing'"):
        constrain_shape(linear(), "increasin")
    with pytest.raises(TypeError, match="must be a KAN layer"):
        constrain_shape(nn.Linear(2, 2), "convex")
    with pytest.raises(TypeError, match="must be a BSplineBasis; got ChebyshevBasis"):
        constrain_shape(KANLinear(2, 2, basis="chebyshev", base_activation=None), "convex")
    with pytest.raises(ValueError, match="no base term"):
        constrain_shape(KANLinear(2, 2, outside="linear"), "convex")
    with pytest.raises(ValueError, match="outside='clamp' or 'linear'; got 'zero'"):
        constrain_shape(linear(outside="zero"), "increasing")
    with pytest.raises(ValueError, match="outside='linear'; got 'clamp'"):
        constrain_shape(linear(outside="clamp"), "convex")
    with pytest.raises(ValueError, match="parametrized already"):
        constrain_shape(constrain_shape(linear(), "convex"), "increasing")
    layer = linear()
    layer.set_input_map(torch.tensor([1.0, -2.0, 1.0]), torch.zeros(3))
    with pytest.raises(ValueError, match="smallest is -2"):
        constrain_shape(layer, "increasing")
    constrain_shape(layer, "concave")


def test_a_later_input_map_must_keep_the_direction() -> None:
    torch.manual_seed(0)
    layer = constrain_shape(KANLinear(2, 1, base_activation=None, outside="linear"), "increasing")
    with pytest.raises(ValueError, match="'increasing' functions need an input map with positive scales"):
        layer.set_input_map(torch.tensor([1.0, -2.0]), torch.zeros(2))
    assert layer.input_scale is None
    layer.set_input_map(torch.tensor([1.0, 2.0]), torch.zeros(2))
    x = torch.linspace(-4, 4, 50)[:, None].expand(-1, 2)
    assert bool((layer(x).diff(dim=0) >= -1e-6).all())
    convex = constrain_shape(KANLinear(1, 1, base_activation=None, outside="linear"), "convex")
    convex.set_input_map(torch.tensor([-2.0]), torch.zeros(1))
    assert bool((convex(x[:, :1]).diff(dim=0).diff(dim=0) >= -1e-4).all())
