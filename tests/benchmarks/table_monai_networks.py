"""Try in which ways MONAI's networks work with KAN layers, and write the table of the documentation.

python tests/benchmarks/table_monai_networks.py [--only NAME ...] [--write docs/how-to/kan-in-monai-networks.md]

Takes tens of minutes on one core. The networks are small ones of each kind, the weights random, the data noise.
Networks with attention need einops.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from monai.apps.reconstruction.networks.nets.complex_unet import ComplexUnet
from monai.networks import nets
from torch import Tensor, nn

from monai_deqkan.networks import KANReplacement, kan_convolutions, to_kan
from monai_deqkan.networks.layers import KANActivation, KANConv1d, KANConv2d, KANConv3d

START, END = "<!-- table of networks: start -->", "<!-- table of networks: end -->"
CONVOLUTIONS = (KANConv1d, KANConv2d, KANConv3d)


@dataclass(frozen=True)
class Case:
    """One network: how to build it, what it eats, and the word of its activation, if it has one."""

    name: str
    spatial_dims: int
    kind: Callable[..., nn.Module]
    words: dict[str, Any]
    shapes: tuple[tuple[int, ...], ...]
    act: str | None = None
    extra: tuple[Any, ...] = ()  # inputs after the tensors of the given shapes
    grid: dict[str, Any] = field(default_factory=dict)  # settings of its KAN layers

    @property
    def is_installed(self) -> bool:
        """Whether the packages that it imports are there."""
        needs_einops = self.name in ("AutoencoderKL", "DiffusionModelUNet", "SwinUNETR", "UNETR")
        return not needs_einops or importlib.util.find_spec("einops") is not None

    def build(self, **changes: Any) -> nn.Module:
        """Build it, with the same weights each time."""
        torch.manual_seed(0)
        return self.kind(**(self.words | changes))

    def inputs(self) -> tuple[Any, ...]:
        """Return noise."""
        generator = torch.Generator().manual_seed(1)
        return (*(torch.randn(shape, generator=generator) for shape in self.shapes), *self.extra)


def spatial(name: str, kind: Callable[..., nn.Module], size: int, act: str | None = "act", **words: Any) -> list[Case]:
    """Return a case in 2-D and one in 3-D for a network from one channel, ``in_channels``, on cubes."""
    words = {"in_channels": 1, **words}
    return [
        Case(name, dims, kind, {"spatial_dims": dims, **words}, ((2, words["in_channels"], *[size] * dims),), act)
        for dims in (2, 3)
    ]


def flat(name: str, kind: Callable[..., nn.Module], shape: tuple[int, ...], act: str | None, **words: Any) -> Case:
    """Return a case of a network that is for 2-D only, or tried there only."""
    return Case(name, 2, kind, words, (shape,), act)


SMALL = {"channels": (4, 8, 8), "strides": (2, 2)}
HALVES = {"channels": (4, 8), "strides": (2, 2)}
HEAD = {"num_res_units": 1, **HALVES}
DIFFUSION = {"channels": (8, 8), "attention_levels": (False, True), "num_res_blocks": 1, "norm_num_groups": 4}
STEP = torch.tensor([3, 7])
BASIC = {"features": (4, 4, 8, 8, 8, 4)}
DYN = {"kernel_size": (3, 3, 3), "strides": (1, 2, 2), "upsample_kernel_size": (2, 2), "filters": (4, 8, 8)}
FEWEST = {"grid_size": 2, "spline_order": 1, "base_activation": None}  # for networks of fixed, high widths


def complex_unet(act: Any = ("LeakyReLU", {"negative_slope": 0.1, "inplace": True})) -> nn.Module:
    """Return MONAI's complex U-Net around a small U-Net."""
    return ComplexUnet(spatial_dims=2, features=(4, 4, 8, 8, 8, 4), act=act)


def dints(act_name: Any = "RELU") -> nn.Module:
    """Return the network that a fixed path through the space of DiNTS gives."""
    space = nets.TopologyInstance(
        channel_mul=0.125, num_blocks=4, num_depths=2, spatial_dims=2, act_name=act_name, use_downsample=True
    )
    return nets.DiNTS(space, in_channels=1, num_classes=2, spatial_dims=2, use_downsample=True, act_name=act_name)


