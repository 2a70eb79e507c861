from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from monai_deqkan.networks.layers import (
    CertifiedSpectralNorm,
    KANConv2d,
    KANLinear,
    certified_spectral_norm,
    frozen_weights,
    kan_lipschitz_bound,
    normalize_lipschitz_,
    remove_spectral_norm,
)
from monai_deqkan.networks.layers import operator_norm as operator_norm_module


def count_searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    search = operator_norm_module.find_peak

    def counted(*args: object) -> object:
        calls.append(1)
        return search(*args)

    monkeypatch.setattr(operator_norm_module, "find_peak", counted)
    return calls


def true_norm(layer: nn.Module) -> float:
    """Largest singular value over a fine frequency grid, in float64."""
    weight = layer.weight.detach().double()
    axes = weight.ndim - 2
    if not axes:
        return float(torch.linalg.matrix_norm(weight, ord=2))
    transfer = torch.fft.fftn(weight, s=(48,) * axes).reshape(*weight.shape[:2], -1).permute(2, 0, 1)
    return float(torch.linalg.matrix_norm(transfer, ord=2).max())


LAYERS = {
    "linear": lambda: nn.Linear(6, 4),
    "conv1d": lambda: nn.Conv1d(3, 4, 5),
    "conv2d": lambda: nn.Conv2d(3, 4, 3, padding=1),
    "conv3d": lambda: nn.Conv3d(2, 3, 3, padding=1),
    "strided": lambda: nn.Conv2d(3, 4, 3, stride=2),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bound", [0.5, 3.0])
def test_weight_has_the_wanted_norm(name: str, bound: float) -> None:
    torch.manual_seed(0)
    layer = certified_spectral_norm(LAYERS[name](), bound)
    assert 0.94 * bound < true_norm(layer) <= bound
    torch.nn.init.normal_(layer.parametrizations.weight.original, std=30.0)
    assert 0.94 * bound < true_norm(layer) <= bound
    layer.weight = torch.ones_like(layer.weight)
    assert 0.94 * bound < true_norm(layer) <= bound


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (KANLinear(4, 5), (64, 4)),
        (KANConv2d(2, 3, 3, padding=1), (64, 2, 8, 8)),
        (KANLinear(3, 3, base_activation=None), (64, 3)),
    ],
)
def test_kan_layer_has_the_wanted_bound(layer: nn.Module, shape: tuple[int, ...]) -> None:
    certified_spectral_norm(layer, 0.7)
    assert float(kan_lipschitz_bound(layer).detach()) == pytest.approx(0.7, rel=2e-3)
    a, b = torch.randn(2, *shape)
    with torch.no_grad():
        assert float(((layer(a) - layer(b)).flatten(1).norm(dim=1) / (a - b).flatten(1).norm(dim=1)).max()) <= 0.7


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), KANLinear(6, 6)])
def test_normalize_once(layer: nn.Module) -> None:
    before = layer.weight.detach().clone()
    assert normalize_lipschitz_(layer, 0.3) is layer
    assert torch.allclose(layer.weight / layer.weight.norm(), before / before.norm(), atol=1e-6)
    # A second time it has the bound already.
    once = layer.weight.detach().clone()
    normalize_lipschitz_(layer, 0.3)
    assert torch.allclose(layer.weight, once, rtol=1e-4)
    if isinstance(layer, KANLinear):
        assert float(kan_lipschitz_bound(layer).detach()) == pytest.approx(0.3, rel=1e-4)


def test_normalize_leaves_zero_and_refuses_what_it_cannot_scale() -> None:
    layer = nn.Linear(2, 2)
    nn.init.zeros_(layer.weight)
    assert not normalize_lipschitz_(layer).weight.any()
    nn.init.constant_(layer.weight, float("nan"))
    with pytest.raises(ValueError, match="finite"):
        normalize_lipschitz_(layer)
    with pytest.raises(ValueError, match="plain weight"):
        normalize_lipschitz_(certified_spectral_norm(nn.Linear(2, 2)))
    with pytest.raises(TypeError, match="ReLU"):
        normalize_lipschitz_(nn.ReLU())


