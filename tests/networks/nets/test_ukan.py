from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from monai.inferers import SlidingWindowInferer
from monai.losses import DeepSupervisionLoss, DiceCELoss

from monai_deqkan.networks.layers import InputStatistics
from monai_deqkan.networks.nets import UKAN

FEATURES = (2, 3, 4, 5, 6)


@pytest.mark.parametrize("dims", [2, 3])
def test_number_of_parameters(dims: int) -> None:
    f = FEATURES
    net = UKAN(dims, 3, 2, features=f, depths=(2, 1), num_layers=2, grid_size=3, spline_order=2)

    def double(inputs: int, middle: int, outputs: int) -> int:
        return 3**dims * (inputs * middle + middle * outputs) + 2 * (middle + outputs)

    encoder = sum(double(a, b, b) for a, b in pairwise((3, *f[:3])))
    embeddings = sum(3**dims * a * b + b for a, b in pairwise(f[2:]))
    decoder = sum(double(b, b, a) for a, b in pairwise(f)) + double(f[0], f[0], f[0])
    blocks = sum(count * 2 * (6 * width**2 + 3**dims * width) for count, width in ((2, f[3]), (1, f[4])))
    blocks += sum(count * 2 * (6 * width**2 + 3**dims * width) for count, width in ((1, f[3]), (2, f[2])))
    assert sum(p.numel() for p in net.parameters()) == encoder + embeddings + decoder + blocks + f[0] * 2 + 2


def test_default_has_about_the_papers_size() -> None:
    """The paper names 6.35 million; its normalizations have weights, and its splines a scale per edge."""
    assert abs(sum(p.numel() for p in UKAN(2, 3, 1).parameters()) / 6.35e6 - 1) < 0.1


def test_is_made_of_the_papers_steps() -> None:
    torch.manual_seed(0)
    net: Any = UKAN(2, 1, 2, features=(2, 3, 4), depths=(1,), num_layers=1).eval()
    x = torch.randn(1, 1, 19, 22)
    first = F.max_pool2d(net.encoder[0][0](x), 2)
    second = F.max_pool2d(net.encoder[1][0](first), 2)
    embedded = F.conv2d(second, net.encoder[2][0].weight, net.encoder[2][0].bias, stride=2, padding=1)

    def layer_norm(maps: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(maps.permute(0, 2, 3, 1), maps.shape[1:2]).permute(0, 3, 1, 2)

    z = net.encoder[2][2](layer_norm(embedded))
    z = F.interpolate(net.ups[0](z), size=second.shape[2:], mode="bilinear") + second
    z = net.decoder[0][1](layer_norm(z))
    z = F.interpolate(net.ups[1](z), size=first.shape[2:], mode="bilinear") + first
    expected = F.conv2d(F.interpolate(net.final(z), size=(19, 22), mode="bilinear"), net.head.weight, net.head.bias)
    torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize("dims", [2, 3])
def test_learns_and_stays_on_the_grid(dims: int) -> None:
    torch.manual_seed(0)
    net = UKAN(dims, 1, 2, features=FEATURES, num_layers=2)
    axis = torch.linspace(-1, 1, 24)
    radius = torch.stack(torch.meshgrid(*[axis] * dims, indexing="ij")).square().sum(0).sqrt()
    masks = torch.stack([radius < 0.5, radius < 0.8]).long()
    images = (masks + 0.3 * torch.randn(masks.shape))[:, None]
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(net(images), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())
    with InputStatistics(net) as statistics:
        net(images)
    assert max(inputs.outside for inputs in statistics.layers.values()) < 0.03
    other = UKAN(dims, 1, 2, features=FEATURES, num_layers=2)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.eval()(images), net.eval()(images))


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # deprecated, and still asked for by users
def test_sliding_window_scripts_and_exports() -> None:
    torch.manual_seed(0)
    net = UKAN(2, 1, 2, features=FEATURES, deep_supervision=True).double().eval()
    x = torch.randn(2, 1, 17, 40).double()
    torch.testing.assert_close(torch.jit.script(net)(x), net(x))
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), net(x))
    with torch.no_grad():
        windows = SlidingWindowInferer((17, 20), overlap=0.0)(x, net)
        torch.testing.assert_close(windows, torch.cat((net(x[..., :20]), net(x[..., 20:])), dim=3))


def test_deep_supervision() -> None:
    torch.manual_seed(0)
    net = UKAN(2, 1, 2, features=FEATURES, deep_supervision=True)
    x, label = torch.randn(2, 1, 32, 48), torch.randint(0, 2, (2, 1, 32, 48)).float()
    outputs = net(x)
    assert [tuple(y.shape[2:]) for y in outputs] == [(32, 48), (16, 24), (8, 12)]
    DeepSupervisionLoss(DiceCELoss(softmax=True, to_onehot_y=True))(outputs, label).backward()
    assert all(p.grad is not None for p in net.parameters())
    assert net.eval()(x).shape == (2, 2, 32, 48)


def test_wrong_use() -> None:
    with pytest.raises(ValueError, match=r"`x` must have shape \(B, 1, H, W\)"):
        UKAN(2, 1, 2, features=FEATURES)(torch.rand(1, 2, 32, 32))
    with pytest.raises(ValueError, match="at least 8 elements along each axis"):
        UKAN(2, 1, 2, features=FEATURES)(torch.rand(1, 1, 7, 32))
    for settings, message in (
        ({"spatial_dims": 1}, "spatial_dims"),
        ({"depths": ()}, "`depths` must have an entry"),
        ({"depths": (1, 1, 1, 1, 1)}, "fewer than `features`"),
        ({"features": (4, 0, 4)}, "`features` must be at least 1"),
        ({"num_supervised": 6}, "`num_supervised` must be at most 5"),
    ):
        with pytest.raises(ValueError, match=message):
            UKAN(**{"spatial_dims": 2, "in_channels": 1, "out_channels": 2, **settings})  # type: ignore[arg-type]
