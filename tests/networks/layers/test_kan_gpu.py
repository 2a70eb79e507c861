"""The KAN layers on a GPU against themselves on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from monai_deqkan.networks.layers import BASES, KANActivation, KANConv2d, KANConv3d, KANLinear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LAYERS: dict[str, tuple[Callable[[str], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda basis: KANLinear(24, 16, basis=basis), (32, 24)),
    "conv2d": (lambda basis: KANConv2d(6, 8, 3, padding=1, groups=2, basis=basis), (2, 6, 17, 12)),
    "conv2d reflect": (lambda basis: KANConv2d(6, 8, 3, 2, 1, padding_mode="reflect", basis=basis), (2, 6, 17, 12)),
    "conv3d": (lambda basis: KANConv3d(3, 4, 3, padding=1, basis=basis), (1, 3, 6, 7, 8)),
    "activation": (lambda basis: KANActivation(6, basis=basis), (2, 6, 9, 5)),
}


def problem(kind: str, basis: str, mapped: bool) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, shape = LAYERS[kind]
    layer = build(basis)
    functions = layer.functions if isinstance(layer, KANActivation) else layer
    nn.init.normal_(functions.weight, std=0.2)
    if mapped:
        functions.set_input_map(torch.linspace(0.5, 1.5, shape[1]), torch.linspace(-0.5, 0.5, shape[1]))
    return layer, torch.randn(shape)


def evaluated(layer: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, mixed: bool = False) -> list[Tensor]:
    """Return the output and the gradients with respect to input and parameters, on the CPU."""
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=mixed):
        y = layer(x)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device)
    (y.float() * weight).sum().backward()
    return [t.detach().float().cpu() for t in (y, x.grad, *(p.grad for p in module.parameters()))]  # type: ignore[union-attr]


def assert_near(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


@pytest.fixture(autouse=True)
def _exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("basis", BASES.names())
@pytest.mark.parametrize("mapped", [False, True])
def test_float32(kind: str, basis: str, mapped: bool) -> None:
    layer, x = problem(kind, basis, mapped)
    other = copy.deepcopy(layer).cuda()
    assert_near(evaluated(other, other, x.cuda()), evaluated(layer, layer, x), 1e-4)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("mapped", [False, True])
def test_bfloat16_autocast(kind: str, mapped: bool) -> None:
    layer, x = problem(kind, "bspline", mapped)
    other = copy.deepcopy(layer).cuda()
    assert_near(evaluated(other, other, x.cuda(), mixed=True), evaluated(layer, layer, x), 0.04)


@pytest.mark.parametrize("kind", LAYERS)
def test_float16_autocast_is_finite_far_outside_the_grid(kind: str) -> None:
    layer, x = problem(kind, "bspline", False)
    layer.cuda()
    with torch.autocast("cuda", torch.float16):
        y = layer(100 * x.cuda())
    y.float().mean().backward()
    assert y.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("kind", LAYERS)
def test_compiled(kind: str) -> None:
    layer, x = problem(kind, "bspline", True)
    layer.cuda()
    compiled = torch.compile(layer, fullgraph=True)
    assert_near(evaluated(compiled, layer, x.cuda()), evaluated(layer, layer, x.cuda()), 1e-4)


@pytest.mark.parametrize("kind", LAYERS)
def test_channels_last_and_double_backward(kind: str) -> None:
    layer, x = problem(kind, "bspline", False)
    other = copy.deepcopy(layer).cuda()
    if x.dim() == 4:
        other, moved = other.to(memory_format=torch.channels_last), x.cuda().to(memory_format=torch.channels_last)
    else:
        moved = x.cuda()
    found = []
    for module, data in ((layer, x), (other, moved)):
        leaf = data.detach().clone().requires_grad_()
        (first,) = torch.autograd.grad(module(leaf).sin().sum(), leaf, create_graph=True)
        found.append([t.detach().cpu() for t in torch.autograd.grad(first.square().sum(), leaf)])
    assert_near(found[1], found[0], 1e-4)
