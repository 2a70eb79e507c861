"""What KAN segmenters cost beside ordinary ones: time of a training step and of inference, memory. Run by hand.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_segmentation_cost.py [--parts step memory volume compressed lighter]

- **step**: KANUNet, the same network with each KAN convolution replaced by an ordinary one on 9 copies of its input
  channels ("9x", the floor of 8 splines and a base term), and the plain U-Net: the same network with ordinary
  convolutions and ReLU. A step is forward, backward and AdamW.
- **memory**: time and peak (of what one step allocates above parameters) with and without checkpointing.
- **volume**: the peak of a 3-D training step on 96 x 96 x 96, and of the process.
- **compressed**: pruned channels taken out, and low rank, beside the dense network.
- **lighter**: other settings and networks.

Networks take turns; times are medians over the turns with their range: the process's own time on one CPU thread.
"""

from __future__ import annotations

import argparse
import copy
import resource
import statistics
from collections.abc import Callable
from typing import Any

import torch
from monai.networks.nets import AttentionUnet, BasicUNet, SegResNet, UNet
from segmentation_cost import interleaved_ms, multiply_adds, peak_mib
from torch import Tensor, nn

from monai_deqkan.networks import layers
from monai_deqkan.networks.layers import KANConv2d, KANConv3d
from monai_deqkan.networks.nets import UKAN, HybridKANUNet, KANUNet

FEATURES = (16, 32, 64, 128, 256)
PLAIN: dict[type[nn.Module], type[nn.Module]] = {KANConv2d: nn.Conv2d, KANConv3d: nn.Conv3d}
Networks = dict[str, nn.Module]


class _OnCopies(nn.Module):
    """An ordinary convolution of ``copies`` copies of the input."""

    def __init__(self, layer: Any, copies: int) -> None:
        super().__init__()
        self.copies = copies
        self.conv = PLAIN[type(layer)](
            copies * layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            padding=layer.padding,
            bias=layer.bias is not None,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.repeat(1, self.copies, *[1] * (x.dim() - 2)))


def swapped(network: nn.Module, make: Callable[[Any], nn.Module]) -> nn.Module:
    """Return a copy whose KAN convolutions are what ``make`` gives for them."""
    network = copy.deepcopy(network)
    for name, layer in list(network.named_modules()):
        if type(layer) in PLAIN:
            parent, _, last = name.rpartition(".")
            setattr(network.get_submodule(parent), last, make(layer))
    return network


def plain_conv(layer: Any) -> nn.Module:
    """Return an ordinary convolution and, but for the head, ReLU."""
    conv = _OnCopies(layer, 1).conv
    return conv if set(layer.kernel_size) == {1} else nn.Sequential(conv, nn.ReLU(inplace=True))


def twins(network: nn.Module, name: str) -> Networks:
    return {
        name: network,
        "9x": swapped(network, lambda layer: _OnCopies(layer, 9)),
        "plain": swapped(network, plain_conv),
    }


def training_step(network: nn.Module, x: Tensor, classes: int = 2) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    labels = torch.randint(classes, (x.shape[0], *x.shape[2:]), generator=torch.Generator().manual_seed(0)).to(x.device)

    def step() -> None:
        optimizer.zero_grad()
        logits = network(x)
        nn.functional.cross_entropy(logits if isinstance(logits, Tensor) else logits[0], labels).backward()
        optimizer.step()

    return step


def inference(network: nn.Module, x: Tensor) -> Callable[[], None]:
    network.eval()

    def step() -> None:
        with torch.no_grad():
            network(x)

    return step


def report(title: str, networks: Networks, x: Tensor, make: Callable[..., Callable[[], None]], repeats: int) -> None:
    """Print times and peaks; ratios are to the last network."""
    steps = {name: make(network, x) for name, network in networks.items()}
    times = interleaved_ms(steps, repeats, x.device.type)
    peaks = {name: peak_mib(step, x.device.type) for name, step in steps.items()}
    last = list(steps)[-1]
    print(f"\n### {title}\n")
    print("| network | parameters | multiply-adds, G | ms per image, median (min-max) | x last | peak MiB | x last |")
    print("|---|---|---|---|---|---|---|")
    for name, found in times.items():
        median, size = statistics.median(found), len(x)
        print(
            f"| {name} | {sum(p.numel() for p in networks[name].parameters()) / 1e6:.2f} M "
            f"| {multiply_adds(networks[name], (1, *x.shape[1:])) / 1e9:.2f} "
            f"| {median / size:.0f} ({min(found) / size:.0f}-{max(found) / size:.0f}) "
            f"| {median / statistics.median(times[last]):.2f} "
            f"| {peaks[name]:.0f} | {peaks[name] / peaks[last]:.2f} |",
            flush=True,
        )


