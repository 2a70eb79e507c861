"""What grid schedules and pruning do to a KANUNet trained by the bundle's configurations. Run by hand; asserts nothing.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_segmentation_schedule.py [DATA] [--seeds 0 1 2]

``DATA`` holds ``{train,val}/{images,masks}``, by default the sample `brain_tissue`: slices of a brain template, four
classes. One JSON per run below ``--results``; a run that has its own is not repeated. The table at the end gives Dice
on the validation part: at the last epoch, right after the first extension beside the same epoch without it, and what
pruning costs.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

from monai.bundle import ConfigWorkflow

from monai_deqkan.data import write_sample

CONFIGS = Path(__file__).parents[2] / "bundles" / "lung_xray_kanunet_segmentation" / "configs"
SCHEDULES: dict[str, dict[str, Any]] = {
    "fixed grid": {},
    "extended": {"extend_at": {"4": 6, "7": 12}},
    "refitted, extended": {"refit_every": 2, "refit_until": 6, "extend_at": {"4": 6, "7": 12}},
}
PRUNED = {"pruned": 0.5, "only fine-tuned": 0.0}


def main() -> None:
    """Run what has no result yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path, help="folder of images and masks; the sample where left out")
    parser.add_argument("--results", type=Path, default=Path("results/segmentation_schedule"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--fine-tune", type=int, default=5)
    parser.add_argument("--image-size", nargs=2, type=int, default=[80, 96])
    parser.add_argument("--learning-rate", type=float, default=0.001)
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        data = options.data or write_sample("brain_tissue", Path(temporary) / "data")
        for seed in options.seeds:
            for name in SCHEDULES:
                once(options, name, seed, lambda work, n=name, s=seed: train(options, data, work, n, s))
            for name in PRUNED:
                once(options, name, seed, lambda work, n=name, s=seed: prune(options, data, work, n, s))
    print(table(options))


def once(options: argparse.Namespace, name: str, seed: int, run: Any) -> None:
    """Call ``run`` in a folder of its own unless its result is there."""
    path = result_path(options, name, seed)
    if not path.exists():
        start = time.perf_counter()
        work = path.with_suffix("")
        work.mkdir(exist_ok=True)
        result = {"run": name, "seed": seed, **run(work), "seconds": round(time.perf_counter() - start)}
        path.write_text(json.dumps(result, indent=1) + "\n")


def train(options: argparse.Namespace, data: Path, work: Path, name: str, seed: int) -> dict[str, Any]:
    """Train on a schedule, from a grid of 3 intervals; return the validation Dice and the loss of each epoch."""
    settings = {
        "bundle_root": str(work),
        "dataset_dir": str(data),
        "network_settings": {"features": [8, 16, 32], "grid_size": 3, "stem_stride": 2, "up": "transposed"},
        "image_size": options.image_size,
        "max_epochs": options.epochs,
        "learning_rate": options.learning_rate,
        "batch_size": 4,
        "seed": seed,
        "ckpt_dir": str(work / "models"),
        "output_dir": str(work / f"logs-{time.time_ns()}"),
        **SCHEDULES[name],
    }
    run(["train.json"], settings)
    with (Path(settings["output_dir"]) / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["train_loss"]) for row in rows]
    return {
        "val_dice": [float(row["val_mean_dice"]) for row in rows],
        "loss": losses,
        "finite": all(map(math.isfinite, losses)),
    }


def prune(options: argparse.Namespace, data: Path, work: Path, name: str, seed: int) -> dict[str, Any]:
    """Prune the model of the fixed grid, fine-tune, and return what pruning cost."""
    trained = result_path(options, "fixed grid", seed).with_suffix("") / "models"
    output = work / f"logs-{time.time_ns()}"
    settings = {
        "bundle_root": str(work),
        "dataset_dir": str(data),
        "trained_dir": str(trained),
        "ckpt_dir": str(work / "models"),
        "output_dir": str(output),
        "prune_amount": PRUNED[name],
        "max_epochs": options.fine_tune,
        "learning_rate": options.learning_rate / 4,
        "batch_size": 4,
    }
    run(["train.json", "prune.json"], settings)
    record = json.loads((output / "pruning.json").read_text())
    return {key: record[key] for key in ("amount", "before", "pruned", "fine_tuned", "fine_tuned_epoch")}


def run(files: list[str], settings: dict[str, Any]) -> None:
    """Run configurations of the bundle on the CPU."""
    common = {"device": "cpu", "progress": False}
    paths = [str(CONFIGS / file) for file in files]
    workflow = ConfigWorkflow(paths, logging_file=False, workflow_type="train", **common, **settings)
    workflow.initialize()
    workflow.run()
    workflow.finalize()


def result_path(options: argparse.Namespace, name: str, seed: int) -> Path:
    """Return the file of a run's result; its folder has the same name without the suffix."""
    return options.results.absolute() / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}.json"


def table(options: argparse.Namespace) -> str:
    """Return two Markdown tables, one line per run."""
    lines = [
        "| schedule | seed | finite | last epoch | right after the first extension | without it |",
        "|---|---|---|---|---|---|",
    ]
    for name, schedule in SCHEDULES.items():
        for seed in options.seeds:
            found = json.loads(result_path(options, name, seed).read_text())
            dice = found["val_dice"]
            cells = "- | -"
            if "extend_at" in schedule and "refit_every" not in schedule:  # until then the runs are the same
                first = int(min(schedule["extend_at"], key=int)) - 1
                fixed = json.loads(result_path(options, "fixed grid", seed).read_text())["val_dice"]
                cells = f"{dice[first]:.4f} | {fixed[first]:.4f}"
            lines.append(f"| {name} | {seed} | {found['finite']} | {dice[-1]:.4f} | {cells} |")
    lines += ["", "| run | seed | edges gone | Dice before | right after | fine-tuned |", "|---|---|---|---|---|---|"]
    for name in PRUNED:
        for seed in options.seeds:
            found = json.loads(result_path(options, name, seed).read_text())
            cells = " | ".join(f"{found[key]:.4f}" for key in ("before", "pruned", "fine_tuned"))
            lines.append(f"| {name} | {seed} | {found['amount']:.0%} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
