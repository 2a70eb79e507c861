"""What all KAN layers share: the input map, exchange and reloading of the basis, initialization, gradients."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.nn.utils import parametrize

from monai_deqkan.networks.layers import BASES, BSplineBasis, KANActivation, KANConv1d, KANConv2d, KANConv3d, KANLinear
from monai_deqkan.networks.layers.kan_layer import KANLayer

KINDS: dict[str, Callable[..., Any]] = {
    "linear": lambda **settings: KANLinear(4, 3, **settings),
    "conv1d": lambda **settings: KANConv1d(4, 2, 3, padding=1, groups=2, **settings),
    "conv2d": lambda **settings: KANConv2d(4, 2, (1, 2), padding=(0, 1), **settings),
    "conv3d": lambda **settings: KANConv3d(4, 2, (1, 2, 1), padding="same", **settings),
    "reflect": lambda **settings: KANConv2d(4, 2, (1, 3), padding=(0, 1), padding_mode="reflect", groups=2, **settings),
    "pointwise": lambda **settings: KANActivation(4, **settings).functions,
}
INPUTS: dict[str, tuple[int, ...]] = {
    "linear": (3, 4),
    "conv1d": (2, 4, 3),
    "conv2d": (2, 4, 1, 2),
    "conv3d": (1, 4, 1, 2, 2),
    "reflect": (1, 4, 1, 3),
    "pointwise": (2, 4, 5),
}
SCALE, SHIFT = torch.tensor([0.5, -2.0, 1.0, 1.5]).double(), torch.tensor([0.1, 0.4, 0.0, -1.0]).double()


def make(kind: str, *, mapped: bool = False, **settings: Any) -> KANLayer:
    torch.manual_seed(0)
    layer = KINDS[kind](**settings).double()
    nn.init.normal_(layer.weight)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    if mapped:
        layer.set_input_map(SCALE, SHIFT)
    return layer


def points(kind: str) -> Tensor:
    return 1.3 * torch.randn(INPUTS[kind], generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BASES.names())
def test_gradients_of_every_basis_and_layer(name: str, kind: str) -> None:
    for mapped, base_activation in ((False, "silu"), (True, None)):
        layer = make(kind, basis=name, base_activation=base_activation, mapped=mapped)
        names, parameters = zip(*layer.named_parameters(), strict=True)
        x = points(kind).requires_grad_()

        def function(x: Tensor, *values: Tensor) -> Tensor:
            return functional_call(layer, dict(zip(names, values, strict=True)), (x,))  # noqa: B023

        assert gradcheck(function, (x, *parameters), fast_mode=True)
        assert gradgradcheck(function, (x, *parameters), fast_mode=True)


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # deprecated, and still asked for by users
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outside", ["zero", "clamp", "linear"])
def test_scripted_and_eager_agree(kind: str, outside: str) -> None:
    x = 3 * points(kind)
    for mapped in (False, True):
        layer = make(kind, mapped=mapped, outside=outside)
        torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("name", BASES.names())
def test_every_basis_scripts(name: str) -> None:
    layer = make("linear", basis=name)
    torch.testing.assert_close(torch.jit.script(layer)(points("linear")), layer(points("linear")))


@pytest.mark.parametrize("kind", KINDS)
def test_input_map_moves_the_points_of_the_basis_only(kind: str) -> None:
    layer = make(kind, mapped=True, base_activation=None)
    plain = make(kind, base_activation=None)
    x = points(kind)
    axes = (slice(None), *[None] * (x.dim() - 2))
    if kind in ("linear", "pointwise"):  # no padding: the map may as well be applied before
        torch.testing.assert_close(layer(x), plain(x * SCALE[axes] + SHIFT[axes]))
    based, only_base = make(kind, mapped=True), make(kind, mapped=True)
    with torch.no_grad():
        only_base.coefficients.zero_()
    without = make(kind)
    with torch.no_grad():
        without.coefficients.zero_()
    torch.testing.assert_close(only_base(x), without(x))  # the base term is not mapped
    curves = based.edge_functions(x.flatten()[:5])
    inputs = based._unpacked().shape[2]
    for o in range(len(based.weight)):
        group = o // (len(based.weight) // based.groups)
        for i in range(inputs):
            channel = group * inputs + i
            values = based.basis.values(SCALE[channel] * x.flatten()[:5] + SHIFT[channel])  # (K, P)
            expected = torch.tensordot(values, based.coefficients[o, :, i], dims=([0], [0]))
            expected += torch.tensordot(F.silu(x.flatten()[:5]), based.base_weight[o, i], dims=0)  # type: ignore[index]
            torch.testing.assert_close(curves[:, o, i], expected)


def test_input_map_is_saved_copied_and_reset() -> None:
    layer = make("conv2d", mapped=True)
    x = points("conv2d")
    fresh = make("conv2d")
    assert set(fresh.state_dict()) == {"weight", "bias"}
    before = fresh.state_dict()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    for assign in (False, True):
        fresh = make("conv2d")
        fresh.load_state_dict({name: value.clone() for name, value in layer.state_dict().items()}, assign=assign)
        assert torch.equal(fresh(x), layer(x))
    net, other = nn.Sequential(nn.Identity(), layer), nn.Sequential(nn.Identity(), make("conv2d"))
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), layer(x))
    fresh.load_state_dict(before)
    assert fresh.input_scale is None
    assert fresh.input_shift is None
    state = layer.state_dict()
    del state["input_shift"]
    with pytest.raises(RuntimeError, match="input_shift"):
        fresh.load_state_dict(state)
    layer.set_input_map(None, None)
    torch.testing.assert_close(layer(x), make("conv2d")(x))


def test_weights_of_other_inputs_do_not_pass_for_more_functions() -> None:
    """36 columns are 4 inputs of 9 features, not 1 of 36; also from a file."""
    file = io.BytesIO()
    torch.save(nn.Sequential(KANConv2d(4, 2, 3)).state_dict(), file)
    file.seek(0)
    network = nn.Sequential(KANConv2d(1, 2, 3))
    with pytest.raises(RuntimeError, match="size mismatch"):
        network.load_state_dict(torch.load(file, weights_only=True))
    assert network[0].basis == BSplineBasis()


@pytest.mark.parametrize("base", ["silu", None])
def test_weights_with_and_without_base_term_are_not_taken_for_each_other(base: str | None) -> None:
    saved = KANLinear(4, 3, base_activation=base).state_dict()
    layer = KANLinear(4, 3, grid_size=5, base_activation=None if base else "silu")
    with pytest.raises(RuntimeError, match=f"saved {'with' if base else 'without'} a base term"):
        layer.load_state_dict(saved)


def test_wrong_input_maps() -> None:
    layer = make("conv2d")
    for scale, shift, message in (
        (torch.ones(3), torch.ones(4), r"`scale` must have shape \(4\)"),
        (torch.ones(4), torch.full((4,), torch.nan), "`shift` must be finite"),
        (torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.zeros(4), "`scale` must be nonzero"),
        (torch.ones(4), None, "both be tensors or both None"),
    ):
        with pytest.raises(ValueError, match=message):
            layer.set_input_map(scale, shift)
    with pytest.raises(ValueError, match=r"finite in torch\.float16"):
        layer.half().set_input_map(torch.full((4,), 1e6), torch.zeros(4))


@pytest.mark.parametrize("kind", KINDS)
def test_set_basis_keeps_the_parameter_and_reloads(kind: str) -> None:
    layer = make(kind)
    parameter, base = layer.weight, layer.base_weight.detach().clone()  # type: ignore[union-attr]
    x = points(kind)
    old_loss = layer(x).sum()  # its graph stays alive, as that of the last loss does in a training
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    old = layer.coefficients
    coefficients = torch.randn(old.shape[0], 12, *old.shape[2:], generator=torch.Generator().manual_seed(5)).double()
    layer.set_basis(BSplineBasis(9), coefficients)
    assert layer.weight is parameter
    assert torch.equal(layer.coefficients, coefficients)
    assert torch.equal(layer.base_weight, base)  # type: ignore[arg-type]
    y = layer(x)
    y.sum().backward()
    optimizer.step()
    assert layer.weight.grad is not None
    assert layer.weight.grad.shape == layer.weight.shape
    torch.testing.assert_close(layer._forward_plain(x) if hasattr(layer, "_forward_plain") else y, y)
    del old_loss
    fresh = make(kind)
    fresh.load_state_dict(layer.state_dict())
    assert fresh.basis == BSplineBasis(9)
    assert torch.equal(fresh(x), layer(x))


def test_set_basis_recomputes_the_padding() -> None:
    layer = KANConv2d(1, 1, 3, padding=1, bias=False, base_activation=None, dtype=torch.float64)
    basis = BSplineBasis(7, 2)
    layer.set_basis(basis, torch.ones(1, basis.num_basis, 1, 3, 3))
    torch.testing.assert_close(layer(torch.rand(1, 1, 4, 4).double()), torch.full((1, 1, 4, 4), 9.0).double())


def test_wrong_bases() -> None:
    layer = make("linear")
    with pytest.raises(ValueError, match=r"`coefficients` must have shape \(3, 12, 4\)"):
        layer.set_basis(BSplineBasis(9), torch.zeros(3, 8, 4))
    with pytest.raises(ValueError, match="`coefficients` must be finite"):
        layer.set_basis(BSplineBasis(), torch.full((3, 8, 4), torch.inf))
    with pytest.raises(TypeError, match="`basis` must be a Basis; got str"):
        layer.set_basis("bspline", torch.zeros(3, 8, 4))  # type: ignore[arg-type]
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    with pytest.raises(ValueError, match="parametrized cannot be exchanged"):
        layer.set_basis(BSplineBasis(), torch.zeros(3, 8, 4))
    layer = make("linear")
    for shape in ((3, 4 * 9 + 1), (5, 4 * 9)):
        with pytest.raises(RuntimeError, match="size mismatch"):
            layer.load_state_dict({"weight": torch.zeros(shape), "bias": torch.zeros(3)})
    with pytest.raises(RuntimeError, match="another number of basis functions"):
        layer.load_state_dict({"weight": torch.zeros(3, 4 * 2), "bias": torch.zeros(3)})
    assert layer.basis == BSplineBasis()


def mean_squares(layers: list[nn.Module], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return those of each layer's output, and of the gradient at each layer's input for one of variance 1."""
    steps = [x.requires_grad_()]
    for layer in layers:
        steps.append(layer(steps[-1]))
    gradients = torch.autograd.grad(steps[-1], steps[:-1], torch.randn_like(steps[-1]))
    return tuple(torch.stack([t.detach().square().mean() for t in part]) for part in (steps[1:], gradients))  # type: ignore[return-value]


