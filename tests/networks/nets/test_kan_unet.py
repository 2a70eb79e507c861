from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from torch import Tensor

from monai_deqkan.networks.layers import KANLayer
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
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
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
def test_scripts_and_exports() -> None:
    torch.manual_seed(0)
    net = KANUNet(2, 1, 2, features=(2, 3)).double().eval()
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
        ({"up": "deconv"}, "`up` must be one of interp, nearest"),
        ({"down": "stride"}, "`down` must be one of maxpool, avgpool"),
    ):
        with pytest.raises(ValueError, match=message):
            KANUNet(**{"spatial_dims": 2, "in_channels": 1, "out_channels": 2, **settings})  # type: ignore[arg-type]