def awake(kind: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Return a builder of networks whose output is not zero, as it is at the start: nothing would get a gradient."""

    def build(**words: Any) -> nn.Module:
        network = kind(**words)
        for parameter in network.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
        return network

    return build


def mean_only(z_mu: Tensor, z_sigma: Tensor) -> Tensor:
    """Return the mean: noise is drawn in the order of the memory, which is another one for KAN layers."""
    return z_mu


def autoencoder_kl(**words: Any) -> nn.Module:
    """Return MONAI's autoencoder without the noise on its latent image."""
    network = nets.AutoencoderKL(**words)
    network.sampling = mean_only  # type: ignore[method-assign]
    return network


def multiple_instances() -> nn.Module:
    """Return the multiple instance network on torchvision's smallest residual network."""
    return nets.MILModel(num_classes=2, mil_mode="att", pretrained=False, backbone="resnet18")


def voxel_morph() -> nn.Module:
    """Return the registration network around a small U-Net."""
    unet = nets.VoxelMorphUNet(
        spatial_dims=2, in_channels=2, unet_out_channels=4, channels=(4, 4, 8, 8), final_conv_channels=(4,)
    )
    return nets.VoxelMorph(backbone=unet, integration_steps=2, spatial_dims=2)


CASES: list[Case] = [
    *spatial("UNet", nets.UNet, 16, out_channels=2, num_res_units=1, **SMALL),
    *spatial("BasicUNet", nets.BasicUNet, 32, **BASIC),
    *spatial("BasicUNetPlusPlus", nets.BasicUNetPlusPlus, 32, **BASIC),
    *spatial("AttentionUnet", nets.AttentionUnet, 16, None, out_channels=2, **SMALL),
    *spatial("SegResNet", nets.SegResNet, 16, init_filters=8, blocks_down=(1, 1), blocks_up=(1,)),
    *spatial("SegResNetDS", nets.SegResNetDS, 16, init_filters=8, blocks_down=(1, 1), dsdepth=2),
    Case(
        "SegResNetVAE",
        2,
        nets.SegResNetVAE,
        {"input_image_size": (16, 16), "spatial_dims": 2, "blocks_down": (1, 1), "blocks_up": (1,), "vae_nz": 8},
        ((2, 1, 16, 16),),
        "act",
    ),
    *spatial("DynUNet", nets.DynUNet, 16, "act_name", out_channels=2, res_block=True, **DYN),
    *(
        Case("VNet", dims, nets.VNet, {"spatial_dims": dims}, ((2, 1, *[16] * dims),), "act", grid=FEWEST)
        for dims in (2, 3)
    ),
    flat(
        "FlexibleUNet",
        nets.FlexibleUNet,
        (2, 3, 64, 64),
        "act",
        in_channels=3,
        out_channels=2,
        backbone="resnet18",
        decoder_channels=(8, 8, 8, 4, 4),
    ),
    *spatial("UNETR", nets.UNETR, 32, None, out_channels=2, img_size=32, feature_size=4, hidden_size=24,
             mlp_dim=32, num_heads=2),
    *spatial("SwinUNETR", nets.SwinUNETR, 64, None, out_channels=2, feature_size=12, depths=(1, 1, 1, 1),
             window_size=2)[:1],
    *spatial("MedNeXt", nets.MedNeXt, 16, None, init_filters=4, kernel_size=3, blocks_down=(1,) * 4,
             blocks_up=(1,) * 4, blocks_bottleneck=1),
    *spatial("HighResNet", nets.HighResNet, 8, "acti_type", layer_params=(
        {"name": "conv_0", "n_features": 4, "kernel_size": 3},
        {"name": "res_1", "n_features": 4, "kernels": (3, 3), "repeat": 1},
        {"name": "res_2", "n_features": 8, "kernels": (3, 3), "repeat": 1},
        {"name": "res_3", "n_features": 8, "kernels": (3, 3), "repeat": 1},
        {"name": "conv_1", "n_features": 8, "kernel_size": 1},
        {"name": "conv_2", "kernel_size": 1},
    )),
    Case("AHNet", 2, nets.AHNet, {
        "spatial_dims": 2, "layers": (1, 1, 1, 1), "psp_block_num": 1, "upsample_mode": "nearest"
    }, ((2, 1, 64, 64),), grid=FEWEST),
    flat("QuickNAT", nets.Quicknat, (2, 1, 32, 32), None, num_classes=2, num_filters=4, se_block=None),  # no use of act
    Case("DiNTS", 2, dints, {}, ((2, 1, 32, 32),), "act_name"),
    flat("ComplexUnet", complex_unet, (1, 1, 32, 32, 2), "act"),
    *spatial("AutoEncoder", nets.AutoEncoder, 16, out_channels=1, **HALVES),
    Case("VarAutoEncoder", 2, nets.VarAutoEncoder, {
        "spatial_dims": 2, "in_shape": (1, 16, 16), "out_channels": 1, "latent_size": 4, **HALVES
    }, ((2, 1, 16, 16),), "act"),
    *spatial("AutoencoderKL", autoencoder_kl, 16, None, latent_channels=2, **DIFFUSION),
    *spatial("VQVAE", nets.VQVAE, 16, out_channels=1, channels=(4, 8), num_res_layers=1, num_res_channels=(4, 8),
             downsample_parameters=((2, 4, 1, 1),) * 2, upsample_parameters=((2, 4, 1, 1, 0),) * 2, embedding_dim=4),
    Case("DiffusionModelUNet", 2, awake(nets.DiffusionModelUNet), {
        "spatial_dims": 2, "in_channels": 1, "out_channels": 1, "num_head_channels": 4, **DIFFUSION
    }, ((2, 1, 16, 16),), None, (STEP,)),
    Case("DiffusionModelUNet", 3, awake(nets.DiffusionModelUNet), {
        "spatial_dims": 3, "in_channels": 1, "out_channels": 1, "num_head_channels": 4, **DIFFUSION
    }, ((2, 1, 8, 8, 8),), None, (STEP,)),
    *(
        Case("ResNet", dims, nets.ResNet, {
            "block": "basic", "layers": [1, 1, 1, 1], "block_inplanes": [4, 8, 8, 8], "spatial_dims": dims,
            "n_input_channels": 1, "num_classes": 2,
        }, ((2, 1, *[32] * dims),), "act")
        for dims in (2, 3)
    ),
    *spatial("DenseNet", nets.DenseNet, 32, out_channels=2, init_features=4, growth_rate=4, block_config=(2, 2)),
    Case("SENet", 2, nets.SENet, {
        "spatial_dims": 2, "in_channels": 1, "block": "se_resnet_bottleneck", "layers": [1, 1, 1, 1], "groups": 1,
        "reduction": 16, "inplanes": 8, "num_classes": 2,
    }, ((2, 1, 32, 32),), grid=FEWEST),
    *spatial("EfficientNet", nets.EfficientNetBN, 32, None, model_name="efficientnet-b0", pretrained=False,
             num_classes=2)[:1],
    Case("Regressor", 2, nets.Regressor, {"in_shape": (1, 16, 16), "out_shape": (2,), **HEAD},
         ((2, 1, 16, 16),), "act"),
    Case("Regressor", 3, nets.Regressor, {"in_shape": (1, 8, 8, 8), "out_shape": (2,), **HEAD},
         ((2, 1, 8, 8, 8),), "act"),
    Case("Classifier", 2, nets.Classifier, {"in_shape": (1, 16, 16), "classes": 2, **HEAD}, ((2, 1, 16, 16),), "act"),
    Case("Discriminator", 2, nets.Discriminator, {"in_shape": (1, 16, 16), **HEAD}, ((2, 1, 16, 16),), "act"),
    Case("Critic", 2, nets.Critic, {"in_shape": (1, 16, 16), **HEAD}, ((2, 1, 16, 16),), "act"),
    Case("Generator", 2, nets.Generator, {
        "latent_shape": (4,), "start_shape": (4, 4, 4), "channels": (8, 1), "strides": (2, 2), "num_res_units": 1
    }, ((2, 4),), "act"),
    *spatial("PatchDiscriminator", nets.PatchDiscriminator, 32, "activation", channels=4, num_layers_d=2),
    Case("TorchVisionFCModel", 2, nets.TorchVisionFCModel, {
        "model_name": "resnet18", "num_classes": 2
    }, ((2, 3, 224, 224),), grid=FEWEST),
    Case("MILModel", 2, multiple_instances, {}, ((1, 2, 3, 64, 64),), grid=FEWEST),
    *spatial("LocalNet", nets.LocalNet, 16, None, in_channels=2, num_channel_initial=4, extract_levels=(0, 1)),
    *spatial("RegUNet", nets.RegUNet, 16, None, in_channels=2, num_channel_initial=4, depth=2),
    Case("GlobalNet", 2, awake(nets.GlobalNet), {
        "image_size": [16, 16], "spatial_dims": 2, "in_channels": 2, "num_channel_initial": 4, "depth": 2
    }, ((2, 2, 16, 16),)),
    Case("VoxelMorph", 2, voxel_morph, {}, ((1, 1, 16, 16), (1, 1, 16, 16))),
]  # fmt: skip


@dataclass
class Result:
    """What was found for one case."""

    case: Case
    replaced: int = 0
    left: int = 0
    difference: float = float("nan")
    facts: dict[str, bool | None] = field(default_factory=dict)  # None: does not apply
    errors: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def tensors(output: Any) -> list[Tensor]:
    """Return the floating-point tensors of nested outputs."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else []
    return [tensor for part in parts for tensor in tensors(part)]


def settled(network: nn.Module, inputs: tuple[Any, ...]) -> nn.Module:
    """Give batch normalizations the statistics that training would have left, so that no signal dies out."""
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    if norms:
        evaluate(network.train(), inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return network.eval()


def evaluate(network: Callable[..., Any], inputs: tuple[Any, ...]) -> list[Tensor]:
    """Run it without gradients; random parts of a forward pass are the same each time."""
    torch.manual_seed(2)
    with torch.no_grad():
        return [tensor.clone() for tensor in tensors(network(*inputs))]


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest difference relative to the largest value of each output."""
    if len(found) != len(expected) or not expected:
        raise ValueError(f"expected {len(expected)} tensors, got {len(found)}")
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)) for a, b in zip(found, expected, strict=True))