def spread(layer: nn.Module, channels: int) -> float:
    """Largest ratio of output and input distances among close pairs."""
    a = 4 * torch.randn(4096, channels, generator=torch.Generator().manual_seed(0))
    b = a + 1e-2 * torch.randn(a.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return float(((layer(a) - layer(b)).norm(dim=1) / (a - b).norm(dim=1)).max())


def test_bound_follows_the_input_map_and_the_basis() -> None:
    torch.manual_seed(0)
    plain = KANLinear(1, 3, base_activation=None)
    layer = certified_spectral_norm(copy.deepcopy(plain), 0.7)
    assert spread(layer, 1) <= 0.7
    twin = copy.deepcopy(layer)
    layer.set_input_map(torch.full((1,), 8.0), torch.zeros(1))
    assert 0.2 < spread(layer, 1) <= 0.7
    assert float(kan_lipschitz_bound(layer).detach()) == pytest.approx(0.7, rel=1e-4)
    # A copy has its own layer and takes the map over from a state dict.
    assert twin.input_scale is None
    assert spread(twin, 1) <= 0.7
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin.weight, layer.weight)
    plain.set_input_map(torch.full((1,), 8.0), torch.zeros(1))
    assert spread(plain, 1) > 0.7


def test_zero_weight_stays_zero_with_finite_gradient() -> None:
    layer = certified_spectral_norm(nn.Conv2d(2, 2, 3, padding=1))
    original = layer.parametrizations.weight.original
    nn.init.zeros_(original)
    layer(torch.ones(1, 2, 4, 4)).sum().backward()
    assert torch.equal(layer.weight, torch.zeros_like(original))
    assert torch.isfinite(original.grad).all()
    assert original.grad.abs().max() > 0


def test_gradient_through_the_norm() -> None:
    torch.manual_seed(0)
    norm = CertifiedSpectralNorm(nn.Conv1d(2, 3, 3))
    weight = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, (weight,), atol=1e-5)
    # The scaled weight does not depend on the scale of the trainable one: the gradient is orthogonal to it.
    (gradient,) = torch.autograd.grad(norm(weight).pow(3).sum(), weight)
    assert abs(float((gradient * weight.detach()).sum())) < 1e-9


