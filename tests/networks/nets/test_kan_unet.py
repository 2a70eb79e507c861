from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.losses import DeepSupervisionLoss, DiceCELoss
from torch import Tensor

from monai_deqkan.networks.layers import BSplineBasis, InputStatistics, KANLayer, refit_grids
from monai_deqkan.networks.nets import KANUNet


def disks(dims: int, size: int = 16) -> tuple[Tensor, Tensor]:
    """Return noisy images of bright balls, and their masks."""
    axis = torch.linspace(-1, 1, size)
    radius = torch.stack(torch.meshgrid(*[axis] * dims, indexing="ij")).square().sum(0).sqrt()
    masks = torch.stack([radius < 0.4, radius < 0.7]).long()
    noise = torch.randn(masks.shape, generator=torch.Generator().manual_seed(0))
    return (masks + 0.3 * noise)[:, None], masks


@pytest.mark.parametrize("dims", [2, 3])
def test_learns_a_tiny_segmentation(dims: int) -> None:
    torch.manual_seed(0)
    net = KANUNet(dims, 1, 2, features=(4, 8))
    images, masks = disks(dims, 16 if dims == 2 else 8)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.002)
    losses = []
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(net(images), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name
    other = KANUNet(dims, 1, 2, features=(4, 8))
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(images), net(images))
    assert torch.equal(copy.deepcopy(net)(images), net(images))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("settings", [{}, {"base_activation": "silu", "grid_size": 3, "spline_order": 2}])
def test_number_of_parameters(dims: int, settings: dict[str, Any]) -> None:
    f = (3, 5, 6, 7)
    net = KANUNet(dims, 2, 4, features=f, **settings)
    functions = settings.get("grid_size", 5) + settings.get("spline_order", 3) + ("base_activation" in settings)
    kernels = 2 * f[0] + f[0] ** 2 + sum(a * b + b**2 for a, b in pairwise(f))
    kernels += sum(a * b + 3 * a**2 for a, b in pairwise(f))
    expected = functions * (3**dims * kernels + f[0] * 4)
    assert sum(p.numel() for p in net.parameters()) == expected


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("num_convs", [1, 3])
def test_number_of_parameters_with_transposed_convolutions(dims: int, num_convs: int) -> None:
    f = (3, 5, 6)
    net = KANUNet(dims, 2, 4, features=f, up="transposed", down="strided", stem_stride=2, num_convs=num_convs)
    kernels = 2 * f[0] + sum(a * b for a, b in pairwise(f)) + (num_convs - 1) * sum(a**2 for a in f)
    kernels += sum((num_convs + 1) * a**2 for a in f[:-1])
    expected = 8 * (3**dims * kernels + 2**dims * sum(a * b for a, b in pairwise(f)) + f[0] * 4)
    assert sum(p.numel() for p in net.parameters()) == expected


