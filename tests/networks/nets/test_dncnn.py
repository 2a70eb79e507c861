from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from monai_deqkan.networks.layers import DEQLayer, certified_spectral_norm, conv_norm_bound, remove_spectral_norm
from monai_deqkan.networks.nets import DEQReconstructor, DnCNN, dncnn
from monai_deqkan.solvers import SolveRecorder


def small(**settings: object) -> DnCNN:
    torch.manual_seed(0)
    return DnCNN(**{"spatial_dims": 2, "in_channels": 2, "out_channels": 2, "num_layers": 4, "features": 8, **settings})


def rms(x: torch.Tensor) -> float:
    return float(x.detach().square().mean().sqrt())


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"spectral_norm": "certified"},
        {"spectral_norm": "certified", "norm": ("nonexpansive_group", {"num_groups": 2})},
        {"spectral_norm": "spectral", "norm": "batch"},
        {"norm": "batch", "bias": True},
    ],
)
def test_shape_and_gradients(spatial_dims: int, settings: dict[str, object]) -> None:
    net = small(spatial_dims=spatial_dims, **settings)
    x = torch.randn(2, 2, *(9, 8, 7)[:spatial_dims])
    y = net(x)
    y.square().mean().backward()
    assert y.shape == x.shape
    for parameter in net.parameters():
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.abs().max() > 0


def test_residual_takes_the_network_off_the_input() -> None:
    net, x = small(), torch.randn(1, 2, 6, 6)
    assert torch.equal(net(x), x - net.layers(x))
    with torch.no_grad():
        net.layers[-1].weight.zero_()
    assert torch.equal(net(x), x)
    assert torch.equal(small(residual=False)(x), small().layers(x))


@pytest.mark.parametrize("spectral_norm", [None, "spectral", "certified"])
def test_homogeneous(spectral_norm: str | None) -> None:
    net, x = small(spectral_norm=spectral_norm).eval(), torch.randn(1, 2, 8, 8)
    assert torch.allclose(net(1e-4 * x), 1e-4 * net(x), rtol=1e-4, atol=1e-9)


def test_layer_and_parameter_count_of_the_paper() -> None:
    net = DnCNN(spatial_dims=2, in_channels=2, out_channels=2)
    assert sum(isinstance(layer, nn.Conv2d) for layer in net.layers) == 17
    assert sum(p.numel() for p in net.parameters()) == 9 * (2 * 64 + 15 * 64 * 64 + 64 * 2)


@pytest.mark.parametrize(("spatial_dims", "features", "least"), [(2, 32, 0.2), (2, 9, 0.1), (3, 8, 0.1)])
def test_certified_initialization_passes_the_signal_on(spatial_dims: int, features: int, least: float) -> None:
    torch.manual_seed(0)
    net = DnCNN(spatial_dims, 2, 2, features=features, residual=False, spectral_norm="certified")
    x = torch.randn(1, 2, *(24, 24) if spatial_dims == 2 else (8, 8, 8))
    assert least < rms(net(x)) / rms(x) <= 1  # 0.27 at 64 features in 2-D

    plain = DnCNN(2, 2, 2, features=9, residual=False)
    for layer in plain.layers:
        if isinstance(layer, nn.Conv2d):
            certified_spectral_norm(layer)
    assert rms(plain(torch.randn(1, 2, 24, 24))) < 1e-3  # what it is without


def layer_norms(net: DnCNN) -> list[float]:
    norms = []
    for layer in net.layers:
        if isinstance(layer, nn.Conv2d):
            transfer = torch.fft.fft2(layer.weight.detach().double(), s=(40, 40)).flatten(2).permute(2, 0, 1)[: 40 * 21]
            norms.append(float(torch.linalg.matrix_norm(transfer, ord=2).max()))
    return norms


@pytest.mark.parametrize("bound", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("residual", [True, False])
def test_certificate_holds_during_training(bound: float, residual: bool) -> None:
    net = small(spectral_norm="certified", lipschitz_bound=bound, residual=residual, num_layers=3)
    constant = bound + residual
    assert net.certified_lipschitz() == constant
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    clean = torch.randn(4, 2, 8, 8).cumsum(-1)
    for step in range(30):
        optimizer.zero_grad()
        (net(clean + torch.randn_like(clean)) - clean).square().mean().backward()
        optimizer.step()
        if step % 5 == 4:
            assert math.prod(layer_norms(net)) <= bound + 1e-6
    a = torch.randn(16, 2, 8, 8)
    for distance in (1e-2, 1.0):
        b = a + distance * torch.randn_like(a)
        with torch.no_grad():
            ratio = (net(a) - net(b)).flatten(1).norm(dim=1) / (a - b).flatten(1).norm(dim=1)
        assert float(ratio.max()) <= constant + 1e-4


def test_training_denoises() -> None:
    net = small(spectral_norm="certified", features=16)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    ramp = torch.linspace(-1, 1, 16)
    losses = []
    for _ in range(40):
        angle = 2 * math.pi * torch.rand(8, 2, 1, 1)
        clean = angle.cos() * ramp[:, None] + angle.sin() * ramp
        optimizer.zero_grad()
        loss = (net(clean + 0.5 * torch.randn_like(clean)) - clean).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) / 5 < 0.7 * 0.25  # the noise has variance 0.25; 0.157 when written


