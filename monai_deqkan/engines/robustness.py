"""How a classifier's accuracy and area under the ROC curve fall with corruptions and attacks."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.metrics import compute_roc_auc
from torch import Tensor, nn
from tqdm import tqdm

from monai_deqkan._checks import check_choice, check_int
from monai_deqkan.engines.attacks import check_labels, class_logits, fgsm_attack, pgd_attack
from monai_deqkan.engines.corruptions import CORRUPTIONS, check_unit_images, corrupt
from monai_deqkan.networks.layers.kan_inputs import evaluation_mode
from monai_deqkan.visualize import plot_robustness

__all__ = [
    "RobustnessCell",
    "RobustnessScore",
    "attack_scores",
    "balanced_rows",
    "robustness_score",
    "write_robustness_report",
]

_Change = Callable[[Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class RobustnessCell:
    """One line of the table.

    Attributes:
        name: the corruption or attack; ``"clean"`` for neither.
        severity: 1 to 5; of an attack the largest change of a pixel in units of 1/255; 0 for clean images.
        setting: the number behind it; see :data:`~monai_deqkan.engines.CORRUPTIONS`; of an attack its epsilon.
        accuracy: share of images whose likeliest class is the true one.
        auc: area under the ROC curve, each class against the rest, mean over the classes.
    """

    name: str
    severity: float
    setting: float
    accuracy: float
    auc: float


@dataclass(frozen=True)
class RobustnessScore:
    """Clean and corrupted results of one network.

    Attributes:
        clean: the images as they are.
        cells: one per corruption and severity.
    """

    clean: RobustnessCell
    cells: tuple[RobustnessCell, ...]

    @property
    def score(self) -> float:
        """The mean area under the ROC curve over all corruptions and severities."""
        return math.fsum(cell.auc for cell in self.cells) / len(self.cells)

    @property
    def accuracy(self) -> float:
        """The mean accuracy over all corruptions and severities."""
        return math.fsum(cell.accuracy for cell in self.cells) / len(self.cells)

    def curves(self, value: str = "auc") -> dict[str, list[float]]:
        """Return for each corruption the value (``"auc"`` or ``"accuracy"``) clean and at severities 1 to 5."""
        check_choice("value", value, ("auc", "accuracy"))
        return {
            name: [getattr(self.clean, value), *(getattr(cell, value) for cell in self.cells if cell.name == name)]
            for name in dict.fromkeys(cell.name for cell in self.cells)
        }

    def to_dict(self) -> dict[str, Any]:
        """Return all of it in types that JSON has."""
        return {"score": self.score, "accuracy": self.accuracy, **asdict(self)}


def robustness_score(
    network: nn.Module, images: Tensor, labels: Tensor, *, seed: int = 0, batch_size: int = 64
) -> RobustnessScore:
    """Score a classifier on clean images and on the whole fixed table of corruptions.

    Args:
        network: returns logits ``(B, classes)``, or ``(B, 1)`` for the second of two classes; runs in evaluation mode.
        images: all images, intensities in [0, 1], shape ``(N, C, *space)``; batches go to the network's device.
        labels: true classes, integers ``(N,)``; each class must occur.
        seed: seed of the corruptions, see :func:`~monai_deqkan.engines.corrupt`.
        batch_size: images at a time; has no influence on the result beyond rounding.

    Returns:
        The score and its table.

    Raises:
        TypeError: if images or labels are of another kind.
        ValueError: if shapes do not fit, images lie outside [0, 1], a class is absent, or the network returns NaN.

    Example:
        >>> class Brightness(nn.Module):
        ...     def forward(self, images):
        ...         return images.flatten(1).mean(1, keepdim=True) - 0.5
        >>> images = torch.tensor([0.2, 0.8]).view(2, 1, 1, 1).expand(2, 1, 32, 32)
        >>> result = robustness_score(Brightness(), images, torch.tensor([0, 1]))
        >>> result.clean.accuracy, len(result.cells)
        (1.0, 30)
    """
    images, labels = _checked(images, labels, batch_size)

    def score(name: str, severity: int, setting: float) -> RobustnessCell:
        def change(rows: Tensor, _: Tensor, first: int) -> Tensor:
            return rows if severity == 0 else corrupt(rows, name, severity, seed=seed, first_index=first)

        return _cell(network, images, labels, batch_size, change, (name, severity, setting))

    clean = score("clean", 0, 0.0)
    cells = [
        score(name, severity, setting)
        for name, corruption in CORRUPTIONS.items()
        for severity, setting in enumerate(corruption.settings, start=1)
    ]
    return RobustnessScore(clean, tuple(cells))


def attack_scores(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    attacks: Sequence[str] = ("fgsm", "pgd"),
    levels: Sequence[float] = (1, 2, 4),
    seed: int = 0,
    batch_size: int = 32,
) -> tuple[RobustnessCell, ...]:
    """Score a classifier on images attacked through its own gradient.

    PGD takes 10 steps of ``2.5 * epsilon / 10`` from a random start.

    Args:
        network: see :func:`robustness_score`.
        images: see :func:`robustness_score`.
        labels: see :func:`robustness_score`.
        attacks: which: ``"fgsm"``, ``"pgd"``.
        levels: largest change of a pixel, in units of 1/255 of the intensity range.
        seed: seed of the random starts.
        batch_size: images at a time.

    Returns:
        The clean images first, then one cell per attack and level.

    Raises:
        TypeError: if images or labels are of another kind.
        ValueError: see :func:`robustness_score`, or for an unknown attack.
    """
    images, labels = _checked(images, labels, batch_size)
    for attack in attacks:
        check_choice("attacks", attack, ("fgsm", "pgd"))

    def score(name: str, level: float) -> RobustnessCell:
        def change(rows: Tensor, classes: Tensor, first: int) -> Tensor:
            if name == "clean":
                return rows
            if name == "fgsm":
                return fgsm_attack(network, rows, classes, level / 255)
            return pgd_attack(network, rows, classes, level / 255, seed=seed, first_index=first)

        return _cell(network, images, labels, batch_size, change, (name, level, level / 255))

    return (score("clean", 0), *(score(attack, level) for attack in attacks for level in levels))


def balanced_rows(labels: Tensor, count: int, seed: int = 0) -> Tensor:
    """Choose about ``count`` images by chance, equally many of each class, and return their sorted numbers.

    Raises:
        ValueError: if ``count`` is smaller than the number of classes.
    """
    labels = check_labels(labels, len(labels))
    classes = labels.unique()
    check_int("count", count, minimum=len(classes))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shuffled = labels.cpu()[order]
    rows = [order[shuffled == value][: count // len(classes)] for value in classes.tolist()]
    return torch.cat(rows).sort().values


def write_robustness_report(
    network: nn.Module,
    batches: Iterable[Any],
    output_dir: str | os.PathLike[str],
    *,
    name: str = "model",
    seed: int = 0,
    batch_size: int = 32,
    num_attacked: int = 96,
    progress: bool = False,
) -> RobustnessScore:
    """Score a trained classifier on corruptions and attacks; write ``robustness.csv``, ``.json`` and ``.png``.

    Nothing about single images is written.

    Args:
        network: see :func:`robustness_score`.
        batches: batches with ``image`` and ``label``, such as a data loader gives.
        output_dir: folder of the files; made where absent.
        name: what the curve is called.
        seed: seed of the corruptions and attacks, and of the choice of attacked images.
        batch_size: images at a time.
        num_attacked: number of images that are attacked, equally many of each class; 0 for none.
        progress: whether to show the reading of the batches.

    Returns:
        The score.

    Raises:
        ValueError: if there are no images, or see :func:`robustness_score`.
        FileExistsError: if one of the files is there already.
    """
    folder = Path(output_dir)
    files = {suffix: folder / f"robustness.{suffix}" for suffix in ("csv", "json", "png")}
    for path in files.values():
        if path.exists():
            raise FileExistsError(f"{path} is there already; nothing was written. Name another folder.")
    check_int("num_attacked", num_attacked, minimum=0)
    parts = [(batch["image"], torch.as_tensor(batch["label"])) for batch in tqdm(batches, disable=not progress)]
    if not parts:
        raise ValueError("`batches` holds no image. Check the folder of the data set.")
    images, labels = (torch.cat([part[index].cpu() for part in parts]) for index in (0, 1))
    result = robustness_score(network, images, labels, seed=seed, batch_size=batch_size)
    attacks: tuple[RobustnessCell, ...] = ()
    if num_attacked:
        rows = balanced_rows(labels, num_attacked, seed)
        attacks = attack_scores(network, images[rows], labels[rows], seed=seed, batch_size=batch_size)
    folder.mkdir(parents=True, exist_ok=True)
    with files["csv"].open("w", newline="") as file:
        writer = csv.DictWriter(file, ("name", "severity", "setting", "accuracy", "auc"))
        writer.writeheader()
        writer.writerows(asdict(cell) for cell in (result.clean, *result.cells, *attacks[1:]))
    report = {
        "intended_use": "Research only; not for clinical use.",
        "images": len(labels),
        "seed": seed,
        **result.to_dict(),
        "attacked_images": len(rows) if num_attacked else 0,
        "attacks": [asdict(cell) for cell in attacks],
    }
    files["json"].write_text(json.dumps(report, indent=2) + "\n")
    curves = {corruption: [values] for corruption, values in result.curves().items()}
    plot_robustness({name: curves}, title="Robustness (research only; not for clinical use)").savefig(files["png"])
    return result


def _checked(images: Tensor, labels: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    check_int("batch_size", batch_size)
    images = check_unit_images(images)
    return images, check_labels(labels, len(images)).cpu()


def _cell(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    change: _Change,
    key: tuple[str, float, float],
) -> RobustnessCell:
    device = next((parameter.device for parameter in network.parameters()), images.device)
    logits = []
    with evaluation_mode(network):
        for first in range(0, len(images), batch_size):
            rows = slice(first, first + batch_size)
            changed = change(images[rows].to(device), labels[rows].to(device), first)
            with torch.no_grad():
                logits.append(class_logits(network(changed), len(changed)).double().cpu())
    accuracy, auc = _accuracy_and_auc(torch.cat(logits), labels)
    return RobustnessCell(*key, accuracy, auc)


def _accuracy_and_auc(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    classes = logits.shape[1]
    found = labels.unique().tolist()
    if found != list(range(classes)):
        raise ValueError(
            f"`labels` must hold each of the network's {classes} classes, 0 to {classes - 1}; got {found}."
        )
    if not bool(logits.isfinite().all()):
        raise ValueError("The network returned logits that are NaN or infinite; they cannot be scored.")
    probabilities = logits.softmax(1)
    one_hot = nn.functional.one_hot(labels, classes)
    auc = float(np.asarray(compute_roc_auc(probabilities, one_hot, average="macro")))
    return float((probabilities.argmax(1) == labels).double().mean()), auc