def linear(settings: dict[str, Any]) -> nn.Module:
    return KANLinear(64, 64, **settings)


def convolution(settings: dict[str, Any]) -> nn.Module:
    return KANConv2d(32, 32, 3, padding=1, padding_mode="circular", **settings)


DEPTH: list[tuple[Any, tuple[int, ...], dict[str, Any], float]] = [
    (linear, (256, 64), {}, 2.0),
    (convolution, (2, 32, 12, 12), {}, 2.0),
    (linear, (256, 64), {"init": "zero_spline"}, 3.0),
    (linear, (256, 64), {"base_activation": None}, 2.0),
    (linear, (256, 64), {"grid_size": 20}, 3.0),
    (linear, (256, 64), {"basis": ("gaussian", {}), "base_activation": None}, 2.0),
]


@pytest.mark.parametrize(("build", "shape", "settings", "factor"), DEPTH)
def test_mean_squares_over_depth(build: Any, shape: tuple[int, ...], settings: dict[str, Any], factor: float) -> None:
    torch.manual_seed(0)
    outputs, gradients = mean_squares([build(settings) for _ in range(10)], torch.randn(shape))
    for found in (outputs, gradients):
        assert found.min() > 1 / factor
        assert found.max() < factor


@pytest.mark.parametrize("name", BASES.names())
@pytest.mark.parametrize("base_activation", ["silu", None])
def test_mean_squares_over_depth_of_every_basis(name: str, base_activation: str | None) -> None:
    found = []
    for seed in range(5):
        torch.manual_seed(seed)
        layers = [linear({"basis": name, "base_activation": base_activation}) for _ in range(10)]
        outputs, gradients = mean_squares(layers, torch.randn(256, 64))
        found.append((float(outputs[-1]), float(gradients[0])))
    output, gradient = torch.tensor(found).mean(0).tolist()
    print(f"{name}, {base_activation}: output {output:.2f}, gradient {gradient:.2f}")
    assert 0.5 < output < 2.0
    assert 0.5 < gradient < 2.0