@pytest.mark.parametrize("settings", [{}, {"rank": 2}, {"up": "transposed", "norm": ("group", {"num_groups": 2})}])
def test_initial_scale_changes_the_weights_but_not_the_function(settings: dict[str, Any]) -> None:
    nets = []
    for scale in (1.0, 0.05):
        torch.manual_seed(0)
        nets.append(KANUNet(2, 1, 2, features=(4, 6), init_scale=scale, **settings).double())
    ratios = [
        (small.abs().sum() / large.abs().sum()).item()
        for large, small in zip(*(net.parameters() for net in nets), strict=True)
    ]
    assert max(ratios) < (0.05 if "rank" not in settings else 0.5) * (1 + 1e-6)
    x = torch.randn(2, 1, 16, 16).double()
    for module in (module for net in nets for module in net.modules() if hasattr(module, "eps")):
        module.eps = 1e-12  # else it weighs more beside the small weights' outputs
    torch.testing.assert_close(nets[1](x), nets[0](x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="`init_scale` needs a normalization"):
        KANUNet(2, 1, 2, norm=None, init_scale=0.05)


def test_defaults_are_the_km_unet() -> None:
    net = KANUNet(spatial_dims=2, in_channels=1, out_channels=2)
    assert sum(p.numel() for p in net.parameters()) == 4_277_632
    layers = [module for module in net.modules() if isinstance(module, KANLayer)]
    assert len(layers) == 8 + 3 + 6 + 1
    assert all(layer.bias is None and layer.base_weight is None for layer in layers)
    assert all(layer.basis.grid_range == (-3.0, 3.0) for layer in layers)  # type: ignore[attr-defined]


@pytest.mark.parametrize("up", ["interp", "nearest"])
def test_sizes_down_to_the_minimum(up: str) -> None:
    torch.manual_seed(0)
    net = KANUNet(2, 1, 3, features=(2, 3, 4), up=up, down="avgpool").double()
    for size in ((4, 8), (7, 9), (11, 13), (12, 16)):
        x = torch.randn(1, 1, *size, dtype=torch.float64)
        y = net(x)
        assert y.shape == (1, 3, *size)
        assert y.std() > 0
        # a sample does not depend on its batch mates, nor on the image's offset
        both = net(torch.cat((x, torch.randn_like(x))))[:1]
        torch.testing.assert_close(both, y)
        torch.testing.assert_close(net(x - 3), y)
    for size in ((3, 16), (4, 7)):
        with pytest.raises(ValueError, match=r"at least 4 elements along each axis and, with normalization, 8"):
            net(torch.randn(1, 1, *size).double())
    assert torch.isfinite(KANUNet(2, 1, 3, features=(2, 3, 4), norm=None)(torch.randn(1, 1, 4, 4))).all()


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {"down": "strided", "up": "transposed", "stem_stride": 2, "num_convs": 1, "grid_size": 2, "spline_order": 2},
        {"down": "strided", "norm": ("group", {"num_groups": 2}), "basis": "gaussian", "base_activation": "silu"},
        {"up": "transposed", "norm": "batch", "rank": 3, "bias": True},
        {"stem_stride": 2, "norm": None, "outside": "linear", "init": "identity", "up": "nearest"},
    ],
)
def test_options_at_any_size(dims: int, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = KANUNet(dims, 2, 3, features=(2, 3, 4), **settings).double().eval()
    for size in ((9, 14, 11), (16, 8, 12)):
        x = torch.randn(1, 2, *size[:dims], dtype=torch.float64)
        y = net(x)
        assert y.shape == (1, 3, *size[:dims])
        assert y.std() > 0
        torch.testing.assert_close(net(torch.cat((x, torch.randn_like(x))))[:1], y)
    net.train()(torch.randn(2, 2, *size[:dims]).double()).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_options_reach_the_layers() -> None:
    net = KANUNet(
        2, 1, 2, features=(2, 3), basis="bspline", outside="linear", init="zero_spline", base_activation="silu"
    )
    layers = [module for module in net.modules() if isinstance(module, KANLayer)]
    assert all(layer.basis == BSplineBasis(outside="linear") and not layer.coefficients.any() for layer in layers)
    strides = [layer.stride for layer in KANUNet(2, 1, 2, features=(2, 3), down="strided", stem_stride=2).modules()
               if isinstance(layer, KANLayer)]  # fmt: skip
    assert strides == [(2, 2), (1, 1), (2, 2), (1, 1), (1, 1), (1, 1), (1, 1), (1, 1)]


def test_smallest_sizes() -> None:
    torch.manual_seed(0)
    for settings, small, large in (
        ({}, 4, 8),
        ({"stem_stride": 2}, 7, 15),
        ({"down": "strided"}, 1, 5),
        ({"down": "strided", "stem_stride": 2}, 1, 9),
    ):
        net = KANUNet(2, 1, 2, features=(2, 3, 4), **settings)  # type: ignore[arg-type]
        assert (net.min_size, net.min_longest) == (small, large)
        assert torch.isfinite(net(torch.randn(1, 1, small, large))).all()
        for size in ((max(small - 1, 1), large - 1), (small, large - 1)):
            with pytest.raises(ValueError, match="along each axis"):
                net(torch.randn(1, 1, *size))


@pytest.mark.parametrize(("norm", "in_evaluation"), [("batch", True), (("group", {"num_groups": 4}), False)])
def test_one_pixel_of_one_image_is_not_normalized(norm: Any, in_evaluation: bool) -> None:
    net = KANUNet(2, 1, 2, features=(4, 4, 4), norm=norm, down="strided")
    x = torch.randn(1, 1, 3, 3)  # one element at the bottom
    assert net(x.repeat(2, 1, 1, 1)).shape == (2, 2, 3, 3)
    with pytest.raises(ValueError, match="with normalization, 5 along one"):
        net(x)
    net.eval()
    if in_evaluation:
        assert net(x).shape == (1, 2, 3, 3)
    with pytest.raises(TypeError, match="floating-point"):
        net(x.long())


def test_half_resolution_is_interpolated() -> None:
    torch.manual_seed(0)
    net = KANUNet(2, 1, 2, features=(3,), stem_stride=2)
    x = torch.randn(1, 1, 12, 9)
    coarse = net.head(net.stem(x))
    assert coarse.shape[2:] == (6, 5)
    expected = torch.nn.functional.interpolate(
        coarse / net.init_scale, size=(12, 9), mode="bilinear", align_corners=False
    )
    torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize("norm", ["instance", "batch", ("group", {"num_groups": 2}), None])
def test_inputs_stay_on_the_grid(norm: Any) -> None:
    """At initialization and after training; without a normalization after a refit of the grids."""
    torch.manual_seed(0)
    net = KANUNet(2, 1, 2, features=(4, 8), norm=norm, up="transposed", outside="linear")
    images, masks = disks(2)
    images = (images - images.mean()) / images.std()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01 if norm is None else 0.001)
    for steps in (0, 30):
        for _ in range(steps):
            loss = torch.nn.functional.cross_entropy(net(images), masks)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if norm is None and steps:
            assert max(refit.outside_before for refit in refit_grids(net, [images])) > 0.1
        with InputStatistics(net) as statistics:
            net(images)
        outside = max(inputs.outside for inputs in statistics.layers.values())
        print(f"norm {norm}: after {steps} steps at most {100 * outside:.1f} % outside")
        assert outside < (0.03 if norm else 0.06)


