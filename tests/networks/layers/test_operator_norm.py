from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline
from torch import Tensor, nn

from monai_deqkan.networks.layers import KANConv1d, KANConv2d, KANConv3d, KANLinear
from monai_deqkan.networks.layers.operator_norm import (
    _BSPLINE_SQUARE_SUM,
    _SILU_MAX_SLOPE,
    conv_norm_bound,
    kan_lipschitz_bound,
    linear_norm_bound,
)

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
KAN_CONVS = (KANConv1d, KANConv2d, KANConv3d)


def dense_norm(layer: nn.Module, shape: tuple[int, ...]) -> float:
    """Largest singular value of the explicit matrix of a linear map, in float64."""
    count = math.prod(shape)
    with torch.no_grad():
        columns = layer(torch.eye(count, dtype=torch.float64).reshape(count, *shape))
    return float(torch.linalg.matrix_norm(columns.reshape(count, -1), ord=2))


def make_conv(weight: Tensor, groups: int = 1, **settings: object) -> nn.Module:
    out, in_per_group, *kernel = weight.shape
    conv = CONVS[len(kernel) - 1](in_per_group * groups, out, tuple(kernel), groups=groups, bias=False, **settings)
    conv = conv.double()
    conv.weight.data.copy_(weight)
    return conv


