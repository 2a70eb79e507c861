"""KAN segmenters against MONAI's networks by one shared recipe on folders of images and masks; one JSON per run.

    python tests/benchmarks/bench_segmentation.py DATA --sets cvc_clinicdb_polyps glas_glands --seeds 0 1 2
    python tests/benchmarks/bench_segmentation.py DATA --table

``DATA`` holds ``<set>/{train,val}/{images,masks}/*``. A run that has its JSON below ``--results`` is not repeated, so
the command goes on where it was stopped; ``--table`` prints means and spreads, differences from MONAI's best network,
costs, and the missing cells by name.
``--fold`` cuts a fifth from ``train`` and scores on that: choices of design are made there, never on val. ``--seconds``
gives every network the same training time (seconds of the process with one thread) in place of the same number of
steps. ``--device cuda`` trains on a GPU; scores are computed on the CPU.

The recipe: 128 x 128 pixels of mean 0 and standard deviation 1, flips where anatomy allows, rotation up to 15 degrees,
stretching along the rows by up to 15 %, shifts, gamma and intensity; Dice and cross-entropy, AdamW 1e-3 with weight
decay 1e-4, 30 steps of warm-up, cosine decay; the last step's weights are scored once, each image by its own Dice at
128 x 128.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from monai.data import CacheDataset, DataLoader
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric, MeanIoU
from monai.networks.nets import AttentionUnet, BasicUNet, SegResNet, UNet
from monai.transforms import (
    Compose,
    NormalizeIntensityd,
    RandAdjustContrastd,
    RandAffined,
    RandFlipd,
    RandScaleIntensityd,
    RandShiftIntensityd,
    Resized,
    ResizeWithPadOrCropd,
)
from monai.utils import set_determinism
from segmentation_cost import inference_ms, multiply_adds, peak_mib
from segmentation_table import costs, differences, scores
from torch import Tensor, nn

from monai_deqkan.data import hold_out, segmentation_items
from monai_deqkan.networks.nets import UKAN, HybridKANUNet, KANUNet
from monai_deqkan.transforms import LoadMaskd, LoadMedicalImaged

# Channels, the axes along which a mirrored image is as likely as the original, and the characters of a file's name
# that tell images apart which must not be parted by a fold (frames of a video), if any.
SETS: dict[str, tuple[int, tuple[int, ...], int | None]] = {
    "lung_fields_chest_xray": (1, (0,), None),
    "busi_breast_ultrasound": (1, (0,), None),
    "glas_glands": (3, (0, 1), None),
    "cvc_clinicdb_polyps": (3, (0, 1), 5),
    "isic2018_skin_lesions": (3, (0, 1), None),
}


def _kanunet(channels: int, classes: int, **settings: Any) -> nn.Module:
    cheap: dict[str, Any] = {"features": (8, 16, 32, 64, 80), "grid_size": 3, "spline_order": 2}
    return KANUNet(2, channels, classes, **{**cheap, "stem_stride": 2, "up": "transposed", **settings})


def _fine(channels: int, classes: int, **settings: Any) -> nn.Module:
    """Return the KANUNet with the layers' default grid, and fewer channels for as many parameters."""
    usual: dict[str, Any] = {"features": (8, 16, 32, 48, 64), "grid_size": 5, "spline_order": 3}
    return _kanunet(channels, classes, **{**usual, **settings})


NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "basicunet": lambda channels, classes: BasicUNet(2, channels, classes, features=(32, 32, 64, 128, 256, 32)),
    "unet": lambda channels, classes: UNet(
        2, channels, classes, channels=(16, 32, 64, 128, 256), strides=(2, 2, 2, 2), num_res_units=2
    ),
    "attentionunet": lambda channels, classes: AttentionUnet(
        2, channels, classes, channels=(16, 32, 64, 128, 256), strides=(2, 2, 2, 2)
    ),
    "segresnet": lambda channels, classes: SegResNet(2, 16, channels, classes),
    "hybrid": lambda channels, classes: HybridKANUNet(2, channels, classes),
    "kanunet": lambda channels, classes: _kanunet(channels, classes),
    "ukan": lambda channels, classes: UKAN(2, channels, classes, (16, 32, 64, 128, 192), num_layers=1),
}
# Forms of the same that were tried on folds, and not taken.
VARIANTS: dict[str, Callable[[int, int], nn.Module]] = {
    "hybrid_batch_norm": lambda channels, classes: HybridKANUNet(2, channels, classes, norm="batch", act="relu"),
    "kanunet_full_size": lambda channels, classes: _fine(channels, classes, stem_stride=1),
    "kanunet_dropout": lambda channels, classes: _fine(channels, classes, dropout=0.1),
    "kanunet_fine_grid": lambda channels, classes: _fine(channels, classes),
    "kanunet_group_norm": lambda channels, classes: _fine(channels, classes, norm=("group", {"num_groups": 4})),
    "kanunet_init_0.02": lambda channels, classes: _fine(channels, classes, init_scale=0.02),
    "kanunet_four_levels": lambda channels, classes: _fine(channels, classes, features=(12, 24, 40, 64)),
    "kanunet_coarse_wide": lambda channels, classes: _kanunet(channels, classes, features=(16, 32, 48, 64, 72)),
    "kanunet_coarse_init_0.02": lambda channels, classes: _kanunet(channels, classes, init_scale=0.02),
    "kanunet_coarse_avgpool": lambda channels, classes: _kanunet(channels, classes, down="avgpool"),
    "kanunet_coarse_dropout": lambda channels, classes: _kanunet(channels, classes, dropout=0.1),
    "kanunet_coarse_batch_norm": lambda channels, classes: _kanunet(channels, classes, norm="batch"),
    "kanunet_coarse_rank_32": lambda channels, classes: _kanunet(
        channels, classes, features=(16, 32, 64, 96, 128), rank=32, init_scale=0.002
    ),
}
MONAI = ("basicunet", "unet", "attentionunet", "segresnet")
SIZE = 128
STEPS = 600
BATCH_SIZE = 8
WARM_UP = 30


