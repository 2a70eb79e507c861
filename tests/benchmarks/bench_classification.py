"""DEQ-KAN against MONAI's ResNet18 and DenseNet121 by one shared recipe on folders of images; one JSON per run.

    python tests/benchmarks/bench_classification.py DATA --sets brain_tumor_mri tb_chest_xray --seeds 0 1 2
    python tests/benchmarks/bench_classification.py DATA --table

``DATA`` holds ``<set>/{train,val}/<class>/*``. A run that has its JSON below ``--results`` is not repeated, so the
command goes on where it was stopped; ``--table`` prints means and spreads, and names the cells that are missing.
``--fold`` cuts a fifth of each class from ``train`` and scores on that: choices of design are made there, never on val.

The recipe: 128 x 128 pixels scaled to [0, 1], flips where anatomy allows, rotation up to 15 degrees, shifts, scaling,
gamma and intensity; cross-entropy, AdamW 1e-3 with weight decay 1e-4, one tenth of the steps as linear warm-up, cosine
decay, gradients clipped to norm 2; the last step's weights are scored once.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from monai.data import CacheDataset, DataLoader
from monai.metrics import ROCAUCMetric
from monai.networks.nets import DenseNet121, resnet18
from monai.transforms import (
    Compose,
    RandAdjustContrastd,
    RandAffined,
    RandFlipd,
    RandScaleIntensityd,
    RandShiftIntensityd,
    Resized,
    ResizeWithPadOrCropd,
    ScaleIntensityRangePercentilesd,
)
from monai.utils import set_determinism
from torch import Tensor, nn

from monai_deqkan.data import class_names, classification_items, hold_out
from monai_deqkan.networks.nets import DEQKANClassifier
from monai_deqkan.solvers import SolveRecorder
from monai_deqkan.transforms import LoadMedicalImaged

# Channels, and the axes along which a mirrored image is as likely as the original.
SETS: dict[str, tuple[int, tuple[int, ...]]] = {
    "brain_tumor_mri": (1, (0,)),
    "lung_histopathology": (3, (0, 1)),
    "tb_chest_xray": (1, ()),
    "chest_xray_pneumonia": (1, ()),
}
NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "deqkan": lambda channels, classes: DEQKANClassifier(2, channels, classes),
    "resnet18": lambda channels, classes: resnet18(
        spatial_dims=2, n_input_channels=channels, num_classes=classes, conv1_t_stride=2
    ),
    "densenet121": lambda channels, classes: DenseNet121(2, channels, classes),
}
SIZE = 128


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
                print(f"{path.stem}: AUC {result['auc']:.4f}, accuracy {result['accuracy']:.3f}", flush=True)


def run(options: argparse.Namespace, network_name: str, name: str, seed: int) -> dict[str, Any]:
    """Train and score one network on one set with one seed."""
    set_determinism(seed)
    channels, axes = SETS[name]
    train_items, val_items = split(options.data / name, options.fold)
    classes = len(class_names(options.data / name))
    # Channels last is a fifth faster for the ordinary networks on a CPU, and changes no result beyond rounding.
    network = NETWORKS[network_name](channels, classes).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    scale = load_and_scale(channels)
    train = CacheDataset(train_items, Compose([*scale, *augmentation(axes)]), progress=False)
    started = time.perf_counter()
    loss, evaluations = fit(network, train, options.steps, options.batch_size)
    seconds = time.perf_counter() - started
    weights = options.results / "weights" / f"{run_name(options, network_name, name, seed)}.pt"
    weights.parent.mkdir(exist_ok=True)
    torch.save(network.state_dict(), weights)
    images, labels = load_all(val_items, scale)
    return {
        "network": network_name,
        "set": name,
        "seed": seed,
        "fold": options.fold,
        "steps": options.steps,
        "batch_size": options.batch_size,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "train_seconds": round(seconds, 1),
        "train_loss": loss,
        "train_evaluations": evaluations,
        **score(network, images, labels, classes),
    }


def fit(network: nn.Module, data: CacheDataset, steps: int, batch_size: int) -> tuple[float, float | None]:
    """Train for a number of steps; return the mean loss and cell evaluations of the last tenth."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-4)
    warm_up = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * max(step - warm_up, 0) / (steps - warm_up))
        ),
    )
    loader = DataLoader(data, batch_size=batch_size, shuffle=True, drop_last=True)
    network.train()
    losses: list[float] = []
    evaluations: list[float] = []
    while len(losses) < steps:
        for batch in loader:
            with SolveRecorder() as recorder:
                loss = nn.functional.cross_entropy(network(plain(batch["image"])), batch["label"])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 2.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            evaluations += [float(recorder.evaluations().float().mean())] if recorder.records else []
            if len(losses) == steps:
                break
    tail = max(steps // 10, 1)
    return sum(losses[-tail:]) / tail, sum(evaluations[-tail:]) / tail if evaluations else None


@torch.no_grad()
def score(network: nn.Module, images: Tensor, labels: Tensor, classes: int) -> dict[str, Any]:
    """Return the area under the curve (one class against the rest, mean of the classes) and the accuracy."""
    network.eval()
    probabilities = torch.cat([network(rows).softmax(1) for rows in images.split(64)])
    metric = ROCAUCMetric()
    metric(y_pred=list(probabilities), y=list(nn.functional.one_hot(labels, classes)))
    return {
        "auc": float(metric.aggregate()),
        "accuracy": float((probabilities.argmax(1) == labels).float().mean()),
        "probabilities": [[round(value, 5) for value in row] for row in probabilities.tolist()],
    }


def split(folder: Path, fold: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the training and the scored images: train and val, or with ``fold`` two parts of train."""
    train = classification_items(folder, "train")
    if not fold:
        return train, classification_items(folder, "val")
    labels = sorted({item["label"] for item in train})
    groups = [[item for item in train if item["label"] == label] for label in labels]
    first, second = ([item for group in groups for item in hold_out(group, part)] for part in ("train", "val"))
    return first, second


def load_and_scale(channels: int) -> list[Any]:
    return [
        LoadMedicalImaged(keys="image", channels=channels),
        Resized(keys="image", spatial_size=SIZE, size_mode="longest", anti_aliasing=True),
        ResizeWithPadOrCropd(keys="image", spatial_size=(SIZE, SIZE)),
        ScaleIntensityRangePercentilesd(keys="image", lower=0, upper=99.5, b_min=0.0, b_max=1.0, clip=True),
    ]


def augmentation(axes: tuple[int, ...]) -> list[Any]:
    return [
        *(RandFlipd(keys="image", spatial_axis=axis, prob=0.5) for axis in axes),
        RandAffined(
            keys="image",
            prob=0.8,
            rotate_range=math.radians(15),
            translate_range=(8, 8),
            scale_range=0.1,
            padding_mode="zeros",
        ),
        RandAdjustContrastd(keys="image", prob=0.5, gamma=(0.7, 1.5)),
        RandScaleIntensityd(keys="image", factors=0.15, prob=0.5),
        RandShiftIntensityd(keys="image", offsets=0.05, prob=0.5),
    ]


def load_all(items: list[dict[str, Any]], scale: list[Any]) -> tuple[Tensor, Tensor]:
    transform = Compose(scale)
    images = [plain(transform(item)["image"]) for item in items]
    return torch.stack(images), torch.tensor([item["label"] for item in items])


def plain(image: Tensor) -> Tensor:
    return image.as_tensor() if hasattr(image, "as_tensor") else image


def run_name(options: argparse.Namespace, network: str, name: str, seed: int) -> str:
    return f"{'fold' if options.fold else 'val'}-{name}-{network}-{seed}"


def table(options: argparse.Namespace) -> str:
    """Return a Markdown table of means and spreads over the seeds, and the missing cells by name."""
    lines = ["| set | network | parameters | AUC mean (min-max) | accuracy mean (min-max) | seeds | s per run |"]
    lines.append("|---|---|---|---|---|---|---|")
    missing = []
    for name in options.sets:
        for network in options.networks:
            found = []
            for seed in options.seeds:
                path = options.results / f"{run_name(options, network, name, seed)}.json"
                if path.exists():
                    found.append(json.loads(path.read_text()))
                else:
                    missing.append(path.stem)
            if found:
                cells = [spread([result[key] for result in found]) for key in ("auc", "accuracy")]
                seconds = sum(result["train_seconds"] for result in found) / len(found)
                size = f"{found[0]['parameters'] / 1e6:.2f} M"
                lines.append(
                    f"| {name} | {network} | {size} | {cells[0]} | {cells[1]} | {len(found)} | {seconds:.0f} |"
                )
    return "\n".join([*lines, *([f"\nMissing: {', '.join(missing)}."] if missing else [])])


def spread(values: list[float]) -> str:
    return f"{sum(values) / len(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the sets")
    parser.add_argument("--results", type=Path, default=Path("results/classification"), help="folder of the JSON files")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS)[:3])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fold", action="store_true", help="score on a fifth of train in place of val")
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
