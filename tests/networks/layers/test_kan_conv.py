from __future__ import annotations

import copy
import pickle
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

from monai_deqkan.networks.layers import KANConv1d, KANConv2d, KANConv3d, kan_features

CLASSES: dict[int, Any] = {1: KANConv1d, 2: KANConv2d, 3: KANConv3d}
PLAIN: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def make(dims: int, *args: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    layer = CLASSES[dims](*args, dtype=torch.float64, **settings)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer


def image(*shape: int) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def by_loops(layer: Any, x: Tensor, pairs: list[tuple[int, int]]) -> Tensor:
    """Evaluate the formula: pad, then sum one function per kernel element, output by output."""
    mode = {"zeros": "constant", "replicate": "edge", "reflect": "reflect", "circular": "wrap"}[layer.padding_mode]
    padded = torch.from_numpy(np.pad(x.numpy(), [(0, 0), (0, 0), *pairs], mode=mode))
    dims = len(layer.kernel_size)
    reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    space = [(n - r - 1) // s + 1 for n, r, s in zip(padded.shape[2:], reach, layer.stride, strict=True)]
    y = torch.zeros(len(x), layer.out_channels, *space, dtype=x.dtype)
    per_group = (layer.in_channels // layer.groups, layer.out_channels // layer.groups)
    for o in range(layer.out_channels):
        for inner in range(per_group[0]):
            i = (o // per_group[1]) * per_group[0] + inner
            for offset in product(*(range(k) for k in layer.kernel_size)):
                spots = tuple(
                    slice(d * off, d * off + s * (n - 1) + 1, s)
                    for d, off, s, n in zip(layer.dilation, offset, layer.stride, space, strict=True)
                )
                t = padded[(slice(None), i, *spots)]
                seen = t if layer.input_scale is None else layer.input_scale[i] * t + layer.input_shift[i]
                values = layer.basis.values(seen)
                y[:, o] += torch.tensordot(layer.coefficients[(o, slice(None), inner, *offset)], values, dims=1)
                if layer.base_weight is not None:
                    y[:, o] += layer.base_weight[(o, inner, *offset)] * F.silu(t)
        if layer.bias is not None:
            y[:, o] += layer.bias[o]
    assert dims == x.dim() - 2
    return y


ATTRIBUTES = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "in_channels", "out_channels")
ATTRIBUTES += ("transposed", "output_padding")
CASES: list[tuple[int, dict[str, Any], list[tuple[int, int]]]] = [
    (1, {"kernel_size": 3, "padding": 1}, [(1, 1)]),
    (1, {"kernel_size": 4, "padding": "same", "dilation": 3}, [(4, 5)]),
    (2, {"kernel_size": 3}, [(0, 0)] * 2),
    (2, {"kernel_size": 3, "padding": "valid", "bias": False}, [(0, 0)] * 2),
    (2, {"kernel_size": 3, "padding": 1}, [(1, 1)] * 2),
    (2, {"kernel_size": 3, "padding": 1, "base_activation": None, "bias": False}, [(1, 1)] * 2),
    (2, {"kernel_size": (3, 2), "padding": (2, 0), "stride": (2, 1), "dilation": (1, 2)}, [(2, 2), (0, 0)]),
    (2, {"kernel_size": 3, "padding": 1, "groups": 2, "stride": 2}, [(1, 1)] * 2),
    (2, {"kernel_size": 3, "padding": "same", "groups": 2}, [(1, 1)] * 2),
    (2, {"kernel_size": 2, "padding": "same"}, [(0, 1)] * 2),
    (2, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, [(1, 1)] * 2),
    (2, {"kernel_size": (3, 5), "padding": (1, 2), "padding_mode": "replicate", "groups": 2}, [(1, 1), (2, 2)]),
    (2, {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}, [(1, 1)] * 2),
    (2, {"kernel_size": 3, "padding": 1, "grid_range": (50.0, 60.0)}, [(1, 1)] * 2),  # no function is non-zero at 0
    (1, {"kernel_size": 3, "padding": 2, "padding_mode": "circular", "groups": 2, "stride": 3}, [(2, 2)]),
    (1, {"kernel_size": 5, "padding": "same", "padding_mode": "reflect"}, [(2, 2)]),
    (1, {"kernel_size": 2, "padding": 3, "padding_mode": "replicate", "dilation": 4}, [(3, 3)]),
    (3, {"kernel_size": (3, 1, 2), "padding": (1, 0, 1)}, [(1, 1), (0, 0), (1, 1)]),
    (3, {"kernel_size": 2, "padding": "same", "groups": 2, "base_activation": None}, [(0, 1)] * 3),
    (3, {"kernel_size": (1, 3, 3), "padding": (0, 1, 2), "padding_mode": "reflect"}, [(0, 0), (1, 1), (2, 2)]),
    (3, {"kernel_size": 3, "padding": 1, "padding_mode": "replicate", "stride": (2, 1, 2)}, [(1, 1)] * 3),
    (
        3,
        {"kernel_size": (2, 3, 1), "padding": (1, 2, 0), "padding_mode": "circular", "dilation": (1, 2, 1)},
        [(1, 1), (2, 2), (0, 0)],
    ),
    (2, {"kernel_size": 3, "padding": 2, "basis": "gaussian", "dilation": 2}, [(2, 2)] * 2),
    (2, {"kernel_size": 3, "padding": 1, "basis": "chebyshev", "base_activation": None, "groups": 2}, [(1, 1)] * 2),
    (2, {"kernel_size": 3, "padding": 1, "outside": "linear", "grid_range": (0.5, 1.5)}, [(1, 1)] * 2),
]


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # of nn.Conv1d
@pytest.mark.parametrize(("dims", "settings", "pairs"), CASES)
def test_equals_the_formula_by_loops(dims: int, settings: dict[str, Any], pairs: list[tuple[int, int]]) -> None:
    layer = make(dims, 4, 2, **settings)
    x = image(2, 4, *(12, 7, 6)[:dims])
    for mapped in (False, True):
        if mapped:
            layer.set_input_map(*image(2, 4))
        expected = by_loops(layer, x, pairs)
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(layer._forward_plain(x), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(layer(x[0]), expected[0], rtol=0, atol=1e-12)
    ours = ("base_activation", "grid_range", "basis", "outside")
    twin = PLAIN[dims](4, 2, **{name: value for name, value in settings.items() if name not in ours})
    for name in ATTRIBUTES:
        assert getattr(layer, name) == getattr(twin, name)
    assert list(layer._reversed_padding_repeated_twice) == list(twin._reversed_padding_repeated_twice)
    assert layer(x).shape == twin(x.float()).shape


@pytest.mark.parametrize(
    ("dims", "settings"),
    [
        (1, {"kernel_size": 2, "stride": 2}),
        (2, {"kernel_size": 3, "padding": 1, "groups": 2}),
        (2, {"kernel_size": 2, "padding": 1, "padding_mode": "reflect", "base_activation": None}),
        (3, {"kernel_size": (1, 2, 1), "padding": (0, 1, 0), "bias": False, "stride": 2}),
    ],
)
def test_gradients(dims: int, settings: dict[str, Any]) -> None:
    layer = make(dims, 2, 2, grid_size=2, **settings)
    x = image(2, 2, *[3] * dims).requires_grad_()
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert gradcheck(function, (x, *parameters))
    assert gradgradcheck(function, (x, *parameters), fast_mode=True)


def test_keeps_no_features_for_the_gradient() -> None:
    layer = make(2, 2, 3, 3, padding=1)
    x = image(2, 2, 20, 20).requires_grad_()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(x)
    assert max(kept) <= max(x.numel(), layer.weight.numel())


@pytest.mark.filterwarnings("ignore:Converting a tensor")  # of the input checks, while tracing
@pytest.mark.filterwarnings("ignore:.*torch.jit")  # deprecated, and still asked for by users
def test_other_forms_agree() -> None:
    layer = make(2, 4, 2, 3, padding=1, groups=2)
    x = image(2, 4, 6, 5)
    expected = layer(x)
    torch.testing.assert_close(torch.jit.script(layer)(x), expected)
    torch.testing.assert_close(torch.jit.trace(layer, x)(x), expected)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), expected)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), expected)
    torch.testing.assert_close(torch.func.vmap(layer)(x), expected)


