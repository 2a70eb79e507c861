"""``to_kan`` and ``kan_convolutions``: against the layers that they replace, and on MONAI's networks."""

from __future__ import annotations

import asyncio
import copy
import importlib.util
import sys
import threading
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from monai.networks.layers.factories import Act, Conv
from monai.networks.nets import DenseNet, ResNet, UNet
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import monai_deqkan  # noqa: F401, registers the factories
from monai_deqkan.networks import KANReplacement, kan_convolutions, to_kan
from monai_deqkan.networks.layers import (
    BSplineBasis,
    KANActivation,
    KANConv1d,
    KANConv2d,
    KANConv3d,
    KANLinear,
)


def table_script() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "table_monai_networks.py"
    spec = importlib.util.spec_from_file_location("table_monai_networks", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


TABLE = table_script()


def small_unet(**words: Any) -> UNet:
    torch.manual_seed(0)
    return UNet(spatial_dims=2, in_channels=1, out_channels=2, channels=(4, 8), strides=(2,), **words)


def kan_layers(network: nn.Module) -> list[nn.Module]:
    return [m for m in network.modules() if isinstance(m, (KANConv1d, KANConv2d, KANConv3d, KANLinear))]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("base_activation", ["silu", None])
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv1d(2, 3, 5, padding="same", dilation=2),
        nn.Conv1d(2, 3, 4, padding="same", bias=False),
        nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 0), groups=2),
        nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect", dtype=torch.float64),
        nn.Conv2d(2, 3, 3, padding="valid"),
        nn.Conv2d(3, 3, 3, padding=2, padding_mode="circular", groups=3),
        nn.Conv3d(1, 2, 3, stride=2, padding=1, padding_mode="replicate"),
    ],
    ids=str,
)
def test_imitates_convolutions_on_and_off_the_grid(conv: nn.Module, base_activation: str | None) -> None:
    torch.manual_seed(0)
    x = 20.0 * torch.randn(2, conv.in_channels, *[9] * (conv.weight.dim() - 2), dtype=conv.weight.dtype)
    kan = to_kan(conv, base_activation=base_activation)
    assert type(kan).__name__ == f"KAN{type(conv).__name__}"
    # off the grid a line is the difference of two: about as many roundings as steps, 20 / 3
    torch.testing.assert_close(kan(x), conv(x), rtol=1e-4, atol=2e-5 * float(x.abs().max()))


@pytest.mark.parametrize("spline_order", [1, 2, 3])
def test_a_line_is_exact_for_every_order(spline_order: int) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(3, 2, dtype=torch.float64), torch.randn(50, 3, dtype=torch.float64)
    kan = to_kan(linear, linears=True, spline_order=spline_order, grid_size=7, grid_range=(-1.0, 2.0))
    torch.testing.assert_close(kan(x), linear(x), rtol=1e-9, atol=1e-9)


def with_statistics(network: nn.Module) -> nn.Module:
    """Give its batch normalizations the statistics that training would have left."""
    network.train()
    with torch.no_grad():
        for _ in range(20):
            network(torch.randn(4, 1, 32, 32))
    return network.eval()


