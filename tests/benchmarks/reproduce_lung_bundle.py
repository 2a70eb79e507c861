"""Train, prune, evaluate, explain and document the weights of ``lung_xray_kanunet_segmentation``, by one command.

    python tests/benchmarks/reproduce_lung_bundle.py DATA/lung_fields_chest_xray --out WORK --publish

Runs the bundle's own configurations in a copy below ``--out``; steps that are done there are not repeated, and a
training that was cut short goes on. Then inference writes masks of the val images, and these files, in the geometry of
the images, are scored against the references: what a user gets. ``--publish`` puts model, manifest, pictures, report
and the table of results into the bundle of this checkout.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.metrics import compute_dice
from PIL import Image

from monai_deqkan.data import bundle_folder, copy_bundle, image_files

NAME = "lung_xray_kanunet_segmentation"
TRAINING: dict[str, Any] = {
    "class_names": ["background", "lungs"],
    "image_size": [256, 256],
    "max_epochs": 16,
    "patience": 16,
}
FINE_TUNED = {"max_epochs": 4, "patience": 4}
EXPLAINED = {"num_images": 8, "num_channels": 4}


def main() -> None:
    options = _options()
    data, work = options.data.resolve(), options.out.resolve()
    bundle = work / "bundle"
    if not bundle.exists():
        copy_bundle(NAME, bundle)
        shutil.rmtree(bundle / "models", ignore_errors=True)
    configs = bundle / "configs"
    started = any((bundle / "models").glob("checkpoint_epoch=*.pt"))
    train = configs / "train.json"
    step([train], bundle / "logs", dataset_dir=data, resume=started, **TRAINING)
    step([configs / "evaluate.json"], bundle / "eval", dataset_dir=data)
    step([configs / "inference.json"], bundle / "predictions", dataset_dir=data / "val" / "images", keep_largest=2)
    step([train, configs / "prune.json"], bundle / "logs_pruned", dataset_dir=data, **FINE_TUNED)
    step([configs / "evaluate.json", configs / "explain.json"], bundle / "explain", dataset_dir=data, **EXPLAINED)
    results = results_page(bundle, data)
    (work / "results.md").write_text(results)
    print(results)
    if options.publish:
        publish(bundle, data, results)


def step(configs: list[Path], output: Path, **settings: Any) -> None:
    """Run the bundle's configurations laid over each other, unless their output is there."""
    done = output.with_name(f"{output.name}.done")
    if done.exists():
        return
    words = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str([str(path) for path in configs])]
    for name, value in {**settings, "output_dir": output, "progress": False}.items():
        words += [f"--{name}", str(value)]
    subprocess.run(words, check=True)
    done.touch()


def results_page(bundle: Path, data: Path) -> str:
    """Return the tables of results, as Markdown."""
    metrics = json.loads((bundle / "eval" / "metrics.json").read_text())
    lines = ["| score on val, at the network's size | mean |", "|---|---|"]
    for name, value in metrics.items():
        unit = " (pixels of the file)" if "hd95" in name or "distance" in name else ""  # X-rays without a spacing
        lines.append(f"| {name.removeprefix('val_').replace('_', ' ')}{unit} | {value:.4f} |")
    dices = file_dices(bundle / "predictions", data / "val" / "masks")
    lines += ["", "| Dice of the masks that inference writes, at the size of the files | |", "|---|---|"]
    lines += [f"| mean of {len(dices)} images | {np.mean(dices):.4f} |", f"| lowest | {min(dices):.4f} |"]
    pruning = json.loads((bundle / "logs_pruned" / "pruning.json").read_text())
    lines += ["", f"| Dice on val, {pruning['amount']:.0%} of the edges pruned | |", "|---|---|"]
    steps = ("before", "pruned", "fine_tuned")
    lines += [f"| {name.replace('_', ' ')} | {pruning[name]:.4f} |" for name in steps]
    return "\n".join(lines) + "\n"


def file_dices(predictions: Path, masks: Path) -> list[float]:
    """Score the written masks against the references, pixel by pixel of the files."""
    dices = []
    for reference in image_files(masks):
        pair = [
            torch.from_numpy(np.array(Image.open(path).convert("L")) > 127)[None, None]
            for path in (predictions / f"{reference.stem}_mask.png", reference)
        ]
        dices.append(float(compute_dice(pair[0].float(), pair[1].float())))
    return dices


def publish(bundle: Path, data: Path, results: str) -> None:
    """Put model, manifest, pictures and results into the bundle of this checkout."""
    target = bundle_folder(NAME)
    (target / "models").mkdir(exist_ok=True)
    for name in ("model.pt", "model.json"):
        shutil.copyfile(bundle / "models" / name, target / "models" / name)
    with (target / "models" / "training_images.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "sha256"])
        for path in image_files(data / "train"):
            writer.writerow([path.relative_to(data).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()])
    for path in (bundle / "eval" / "worst.png", bundle / "explain" / "interpretation.html"):
        shutil.copyfile(path, target / "docs" / path.name)
    page = target / "docs" / "README.md"
    before, _, rest = page.read_text(encoding="utf-8").partition("<!--results-->\n")
    after = rest.partition("<!--end of results-->\n")[2]
    text = f"{before}<!--results-->\n\n{results}\n<!--end of results-->\n{after}"
    page.write_text(text, encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train/ and val/")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--publish", action="store_true", help="put the results into the bundle of this checkout")
    return parser.parse_args()


if __name__ == "__main__":
    main()
