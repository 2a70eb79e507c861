"""Train, evaluate and document the weights of ``chest_xray_deqkan_classification``, by one command.

    python tests/benchmarks/reproduce_chest_xray_bundle.py DATA/chest_xray_pneumonia --out WORK \\
        --foreign DATA/tb_chest_xray --publish

Runs the bundle's own configurations in a copy below ``--out`` (steps that are done there are not repeated): train,
evaluate on val, robustness; then checks the solves (target reached, certified factor, ten times the budget). With
``--foreign`` X-rays of other hospitals, in class folders whose first class is normal, are scored too. ``--publish``
puts model, manifest, pictures and the table of results into the bundle of this checkout.
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

import torch
from monai.data import DataLoader, Dataset
from monai.transforms import Compose, Resized, ResizeWithPadOrCropd, ScaleIntensityRangePercentilesd
from sklearn.metrics import roc_auc_score
from torch import Tensor

from monai_deqkan.data import bundle_folder, classification_items, copy_bundle, image_files
from monai_deqkan.engines import load_task, load_weights
from monai_deqkan.networks import certify
from monai_deqkan.networks.nets import DEQKANClassifier
from monai_deqkan.solvers import SolveRecorder, solve_budget
from monai_deqkan.transforms import LoadMedicalImaged

NAME = "chest_xray_deqkan_classification"
# One patient per number; the two series of normal children count on their own.
PATIENTS = r"^person(\d+)|^IM-(\d+)|^NORMAL2-IM-(\d+)"
TRAINING = {"patients": PATIENTS, "max_epochs": 14, "patience": 14, "batch_size": 32}
PICTURES = ("roc", "precision_recall", "reliability", "confusion_matrix", "features", "robustness")


def main() -> None:
    options = _options()
    data, work = options.data.resolve(), options.out.resolve()
    bundle = work / "bundle"
    if not bundle.exists():
        copy_bundle(NAME, bundle)
    started = any((bundle / "models").glob("checkpoint_epoch=*.pt"))
    step(bundle, "train", bundle / "logs", dataset_dir=data, resume=started, **TRAINING)
    step(bundle, "evaluate", bundle / "eval", dataset_dir=data)
    step(bundle, "robustness", bundle / "eval_robustness", dataset_dir=data, num_attacked=options.attacked)
    facts = check_solves(bundle, data)
    facts["foreign"] = score_foreign(bundle, options.foreign) if options.foreign else None
    (work / "checks.json").write_text(json.dumps(facts, indent=2) + "\n")
    results = results_page(bundle, facts)
    (work / "results.md").write_text(results)
    print(results)
    if options.publish:
        publish(bundle, data, results)


def step(bundle: Path, config: str, output: Path, **settings: Any) -> None:
    """Run one of the bundle's configurations, unless its output is there."""
    done = output.with_name(f"{output.name}.done")
    if done.exists():
        return
    words = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(bundle / "configs" / f"{config}.json")]
    for name, value in {**settings, "output_dir": output, "progress": False}.items():
        words += [f"--{name}", str(value)]
    subprocess.run(words, check=True)
    done.touch()


def loader(items: list[dict[str, Any]], task: dict[str, Any]) -> DataLoader:
    """Load images as the bundle's configurations do."""
    size = task["preprocessing"]["image_size"]
    transform = Compose(
        [
            LoadMedicalImaged(keys="image", channels=task["preprocessing"]["in_channels"]),
            Resized(keys="image", spatial_size=max(size), size_mode="longest", anti_aliasing=True),
            ResizeWithPadOrCropd(keys="image", spatial_size=size),
            ScaleIntensityRangePercentilesd(keys="image", lower=0, upper=99.5, b_min=0.0, b_max=1.0, clip=True),
        ]
    )
    return DataLoader(Dataset(items, transform), batch_size=32)


def trained(bundle: Path) -> tuple[DEQKANClassifier, dict[str, Any]]:
    task = load_task(bundle / "models" / "model.json")
    settings = task.get("network_settings", {})
    network = DEQKANClassifier(2, 1, len(task["class_names"]), features=task["features"], **settings)
    load_weights(network, bundle / "models" / "model.pt")
    return network.eval(), task