@pytest.mark.parametrize("base_activation", ["silu", None])
def test_identity(base_activation: str | None) -> None:
    settings = {"init": "identity", "base_activation": base_activation}
    torch.manual_seed(0)
    x = torch.randn(2, 4, 9, 9).clamp(-3, 3)
    for layer in (
        KANConv2d(4, 4, 3, padding=1, **settings),
        KANConv2d(4, 4, 3, padding=1, groups=2, **settings),
        KANConv2d(4, 4, 2, padding="same", basis="chebyshev", **settings),
    ):
        assert (layer(x) - x).square().mean().sqrt() < 0.03
    rows = x[:, :, 0].transpose(1, 2)
    assert (KANLinear(4, 6, **settings)(rows)[..., :4] - rows).square().mean().sqrt() < 0.03
    narrow = KANLinear(4, 2, **settings)
    assert (narrow(rows) - rows[..., :2]).square().mean().sqrt() < 0.03
    narrow.set_input_map(torch.full((4,), 3.0), torch.full((4,), 1.0))
    narrow.reset_parameters()
    inside = rows.clamp(-1.3, 0.6)
    assert (narrow(inside) - inside[..., :2]).square().mean().sqrt() < 0.03


def test_zero_spline() -> None:
    torch.manual_seed(0)
    layer = KANLinear(256, 256, init="zero_spline")
    x = torch.randn(100, 256)
    assert not layer.coefficients.any()
    torch.testing.assert_close(layer(x), F.linear(F.silu(x), layer.base_weight))
    assert 0.8 < layer(x).square().mean() < 1.2
    with pytest.raises(ValueError, match="needs a base term"):
        KANLinear(2, 2, init="zero_spline", base_activation=None)
    with pytest.raises(ValueError, match="Did you mean 'variance'"):
        KANLinear(2, 2, init="varience")


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        layer = KANConv2d(3, 5, 3, padding=1, init="identity", basis=("bspline", {"grid_size": 6}))
    assert layer.weight.device.type == "meta"
    torch.manual_seed(0)
    layer.to_empty(device="cpu").reset_parameters()
    assert layer.weight.isfinite().all()
    x = torch.rand(1, 3, 5, 5)
    assert (layer(x)[:, :3] - x).abs().mean() < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_needed_is_differentiated(kind: str) -> None:
    x = points(kind)
    for mapped in (False, True):
        layer = make(kind, mapped=mapped)
        leaf = x.clone().requires_grad_()
        expected = torch.autograd.grad(layer(leaf).sin().sum(), (leaf, layer.weight))
        layer.weight.requires_grad_(False)
        assert torch.equal(torch.autograd.grad(layer(leaf).sin().sum(), leaf)[0], expected[0])
        (first,) = torch.autograd.grad(layer(leaf).sin().sum(), leaf, create_graph=True)  # with a frozen weight
        assert torch.autograd.grad(first.square().sum(), leaf)[0].abs().max() > 0
        layer.weight.requires_grad_(True)
        torch.testing.assert_close(torch.autograd.grad(layer(x).sin().sum(), layer.weight)[0], expected[1])
        layer.requires_grad_(False)
        with torch.no_grad():
            quiet = layer(x)
        with torch.inference_mode():
            assert torch.equal(layer(x), quiet)
        assert not layer(x).requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_empty_and_strided_inputs(kind: str) -> None:
    x = points(kind)
    for mapped in (False, True):
        layer = make(kind, mapped=mapped)
        expected = layer(x)
        assert layer(x[:0]).shape == (0, *expected.shape[1:])
        wide = torch.stack((x, -x), dim=-1)[..., 0]
        assert not wide.is_contiguous()
        torch.testing.assert_close(layer(wide), expected)
        turned = x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        torch.testing.assert_close(layer(turned), expected)
        leaf = x.clone().requires_grad_()
        (found,), (wanted,) = (torch.autograd.grad(layer(t).sin().sum(), t) for t in (turned, leaf))
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_with_an_input_map(kind: str) -> None:
    exact = make(kind, mapped=True)
    x = points(kind)
    layer = copy.deepcopy(exact).float()
    leaf = x.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(leaf)
    assert y.dtype == torch.bfloat16
    assert (y.double() - exact(x)).norm() < 0.015 * exact(x).norm()
    y.float().square().sum().backward()
    assert leaf.grad is not None
    (expected,) = torch.autograd.grad(exact(twin := x.clone().requires_grad_()).square().sum(), twin)
    assert (leaf.grad.double() - expected).norm() < 0.04 * expected.norm()
    half = copy.deepcopy(exact).bfloat16()
    rounded = copy.deepcopy(half).double()(x.bfloat16().double())
    assert (half(x.bfloat16()).double() - rounded).norm() < 0.015 * rounded.norm()


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # from within torch
@pytest.mark.parametrize("kind", ["linear", "reflect", "pointwise"])
def test_transforms_and_graphs_with_an_input_map(kind: str) -> None:
    layer = make(kind, mapped=True)
    x = points(kind)
    y = layer(x)
    torch.testing.assert_close(torch.func.vmap(layer)(x), y)
    tangent = torch.ones_like(x)
    _, slope = torch.func.jvp(layer, (x,), (tangent,))
    leaf = x.clone().requires_grad_()
    weight = torch.randn_like(y)
    (pulled,) = torch.autograd.grad(layer(leaf), leaf, weight)
    torch.testing.assert_close((slope * weight).sum(), (pulled * tangent).sum())
    torch.testing.assert_close(torch.func.grad(lambda t: (layer(t) * weight).sum())(x), pulled)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), y)
    batch = torch.export.Dim("batch", min=2)
    long = torch.cat((x, x, 2 * x))
    program = torch.export.export(layer, (long,), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(long[:2]), layer(long[:2]))


