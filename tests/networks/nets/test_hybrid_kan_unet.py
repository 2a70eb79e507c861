from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.losses import DeepSupervisionLoss, DiceCELoss
from monai.transforms import CropForeground
from torch import nn

from monai_deqkan.adjoints import UnrolledAdjoint
from monai_deqkan.networks import export_error, prepare_for_export
from monai_deqkan.networks.layers import KANLayer, frozen_weights
from monai_deqkan.networks.nets import UKAN, HybridKANUNet, KANUNet
from monai_deqkan.solvers import SOLVERS, SolveRecorder

FEATURES = (4, 6, 8)
BOTTLENECKS = ("tokens", "conv", "low_rank", "equilibrium", "none")


def discs(dims: int, size: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    axis = torch.linspace(-1, 1, size)
    radius = torch.stack(torch.meshgrid(*[axis] * dims, indexing="ij")).square().sum(0).sqrt()
    masks = torch.stack([radius < 0.5, radius < 0.8]).long()
    return (masks + 0.3 * torch.randn(masks.shape))[:, None], masks


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("bottleneck", BOTTLENECKS)
def test_learns(dims: int, bottleneck: str) -> None:
    torch.manual_seed(0)
    net = HybridKANUNet(dims, 1, 2, features=FEATURES, bottleneck=bottleneck, skip="kan_gate", rank=2)
    images, masks = discs(dims, 24 if dims == 2 else 12)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(net(images), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())
    other = HybridKANUNet(dims, 1, 2, features=FEATURES, bottleneck=bottleneck, skip="kan_gate", rank=2)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.eval()(images), net.eval()(images))


def test_is_made_of_its_parts() -> None:
    torch.manual_seed(0)
    net: Any = HybridKANUNet(2, 1, 2, features=FEATURES, bottleneck="none").eval()
    x = torch.randn(1, 1, 17, 22)
    fine = net.stem(x)
    middle = net.encoder[0](F.avg_pool2d(fine, 2))
    coarse = net.encoder[1](F.avg_pool2d(middle, 2))
    votes = net.first_vote(coarse)
    for index, skip in enumerate((middle, fine)):
        size = skip.shape[2:]
        coarse = net.decoder[index](skip + F.interpolate(net.ups[index](coarse), size=size, mode="bilinear"))
        votes = F.interpolate(votes, size=size, mode="bilinear") + net.votes[index](coarse)
    torch.testing.assert_close(net(x), votes)


def test_an_equilibrium_is_one() -> None:
    """The deepest map solves z = p + kappa KAN(z) / L, and the certificate says that only one map does."""
    torch.manual_seed(0)
    net: Any = HybridKANUNet(2, 1, 2, features=FEATURES, bottleneck="equilibrium", contraction=0.7).eval()
    norm, layer = net.bottleneck
    maps = norm(torch.randn(2, 8, 4, 5))
    with torch.no_grad(), SolveRecorder() as recorder:
        state = layer(maps)
    assert bool(recorder.converged().all())
    with torch.no_grad(), frozen_weights(layer.cell):
        far = torch.zeros_like(maps)
        for _ in range(80):
            far = layer.cell(far, maps)
    torch.testing.assert_close(state, far, rtol=1e-3, atol=1e-3)
    assert layer.cell.certified_contraction().factor <= 0.7 * (1 + 1e-5)


def test_kan_layers_stand_where_they_should() -> None:
    def names(**settings: Any) -> set[str]:
        net = HybridKANUNet(2, 1, 2, features=FEATURES, **settings)
        return {name.split(".")[0] for name, module in net.named_modules() if isinstance(module, KANLayer)}

    assert names() == {"bottleneck"}
    assert names(bottleneck="none", skip="kan_gate") == {"gates"}
    assert names(bottleneck="none") == set()


def test_options_reach_their_parts() -> None:
    def made(**settings: Any) -> Any:
        torch.manual_seed(0)
        return HybridKANUNet(2, 1, 2, features=FEATURES, **settings)

    gated = made(skip="kan_gate", bottleneck="conv", num_bottleneck=2, kan_settings={"grid_size": 7})
    bases: list[Any] = [module.basis for module in gated.modules() if isinstance(module, KANLayer)]
    assert {basis.grid_size for basis in bases} == {7}
    assert len(gated.bottleneck) == 2
    equilibrium = made(bottleneck="equilibrium", solver=("fixed_point_iteration", {"max_iter": 7}), adjoint="unrolled")
    layer = equilibrium.bottleneck[1]
    assert layer.solver.max_iter == 7
    assert isinstance(layer.solver, SOLVERS.get("fixed_point_iteration"))
    assert isinstance(layer.adjoint, UnrolledAdjoint)
    x = torch.randn(2, 1, 16, 16)
    other = made(norm="batch", act="relu")
    kinds = {type(module) for module in other.stem.modules()}
    assert {nn.BatchNorm2d, nn.ReLU} <= kinds
    dropped = made(dropout=0.9)
    assert not torch.equal(dropped(x), dropped(x))
    torch.testing.assert_close(made(dropout=0.9).eval()(x), made().eval()(x))