def test_training_keeps_the_bound() -> None:
    torch.manual_seed(0)
    layer = certified_spectral_norm(nn.Conv2d(4, 4, 3, padding=1), 0.9)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    x, y = torch.randn(2, 4, 4, 10, 10)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (layer(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        assert true_norm(layer) <= 0.9 + 1e-6
    assert losses[-1] < losses[0]


def test_search_runs_only_for_new_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_searches(monkeypatch)
    layer = certified_spectral_norm(nn.Conv2d(2, 2, 3))
    x = torch.randn(1, 2, 5, 5)
    layer(x)
    before = len(calls)
    with torch.no_grad():
        quiet = layer(x)
    assert torch.allclose(layer(x), quiet, rtol=1e-6)
    assert len(calls) == before
    layer.parametrizations.weight.original.data.mul_(-2.0).add_(1.0)  # does not count in `_version`
    assert true_norm(layer) <= 1
    assert len(calls) > before


def test_frozen_weights_carry_gradients_into_no_grad_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = certified_spectral_norm(nn.Linear(3, 3, bias=False))
    plain = torch.autograd.grad(layer(torch.ones(1, 3)).sum() + layer(torch.eye(3)).pow(2).sum(), layer.parameters())
    with frozen_weights(layer):
        with torch.no_grad():
            weight = layer.weight
            layer(torch.ones(1, 3))
        assert layer.weight is weight
        value = layer(torch.ones(1, 3)).sum() + layer(torch.eye(3)).pow(2).sum()
    frozen = torch.autograd.grad(value, layer.parameters())
    assert torch.allclose(plain[0], frozen[0], atol=1e-6)
    assert layer.weight is not weight


class Drifting(nn.Module):
    """Changes with every reading, as torch's spectral norm does in training before it has converged."""

    readings = 0

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        self.readings += 1
        return weight + self.readings


def test_frozen_weights_hold_any_parametrization_still() -> None:
    layer = nn.Linear(2, 2)
    parametrize.register_parametrization(layer, "bias", Drifting())
    with frozen_weights(layer):
        assert layer.bias is layer.bias
    assert not torch.equal(layer.bias, layer.bias)


def test_frozen_weights_nest_and_end_on_errors() -> None:
    layer = certified_spectral_norm(nn.Linear(3, 3))
    with frozen_weights(layer):
        outer = layer.weight
        with torch.no_grad(), frozen_weights(layer):
            assert layer.weight is outer
        with pytest.raises(RuntimeError, match="stop"), frozen_weights(layer):
            raise RuntimeError("stop")
        assert layer.weight is outer
    with torch.no_grad(), frozen_weights(layer):
        without = layer.weight
        assert not without.requires_grad
        with torch.enable_grad(), frozen_weights(layer):
            assert layer.weight.requires_grad
        assert layer.weight is without
    assert layer.weight is not outer


def test_frozen_weights_do_not_reach_copies_and_other_threads() -> None:
    layer = certified_spectral_norm(nn.Linear(3, 3))
    seen = []
    with frozen_weights(layer):
        frozen = layer.weight
        twin = copy.deepcopy(layer)
        with torch.no_grad():
            twin.parametrizations.weight.original.copy_(torch.eye(3))
        assert torch.allclose(twin.weight, torch.eye(3), atol=1e-5)
        thread = threading.Thread(target=lambda: seen.append(layer.weight))
        thread.start()
        thread.join()
    assert seen[0] is not frozen
    assert torch.equal(seen[0], frozen)


def test_frozen_weights_leave_nothing_behind() -> None:
    layer = certified_spectral_norm(nn.Linear(2, 2, bias=False))
    with frozen_weights(layer):
        pass
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(3 * torch.eye(2))
    assert torch.allclose(layer.weight, torch.eye(2), atol=1e-5)


def test_remove_spectral_norm_keeps_outputs() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), KANConv2d(3, 1, 3))
    for part in (net[0], net[2]):
        certified_spectral_norm(part)
    x = torch.randn(1, 2, 8, 8)
    before = net(x)
    with frozen_weights(net):
        pass  # its class of list must be removable too
    remove_spectral_norm(net)
    assert not any(parametrize.is_parametrized(part) for part in net)
    assert torch.allclose(net(x), before, atol=1e-6)
    assert sorted(dict(net.named_parameters())) == ["0.bias", "0.weight", "2.bias", "2.weight"]


def test_state_dict_reload_gives_the_same_output() -> None:
    torch.manual_seed(0)
    one, two = (certified_spectral_norm(nn.Linear(4, 4)) for _ in range(2))
    two(torch.zeros(1, 4))
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(torch.ones(1, 4)), two(torch.ones(1, 4)))


@pytest.mark.parametrize(
    ("layer", "error", "match"),
    [
        (nn.ConvTranspose2d(2, 2, 3), TypeError, "ConvTranspose2d"),
        (nn.ReLU(), TypeError, "ReLU"),
        (certified_spectral_norm(nn.Linear(2, 2)), ValueError, "already"),
    ],
)
def test_unsuitable_layers_are_refused(layer: nn.Module, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        certified_spectral_norm(layer)


@pytest.mark.parametrize("bound", [0.0, -1.0, float("inf"), float("nan")])
def test_unsuitable_bounds_are_refused(bound: float) -> None:
    for function in (certified_spectral_norm, normalize_lipschitz_):
        with pytest.raises(ValueError, match="bound"):
            function(nn.Linear(2, 2), bound)


def test_removing_the_norm_of_a_copy_leaves_the_original_alone():
    layer = certified_spectral_norm(nn.Linear(3, 2))
    copied = remove_spectral_norm(copy.deepcopy(layer))
    assert torch.equal(layer.weight, copied.weight)
    assert isinstance(copied.weight, nn.Parameter)
