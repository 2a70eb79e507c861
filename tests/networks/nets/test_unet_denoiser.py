from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from monai_deqkan.networks.nets import DnCNN, UNetDenoiser


def small(spatial_dims: int = 2, **settings: object) -> UNetDenoiser:
    torch.manual_seed(0)
    return UNetDenoiser(spatial_dims, **{"features": (4, 6, 8), "num_blocks": 1, **settings})


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("blind", [False, True])
def test_homogeneous_in_image_and_noise_level(spatial_dims: int, blind: bool) -> None:
    net = small(spatial_dims, blind=blind).double()
    for parameter in net.parameters():  # not the small weights of the start
        torch.nn.init.normal_(parameter, std=0.2)
    x = rows(2, 2, *(9, 10, 5)[:spatial_dims])
    level = None if blind else torch.tensor([0.1, 0.5], dtype=torch.float64)
    with torch.no_grad():
        expected = net(x, level)
        assert float((expected - x).abs().max()) > 0.1
        for scale in (1e-6, 3.0, 1e5):
            scaled = net(scale * x, None if level is None else scale * level)
            torch.testing.assert_close(scaled, scale * expected, rtol=1e-9, atol=1e-9 * scale)


def test_noise_level_matters_and_may_differ_per_sample() -> None:
    net, x = small().double(), rows(3, 2, 8, 8)
    with torch.no_grad():
        together = net(x, torch.tensor([0.1, 0.2, 0.3]))
        for index, level in enumerate((0.1, 0.2, 0.3)):
            alone = net(x[index : index + 1], level)
            torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(net(x, 0.2), net(x, torch.tensor([0.2])), rtol=1e-6, atol=1e-8)
        assert float((net(x, 0.1) - net(x, 0.3)).abs().max()) > 1e-4


@pytest.mark.parametrize("shape", [(8, 12), (7, 9), (5, 6, 7), (1, 3)])
def test_any_size_is_that_of_the_repeated_border(shape: tuple[int, ...]) -> None:
    net, x = small(len(shape), blind=True).double(), rows(1, 2, *shape)
    padded = x
    for axis, size in enumerate(shape, start=2):  # repeats the last row, one axis after another
        last = padded.narrow(axis, size - 1, 1)
        padded = torch.cat([padded, *[last] * (-size % 4)], dim=axis)
    with torch.no_grad():
        inside = net(padded)[(..., *map(slice, shape))]
        torch.testing.assert_close(net(x), inside)


def test_two_levels_by_hand() -> None:
    net, x = small(features=(3, 5), blind=True).double(), rows(1, 2, 6, 8)

    def block(part: torch.nn.Module, image: torch.Tensor) -> torch.Tensor:
        hidden = F.conv2d(image, part.first.weight, padding=1).clamp_min(0)
        return image + F.conv2d(hidden, part.second.weight, padding=1)

    with torch.no_grad():
        fine = block(net.down[0].blocks[0], F.conv2d(x, net.head.weight, padding=1))
        coarse = block(net.bottom[0], F.conv2d(fine, net.down[0].shrink.weight, stride=2))
        joined = F.conv_transpose2d(coarse, net.up[0].grow.weight, stride=2) + fine
        noise = F.conv2d(block(net.up[0].blocks[0], joined), net.tail.weight, padding=1)
        torch.testing.assert_close(net(x), x - noise)


def test_size_of_the_default_and_no_biases() -> None:
    net, rival = UNetDenoiser(2), DnCNN(2, 2, 2)
    counts = [sum(parameter.numel() for parameter in network.parameters()) for network in (net, rival)]
    assert 0.85 * counts[1] < counts[0] <= counts[1]
    assert all(name.endswith("weight") for name, _ in net.named_parameters())


def test_starts_near_the_identity_and_learns_to_denoise() -> None:
    net = small(features=(8, 16))
    clean = torch.zeros(8, 2, 16, 16)
    clean[:, :, 4:12, 5:11] = 1.0
    generator = torch.Generator().manual_seed(0)
    x = clean + 0.3 * torch.randn(clean.shape, generator=generator)
    with torch.no_grad():
        assert float((net(x, 0.3) - x).norm() / x.norm()) < 0.5
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        level = 0.1 + 0.4 * torch.rand(8, generator=generator)
        noisy = clean + level.view(-1, 1, 1, 1) * torch.randn(clean.shape, generator=generator)
        loss = (net(noisy, level) - clean).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) / 5 < 0.4 * 0.103  # the noise has variance 0.103 in the mean
    assert all(torch.isfinite(parameter.grad).all() and parameter.grad.any() for parameter in net.parameters())


def test_export_and_reload(tmp_path) -> None:
    net, x = small().eval(), rows(1, 2, 9, 8).float()
    level = torch.tensor([0.2])
    exported = torch.export.export(net, (x, level)).module()
    torch.testing.assert_close(exported(x, 2 * level), net(x, 2 * level))
    torch.save(net.state_dict(), tmp_path / "net.pt")
    other = UNetDenoiser(2, features=(4, 6, 8), num_blocks=1)
    assert not torch.equal(other(x, level), net(x, level))
    other.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    assert torch.equal(other(x, level), net(x, level))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"spatial_dims": 1}, "spatial_dims"),
        ({"features": (8,)}, "at least two levels"),
        ({"features": 8}, "at least two levels"),
        ({"features": (8, 0)}, "features"),
        ({"num_blocks": 0}, "num_blocks"),
        ({"channels": 0}, "channels"),
    ],
)
def test_wrong_settings(settings: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        small(**settings)


def test_wrong_inputs_are_named() -> None:
    x = torch.randn(1, 2, 8, 8)
    with pytest.raises(ValueError, match="must be told the `noise_level`"):
        small()(x)
    with pytest.raises(ValueError, match="blind"):
        small(blind=True)(x, 0.1)
    with pytest.raises(ValueError, match=r"one per sample; got \(2,\)"):
        small()(x, torch.tensor([0.1, 0.2]))
    with pytest.raises(ValueError, match="`image` must have shape"):
        small()(x[0], 0.1)
    with pytest.raises(ValueError, match="`image` must have shape"):
        small()(x[:, :1], 0.1)