@pytest.mark.parametrize("name", ["UNet", "ResNet", "DenseNet"])
def test_a_trained_network_keeps_its_outputs(name: str) -> None:
    torch.manual_seed(0)
    words = {"spatial_dims": 2}
    network = {
        "UNet": lambda: UNet(
            in_channels=1, out_channels=2, channels=(8, 16, 32), strides=(2, 2), norm="batch", **words
        ),
        "ResNet": lambda: ResNet("basic", [2, 2, 2, 2], [8, 8, 16, 16], n_input_channels=1, num_classes=3, **words),
        "DenseNet": lambda: DenseNet(
            in_channels=1, out_channels=3, init_features=8, growth_rate=8, block_config=(2, 4, 2), **words
        ),
    }[name]()
    network = with_statistics(network)
    x = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(to_kan(network, linears=True)(x), network(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("activation", "tolerance"),
    [
        (nn.ReLU(inplace=True), 0.2),
        (nn.LeakyReLU(0.1), 0.2),
        (nn.PReLU(3), 0.2),
        (nn.ELU(), 0.05),
        (nn.GELU(), 0.05),
        (nn.SiLU(), 1e-6),
    ],
    ids=str,
)
def test_activations_start_near_those_replaced(activation: nn.Module, tolerance: float) -> None:
    if isinstance(activation, nn.PReLU):
        nn.init.uniform_(activation.weight, -0.5, 0.5, generator=torch.Generator().manual_seed(0))
    record: list[KANReplacement] = []
    kan = to_kan(nn.Sequential(activation), activations=True, record=record)
    x = torch.linspace(-3.0, 3.0, 303).reshape(-1, 3)
    worst = float((kan(x) - activation(x.clone())).abs().max().detach())
    assert isinstance(kan[0], KANActivation)
    assert worst < tolerance
    assert record[0].error == pytest.approx(worst, rel=0.1, abs=1e-6)


def test_variance_draws_new_weights_of_kan_layers() -> None:
    torch.manual_seed(0)
    kan = to_kan(nn.Conv2d(8, 64, 3), initialization="variance")
    x = torch.randn(8, 8, 16, 16)
    assert float(kan(x).detach().square().mean()) == pytest.approx(1.0, rel=0.3)
    assert torch.equal(kan.bias, torch.zeros(64))


def test_copy_leaves_the_network_and_the_random_numbers_alone() -> None:
    network, state = small_unet(), torch.get_rng_state()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    kan = to_kan(network, activations=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not kan_layers(network)
    assert not any(type(m) is nn.Conv2d for m in kan.modules())


def test_in_place_changes_the_network_itself() -> None:
    network = small_unet()
    assert to_kan(network, in_place=True) is network
    assert kan_layers(network)
    with pytest.raises(ValueError, match="cannot be replaced in place"):
        to_kan(nn.Conv2d(1, 1, 3), in_place=True)


def test_mode_dtype_and_gradient_flags_are_kept() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.PReLU(), nn.Linear(2, 2)).double()
    network[0].weight.requires_grad_(False)
    network[1].requires_grad_(False)
    network[2].eval()
    kan = to_kan(network, linears=True, activations=True)
    assert [module.training for module in kan] == [True, True, False]
    assert {parameter.dtype for parameter in kan.parameters()} == {torch.float64}
    assert not kan[0].weight.requires_grad
    assert kan[0].bias.requires_grad
    assert not any(parameter.requires_grad for parameter in kan[1].parameters())
    assert kan[2].weight.requires_grad


def test_half_precision_and_the_meta_device() -> None:
    half = to_kan(nn.Conv2d(1, 2, 3, dtype=torch.bfloat16))
    assert half.weight.dtype == torch.bfloat16
    assert to_kan(nn.Conv2d(1, 2, 3, device="meta")).weight.is_meta


def test_shared_modules_stay_one_and_containers_are_searched() -> None:
    conv = nn.Conv2d(2, 2, 1)
    network = nn.ModuleDict({"a": nn.Sequential(conv, nn.ReLU()), "b": nn.ModuleList([conv, nn.Conv1d(1, 1, 1)])})
    record: list[KANReplacement] = []
    kan = to_kan(network, record=record)
    assert kan["a"][0] is kan["b"][0]
    assert isinstance(kan["a"][0], KANConv2d)
    assert isinstance(kan["b"][1], KANConv1d)
    assert [(one.name, one.replaced) for one in record] == [("a.0", True), ("b.1", True)]


class OwnConv(nn.Conv2d):
    """A convolution that computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1.0


def test_what_cannot_be_replaced_is_left_with_a_reason() -> None:
    tied, hooked, listed = nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3)
    other = nn.Conv2d(1, 1, 3)
    other.weight = tied.weight
    hooked.register_forward_hook(lambda module, args, output: output)
    network = nn.ModuleDict({
        "own": OwnConv(1, 1, 3),
        "spectral": spectral_norm(nn.Conv2d(1, 1, 3)),
        "tied": tied,
        "other": other,
        "hooked": hooked,
        "listed": listed,
        "complex": nn.Conv2d(1, 1, 3, dtype=torch.complex64),
        "transposed": nn.ConvTranspose2d(1, 1, 3),
        "plain": nn.Conv2d(1, 1, 3),
    })  # fmt: skip
    network.stages = [listed]  # type: ignore[assignment]
    record: list[KANReplacement] = []
    kan = to_kan(network, record=record)
    reasons = {one.name: one.reason for one in record}
    for name, word in {
        "own": "derived",
        "spectral": "parametrizations",
        "tied": "shares",
        "other": "shares",
        "hooked": "hooks",
        "listed": "plain list",
        "complex": "complex64",
    }.items():
        assert word in reasons[name]
        assert not isinstance(kan[name], KANConv2d)
    assert reasons["plain"] == ""
    assert isinstance(kan["plain"], KANConv2d)
    assert "transposed" not in reasons


def test_transformer_layers_of_pytorch_keep_their_linear_layers() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    network = nn.Sequential(encoder, nn.Linear(8, 2)).eval()
    kan, x = to_kan(network, linears=True), torch.randn(1, 5, 8)
    assert type(kan[0].linear1) is nn.Linear
    assert isinstance(kan[1], KANLinear)
    with torch.no_grad():
        torch.testing.assert_close(kan(x), network(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ("0", ["0"]),
        (["1"], ["1.0", "1.1"]),
        ("1.*", ["1.0", "1.1"]),
        (nn.Conv1d, ["1.1"]),
        ((nn.ModuleList, "0"), ["0", "1.0", "1.1"]),
        (lambda name, module: getattr(module, "in_channels", 0) == 2, ["1.0"]),
    ],
    ids=str,
)
def test_skip(skip: Any, left: list[str]) -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 1, 3), nn.ModuleList([nn.Conv2d(2, 2, 1), nn.Conv1d(1, 1, 1)]), nn.Conv3d(1, 1, 3)
    )
    record: list[KANReplacement] = []
    to_kan(network, skip=skip, record=record)
    assert [one.name for one in record if not one.replaced] == left


def test_skip_pointwise() -> None:
    kan = to_kan(
        nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, (1, 3)), nn.Linear(2, 2)), linears=True, skip_pointwise=True
    )
    assert [type(m) for m in kan] == [nn.Conv2d, KANConv2d, KANLinear]


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ({"skip": "modle.0"}, ValueError, r"which no module is called"),
        ({"skip": 3}, TypeError, r"object is not iterable|names and classes"),
        ({"skip": [3]}, TypeError, r"names and classes"),
        ({"skip": nn.Conv2d}, ValueError, r"Nothing in UNet was replaced.*skipped as asked"),
        ({"convolutions": False}, ValueError, r"must be true; got none"),
        ({"initialization": "imitat"}, ValueError, r"Did you mean 'imitate'"),
        ({"base_activation": "relu"}, ValueError, r"base_activation"),
        ({"basis": "b-spline"}, ValueError, r"bspline"),
        ({"basis": BSplineBasis(), "grid_size": 7}, TypeError, r"`grid_size`"),
        ({"outside": "nowhere"}, ValueError, r"outside"),
    ],
    ids=str,
)
def test_wrong_arguments(words: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        to_kan(small_unet(), **words)


def test_a_network_is_wanted_and_something_to_replace() -> None:
    with pytest.raises(TypeError, match=r"torch.nn.Module; got str"):
        to_kan("UNet")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="holds no modules of the wanted kinds"):
        to_kan(nn.Sequential(nn.ReLU()))


@pytest.mark.parametrize("basis", ["bspline", "chebyshev", "gaussian", "fourier", "mexican_hat"])
def test_other_bases_start_at_the_nearest_fit_and_say_how_near(basis: str) -> None:
    torch.manual_seed(0)
    linear, record = nn.Linear(1, 1, bias=False), list[KANReplacement]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kan = to_kan(linear, linears=True, basis=basis, record=record)
    low, high = kan.basis.grid_range
    x = torch.linspace(low, high, 401)[:, None]
    worst = float(((kan(x) - linear(x)) / linear.weight).abs().max().detach())
    assert record[0].error == pytest.approx(worst, rel=0.01, abs=2e-6)
    assert bool(caught) == (record[0].error > 1e-3 * max(abs(low), abs(high)))
    if basis in ("bspline", "chebyshev"):
        assert worst < 1e-5


def test_a_basis_with_settings_goes_on_by_the_tangent_unless_told_otherwise() -> None:
    assert to_kan(nn.Conv2d(1, 1, 1), basis=("bspline", {"grid_size": 9})).basis.outside == "linear"
    assert to_kan(nn.Conv2d(1, 1, 1), basis=("bspline", {"outside": "clamp"})).basis.outside == "clamp"
    assert to_kan(nn.Conv2d(1, 1, 1), outside="zero").basis.outside == "zero"
    assert to_kan(nn.Conv2d(1, 1, 1), initialization="variance").basis == BSplineBasis()


def test_a_block_replaces_convolutions_and_ends() -> None:
    plain = Conv.components["CONV"]
    with kan_convolutions(grid_size=4, base_activation=None):
        network = small_unet()
    assert Conv.components["CONV"] is plain
    assert {m.basis.grid_size for m in kan_layers(network)} == {4}
    assert {m.base_activation for m in kan_layers(network)} == {None}
    assert not any(type(m) is nn.Conv2d for m in network.modules())
    assert any(type(m) is nn.ConvTranspose2d for m in network.modules())
    assert not kan_layers(small_unet())


def test_a_block_that_fails_ends_too() -> None:
    with pytest.raises(RuntimeError, match="inside"), kan_convolutions():
        raise RuntimeError("inside")
    assert Conv["conv", 2] is nn.Conv2d
    with pytest.raises(ValueError, match="grid_size"), kan_convolutions(grid_size=0):
        pass
    assert Conv["conv", 2] is nn.Conv2d


def test_blocks_nest() -> None:
    with kan_convolutions(grid_size=4):
        with kan_convolutions(grid_size=6):
            inner = Conv["conv", 2](1, 1, 3)
        outer = Conv["conv", 3](1, 1, kernel_size=3)
    assert (inner.basis.grid_size, type(inner)) == (6, KANConv2d)
    assert (outer.basis.grid_size, type(outer)) == (4, KANConv3d)
    assert Conv["conv", 1] is nn.Conv1d


def test_other_threads_and_tasks_are_not_affected() -> None:
    found: list[Any] = []
    with kan_convolutions():
        thread = threading.Thread(target=lambda: found.append(Conv["conv", 2]))
        thread.start()
        thread.join()
    assert found == [nn.Conv2d]

    async def build(inside: bool) -> type[nn.Module]:
        if not inside:
            await asyncio.sleep(0)
            return type(Conv["conv", 2](1, 1, 3))
        with kan_convolutions():
            await asyncio.sleep(0.01)
            return type(Conv["conv", 2](1, 1, 3))

    async def both() -> list[type[nn.Module]]:
        return list(await asyncio.gather(build(True), build(False)))

    assert asyncio.run(both()) == [KANConv2d, nn.Conv2d]
    assert Conv["conv", 2] is nn.Conv2d


def test_pointwise_convolutions_can_stay() -> None:
    with kan_convolutions(skip_pointwise=True):
        kinds = [type(Conv["conv", 2](2, 2, size)) for size in (1, (1, 1), (1, 3), 3)]
        assert type(Conv["conv", 2](2, 2, kernel_size=1)) is nn.Conv2d
    assert kinds == [nn.Conv2d, nn.Conv2d, KANConv2d, KANConv2d]


def test_a_network_does_not_overwrite_the_weights_of_kan_layers() -> None:
    """ResNet draws the weights of all instances of the convolution's class for a fan that KAN layers have not."""
    torch.manual_seed(0)
    with kan_convolutions():
        network = ResNet("basic", [1, 1, 1, 1], [32, 32, 32, 32], spatial_dims=2, n_input_channels=1)
    layer = next(m for m in kan_layers(network) if m.in_channels == 32 and m.kernel_size == (3, 3))
    y = layer(torch.randn(2, 32, 24, 24))[..., 1:-1, 1:-1]
    assert float(y.detach().square().mean()) == pytest.approx(1.0, rel=0.3)


@pytest.mark.parametrize(("dim", "kind"), [(1, KANConv1d), (2, KANConv2d), (3, KANConv3d)])
def test_factories(dim: int, kind: type[nn.Module]) -> None:
    assert Conv["kan", dim] is kind
    assert Conv[Conv.KAN, dim] is kind
    assert Act["kan"] is KANActivation


def test_linear_layers_and_activations_together_keep_the_values() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 1)).eval()
    kan, x = to_kan(network, linears=True, activations=True), torch.randn(20, 4)
    assert [type(m) for m in kan] == [KANLinear, KANActivation, KANLinear]
    torch.testing.assert_close(kan(x), network(x), rtol=1e-5, atol=1e-5)