def train_step(network: nn.Module, inputs: tuple[Any, ...]) -> bool:
    """Take a step; tell whether the gradients of KAN weights are finite, nearly all nonzero, and the loss goes on."""
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-2)

    def loss() -> Tensor:
        torch.manual_seed(3)
        return torch.stack([(output - 0.3).square().mean() for output in tensors(network(*inputs))]).sum()

    loss().backward()
    gradients = [m.weight.grad for m in network.modules() if isinstance(m, CONVOLUTIONS)]
    used = [gradient for gradient in gradients if gradient is not None and bool(gradient.any())]
    finite = all(bool(torch.isfinite(gradient).all()) for gradient in used)
    nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    with torch.no_grad():
        return finite and len(used) >= 0.8 * len(gradients) and bool(torch.isfinite(loss()))


def script(network: nn.Module, inputs: tuple[Any, ...]) -> bool:
    """Tell whether it can be scripted with the same outputs."""
    torch.jit._state._clear_class_state()  # a class that failed before would fail again, for that reason
    return difference(evaluate(torch.jit.script(network), inputs), evaluate(network, inputs)) < 1e-3


def export(network: nn.Module, inputs: tuple[Any, ...]) -> bool:
    """Tell whether ``torch.export`` takes it and gives the same outputs."""
    with torch.no_grad():
        program = torch.export.export(network, inputs, strict=False)
    return difference(evaluate(program.module(check_guards=False), inputs), evaluate(network, inputs)) < 1e-3


