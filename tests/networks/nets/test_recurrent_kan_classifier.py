import pytest
import torch
from torch import nn

from monai_deqkan.networks.nets import RecurrentKANClassifier


def small(**settings):
    torch.manual_seed(0)
    defaults = {"features": (4, 4, 6, 8), "hidden_features": 6}
    return RecurrentKANClassifier(2, 1, 3, **{**defaults, **settings})


def images(batch=4, channels=1, shape=(32, 28)):
    return torch.rand(batch, channels, *shape, generator=torch.Generator().manual_seed(1))


def gaussian_layer(layer, x):
    """Return a KAN layer written as a loop over outputs, inputs and the 16 centers."""
    c, y = layer.coefficients, torch.zeros(len(x), layer.out_features)
    for j in range(layer.out_features):
        y[:, j] += layer.bias[j]
        for i in range(layer.in_features):
            for k in range(16):
                y[:, j] += c[j, k, i] * torch.exp(-0.5 * (x[:, i] - (-3 + 0.4 * k)) ** 2)
    return y


@torch.no_grad()
def test_two_steps_are_the_formula():
    network, x = small(num_steps=2, alpha=0.3).eval(), images()
    p, z = network.injection(x), 0
    for _ in range(2):
        u = z + p
        full = z + p + u + gaussian_layer(network.second, gaussian_layer(network.first, u).clamp_min(0))
        z = 0.7 * z + 0.3 * full
    assert torch.allclose(network.state_features(x), z, atol=1e-4)
    assert torch.allclose(network(x), network.head(z), atol=1e-4)


@torch.no_grad()
def test_steps_move_away_from_each_other():
    """No fixed point: with the KAN's own part small, each step multiplies the state by about 1 + alpha."""
    network, x = small().eval(), images()
    for layer in (network.first, network.second):
        layer.weight.mul_(1e-3)
    states = []
    for steps in (20, 21, 22):
        network.num_steps = steps
        states.append(network.state_features(x))
    growth = (states[2] - states[1]).norm() / (states[1] - states[0]).norm()
    assert growth == pytest.approx(1.5, abs=0.02)


def test_finite_gradients_reload_and_half_precision():
    network, x = small(), images()
    nn.functional.cross_entropy(network(x), torch.tensor([0, 1, 2, 0])).backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().max() > 0 for p in network.parameters())
    other = small().eval()
    other.load_state_dict(network.state_dict())
    network.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert network.state_features(x).dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(other(x), network(x))


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="`alpha`"):
        small(alpha=0.0)
    with pytest.raises(ValueError, match="num_steps"):
        small(num_steps=0)
    with pytest.raises(ValueError, match=r"`image` must have shape \(B, 1, H, W\)"):
        small()(images(channels=2))