def main() -> None:
    options = _options()
    if options.table:
        print(table(options))
        return
    torch.set_num_threads(options.threads)
    options.results.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for name in options.sets:
            for network in options.networks:
                path = options.results / f"{run_name(options, network, name, seed)}.json"
                if path.exists():
                    continue
                result = run(options, network, name, seed)
                path.write_text(json.dumps(result, indent=1) + "\n")
                print(f"{path.stem}: Dice {result['dice']:.4f}, IoU {result['iou']:.4f}", flush=True)


def run(options: argparse.Namespace, network_name: str, name: str, seed: int) -> dict[str, Any]:
    """Train and score one network on one set with one seed."""
    set_determinism(seed)
    channels, axes, group = SETS[name]
    train_items, val_items = split(options.data / name, options.fold, group)
    network = {**NETWORKS, **VARIANTS}[network_name](channels, 2).to(options.device)
    scale = load_and_scale(channels)
    train = CacheDataset(train_items, Compose([*scale, *augmentation(axes)]), progress=False)
    started = time.perf_counter()
    loss, steps = fit(network, train, options.steps, options.batch_size, options.seconds)
    seconds = time.perf_counter() - started
    weights = options.results / "weights" / f"{run_name(options, network_name, name, seed)}.pt"
    weights.parent.mkdir(exist_ok=True)
    network.cpu()  # scores and costs are a CPU's for all
    torch.save(network.state_dict(), weights)
    images, labels = load_all(val_items, scale)
    return {
        "network": network_name,
        "set": name,
        "seed": seed,
        "fold": options.fold,
        "steps": steps,
        "batch_size": options.batch_size,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "train_seconds": round(seconds, 1),
        "train_loss": loss,
        **score(network, images, labels),
        **cost(network, channels, options.batch_size),
    }


def fit(
    network: nn.Module,
    data: CacheDataset,
    steps: int,
    batch_size: int,
    seconds: float | None = None,
    learning_rate: float = 1e-3,
) -> tuple[float, int]:
    """Train for a number of steps, or of seconds; return the mean loss of the last tenth and the steps done."""
    criterion = DiceCELoss(softmax=True, to_onehot_y=True, include_background=False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=1e-4)
    loader = DataLoader(data, batch_size=batch_size, shuffle=True, drop_last=True)
    network.train()
    device = next(network.parameters()).device
    # Seconds of this process, so that what else the machine does gives no network an advantage.
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    losses: list[float] = []
    started = clock()
    while True:
        for batch in loader:
            done = (clock() - started) / seconds if seconds else len(losses) / steps
            if done >= 1:
                tail = max(len(losses) // 10, 1)
                return sum(losses[-tail:]) / tail, len(losses)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min((len(losses) + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * done))
            logits = network(plain(batch["image"]).to(device))
            loss = criterion(logits, plain(batch["label"]).to(device))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 12.0)
            optimizer.step()
            losses.append(loss.item())


