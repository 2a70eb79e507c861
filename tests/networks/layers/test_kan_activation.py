from __future__ import annotations

import pickle

import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.networks.layers import Act
from monai.networks.nets import SegResNet, UNet

from monai_deqkan.networks.layers import BASES, KANActivation


def x(*shape: int) -> torch.Tensor:
    return 1.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_starts_as_silu() -> None:
    data = x(2, 3, 7, 5)
    for act in (KANActivation(), KANActivation(3)):
        torch.testing.assert_close(act(data), F.silu(data))
    inside = data.clamp(-3, 3)
    torch.testing.assert_close(KANActivation(3, base_activation=None)(inside), F.silu(inside), rtol=0, atol=5e-3)
    for name in BASES.names():
        act = KANActivation(basis=name)
        torch.testing.assert_close(act(data), F.silu(data))


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


def gradients(y: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    weight = torch.linspace(-1.0, 1.0, y.numel(), dtype=y.dtype).reshape(y.shape)
    return [y.detach(), *torch.autograd.grad(y, inputs, weight)]


@pytest.mark.parametrize("outside", ["zero", "clamp", "linear"])
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_pieces_equal_the_sum_of_splines(order: int, outside: str) -> None:
    act = KANActivation(3, spline_order=order, outside=outside, grid_size=4, grid_range=(-1.0, 2.5)).double()
    torch.manual_seed(0)
    torch.nn.init.normal_(act.functions.weight)
    knots = torch.linspace(-1.0, 2.5, 5)[None, None].expand(1, 3, -1).double()
    for data in (2 * x(2, 3, 500).double(), 1e6 * x(1, 3, 9).double(), knots[..., 1:-1]):
        leaf = data.clone().requires_grad_()
        inputs = (leaf, act.functions.weight)
        plain = gradients(act.functions._forward_plain(leaf), inputs)
        for name, found, expected in zip("yxw", gradients(act(leaf), inputs), plain, strict=True):
            if order > 1 or name != "x" or data.shape[-1] != 3:  # the hats' kinks have two slopes
                torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_keeps_the_input_only_and_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    act = KANActivation(3)
    torch.manual_seed(0)
    torch.nn.init.normal_(act.functions.weight)
    data = x(2, 3, 40, 30).requires_grad_()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        y = act(data)
    assert max(kept) <= data.numel()
    inputs = (data, act.functions.weight)
    whole = gradients(y, inputs)
    monkeypatch.setattr("monai_deqkan.networks.layers.basis._BLOCK", 777)
    for found, expected in zip(gradients(act(data), inputs), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    exact = KANActivation(3).double()
    exact.load_state_dict(act.state_dict())
    wide = data.detach().double().requires_grad_()
    for found, expected in zip(whole, gradients(exact(wide), (wide, exact.functions.weight)), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_nan_stays_where_it_is() -> None:
    data = x(1, 3, 8)
    data[0, 1, 2] = torch.nan
    expected = F.silu(data)
    torch.testing.assert_close(KANActivation(3)(data), expected, equal_nan=True)


def test_hooks_and_metadata() -> None:
    act, data = KANActivation(3), x(1, 3, 8)
    seen: list[torch.Tensor] = []
    act.functions.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    y = act(MetaTensor(data, meta={"name": "scan"}))
    assert isinstance(y, MetaTensor)
    assert y.meta["name"] == "scan"
    torch.testing.assert_close(seen[0].reshape(data.shape), data)
    torch.testing.assert_close(pickle.loads(pickle.dumps(KANActivation(3)))(data), y.as_tensor())


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


@pytest.mark.parametrize("num_parameters", [1, 3])
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 5), (2, 3, 0)])
def test_empty_inputs(num_parameters: int, shape: tuple[int, ...]) -> None:
    act = KANActivation(num_parameters)
    x = torch.zeros(shape, requires_grad=True)
    y = act(x)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape
    assert torch.equal(act.functions.weight.grad, torch.zeros_like(act.functions.weight))