SLOW = ("EfficientNet", "FlexibleUNet", "MILModel", "TorchVisionFCModel", "AHNet", "SENet")
QUICK = [
    case
    for case in TABLE.CASES
    if case.is_installed and case.name not in SLOW
    if case.spatial_dims == 2 or case.name in ("UNet", "SegResNet", "DynUNet", "VNet")
]
INSTALLED = [case for case in TABLE.CASES if case.is_installed]


def named(cases: list[Any]) -> list[Any]:
    """Name the cases; VNet has 45 million weights in 3-D even before they become functions."""
    return [
        pytest.param(
            case,
            id=f"{case.name}-{case.spatial_dims}d",
            marks=[pytest.mark.slow] if case.name == "VNet" else [],
        )
        for case in cases
    ]


@pytest.mark.parametrize("case", named(QUICK))
def test_monai_networks(case: Any) -> None:
    """Same outputs at the start, a training step, a reload, a build in the block and with the activation."""
    result = TABLE.examine(case, quick=True)
    assert not result.errors
    assert result.replaced > 0
    assert result.difference < 1e-4
    assert all(result.facts[fact] for fact in ("to_kan", "trains", "reloads"))
    assert result.facts["kan_convolutions"] or case.name == "MedNeXt"  # its convolutions are torch.nn's
    assert result.facts["act"] is not False