def step_part(options: argparse.Namespace, x: Tensor) -> None:
    networks = twins(KANUNet(2, 1, 2, features=FEATURES), "KANUNet")
    report(f"step: batch {len(x)}", networks, x, training_step, options.repeats)


def memory_part(options: argparse.Namespace, x: Tensor) -> None:
    dense = KANUNet(2, 1, 2, FEATURES)
    saving = KANUNet(2, 1, 2, FEATURES, checkpointing=True)
    networks = {"KANUNet": dense, "KANUNet, checkpointing": saving, "plain": swapped(dense, plain_conv)}
    report(f"memory: training step, batch {len(x)}", networks, x, training_step, options.repeats)


def volume_part(options: argparse.Namespace, x: Tensor) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    volume = torch.randn(1, 1, 96, 96, 96, device=x.device)
    step = training_step(KANUNet(3, 1, 2, features=(8, 16, 32, 64)).to(x.device), volume)
    step()
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print("\n### volume: KANUNet(3, 1, 2, features=(8, 16, 32, 64)), one step on 1 x 1 x 96 x 96 x 96\n")
    allocated = peak_mib(step, x.device.type) / 1024
    print(f"The process takes {process:.2f} GiB at its peak, {before:.2f} GiB before.")
    print(f"A step allocates {allocated:.2f} GiB.")


def compressed_part(options: argparse.Namespace, x: Tensor) -> None:
    dense = KANUNet(2, 1, 2)
    networks: Networks = {}
    for amount in (0.75, 0.5, 0.25):
        pruned = copy.deepcopy(dense)
        layers.prune_edges(pruned, amount, scope="layer", granularity="input")
        networks[f"{amount:.0%} of the input channels pruned and removed"] = layers.remove_pruned_channels(pruned)
    for rank in (8, 16, 32):
        networks[f"rank {rank}"] = KANUNet(2, 1, 2, rank=rank)
    masked = copy.deepcopy(dense)
    layers.prune_edges(masked, 0.5)
    networks["half of the edges pruned (zeros)"] = layers.make_pruning_permanent(masked)
    networks["dense"] = dense
    report(f"compressed: inference, batch {len(x)}", networks, x, inference, options.repeats)
    report(f"compressed: training step, batch {len(x)}", networks, x, training_step, options.repeats)


def lighter_part(options: argparse.Namespace, x: Tensor) -> None:
    networks: Networks = {
        "KANUNet": KANUNet(2, 1, 2),
        "KANUNet grid 3, order 2": KANUNet(2, 1, 2, grid_size=3, spline_order=2),
        "KANUNet num_convs 1": KANUNet(2, 1, 2, num_convs=1),
        "KANUNet stem_stride 2": KANUNet(2, 1, 2, stem_stride=2),
        "KANUNet rank 16": KANUNet(2, 1, 2, rank=16),
        "KANUNet stem_stride 2, num_convs 1, grid 3, order 2": KANUNet(
            2, 1, 2, stem_stride=2, num_convs=1, grid_size=3, spline_order=2
        ),
    }
    networks |= {
        "UKAN": UKAN(2, 1, 2),
        "HybridKANUNet": HybridKANUNet(2, 1, 2),
        "MONAI UNet 16..256": UNet(2, 1, 2, channels=(16, 32, 64, 128, 256), strides=(2, 2, 2, 2), num_res_units=2),
        "MONAI AttentionUnet 16..256": AttentionUnet(2, 1, 2, channels=(16, 32, 64, 128, 256), strides=(2, 2, 2, 2)),
        "MONAI SegResNet 16": SegResNet(2, 16, 1, 2),
        "MONAI BasicUNet 32..256": BasicUNet(2, 1, 2, features=(32, 32, 64, 128, 256, 32)),
    }
    report(f"lighter: training step, batch {len(x)}", networks, x, training_step, options.repeats)
    report(f"lighter: inference, batch {len(x)}", networks, x, inference, options.repeats)


PARTS = {
    "step": step_part,
    "memory": memory_part,
    "volume": volume_part,
    "compressed": compressed_part,
    "lighter": lighter_part,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    x = torch.randn(options.batch_size, 1, options.size, options.size)
    print(f"torch {torch.__version__}, {options.threads} thread(s), medians of {options.repeats}")
    for name in options.parts:
        PARTS[name](options, x)


if __name__ == "__main__":
    main()