@pytest.mark.parametrize("stem_stride", [1, 2])
def test_deep_supervision(stem_stride: int) -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"features": (2, 3, 4, 5), "stem_stride": stem_stride}
    net = KANUNet(2, 1, 2, deep_supervision=True, num_supervised=2, **settings)
    x, label = torch.randn(2, 1, 40, 16), torch.randint(0, 2, (2, 1, 40, 16)).float()
    outputs = net(x)
    sizes = [(40, 16), (20 // stem_stride, 8 // stem_stride)]
    assert [tuple(y.shape) for y in outputs] == [(2, 2, *size) for size in sizes]
    DeepSupervisionLoss(DiceCELoss(softmax=True, to_onehot_y=True))(outputs, label).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())
    single = net.eval()(x)
    torch.testing.assert_close(single, outputs[0])
    plain = KANUNet(2, 1, 2, **settings)
    plain.load_state_dict({key: value for key, value in net.state_dict().items() if "coarse_heads" not in key})
    torch.testing.assert_close(plain(x), single)
    assert len(KANUNet(2, 1, 2, deep_supervision=True, **settings)(x)) == 3


@pytest.mark.parametrize("up", ["interp", "transposed"])
def test_checkpointing_changes_nothing_but_memory(up: str) -> None:
    torch.manual_seed(0)
    nets = [KANUNet(2, 1, 2, features=(2, 3), checkpointing=on, up=up, dropout=0.2) for on in (False, True)]
    nets[1].load_state_dict(nets[0].state_dict())
    x = torch.randn(2, 1, 16, 12)
    kept: list[int] = [0, 0]
    results = []
    for i, net in enumerate(nets):
        torch.manual_seed(1)

        def count(tensor: Tensor, i: int = i) -> Tensor:
            kept[i] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            y = net(x)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in net.parameters())])
    torch.testing.assert_close(results[1], results[0])
    assert kept[1] < 0.6 * kept[0]


def test_sliding_window_and_metadata() -> None:
    torch.manual_seed(0)
    net = KANUNet(2, 1, 2, features=(2, 4)).eval()
    x = MetaTensor(torch.randn(1, 1, 20, 16), meta={"name": "scan"})
    with torch.no_grad():
        y = net(x)
        assert y.meta["name"] == "scan"
        windows = SlidingWindowInferer((10, 16), overlap=0.0)(x, net)
        halves = torch.cat((net(x[:, :, :10]), net(x[:, :, 10:])), dim=2)
    torch.testing.assert_close(windows.as_tensor(), halves.as_tensor())


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # deprecated, and still asked for by users
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"up": "transposed", "down": "strided", "stem_stride": 2, "rank": 2, "num_convs": 1},
        {"deep_supervision": True, "checkpointing": True, "norm": "batch", "outside": "linear"},
    ],
)
def test_scripts_and_exports(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = KANUNet(2, 1, 2, features=(2, 3), **settings).double().eval()
    x = torch.randn(2, 1, 17, 19).double()
    torch.testing.assert_close(torch.jit.script(net)(x), net(x))
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), net(x))


def test_wrong_use() -> None:
    net = KANUNet(2, 1, 2, features=(2, 3))
    for shape in ((1, 2, 16, 16), (1, 16, 16), (1, 1, 16, 16, 16)):
        with pytest.raises(ValueError, match=r"`x` must have shape \(B, 1, H, W\)"):
            net(torch.rand(shape))
    for settings, message in (
        ({"spatial_dims": 1}, "spatial_dims"),
        ({"features": ()}, "at least one level"),
        ({"features": (4, 0)}, "`features` must be at least 1"),
        ({"up": "deconv"}, "`up` must be one of interp, nearest, transposed"),
        ({"down": "stride"}, "`down` must be one of maxpool, avgpool, strided"),
        ({"num_convs": 0}, "num_convs"),
        ({"stem_stride": 3}, "`stem_stride` must be 1 or 2"),
        ({"num_supervised": 4}, "`num_supervised` must be at most 3"),
        ({"norm": "layer"}, "`norm` must be one of"),
        ({"rank": 2, "init": "identity"}, "`init` must be one of variance, zero_spline"),
    ):
        with pytest.raises(ValueError, match=message):
            KANUNet(**{"spatial_dims": 2, "in_channels": 1, "out_channels": 2, **settings})  # type: ignore[arg-type]
