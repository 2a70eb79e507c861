from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from monai_deqkan.networks.layers import (
    Basis,
    KANActivation,
    KANConv1d,
    KANConv2d,
    KANConv3d,
    KANLayer,
    KANLinear,
    kan_lipschitz_bound,
)
from monai_deqkan.networks.layers.kan_norm import SILU_MAX_SLOPE, _square_root, operator_norm

CONVS = (KANConv1d, KANConv2d, KANConv3d)
FAMILIES = ["init", "rough", "smooth"]


def make(layer: KANLayer, family: str) -> KANLayer:
    """Draw weights of a family: the default ones, independent ones, or samples of lines and sines."""
    generator = torch.Generator().manual_seed(1)
    if family == "rough":
        layer.weight.data.normal_(generator=generator)
    elif family == "smooth":
        basis, shape = layer.basis, layer.coefficients.movedim(1, 0).shape
        x = torch.linspace(*basis.grid_range, 101, dtype=torch.float64)
        wave = torch.randn(math.prod(shape[1:]), 4, generator=generator, dtype=torch.float64)
        targets = wave[:, :1] * torch.sin(wave[:, 1:2] * x + 3 * wave[:, 2:3]) + wave[:, 3:] * x
        layer.coefficients.data.copy_(basis.fit(x, targets.T).reshape(shape).movedim(0, 1))
        if layer.base_weight is not None:
            layer.base_weight.data.normal_(generator=generator)
    return layer.requires_grad_(False)


def find_stretch(layer: nn.Module, shape: tuple[int, ...]) -> float:
    """Search for the largest norm of the Jacobian; it needs nothing but the layer's outputs and their derivatives.

    Entry i of J(x)^T u depends on x_i only. So inputs filled with one number show it for all i, the best number is
    taken for each i, and u moves to where J(x) sends J(x)^T u: the norm rises with each step.
    """
    parameter = next(iter(layer.parameters()))
    small = len(shape) == 1
    starts, steps, count = (3, 12, 481) if small else (1, 6, 121)
    points = torch.linspace(-12.0, 12.0, count, dtype=parameter.dtype)
    filled = points.view(-1, *[1] * len(shape)).expand(-1, *shape).clone().requires_grad_()
    generator = torch.Generator().manual_seed(2)
    found = 0.0
    output = layer(filled)
    for _ in range(starts):
        u = torch.randn(output.shape[1:], generator=generator).to(output)
        for _ in range(steps):
            u = u / u.norm()
            (slopes,) = torch.autograd.grad(output, filled, u.expand_as(output), retain_graph=True)
            best = slopes.abs().argmax(0, keepdim=True)
            x, v = points[best], slopes.gather(0, best)
            found = max(found, float(v.norm()))
            u = torch.autograd.functional.jvp(layer, x, v)[1][0]
    return found


def check(layer: KANLayer, shape: tuple[int, ...], looseness: float = 3.0) -> None:
    found, bound = find_stretch(layer, shape), float(kan_lipschitz_bound(layer).detach())
    assert found <= bound < looseness * found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("width", [1, 16, 64])
@pytest.mark.parametrize("base", ["silu", None])
def test_linear(family: str, width: int, base: str | None) -> None:
    torch.manual_seed(0)
    check(make(KANLinear(width, width, base_activation=base), family), (width,))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("outside", ["zero", "clamp", "linear"])
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_orders_and_continuations(family: str, outside: str, order: int) -> None:
    torch.manual_seed(0)
    check(make(KANLinear(8, 8, spline_order=order, outside=outside), family), (8,))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("basis", ["gaussian", "mexican_hat", "chebyshev", "fourier"])
