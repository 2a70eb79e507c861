from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from scipy.interpolate import BSpline
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.nn.utils import parametrize

from monai_deqkan.networks.layers import BSplineBasis, KANLinear


def make(in_features: int = 4, out_features: int = 3, **settings: object) -> KANLinear:
    torch.manual_seed(0)
    layer = KANLinear(in_features, out_features, dtype=torch.float64, **settings)  # type: ignore[arg-type]
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer


def points(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return 2 * torch.randn(*shape, generator=generator, dtype=torch.float64)


def by_loops(layer: KANLinear, x: Tensor) -> np.ndarray:
    """Evaluate the formula edge by edge with scipy's splines."""
    basis = layer.basis
    assert isinstance(basis, BSplineBasis)
    ends = np.array([-3.0 - 3 * basis.step, 3.0 + 3 * basis.step])  # where the last spline vanishes
    knots = -3.0 + basis.step * np.arange(-6, basis.grid_size + 7)
    out = np.zeros((len(x), layer.out_features))
    for j in range(layer.out_features):
        for i in range(layer.in_features):
            t = x[:, i].detach().numpy()
            coefficients = np.pad(layer.coefficients[j, :, i].detach().numpy(), 3)
            out[:, j] += np.where((t > ends[0]) & (t < ends[1]), BSpline(knots, coefficients, 3)(t), 0.0)
            if layer.base_weight is not None:
                out[:, j] += layer.base_weight[j, i].item() * t / (1 + np.exp(-t))
        if layer.bias is not None:
            out[:, j] += layer.bias[j].item()
    return out


@pytest.mark.parametrize("base_activation", ["silu", None])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_formula_by_loops(base_activation: str | None, bias: bool) -> None:
    layer = make(bias=bias, base_activation=base_activation)
    x = points(50, 4)
    np.testing.assert_allclose(layer(x).detach().numpy(), by_loops(layer, x), rtol=0, atol=1e-12)
    assert (layer.base_weight is None) == (base_activation is None)


def test_any_leading_shape() -> None:
    layer = make()
    x = points(2, 5, 4)
    for part in (x, x[0, 0], x[:0]):
        expected = layer(part.reshape(-1, 4)).reshape(*part.shape[:-1], 3)
        torch.testing.assert_close(layer(part), expected)


def test_learns_what_is_written_into_the_views() -> None:
    layer = make(1, 1, bias=False)
    with torch.no_grad():
        layer.base_weight.zero_()  # type: ignore[union-attr]
        layer.coefficients.fill_(2.0)
    torch.testing.assert_close(layer(torch.tensor([[0.3]]).double()), torch.tensor([[2.0]]).double())
    t = points(7)
    layer = make()
    y = torch.stack([layer(t[:, None].expand(-1, 4) * 0 + t[p]) for p in range(7)])[:, 0]
    torch.testing.assert_close(layer.edge_functions(t).sum(2) + layer.bias, y)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("base_activation", ["silu", None])
def test_gradients(order: int, base_activation: str | None) -> None:
    layer = make(spline_order=order, base_activation=base_activation)
    x = points(5, 4).requires_grad_()
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert gradcheck(function, (x, *parameters))
    if order > 1:  # hats have no second derivative
        assert gradgradcheck(function, (x, *parameters), fast_mode=True)


def plain(layer: KANLinear, x: Tensor) -> Tensor:
    return F.linear(layer._plain_features(x, x).flatten(1), layer.weight, layer.bias)


def test_gradient_equals_that_of_the_plain_path_and_keeps_no_features() -> None:
    layer = make()
    x = points(6, 4).requires_grad_()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        y = layer(x)
    assert max(kept) <= layer.weight.numel()
    assert sum(kept) <= x.numel() + layer.weight.numel() + 3
    inputs = (x, *layer.parameters())
    for found, expected in zip(
        torch.autograd.grad(y.sin().sum(), inputs),
        torch.autograd.grad(plain(layer, x).sin().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # from within torch
def test_functorch_transforms() -> None:
    layer = make()
    x, v = points(5, 4), points(5, 4).flip(0)
    jacobians = torch.func.vmap(torch.func.jacrev(layer))(x)
    for row, jacobian in zip(x, jacobians, strict=True):
        torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(layer, row))
    _, slope = torch.func.jvp(layer, (x,), (v,))
    torch.testing.assert_close(slope, torch.einsum("boi,bi->bo", jacobians, v))


def scripted(layer: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    return torch.jit.script(layer)


def traced(layer: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    return torch.jit.trace(layer, x)


def exported(layer: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    batch = torch.export.Dim("batch", min=2)
    return torch.export.export(layer, (x,), dynamic_shapes=({0: batch},)).module()


def compiled(layer: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    return torch.compile(layer, backend="aot_eager", fullgraph=True)


@pytest.mark.filterwarnings("ignore:Converting a tensor")  # of the input checks, while tracing
@pytest.mark.filterwarnings("ignore:.*torch.jit")  # deprecated, and still asked for by users
@pytest.mark.parametrize("convert", [scripted, traced, exported, compiled])
def test_other_forms_agree(convert: Callable[[nn.Module, Tensor], Callable[[Tensor], Tensor]]) -> None:
    layer = make()
    x = points(6, 4).requires_grad_()
    other = convert(layer, points(3, 4))
    y = other(x)
    torch.testing.assert_close(y, layer(x))
    (found,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(found, expected)


def test_bfloat16_and_autocast_compute_the_basis_in_float32() -> None:
    exact = make(64, 32)
    x = points(100, 64).requires_grad_()
    y = exact(x)
    y.sum().backward()
    layer = copy.deepcopy(exact).float()
    layer.zero_grad()
    single = x.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(single)
    found.float().sum().backward()
    assert found.dtype == torch.bfloat16
    assert single.grad is not None
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == single.grad.dtype == torch.float32
    for a, b in ((found, y), (single.grad, x.grad), (layer.weight.grad, exact.weight.grad)):
        assert (a.double() - b).norm() < 0.01 * b.norm()  # type: ignore[union-attr,operator]
    half = copy.deepcopy(exact).bfloat16()
    rounded = x.detach().bfloat16().requires_grad_()
    found = half(rounded)
    found.sum().backward()
    reference = exact(rounded.detach().double())
    assert (found.double() - reference).norm() < 0.01 * reference.norm()
    assert rounded.grad is not None
    assert torch.isfinite(rounded.grad).all()


def test_initialization_on_a_grid_far_from_zero_is_finite() -> None:
    layer = KANLinear(16, 64, grid_range=(100.0, 200.0), base_activation=None)
    y = layer(torch.empty(500, 16).uniform_(100.0, 200.0))
    assert 0.5 < y.square().mean() < 2.0


def test_copies_pickles_and_reloads() -> None:
    layer = make()
    x = points(5, 4)
    other = make(grid_size=5)
    nn.init.zeros_(other.weight)
    other.load_state_dict(layer.state_dict())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
        assert torch.equal(twin(x), layer(x))


def test_parametrized_weight() -> None:
    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    layer = make(bias=False)
    x = points(5, 4)
    before = layer(x)
    parametrize.register_parametrization(layer, "weight", Double())
    torch.testing.assert_close(layer(x), 2 * before)
    layer(x).sum().backward()
    assert layer.parametrizations.weight.original.grad.abs().max() > 0  # type: ignore[union-attr]


def test_keeps_the_metadata_of_monai() -> None:
    layer = make()
    x = points(5, 4)
    y = layer(MetaTensor(x, meta={"name": "scan"}))
    assert isinstance(y, MetaTensor)
    assert y.meta["name"] == "scan"
    torch.testing.assert_close(y.as_tensor(), layer(x))
    y.sum().backward()
    assert layer.weight.grad is not None


def test_wrong_inputs() -> None:
    with pytest.raises(ValueError, match=r"4 features on its last axis; got shape \[2, 5\]"):
        make()(points(2, 5))
    with pytest.raises(TypeError, match=r"dtype torch\.float64; got torch\.float32"):
        make()(points(2, 4).float())
    with pytest.raises(ValueError, match="`in_features` must be at least 1"):
        KANLinear(0, 1)
    with pytest.raises(ValueError, match="`base_activation` must be one of silu, None"):
        KANLinear(1, 1, base_activation="gelu")
    with pytest.raises(ValueError, match=r"`points` must have shape \(P,\)"):
        make().edge_functions(points(2, 2))