@pytest.mark.parametrize("network", [HybridKANUNet, KANUNet, UKAN])
def test_cropped_to_the_foreground_and_back(network: Any) -> None:
    """Sizes that automatic cropping leaves are no multiple of anything; the logits go back into the whole image."""
    torch.manual_seed(0)
    net = network(2, 1, 2, features=(4, 6, 8) if network is not UKAN else (4, 6, 8, 8)).eval()
    image = MetaTensor(torch.zeros(1, 70, 60))
    image[:, 11:54, 5:42] = torch.rand(1, 43, 37) + 0.1
    crop = CropForeground()
    cropped = crop(image)
    assert cropped.shape == (1, 43, 37)
    with torch.no_grad():
        logits = SlidingWindowInferer((32, 32), overlap=0.25)(cropped[None], net)[0]
    logits.applied_operations = cropped.applied_operations
    assert crop.inverse(logits).shape == (2, 70, 60)


def test_deep_supervision() -> None:
    torch.manual_seed(0)
    net = HybridKANUNet(2, 1, 2, features=FEATURES, deep_supervision=True)
    x, label = torch.randn(2, 1, 32, 48), torch.randint(0, 2, (2, 1, 32, 48)).float()
    outputs = net(x)
    assert [tuple(y.shape[2:]) for y in outputs] == [(32, 48), (16, 24)]
    DeepSupervisionLoss(DiceCELoss(softmax=True, to_onehot_y=True))(outputs, label).backward()
    assert all(p.grad is not None for p in net.parameters())
    assert net.eval()(x).shape == (2, 2, 32, 48)


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # deprecated, and still asked for by users
@pytest.mark.parametrize("bottleneck", ["tokens", "equilibrium"])
def test_sliding_window_scripts_and_exports(bottleneck: str) -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"features": FEATURES, "bottleneck": bottleneck, "skip": "kan_gate"}
    net: nn.Module = HybridKANUNet(2, 1, 2, deep_supervision=True, **settings).eval()
    x = torch.randn(2, 1, 17, 40)
    with torch.no_grad():
        windows = SlidingWindowInferer((17, 20), overlap=0.0)(x, net)
        torch.testing.assert_close(
            windows, torch.cat((net(x[..., :20]), net(x[..., 20:])), dim=3), rtol=1e-3, atol=1e-3
        )
    plain = prepare_for_export(net) if bottleneck == "equilibrium" else net
    for form in (torch.jit.script(plain), torch.export.export(plain, (x,)).module()):
        assert export_error(net, form, x) < 1e-4


def test_one_element_on_the_deepest_map_does_without_instance_normalization() -> None:
    net = HybridKANUNet(2, 1, 2, features=FEATURES, norm="batch")
    assert net(torch.rand(2, 1, 4, 4)).shape == (2, 2, 4, 4)
    assert net.eval()(torch.rand(1, 1, 4, 4)).shape == (1, 2, 4, 4)
    with pytest.raises(ValueError, match="8 along one, to normalize"):
        net.train()(torch.rand(1, 1, 4, 4))


def test_wrong_use() -> None:
    with pytest.raises(ValueError, match=r"`x` must have shape \(B, 1, H, W\)"):
        HybridKANUNet(2, 1, 2, features=FEATURES)(torch.rand(1, 2, 32, 32))
    with pytest.raises(ValueError, match="at least 4 elements along each axis and 8 along one"):
        HybridKANUNet(2, 1, 2, features=FEATURES)(torch.rand(1, 1, 7, 4))
    with pytest.raises(TypeError, match=r"floating-point numbers; got torch.uint8"):
        HybridKANUNet(2, 1, 2, features=FEATURES)(torch.zeros(1, 1, 16, 16, dtype=torch.uint8))
    for settings, message in (
        ({"spatial_dims": 1}, "spatial_dims"),
        ({"features": (4,)}, "at least two levels"),
        ({"bottleneck": "kan"}, "`bottleneck`"),
        ({"bottleneck": "equilibrium", "num_bottleneck": 2}, "must be 1; got 2"),
        ({"skip": "gate"}, "`skip`"),
        ({"contraction": 1.5}, "`contraction`"),
        ({"bottleneck": "none", "kan_settings": {"grid_size": 3}}, "there are none"),
        ({"dropout": 1.0}, "`dropout`"),
    ):
        with pytest.raises(ValueError, match=message):
            HybridKANUNet(**{"spatial_dims": 2, "in_channels": 1, "out_channels": 2, **settings})  # type: ignore[arg-type]