def test_enough_networks_are_tried() -> None:
    assert len({case.name for case in QUICK if case.spatial_dims == 2}) >= 18
    assert {"UNet", "SegResNet", "DynUNet", "VNet"} <= {case.name for case in QUICK if case.spatial_dims == 3}


@pytest.mark.parametrize("name", ["UNet", "SegResNet", "DynUNet"])
def test_networks_are_scripted_as_before(name: str) -> None:
    case = next(case for case in TABLE.CASES if case.name == name and case.spatial_dims == 2)
    network = to_kan(case.build().eval())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert TABLE.script(network, case.inputs())


@pytest.mark.slow
@pytest.mark.parametrize("case", named(INSTALLED))
def test_networks_are_scripted_and_exported_as_before(case: Any) -> None:
    facts = TABLE.examine(case).facts
    for fact in ("scripts", "exports"):
        assert facts[f"{fact} (KAN)"] or not facts[f"{fact} (original)"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_activations_without_parameters_take_dtype_and_device_of_their_neighbor(dtype: torch.dtype) -> None:
    network = nn.Sequential(nn.ReLU(), nn.Conv1d(2, 2, 1), nn.GELU()).to(dtype)
    kan = to_kan(network, activations=True)
    assert {parameter.dtype for parameter in kan.parameters()} == {dtype}
    x = torch.rand(1, 2, 9, dtype=dtype)
    torch.testing.assert_close(kan(x), network(x), atol=0.2, rtol=0.0)
    meta = to_kan(copy.deepcopy(network).to("meta"), activations=True)
    assert {parameter.device.type for parameter in meta.parameters()} == {"meta"}
