from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from monai.networks.layers import Act
from monai.networks.nets import SegResNet, UNet

from monai_deqkan.networks.layers import KANActivation


def x(*shape: int) -> torch.Tensor:
    return 1.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_starts_as_silu() -> None:
    data = x(2, 3, 7, 5)
    for act in (KANActivation(), KANActivation(3)):
        torch.testing.assert_close(act(data), F.silu(data))
    inside = data.clamp(-3, 3)
    torch.testing.assert_close(KANActivation(3, base_activation=None)(inside), F.silu(inside), rtol=0, atol=5e-3)


def test_each_channel_has_its_function() -> None:
    act = KANActivation(3)
    torch.manual_seed(0)
    torch.nn.init.normal_(act.functions.weight)
    data = x(2, 3, 6)
    y = act(data)
    for c in range(3):
        values = act.functions.basis.values(data[:, c])
        expected = torch.tensordot(act.functions.coefficients[c, :, 0, 0], values, dims=1)
        expected = expected + act.functions.base_weight[c, 0, 0] * F.silu(data[:, c])  # type: ignore[index]
        torch.testing.assert_close(y[:, c], expected)
    torch.testing.assert_close(act(data[..., 0]), y[..., 0])
    shared = KANActivation()
    shared.functions.weight.data.copy_(act.functions.weight[:1])
    torch.testing.assert_close(shared(data[:, 0]), y[:, 0])


def test_learns_a_function() -> None:
    act = KANActivation()
    data = torch.linspace(-2.5, 2.5, 200)
    optimizer = torch.optim.Adam(act.parameters(), lr=0.1)
    for _ in range(100):
        loss = (act(data) - torch.sin(2 * data)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.02


@pytest.mark.parametrize("dims", [2, 3])
def test_in_monai_networks(dims: int) -> None:
    if "KAN" not in Act.names:
        Act.add_factory_class("kan", KANActivation)
    torch.manual_seed(0)
    data = x(1, 1, *[16] * dims)
    unet = UNet(dims, 1, 2, channels=(4, 8), strides=(2,), act=("kan", {"grid_size": 4}), norm="instance")
    segresnet = SegResNet(dims, init_filters=8, blocks_down=(1, 1), blocks_up=(1,), act="kan")
    for net in (unet, segresnet):
        acts = [module for module in net.modules() if isinstance(module, KANActivation)]
        assert acts
        net(data).square().mean().backward()
        assert all(act.functions.weight.grad.abs().max() > 0 for act in acts)  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # deprecated, and still asked for by users
def test_scripts() -> None:
    data = x(2, 3, 4)
    for act in (KANActivation(), KANActivation(3)):
        torch.testing.assert_close(torch.jit.script(act)(data), act(data))


def test_wrong_use() -> None:
    with pytest.raises(ValueError, match="as many channels on axis 1"):
        KANActivation(3)(x(2, 4, 4))
    with pytest.raises(ValueError, match="`num_parameters` must be at least 1"):
        KANActivation(0)
    with pytest.raises(TypeError, match="inplace"):
        KANActivation(inplace=True)  # type: ignore[call-arg]