def test_other_bases(family: str, basis: str) -> None:
    torch.manual_seed(0)
    check(make(KANLinear(8, 8, basis=basis), family), (8,), looseness=4.0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(
    ("dims", "settings"),
    [
        (1, {"padding": "same", "kernel_size": 4}),
        (1, {"padding": 3}),
        (2, {"padding": 1}),
        (2, {"padding": 2, "dilation": 2, "groups": 2}),
        (2, {"padding": 1, "stride": 2, "outside": "linear"}),
        (3, {"padding": 1}),
    ],
)
def test_convolutions(family: str, mode: str, dims: int, settings: dict[str, object]) -> None:
    torch.manual_seed(0)
    layer = make(CONVS[dims - 1](2, 4, **{"kernel_size": 3, **settings}, padding_mode=mode), family)
    size = (2, *(16, 6, 3)[dims - 1 : dims] * dims)
    # Small images: neither the worst frequency nor the worst border is reached.
    check(layer, size, looseness=8.0 if dims < 3 else 15.0)


@pytest.mark.parametrize(
    ("layer", "shape"), [(KANLinear(6, 6), (6,)), (KANConv2d(2, 2, 3, padding=1, padding_mode="reflect"), (2, 5, 5))]
)
def test_bound_holds_after_training_and_after_an_input_map(layer: KANLayer, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    x = 2 * torch.randn(64, *shape)
    for _ in range(40):
        optimizer.zero_grad()
        (layer(x) - torch.sin(2 * x)).square().mean().backward()
        optimizer.step()
    layer.requires_grad_(False)
    check(layer, shape, looseness=5.0)
    before = float(kan_lipschitz_bound(layer))
    scale = torch.tensor([0.5, -3.0] * (shape[0] // 2))
    layer.set_input_map(scale, torch.full_like(scale, 0.3))
    check(layer, shape, looseness=5.0)
    assert before < float(kan_lipschitz_bound(layer)) < 3 * before
    layer.set_input_map(-torch.ones_like(scale), 0 * scale)
    assert float(kan_lipschitz_bound(layer)) == pytest.approx(before, rel=1e-4)


def test_lines_are_nearly_exact() -> None:
    """Where all edges are lines the Jacobian is one matrix."""
    layer = KANLinear(12, 9, base_activation=None, outside="linear", grid_size=20, dtype=torch.float64)
    slopes = torch.randn(9, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.linspace(-3, 3, 200, dtype=torch.float64)
    with torch.no_grad():
        layer.coefficients.copy_(
            layer.basis.fit(x, slopes.flatten() * x[:, None], ridge=0).reshape(-1, 9, 12).mT.mT.movedim(0, 1)
        )
    exact = float(torch.linalg.matrix_norm(slopes, ord=2))
    assert exact <= float(kan_lipschitz_bound(layer).detach()) < 1.02 * exact


def test_looseness_does_not_grow_with_the_grid() -> None:
    torch.manual_seed(0)
    for family in FAMILIES:
        check(make(KANLinear(16, 16, grid_size=20), family), (16,))


@pytest.mark.parametrize("share", [0.0, 1e-6, 0.03])
def test_mostly_base(share: float) -> None:
    torch.manual_seed(0)
    layer = KANLinear(8, 8).requires_grad_(False)
    layer.coefficients.mul_(share)
    base = SILU_MAX_SLOPE * float(torch.linalg.matrix_norm(layer.base_weight, ord=2))
    assert base <= float(kan_lipschitz_bound(layer)) <= base * (1 + 1e-5 + 20 * share)


def test_zero_and_nonfinite_weights() -> None:
    layer = KANLinear(3, 2)
    nn.init.zeros_(layer.weight)
    assert float(kan_lipschitz_bound(layer).detach()) == 0
    nn.init.constant_(layer.weight, float("nan"))
    assert math.isnan(float(kan_lipschitz_bound(layer).detach()))


def test_silu_slope() -> None:
    x = torch.linspace(2.3, 2.5, 20001, dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad(nn.functional.silu(x).sum(), x)[0].max()
    assert 0 <= SILU_MAX_SLOPE - float(slope) < 1e-5


class Arctangents(Basis):
    """A third party's basis: the three things that one must give, and true Lipschitz constants."""

    num_basis = 3

    def values(self, x: Tensor, dim: int = 0) -> Tensor:
        return torch.stack([torch.atan(x - shift) for shift in (-1.0, 0.0, 1.0)], dim)

    def derivative(self, x: Tensor, dim: int = 0) -> Tensor:
        return torch.stack([1 / (1 + (x - shift) ** 2) for shift in (-1.0, 0.0, 1.0)], dim)

    def lipschitz_constants(self) -> Tensor:
        return torch.ones(3, dtype=torch.float64)


def test_third_party_basis() -> None:
    torch.manual_seed(0)
    layer = KANLinear(6, 5, basis=Arctangents(), base_activation=None).requires_grad_(False)
    check(layer, (6,), looseness=6.0)
    expected = math.sqrt(3) * float(torch.linalg.matrix_norm(layer.weight, ord=2))
    assert float(kan_lipschitz_bound(layer)) == pytest.approx(expected, rel=1e-5)


def test_activation_starts_as_silu() -> None:
    assert float(kan_lipschitz_bound(KANActivation(3)).detach()) == pytest.approx(SILU_MAX_SLOPE, rel=1e-4)


@pytest.mark.parametrize("base", ["silu", None])
@pytest.mark.parametrize("basis", ["bspline", "gaussian"])
def test_gradient_of_linear_layers(base: str | None, basis: str) -> None:
    torch.manual_seed(0)
    layer = KANLinear(3, 4, basis=basis, base_activation=base, dtype=torch.float64)
    layer.set_input_map(torch.tensor([0.5, 2.0, -1.0]), torch.zeros(3))
    norm = operator_norm(layer)
    assert torch.autograd.gradcheck(lambda w: norm.at(w, norm.find_peak(w)), (layer.weight,), atol=1e-5)


def test_gradient_of_convolutions() -> None:
    torch.manual_seed(0)
    layer = KANConv1d(2, 4, 3, padding=1, padding_mode="reflect", groups=2, dtype=torch.float64)
    norm = operator_norm(layer)
    assert torch.autograd.gradcheck(lambda w: norm.at(w, norm.find_peak(w)), (layer.weight,), atol=1e-5)


def test_gradient_is_finite_for_equal_edges() -> None:
    layer = KANLinear(4, 4, dtype=torch.float64)
    nn.init.ones_(layer.weight)
    kan_lipschitz_bound(layer).backward()
    assert torch.isfinite(layer.weight.grad).all()


def test_square_root() -> None:
    a = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = (a @ a.T + torch.eye(5, dtype=torch.float64)).requires_grad_()
    assert torch.allclose(_square_root(matrix) @ _square_root(matrix), matrix)
    assert torch.autograd.gradcheck(lambda m: _square_root(0.5 * (m + m.T)), (matrix,))
    assert torch.autograd.gradcheck(lambda m: _square_root(0.5 * (m + m.T)), (torch.eye(3).double().requires_grad_(),))


def test_other_layers_are_refused() -> None:
    with pytest.raises(TypeError, match="KANLinear"):
        kan_lipschitz_bound(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="ReLU"):
        kan_lipschitz_bound(nn.ReLU())