@torch.no_grad()
def check_solves(bundle: Path, data: Path) -> dict[str, Any]:
    """Tell whether every solve reached its target, what is certified, and what ten times the budget changes."""
    network, task = trained(bundle)
    items = classification_items(data, "evaluate", class_names=task["class_names"])
    solver = network.equilibrium.solver
    decisions: list[Tensor] = []
    tight: list[Tensor] = []
    with SolveRecorder() as usual:
        batches = [batch["image"].as_tensor() for batch in loader(items, task)]
        decisions = [network(batch).argmax(1) for batch in batches]
    with SolveRecorder() as long, solve_budget(rtol=1e-7, max_iter=10 * solver.max_iter, on_failure="ignore"):
        tight = [network(batch).argmax(1) for batch in batches]
    evaluations = usual.evaluations().float()
    return {
        "images": len(items),
        "converged": int(usual.converged().sum()),
        "residual_target": solver.rtol,
        "largest_residual": float(usual.relative_residual().max()),
        "evaluations_mean": float(evaluations.mean()),
        "evaluations_min": int(evaluations.min()),
        "evaluations_max": int(evaluations.max()),
        "certified_factor": certify(network, batches[0]).factor,
        "long_evaluations_mean": float(long.evaluations().float().mean()),
        "decisions_changed_by_long_solves": int((torch.cat(decisions) != torch.cat(tight)).sum()),
    }


@torch.no_grad()
def score_foreign(bundle: Path, folder: Path) -> dict[str, Any]:
    """Score X-rays of another hospital: the share of its normal images that is called normal, and the ranking."""
    network, task = trained(bundle)
    items = classification_items(folder, "train")
    probability = torch.cat(
        [
            (network(batch["image"].as_tensor()) / task.get("temperature", 1.0)).softmax(1)[:, 1]
            for batch in loader(items, task)
        ]
    )
    labels = torch.tensor([item["label"] for item in items])
    return {
        "normal_images": int((labels == 0).sum()),
        "specificity": float((probability[labels == 0] < task["threshold"]).float().mean()),
        "auc_against_the_other_class": float(roc_auc_score(labels, probability)),
    }


def results_page(bundle: Path, facts: dict[str, Any]) -> str:
    """Return the table of results, as Markdown."""
    with (bundle / "eval" / "metrics.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    robustness = json.loads((bundle / "eval_robustness" / "robustness.json").read_text())
    lines = ["| score on val | value | 95 % interval |", "|---|---|---|"]
    lines += [
        f"| {row[0].replace('_', ' ')} | {float(row[1]):.3f} | {float(row[2]):.3f}-{float(row[3]):.3f} |"
        for row in rows[1:]
    ]
    lines += ["", f"Robustness score (mean AUC of 6 corruptions in 5 severities): {robustness['score']:.3f}.", ""]
    lines += [f"| attack on {robustness['attacked_images']} images of val | accuracy |", "|---|---|"]
    for cell in robustness["attacks"]:
        attack = "none" if cell["name"] == "clean" else f"{cell['name'].upper()}, {255 * cell['setting']:.0f}/255"
        lines.append(f"| {attack} | {cell['accuracy']:.3f} |")
    lines += ["", "| solves on val | |", "|---|---|"]
    lines += [f"| {name.replace('_', ' ')} | {value:.6g} |" for name, value in facts.items() if name != "foreign"]
    if facts["foreign"]:
        lines += ["", "| X-rays of another hospital | |", "|---|---|"]
        lines += [f"| {name.replace('_', ' ')} | {value:.3g} |" for name, value in facts["foreign"].items()]
    return "\n".join(lines) + "\n"


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
    for name in PICTURES:
        folder = bundle / ("eval_robustness" if name == "robustness" else "eval")
        shutil.copyfile(folder / f"{name}.png", target / "docs" / f"{name}.png")
    page = target / "docs" / "README.md"
    before, _, rest = page.read_text(encoding="utf-8").partition("<!--results-->\n")
    after = rest.partition("<!--end of results-->\n")[2]
    text = f"{before}<!--results-->\n\n{results}\n<!--end of results-->\n{after}"
    page.write_text(text, encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train/ and val/")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--foreign", type=Path, help="class folders of another hospital, the first class normal")
    parser.add_argument("--attacked", type=int, default=96, help="number of images attacked by FGSM and PGD")
    parser.add_argument("--publish", action="store_true", help="put the results into the bundle of this checkout")
    return parser.parse_args()


if __name__ == "__main__":
    main()