@torch.no_grad()
def score(network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Return the mean Dice and intersection over union of the foreground over the images, and each image's Dice."""
    network.eval()
    dice, iou = DiceMetric(include_background=False), MeanIoU(include_background=False)
    chosen = torch.cat([network(rows).argmax(1, keepdim=True) for rows in images.split(8)])
    pair = (
        nn.functional.one_hot(chosen[:, 0], 2).movedim(-1, 1),
        nn.functional.one_hot(labels[:, 0], 2).movedim(-1, 1),
    )
    dice(*pair)
    iou(*pair)
    return {
        "dice": float(dice.aggregate()),
        "iou": float(iou.aggregate()),
        "each_dice": [round(value, 4) for value in dice.get_buffer().flatten().tolist()],
    }


def cost(network: nn.Module, channels: int, batch_size: int) -> dict[str, Any]:
    """Return the multiply-adds and the time of an image in inference, and the peak memory of a training step."""
    images = torch.rand(batch_size, channels, SIZE, SIZE)
    return {
        "infer_ms": round(inference_ms(network, (1, channels, SIZE, SIZE)), 1),
        "multiply_adds": multiply_adds(network.eval(), images[:1].shape),
        "peak_mib": round(peak_mib(lambda: network.train()(images).square().mean().backward()), 1),
    }


def split(folder: Path, fold: bool, group: int | None) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return the training and the scored pairs: train and val, or with ``fold`` two parts of train."""
    train = segmentation_items(folder, "train")
    if not fold:
        return train, segmentation_items(folder, "val")
    if group is None:
        return hold_out(train, "train"), hold_out(train, "val")
    names = sorted({Path(item["image"]).name[:group] for item in train})
    kept = set(hold_out(names, "train"))
    inside = [Path(item["image"]).name[:group] in kept for item in train]
    return (
        [item for item, keep in zip(train, inside, strict=True) if keep],
        [item for item, keep in zip(train, inside, strict=True) if not keep],
    )


def load_and_scale(channels: int) -> list[Any]:
    keys = ["image", "label"]
    return [
        LoadMedicalImaged(keys="image", channels=channels),
        LoadMaskd(keys="label", values=[0, 255]),
        Resized(keys=keys, spatial_size=SIZE, size_mode="longest", mode=["area", "nearest"]),
        ResizeWithPadOrCropd(keys=keys, spatial_size=(SIZE, SIZE)),
        NormalizeIntensityd(keys="image"),
    ]


def augmentation(axes: tuple[int, ...]) -> list[Any]:
    keys = ["image", "label"]
    return [
        *(RandFlipd(keys=keys, spatial_axis=axis, prob=0.5) for axis in axes),
        RandAffined(
            keys=keys,
            prob=0.8,
            rotate_range=math.radians(15),
            translate_range=(8, 8),
            scale_range=0.15,
            mode=["bilinear", "nearest"],
            padding_mode="border",
        ),
        RandAdjustContrastd(keys="image", prob=0.3, gamma=(0.7, 1.5)),
        RandScaleIntensityd(keys="image", factors=0.2, prob=0.5),
        RandShiftIntensityd(keys="image", offsets=0.2, prob=0.5),
    ]


def load_all(items: list[dict[str, str]], scale: list[Any]) -> tuple[Tensor, Tensor]:
    pairs = CacheDataset(items, Compose(scale), progress=False)
    images = torch.stack([plain(pair["image"]) for pair in pairs])
    return images, torch.stack([plain(pair["label"]) for pair in pairs]).long()


def plain(image: Tensor) -> Tensor:
    return image.as_tensor() if hasattr(image, "as_tensor") else image


def run_name(options: argparse.Namespace, network: str, name: str, seed: int) -> str:
    part = "fold" if options.fold else "val"
    length = f"-{options.seconds:.0f}s" if options.seconds else f"-{options.steps}" if options.steps != STEPS else ""
    batch = f"-batch{options.batch_size}" if options.batch_size != BATCH_SIZE else ""
    return f"{part}{length}{batch}-{name}-{network}-{seed}"


def table(options: argparse.Namespace) -> str:
    """Return Markdown tables of scores, differences from MONAI's networks and costs, and the missing cells by name."""
    results: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    missing = []
    for name, network, seed in product(options.sets, options.networks, options.seeds):
        path = options.results / f"{run_name(options, network, name, seed)}.json"
        if path.exists():
            results.setdefault((name, network), {})[seed] = json.loads(path.read_text())
        else:
            missing.append(path.stem)
    ours = [network for network in options.networks if network not in MONAI]
    parts = {
        "Dice, mean (smallest to largest of the seeds)": scores(results, options.sets, options.networks, "dice"),
        "Intersection over union": scores(results, options.sets, options.networks, "iou"),
        "Dice minus that of MONAI's best": differences(results, options.sets, ours, MONAI),
        "Cost": costs(results, options.networks),
    }
    if missing:
        parts["Missing"] = ", ".join(missing)
    return "\n\n".join(f"{title}:\n\n{text}" for title, text in parts.items())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the sets")
    parser.add_argument("--results", type=Path, default=Path("results/segmentation"), help="folder of the JSON files")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--networks", nargs="+", choices=[*NETWORKS, *VARIANTS], default=list(NETWORKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seconds", type=float, help="train for this long in place of a number of steps")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="where to train, such as cuda")
    parser.add_argument("--fold", action="store_true", help="score on a fifth of train in place of val")
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