def test_a_map_that_needs_a_gradient_gets_one() -> None:
    layer = make("linear", mapped=True)
    x = points("linear")
    scale = SCALE.clone().requires_grad_()

    def function(scale: Tensor) -> Tensor:
        return functional_call(layer, {"input_scale": scale}, (x,))

    assert gradcheck(function, (scale,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(
    ("basis", "outside"),
    [("bspline", "linear"), ("bspline", "zero"), ("chebyshev", "linear"), ("fourier", None), ("gaussian", "linear")],
)
def test_the_largest_inputs_give_no_nan(basis: str, outside: str | None, mapped: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = KANLinear(1, 3, basis=basis, grid_range=(-0.1, 0.1), outside=outside, dtype=dtype)
    if mapped:
        layer.set_input_map(torch.tensor([50.0]), torch.tensor([1.0]))
    top = torch.finfo(dtype).max
    x = torch.tensor([[top], [-top], [0.5 * top], [-1e-4 * top], [top**0.5]], dtype=dtype, requires_grad=True)
    y = layer(x)
    assert not y.isnan().any()
    assert not torch.autograd.grad(y.sum(), x)[0].isnan().any()
    assert not layer.basis_values(layer._mapped(x)).isnan().any()


@pytest.mark.parametrize(
    "make", [lambda dtype: KANLinear(2, 2, dtype=dtype), lambda dtype: KANConv2d(2, 2, 3, dtype=dtype)]
)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, "float32"])
def test_other_dtypes_than_real_floating_point_ones_are_refused(make: Callable[..., KANLayer], dtype: Any) -> None:
    with pytest.raises(TypeError, match="`dtype` must be a real floating-point"):
        make(dtype)


@pytest.mark.parametrize("layer", [KANLinear(3, 3), KANConv1d(3, 3, 3, padding=1), KANActivation(3)], ids=repr)
def test_gradient_that_is_differentiated_again_is_right_for_a_layer_used_twice(layer):
    layer = layer.double()
    x = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x[..., 0] if isinstance(layer, KANLinear) else x
    parameters = list(layer.parameters())
    plain = torch.autograd.grad(layer(layer(x)).square().sum(), parameters)
    again = torch.autograd.grad(layer(layer(x)).square().sum(), parameters, create_graph=True)
    torch.testing.assert_close(again, plain, rtol=1e-10, atol=1e-12)
