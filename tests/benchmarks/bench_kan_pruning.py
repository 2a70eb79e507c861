"""Prune and compress a KANUNet trained on slices of a brain template. Run by hand; it asserts nothing.

The task is the sample `brain_tissue`: four classes, real anatomy from the template that nilearn ships. Dice is the mean
over the foreground classes and the pictures of the test slab, which training has not seen.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_kan_pruning.py [--epochs 10] [--amount 0.5]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from pathlib import Path

import torch
from monai.losses import DiceCELoss
from monai.metrics import compute_dice
from monai.networks.utils import one_hot
from torch import Tensor, nn

from monai_deqkan.data import mask_values, segmentation_items, write_sample
from monai_deqkan.networks.layers import (
    KANConv2d,
    KANLinear,
    LowRankKANConv2d,
    compare_outputs,
    prune_basis,
    prune_edges,
    quantize_kan,
    tabulate_kan,
)
from monai_deqkan.networks.nets import KANUNet
from monai_deqkan.transforms import LoadMask, LoadMedicalImage

NUM_CLASSES = 4
BATCH = 4


def load(part: str, folder: Path) -> tuple[Tensor, Tensor]:
    """Return the images (B, 1, H, W), each normalized, and the labels of a part."""
    image, mask = LoadMedicalImage(), LoadMask(mask_values(folder))
    items = segmentation_items(folder, part)
    images = torch.stack([torch.as_tensor(image(item["image"])) for item in items])
    labels = torch.stack([torch.as_tensor(mask(item["label"])) for item in items])
    std, mean = torch.std_mean(images, dim=(2, 3), keepdim=True)
    return (images - mean) / std, labels


def train(network: nn.Module, data: tuple[Tensor, Tensor], epochs: int, learning_rate: float) -> None:
    """Train with flips, by Adam and a one-cycle schedule."""
    images, labels = data
    steps = epochs * (len(images) // BATCH)
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.2)
    loss = DiceCELoss(softmax=True, to_onehot_y=True)
    network.train()
    for _ in range(epochs):
        order = torch.randperm(len(images))[: len(images) // BATCH * BATCH]
        for rows in order.view(-1, BATCH):
            x, y = images[rows], labels[rows]
            if torch.rand(()) < 0.5:
                x, y = x.flip(2), y.flip(2)
            optimizer.zero_grad()
            loss(network(x), y).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()


@torch.no_grad()
def dice(network: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Return the mean Dice of the foreground."""
    network.eval()
    images, labels = data
    predicted = torch.cat([network(x).argmax(1, keepdim=True) for x in images.split(BATCH)])
    scores = compute_dice(one_hot(predicted, NUM_CLASSES), one_hot(labels, NUM_CLASSES), include_background=False)
    return float(scores.nanmean())


def state_bytes(network: nn.Module) -> int:
    """Return the size of the state dict."""
    return sum(value.numel() * value.element_size() for value in network.state_dict().values())


def low_rank(network: nn.Module, share: float) -> nn.Module:
    """Return a copy whose 3x3 KAN convolutions have about the given share of the weights."""
    network = copy.deepcopy(network)
    for name, layer in list(network.named_modules()):
        if isinstance(layer, KANConv2d) and layer.kernel_size == (3, 3) and layer.in_channels > 1:
            sizes = layer.weight.shape
            rank = max(1, int(share * layer.weight.numel() / (sizes[0] + sizes[1] + sizes[2] + sizes[3])))
            parent, _, last = name.rpartition(".")
            setattr(network.get_submodule(parent), last, LowRankKANConv2d.from_conv(layer, rank, num_sweeps=20)[0])
    return network


def milliseconds(network: nn.Module, x: Tensor, repeats: int = 7) -> float:
    """Return the median time of a forward pass."""
    times = []
    with torch.no_grad():
        network.eval()(x)
        for _ in range(repeats):
            start = time.perf_counter()
            network(x)
            times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def report_layers() -> None:
    """Print the output error of each kind of layer with untrained weights, on inputs from N(0, 1)."""
    torch.manual_seed(0)
    layers: dict[str, tuple[nn.Module, Tensor]] = {
        "KANLinear 64->64": (KANLinear(64, 64), torch.randn(512, 64)),
        "KANConv2d 16->32 k3": (KANConv2d(16, 32, 3, padding=1), torch.randn(2, 16, 32, 32)),
    }
    print(f"\n{'layer':<22} {'8 bits':>8} {'table':>8} {'plain ms':>9} {'table ms':>9}")
    for name, (layer, x) in layers.items():
        table = tabulate_kan(layer)
        bits, error = compare_outputs(layer, quantize_kan(layer), x).network, compare_outputs(layer, table, x).network
        print(f"{name:<22} {bits:8.3%} {error:8.4%} {milliseconds(layer, x):9.2f} {milliseconds(table, x):9.2f}")


def main() -> None:
    """Train, prune, fine-tune, compress, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--finetune", type=int, default=3)
    parser.add_argument("--amount", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_sample("brain_tissue", Path(temporary) / "data")
        data, test = load("train", folder), load("evaluate", folder)
    start = time.perf_counter()
    network = KANUNet(2, 1, NUM_CLASSES, features=(8, 16, 32))
    train(network, data, arguments.epochs, 0.02)
    print(f"{len(data[0])} training pictures, {len(test[0])} test pictures, {time.perf_counter() - start:.0f} s")
    print(f"Dice before: {dice(network, test):.4f}")

    for name, prune in (("edges", prune_edges), ("basis functions", prune_basis)):
        pruned = copy.deepcopy(network)
        report = prune(pruned, arguments.amount, inputs=data[0][:32])
        if name == "edges":
            print(f"\n{report}")
        line = f"{name}: Dice pruned {dice(pruned, test):.4f}"
        train(pruned, data, arguments.finetune, 0.01)
        print(f"{line}, fine-tuned {dice(pruned, test):.4f}")
    longer = copy.deepcopy(network)
    train(longer, data, arguments.finetune, 0.01)
    print(f"nothing pruned, trained as long: Dice {dice(longer, test):.4f}")

    x = test[0][:8]
    changed = {
        "8 bits": quantize_kan(network),
        "6 bits": quantize_kan(network, 6),
        "table": tabulate_kan(network),
        "rank for 1/2": low_rank(network, 0.5),
        "rank for 1/4": low_rank(network, 0.25),
    }
    print(f"\n{'form':<14} {'Dice':>7} {'output':>8} {'worst layer':>12} {'KiB':>7} {'ms/image':>9}")
    print(f"{'float32':<14} {dice(network, test):7.4f} {0:8.3%} {0:12.3%} {state_bytes(network) / 1024:7.0f}", end=" ")
    print(f"{milliseconds(network, x) / len(x):9.2f}")
    for name, other in changed.items():
        changes = compare_outputs(network, other, x)
        print(
            f"{name:<14} {dice(other, test):7.4f} {changes.network:8.3%} {max(changes.layers.values()):12.3%}", end=" "
        )
        print(f"{state_bytes(other) / 1024:7.0f} {milliseconds(other, x) / len(x):9.2f}")
    report_layers()


if __name__ == "__main__":
    main()