def kernels(kind: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(shape, generator=generator)
    if kind == "random":
        return noise
    if kind == "smooth":
        return noise[(..., *(slice(0, 1) for _ in shape[2:]))].expand(shape) * (1 + 0.1 * noise)
    if kind == "high-frequency":  # peaks between grid points: alternating signs, modulated
        position = torch.stack(torch.meshgrid(*(torch.arange(n) for n in shape[2:]), indexing="ij")).sum(0)
        return noise[(..., *(slice(0, 1) for _ in shape[2:]))] * torch.cos(2.83 * position)
    if kind == "dirac":
        return nn.init.dirac_(torch.empty(shape))
    return torch.ones(shape)  # "constant"


@pytest.mark.parametrize("kind", ["random", "smooth", "high-frequency", "dirac", "constant"])
@pytest.mark.parametrize(
    ("shape", "image"),
    [
        ((4, 3, 3), (40,)),
        ((3, 5, 4), (40,)),
        ((3, 4, 3, 3), (12, 11)),
        ((2, 2, 2, 5), (11, 12)),
        ((2, 2, 3, 3, 3), (6, 6, 6)),
    ],
)
def test_conv_bound_is_sound_for_dense_matrices(kind: str, shape: tuple[int, ...], image: tuple[int, ...]) -> None:
    weight = kernels(kind, shape)
    bound = float(conv_norm_bound(weight))
    half = tuple(n // 2 for n in shape[2:])
    full = tuple(n - 1 for n in shape[2:])
    for padding in (half, full):
        assert dense_norm(make_conv(weight, padding=padding), (shape[1], *image)) <= bound
    assert dense_norm(make_conv(weight, stride=2, padding=full), (shape[1], *image)) <= bound
    if all(n % 2 for n in shape[2:]):
        circular = make_conv(weight, padding=half, padding_mode="circular")
        assert dense_norm(circular, (shape[1], *image)) <= bound


@pytest.mark.parametrize("dilation", [2, 3])
def test_dilation_does_not_change_the_bound(dilation: int) -> None:
    weight = kernels("random", (3, 3, 3, 3))
    conv = make_conv(weight, dilation=dilation, padding=dilation)
    exact = dense_norm(conv, (3, 18, 18))
    assert 0.9 * float(conv_norm_bound(weight)) < exact <= float(conv_norm_bound(weight))


@pytest.mark.parametrize("groups", [2, 4])
def test_groups(groups: int) -> None:
    weight = kernels("random", (8, 4 // groups, 3, 3))
    bound = float(conv_norm_bound(weight, groups=groups))
    exact = dense_norm(make_conv(weight, groups=groups, padding=2), (4, 14, 14))
    assert 0.9 * bound < exact <= bound


@pytest.mark.parametrize(
    ("shape", "slack"), [((8, 8, 3), 1.011), ((32, 32, 3, 3), 1.026), ((16, 16, 5, 5), 1.026), ((4, 4, 3, 3, 3), 1.051)]
)
@pytest.mark.parametrize("kind", ["random", "smooth", "dirac"])
def test_bound_is_tight_against_a_fine_frequency_grid(shape: tuple[int, ...], slack: float, kind: str) -> None:
    weight = kernels(kind, shape)
    axes = len(shape) - 2
    size = (2000, 64, 32)[axes - 1]
    transfer = torch.fft.fftn(weight.double(), s=(size,) * axes).reshape(*shape[:2], -1).permute(2, 0, 1)
    if axes > 1:
        transfer = transfer[: len(transfer) // 2 + size * (axes == 2) + size**2 * (axes == 3)]
    exact = float(torch.linalg.svdvals(transfer).max())
    assert exact <= float(conv_norm_bound(weight)) <= slack * exact


def test_more_frequencies_tighten_the_bound() -> None:
    weight = kernels("high-frequency", (3, 3, 3, 3))
    coarse, fine = (float(conv_norm_bound(weight, num_frequencies=n)) for n in (4, 200))
    exact = dense_norm(make_conv(weight, padding=2), (3, 16, 16))
    assert exact <= fine < coarse
    assert fine < 1.06 * exact  # no image of 16 x 16 reaches the norm over all sizes


def test_peak_between_grid_points_is_covered() -> None:
    kernel = torch.tensor([[[1.0, 0.0, -1.0]]])  # largest at a quarter cycle, which a grid of 3 misses
    assert float(torch.fft.fft(kernel, n=3).abs().max()) < 1.74
    for count in range(3, 12):
        assert float(conv_norm_bound(kernel, num_frequencies=count)) >= 2.0


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (1, 4), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_linear_bound_against_numpy(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = float(np.linalg.norm(weight.double().numpy(), 2))
    slack = 1e-5 if dtype != torch.bfloat16 else 0.2
    assert exact <= float(linear_norm_bound(weight)) <= exact * (1 + slack)


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_bounds_scale_with_the_weight(scale: float) -> None:
    weight = kernels("random", (4, 4, 3, 3))
    assert float(conv_norm_bound(weight * scale)) == pytest.approx(scale * float(conv_norm_bound(weight)), rel=1e-5)


def test_zero_and_nonfinite_weights() -> None:
    weight = torch.zeros(3, 2, 3, 3, requires_grad=True)
    bound = conv_norm_bound(weight)
    bound.backward()
    assert float(bound.detach()) == 0
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert math.isnan(float(conv_norm_bound(torch.full((2, 2, 3), float("nan")))))


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 3), (3, 2, 3, 3), (2, 2, 3, 1, 3)])
def test_gradient_against_finite_differences(shape: tuple[int, ...]) -> None:
    weight = kernels("random", shape).double() if len(shape) > 2 else torch.randn(shape, dtype=torch.float64)
    bound = linear_norm_bound if len(shape) == 2 else conv_norm_bound
    assert torch.autograd.gradcheck(bound, (weight.requires_grad_(),), eps=1e-6, atol=1e-5)


def test_bound_ignores_autocast() -> None:
    weight = kernels("random", (4, 4, 3, 3))
    plain = float(conv_norm_bound(weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert float(conv_norm_bound(weight)) == plain


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"\(out, in\)"):
        linear_norm_bound(torch.zeros(2, 2, 3))
    with pytest.raises(ValueError, match="kernel"):
        conv_norm_bound(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="groups"):
        conv_norm_bound(torch.zeros(3, 2, 3), groups=2)
    with pytest.raises(ValueError, match="num_frequencies"):
        conv_norm_bound(torch.zeros(3, 2, 3), num_frequencies=2)
    with pytest.raises(TypeError, match="KANLinear"):
        kan_lipschitz_bound(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="ReLU"):
        kan_lipschitz_bound(nn.ReLU())
    with pytest.raises(ValueError, match="padding_mode"):
        kan_lipschitz_bound(KANConv1d(2, 2, 3, padding=1, padding_mode="reflect"))


def test_constants_against_scipy() -> None:
    for order, constant in _BSPLINE_SQUARE_SUM.items():
        degree = order - 1
        knots = np.arange(-degree - 4.0, degree + 5.0)
        splines = BSpline(knots, np.eye(len(knots) - degree - 1), degree)
        assert (splines(np.linspace(0, 1, 2001)[:-1]) ** 2).sum(1).max() == pytest.approx(constant, abs=1e-12)
    x = torch.linspace(2.3, 2.5, 20001, dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad(nn.functional.silu(x).sum(), x)[0].max()
    assert 0 <= _SILU_MAX_SLOPE - float(slope) < 1e-5


def random_kan(layer: nn.Module, family: str) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(layer.weight.shape, generator=generator)
    packed = weight.unflatten(1, (layer.num_features, -1))
    if family == "smooth":
        packed[:] = torch.cumsum(packed, dim=1) * 0.3
    elif family == "alternating":
        signs = torch.tensor([(-1.0) ** k for k in range(layer.num_features)])
        packed[:] = signs.view(-1, *[1] * (packed.ndim - 2)) * packed[:, :1].clone()
    elif family == "mostly base":
        packed[:, int(layer.has_base) :] *= 0.02
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer.requires_grad_(False)


def jacobian_norms(layer: nn.Module, inputs: Tensor) -> Tensor:
    jacobians = torch.func.vmap(torch.func.jacrev(lambda v: layer(v[None])[0]))(inputs)
    return torch.linalg.matrix_norm(jacobians.reshape(len(inputs), -1, inputs[0].numel()), ord=2)


@pytest.mark.parametrize("family", ["plain", "smooth", "alternating", "mostly base"])
@pytest.mark.parametrize(
    ("width", "order", "base"), [(8, 3, "silu"), (64, 3, "silu"), (16, 3, None), (16, 2, "silu"), (16, 1, None)]
)
def test_kan_linear_bound_holds_and_is_tight(family: str, width: int, order: int, base: str | None) -> None:
    torch.manual_seed(0)
    layer = random_kan(KANLinear(width, width, spline_order=order, base_activation=base), family)
    inputs = torch.cat((torch.randn(12, width), 5 * torch.randn(6, width), torch.full((1, width), 2.4)))
    worst = float(jacobian_norms(layer, inputs).max())
    bound = float(kan_lipschitz_bound(layer))
    assert worst <= bound
    assert bound < 6 * worst
    if family == "plain" and width == 64:
        assert bound < 3 * worst  # does not grow with the width


def test_kan_linear_bound_is_met_where_inputs_are_the_worst() -> None:
    """One edge, cubic: the bound sqrt(0.59375) |d| is reached only by slopes that are proportional to the splines."""
    layer = KANLinear(1, 1, base_activation=None).requires_grad_(False)
    slopes = torch.tensor([0.125, 0.75, 0.125])
    layer.weight.zero_()
    layer.weight[0, 3:] = torch.cat((torch.cumsum(slopes, 0), torch.ones(layer.weight.shape[1] - 6)))
    # The last coefficient falls to zero behind the grid; its slope of -1 belongs to the bound.
    expected = math.sqrt(0.59375 * (0.59375 + 1)) / layer.basis.step
    assert float(kan_lipschitz_bound(layer)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", ["plain", "smooth", "mostly base"])
@pytest.mark.parametrize(("dims", "groups"), [(1, 1), (2, 1), (2, 2), (3, 1)])
def test_kan_conv_bound_holds(family: str, dims: int, groups: int) -> None:
    torch.manual_seed(0)
    layer = random_kan(KAN_CONVS[dims - 1](2, 4, 3, padding=1, groups=groups), family)
    inputs = 2 * torch.randn(3, 2, *(24, 6, 4)[dims - 1 : dims] * dims)
    worst = float(jacobian_norms(layer, inputs).max())
    assert worst <= float(kan_lipschitz_bound(layer)) < 6 * worst


def test_kan_bound_gradient_and_zero_parts() -> None:
    torch.manual_seed(0)
    layer = KANLinear(3, 4, bias=False, dtype=torch.float64)
    numeric = torch.zeros_like(layer.weight)
    bound = kan_lipschitz_bound(layer)
    (gradient,) = torch.autograd.grad(bound, layer.weight)
    with torch.no_grad():
        for index in np.ndindex(*layer.weight.shape):
            for sign in (1, -1):
                layer.weight[index] += sign * 1e-6
                numeric[index] += sign * kan_lipschitz_bound(layer) / 2e-6
                layer.weight[index] -= sign * 1e-6
        # The balance `a` is searched afresh there: its small change leaves the value almost, the gradient roughly.
        cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), numeric.flatten(), dim=0)
        assert float(cosine) > 0.95
        layer.weight[:, 3:] = 0
        base = layer.base_weight
        assert float(kan_lipschitz_bound(layer)) == pytest.approx(
            _SILU_MAX_SLOPE * float(torch.linalg.matrix_norm(base, ord=2)), rel=1e-5
        )
        layer.weight.zero_()
        assert float(kan_lipschitz_bound(layer)) == 0