def test_autocast() -> None:
    exact = make(2, 8, 8, 3, padding=1)
    x = image(2, 8, 12, 12)
    layer = copy.deepcopy(exact).float()
    single = x.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(single)
    assert y.dtype == torch.bfloat16
    assert (y.double() - exact(x)).norm() < 0.01 * exact(x).norm()
    y.float().square().sum().backward()
    assert single.grad is not None
    (expected,) = torch.autograd.grad(exact(leaf := x.clone().requires_grad_()).square().sum(), leaf)
    assert (single.grad.double() - expected).norm() < 0.02 * expected.norm()


def test_edge_functions() -> None:
    layer = make(2, 2, 3, (1, 2), bias=False)
    t = torch.linspace(-2, 2, 5, dtype=torch.float64)
    curves = layer.edge_functions(t)
    assert curves.shape == (5, 3, 2, 1, 2)
    x = t[:, None, None, None].expand(-1, 2, 1, 2)
    torch.testing.assert_close(layer(x)[:, :, 0, 0], curves.sum((2, 3, 4)))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("mapped", [False, True])
def test_channels_last(dims: int, mapped: bool) -> None:
    layer = make(dims, 4, 2, 3, padding=1, groups=2)
    if mapped:
        layer.set_input_map(*image(2, 4))
    x = image(2, 4, *(6, 5, 4)[:dims])
    memory_format = {2: torch.channels_last, 3: torch.channels_last_3d}[dims]
    turned = x.to(memory_format=memory_format).requires_grad_()
    leaf = x.clone().requires_grad_()
    other = copy.deepcopy(layer).to(memory_format=memory_format)
    y, expected = other(turned), layer(leaf)
    torch.testing.assert_close(y, expected)
    found = torch.autograd.grad(y.sin().sum(), (turned, other.weight))
    wanted = torch.autograd.grad(expected.sin().sum(), (leaf, layer.weight))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_exports_with_dynamic_space() -> None:
    layer = make(2, 4, 2, 3, padding=1, groups=2)
    batch, height, width = torch.export.Dim("b", min=2), torch.export.Dim("h", min=4), torch.export.Dim("w", min=4)
    program = torch.export.export(layer, (image(2, 4, 6, 5),), dynamic_shapes=({0: batch, 2: height, 3: width},))
    x = image(3, 4, 9, 7)
    torch.testing.assert_close(program.module()(x), layer(x))