def test_certificate_of_plain_and_removed_weights() -> None:
    net = small(residual=False)
    assert net.certified_lipschitz() == pytest.approx(math.prod(layer_norms(net)), rel=0.12)
    assert net.certified_lipschitz() >= math.prod(layer_norms(net))
    assert small(norm="batch").certified_lipschitz() == math.inf
    assert small(act="prelu").certified_lipschitz() == math.inf
    certified = small(spectral_norm="certified", lipschitz_bound=0.8)
    x = torch.randn(1, 2, 8, 8)
    before = certified(x)
    remove_spectral_norm(certified)
    assert torch.allclose(certified(x), before, atol=1e-6)
    assert certified.certified_lipschitz() == pytest.approx(1.8, rel=1e-3)


def test_norms_of_plain_weights_are_computed_once_per_change(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(dncnn, "conv_norm_bound", lambda weight: calls.append(weight) or conv_norm_bound(weight))
    prior = remove_spectral_norm(small(spectral_norm="certified", residual=False))
    network = DEQReconstructor(2, prior, num_cg_steps=1, solver=("anderson", {"max_iter": 10, "on_failure": "ignore"}))
    with SolveRecorder() as recorder:
        network(torch.randn(1, 2, 12, 12, dtype=torch.complex64)).sum().backward()
    assert int(recorder.evaluations("forward").sum()) > 1
    assert len(calls) == 4  # one per layer
    before = prior.certified_lipschitz()
    prior.layers[0].weight.data *= 3
    assert prior.certified_lipschitz() == pytest.approx(3 * before, rel=1e-3)
    assert copy.deepcopy(prior).double().certified_lipschitz() == pytest.approx(3 * before, rel=1e-3)


def dense_jacobian(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Jacobian of an image at one place, as a matrix, float64."""
    return torch.autograd.functional.jacobian(function, x).reshape(x.numel(), x.numel())


@pytest.mark.parametrize(
    "settings", [{}, {"norm": "nonexpansive_group"}, {"norm": ("nonexpansive_group", {"eps": 1e-3}), "bias": True}]
)
def test_certificate_against_the_exact_jacobian(settings: dict[str, object]) -> None:
    net = small(spectral_norm="certified", residual=False, num_layers=3, act=("leakyrelu", {}), **settings).double()
    net.requires_grad_(False)
    assert net.certified_lipschitz() == 1.0
    for layer in net.layers:  # wild weights, which the normalization has to hold down
        for name, parameter in layer.named_parameters():
            parameter.copy_(torch.randn(parameter.shape).double() * (30.0 if "weight" in name else 1.0))
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64)
    norms = []
    for _ in range(4):  # towards the place where it expands most: small inputs for a normalization
        jacobian = dense_jacobian(net, x)
        norms.append(float(torch.linalg.matrix_norm(jacobian, ord=2)))
        x = 0.3 * torch.linalg.svd(jacobian)[2][0].reshape(x.shape)
    assert 1e-3 < max(norms) <= 1.0


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_published_spectral_norm_bounds_the_matrix_not_the_convolution(kernel_size: int) -> None:
    net = small(spectral_norm="spectral", residual=False, num_layers=2, features=4, kernel_size=kernel_size).double()
    for layer in net.layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.uniform_(layer.parametrizations.weight.original)
            for _ in range(30):
                weight = layer.weight.detach()  # a power iteration each
            assert float(torch.linalg.matrix_norm(weight.flatten(1), ord=2)) == pytest.approx(1.0, abs=1e-6)
            x = torch.zeros(1, layer.in_channels, 7, 7, dtype=torch.float64)
            columns = torch.autograd.functional.jacobian(layer.eval(), x).reshape(-1, x.numel())
            true = float(torch.linalg.matrix_norm(columns, ord=2))
            assert true == pytest.approx(1.0, abs=1e-6) if kernel_size == 1 else 2.0 < true <= 3.0
    assert net.certified_lipschitz() == math.inf
    x = torch.randn(1, 2, 7, 7, dtype=torch.float64)
    before = net(x)
    remove_spectral_norm(net.train())
    assert torch.equal(net(x), before)
    product = math.prod(layer_norms(net))
    assert product <= net.certified_lipschitz() <= 1.1 * product


def test_published_spectral_norm_stays_constant_during_a_solve_and_certifies_nothing() -> None:
    net = small(spectral_norm="spectral", residual=False)
    with torch.no_grad():
        for layer in net.layers:
            if isinstance(layer, nn.Conv2d):
                layer.parametrizations.weight.original.normal_()
    seen = []
    net.layers[2].register_forward_hook(lambda layer, inputs, output: seen.append(layer.weight.detach().clone()))

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return x + 0.1 * self.net(z)

    DEQLayer(Cell(), ("anderson", {"rtol": 1e-4}))(torch.randn(1, 2, 8, 8)).sum().backward()
    assert len(seen) > 3
    assert all(torch.equal(weight, seen[0]) for weight in seen)
    assert net.layers[2].parametrizations.weight.original.grad.abs().max() > 0
    net(torch.randn(1, 2, 8, 8))
    assert not torch.equal(seen[-1], seen[0])  # outside of a solve each reading iterates
    with pytest.raises(ValueError, match="no finite certified Lipschitz constant"):
        DEQReconstructor(2, net)


def test_new_weights_of_the_published_spectral_norm_are_normalized_at_once() -> None:
    net = small(spectral_norm="spectral", features=16).eval()
    torch.manual_seed(5)
    net.reset_parameters()
    assert not net.training
    for layer in net.layers:
        if isinstance(layer, nn.Conv2d):
            assert float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), ord=2)) == pytest.approx(
                1, abs=0.05
            )


@pytest.mark.parametrize("act", ["relu", "tanh", "elu", ("leakyrelu", {"negative_slope": 0.2})])
def test_activations_with_a_certificate(act: str | tuple[str, dict[str, float]]) -> None:
    net = small(act=act, spectral_norm="certified", residual=False)
    a, b = torch.randn(2, 4, 2, 6, 6)
    with torch.no_grad():
        assert float((net(a) - net(b)).norm() / (a - b).norm()) <= 1


def test_certificate_counts_what_comes_after_the_certified_norm() -> None:
    class Thrice(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 3 * weight

    network = DnCNN(2, 1, 1, num_layers=3, features=4, residual=False, spectral_norm="certified")
    assert network.certified_lipschitz() == 1.0
    for layer in network.layers:
        if isinstance(layer, nn.Conv2d):
            parametrize.register_parametrization(layer, "weight", Thrice())
    assert network.certified_lipschitz() == pytest.approx(27.0, rel=0.05)


def test_export_after_removal() -> None:
    net = remove_spectral_norm(small(spectral_norm="certified")).eval()
    x = torch.randn(1, 2, 8, 8)
    exported = torch.export.export(net, (x,)).module()
    assert torch.allclose(exported(x), net(x), atol=1e-6)


def test_state_dict_reload() -> None:
    one = small(spectral_norm="certified")
    two = DnCNN(2, 2, 2, num_layers=4, features=8, spectral_norm="certified")
    x = torch.randn(1, 2, 8, 8)
    assert not torch.allclose(one(x), two(x))
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(x), two(x))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"spatial_dims": 4}, "spatial_dims"),
        ({"num_layers": 1}, "num_layers"),
        ({"kernel_size": 4}, "odd"),
        ({"out_channels": 1}, "residual"),
        ({"spectral_norm": "certifed"}, "certified"),
        ({"lipschitz_bound": 0.5}, "spectral_norm"),
        ({"spectral_norm": "certified", "lipschitz_bound": 0.0}, "lipschitz_bound"),
        ({"spectral_norm": "certified", "norm": "batch"}, "norm"),
        ({"spectral_norm": "certified", "norm": ("group", {"num_groups": 2})}, "norm"),
        ({"norm": ("nonexpansive_group", {"num_groups": 3})}, "multiple of `num_groups`"),
        ({"spectral_norm": "spectral", "lipschitz_bound": 0.5}, "spectral_norm"),
        ({"spectral_norm": "certified", "act": "prelu"}, "act"),
        ({"spectral_norm": "certified", "act": ("leakyrelu", {"negative_slope": 2.0})}, "slope"),
    ],
)
def test_wrong_settings(settings: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        small(**settings)