@contextlib.contextmanager
def attempt(result: Result, fact: str) -> Iterator[None]:
    """Turn an error into a no."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # whatever a network does, it goes into the table
        result.facts[fact] = False
        result.errors[fact] = f"{type(error).__name__}: {' '.join(str(error).split())[-200:]}"


def with_kan_convolutions(case: Case) -> bool:
    """Tell whether it can be built in the block and takes a step."""
    with kan_convolutions(**case.grid):
        network = case.build()
    return any(isinstance(m, CONVOLUTIONS) for m in network.modules()) and train_step(network, case.inputs())


def with_kan_activations(case: Case) -> bool | None:
    """Tell whether it can be built with ``act="kan"`` and runs; ``None`` if it takes no activation."""
    if case.act is None:
        return None
    network = case.build(**{case.act: "kan"}).eval()
    finite = all(bool(torch.isfinite(output).all()) for output in evaluate(network, case.inputs()))
    return finite and any(isinstance(m, KANActivation) for m in network.modules())


def examine(case: Case, quick: bool = False) -> Result:
    """Try everything on one network; ``quick`` leaves script and export out."""
    result, started = Result(case), time.perf_counter()
    inputs = case.inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        original = settled(case.build(), inputs)
    facts, record = result.facts, list[KANReplacement]()
    with attempt(result, "to_kan"):
        network = to_kan(original, record=record, **case.grid)
        result.replaced = sum(one.replaced for one in record)
        result.left = len(record) - result.replaced
        expected = evaluate(original, inputs)
        result.difference = difference(evaluate(network, inputs), expected)
        facts["to_kan"] = result.difference < 1e-4
    with attempt(result, "trains"):
        trained = to_kan(original, **case.grid)
        facts["trains"] = train_step(trained, inputs)
    with attempt(result, "reloads"):
        fresh = to_kan(case.build(), initialization="variance", outside="linear", **case.grid)
        fresh.load_state_dict(trained.state_dict())
        facts["reloads"] = difference(evaluate(fresh.eval(), inputs), evaluate(trained.eval(), inputs)) == 0.0
    with attempt(result, "kan_convolutions"):
        facts["kan_convolutions"] = with_kan_convolutions(case)
    with attempt(result, "act"):
        facts["act"] = with_kan_activations(case)
    for fact, way in () if quick else (("scripts", script), ("exports", export)):
        for kind, tried in (("original", original), ("KAN", network)):
            with attempt(result, f"{fact} ({kind})"):
                facts[f"{fact} ({kind})"] = way(tried, inputs)
    result.seconds = time.perf_counter() - started
    return result


def row(result: Result) -> str:
    """Return a line of the table."""

    def word(fact: str) -> str:
        value = result.facts.get(fact, False)
        return "-" if value is None else "yes" if value else "**no**"

    def pair(fact: str) -> str:
        return f"{word(f'{fact} (original)')} / {word(f'{fact} (KAN)')}".replace("**no** / **no**", "no / no")

    count = f"{result.replaced} of {result.replaced + result.left}"
    cells = [result.case.name, f"{result.case.spatial_dims}-D", word("to_kan"), count, f"{result.difference:.0e}"]
    cells += [word("trains"), word("reloads"), word("kan_convolutions"), word("act"), pair("scripts"), pair("exports")]
    return f"| {' | '.join(cells)} |"


COLUMNS = ("network", "", "`to_kan`", "replaced", "difference", "trains", "reloads", "`kan_convolutions`")
COLUMNS += ('`act="kan"`', "scripts", "exports")
HEADER = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def main() -> None:
    """Examine all networks, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="names of networks")
    parser.add_argument("--write", type=Path, help="page to write the table into, between its markers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    lines = [HEADER]
    print(HEADER, flush=True)
    for case in CASES:
        if arguments.only and case.name not in arguments.only:
            continue
        if not case.is_installed:
            print(f"{case.name} left out: it needs einops", flush=True)
            continue
        result = examine(case)
        lines.append(row(result))
        print(lines[-1], f"{result.seconds:.0f} s", flush=True)
        for fact, error in result.errors.items():
            print(f"    {fact}: {error}", flush=True)
    if arguments.write:
        text = arguments.write.read_text(encoding="utf-8")
        before, after = text[: text.index(START) + len(START)], text[text.index(END) :]
        arguments.write.write_text(before + "\n" + "\n".join(lines) + "\n" + after, encoding="utf-8")


if __name__ == "__main__":
    main()