def test_copies_pickles_and_metadata() -> None:
    layer = make(2, 2, 3, 3, padding=1)
    x = image(1, 2, 5, 5)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    y = layer(MetaTensor(x, meta={"name": "scan"}))
    assert isinstance(y, MetaTensor)
    assert y.meta["name"] == "scan"
    torch.testing.assert_close(y.as_tensor(), layer(x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups": 3}, "`groups` must divide"),
        ({"padding": "full"}, "`padding` must be one of same, valid"),
        ({"padding": "same", "stride": 2}, "needs a stride of 1"),
        ({"padding": -1}, "`padding` must be at least 0"),
        ({"padding_mode": "zero"}, "Did you mean 'zeros'"),
        ({"stride": (1, 1, 1)}, "one integer or 2"),
        ({"dilation": 0}, "`dilation` must be at least 1"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KANConv2d(4, 4, 3, **settings)


def test_wrong_inputs() -> None:
    layer = make(2, 4, 4, 3)
    for shape in ((1, 3, 8, 8), (4, 8), (1, 1, 4, 8, 8)):
        with pytest.raises(ValueError, match=r"KANConv2d must have shape \(B, 4, 2 spatial axes\)"):
            layer(image(*shape))


@pytest.mark.parametrize("kernel_size", [2.5, (2.5, 3), True, (3, True), None])
def test_a_kernel_size_of_another_kind_is_refused(kernel_size: Any) -> None:
    with pytest.raises(TypeError, match="`kernel_size` must be an integer; got"):
        KANConv2d(2, 2, kernel_size)


def test_integers_of_numpy_are_sizes() -> None:
    assert KANConv2d(1, 1, np.array([3, 1]), padding=np.int64(1)).kernel_size == (3, 1)


@pytest.mark.parametrize("settings", [{"groups": 2}, {"stride": 2, "base_activation": None, "bias": False}])
@pytest.mark.parametrize("mapped", [False, True])
def test_features_made_sample_by_sample_give_the_same(
    settings: dict[str, Any], mapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = make(2, 4, 6, 3, padding=1, **settings)
    if mapped:
        layer.set_input_map(torch.linspace(0.5, 1.5, 4), torch.linspace(-0.2, 0.3, 4))
    x = image(5, 4, 7, 8)
    features_of_a_sample = layer.num_features * x[0].numel()
    found = []
    for samples in (5, 2, 0):  # parts of 5, of 2 2 1, and of 1
        monkeypatch.setattr(kan_features, "_CHUNK", samples * features_of_a_sample)
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        found.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *layer.parameters()])])
    for parts in found[1:]:
        torch.testing.assert_close(parts, found[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x[:1]), found[0][0][:1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("chunk", "calls"), [(1 << 30, [8, 8]), (1, [1] * 16)])
def test_a_step_holds_the_features_of_few_samples(
    chunk: int, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill = kan_features.FeatureMap.fill
    samples: list[int] = []

    def counted(features: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        samples.append(len(x))
        return fill(features, x, dtype)

    monkeypatch.setattr(kan_features, "_CHUNK", chunk)
    monkeypatch.setattr(kan_features.FeatureMap, "fill", counted)
    KANConv2d(8, 2, 3, padding=1)(torch.randn(8, 8, 6, 6)).sum().backward()
    assert samples == calls
