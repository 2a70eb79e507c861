"""What each part of DEQ-KAN adds: one table over depth, cell, features, basis, damping and tolerance.

    python tests/benchmarks/bench_deqkan_ablation.py DATA
    python tests/benchmarks/bench_deqkan_ablation.py DATA --set brain_tumor_mri --cells equilibrium "depth 1" --seeds 0
    python tests/benchmarks/bench_deqkan_ablation.py DATA --network '{"hidden_features": 128, "pool": "avg"}'
    python tests/benchmarks/bench_deqkan_ablation.py DATA --table

``DATA`` holds ``<set>/{train,val}/<class>/*``. The recipe is that of ``bench_classification.py``; one JSON per cell and
seed goes below ``--results``. A run that has its JSON is not repeated, so the command goes on where it was stopped;
``--table`` prints what is there and names what is missing. The default takes about 40 minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from bench_classification import SETS, augmentation, fit, load_all, load_and_scale, plain, score, split
from bench_deqkan_training import peak_mib, training_step
from monai.data import CacheDataset
from monai.transforms import Compose
from monai.utils import set_determinism
from torch import nn

from monai_deqkan.data import class_names
from monai_deqkan.networks.nets import DEQKANClassifier, RecurrentKANClassifier
from monai_deqkan.solvers import SolveRecorder

# Constructor settings of each cell of the table, over those of `--network`; the first one is the reference.
CELLS: dict[str, dict[str, Any]] = {
    "equilibrium": {},
    **{f"depth {n}": {"num_steps": n} for n in (1, 5, 10)},
    "published recurrence, 10 steps": {"recurrence": True},
    "MLP cell": {"cell": "mlp"},
    "without CNN": {"backbone": "none"},
    "equilibrium on the map": {"equilibrium_on": "map"},
    **{f"{n} basis functions": {"kan_settings": {"grid_size": n - 1}} for n in (32, 64)},
    "8 B-splines": {"kan_settings": {"basis": "bspline", "grid_size": 5}},
    **{
        f"plain iteration, alpha {a:g}": {
            "solver": ("fixed_point_iteration", {"damping": round(1 - a, 6), "max_iter": 500})
        }
        for a in (0.1, 0.5, 1.0)
    },
    **{f"tolerance {t:g}": {"solver": ("anderson", {"rtol": t, "max_iter": 200})} for t in (1e-2, 1e-4, 1e-5)},
}
# Settings that the published recurrence has, too.
_SHARED = ("features", "blocks", "hidden_features", "pool", "dropout", "backbone", "backbone_channels")


def main() -> None:
    options = _options()
    if options.table:
        print(table(options))
        return
    torch.set_num_threads(options.threads)
    options.results.mkdir(parents=True, exist_ok=True)
    data = None
    for seed in options.seeds:
        for cell in options.cells:
            path = options.results / f"{run_name(options, cell, seed)}.json"
            if path.exists():
                continue
            data = load(options) if data is None else data
            result = run(options, cell, seed, *data)
            partial = path.with_suffix(".part")
            partial.write_text(json.dumps(result, indent=1) + "\n")
            partial.rename(path)
            print(f"{path.stem}: AUC {result['auc']:.4f}, accuracy {result['accuracy']:.3f}", flush=True)
    print(table(options))


def build(cell: str, overrides: dict[str, Any], channels: int, classes: int) -> nn.Module:
    settings = {**overrides, **CELLS[cell]}
    if settings.pop("recurrence", False):
        shared = {name: value for name, value in settings.items() if name in _SHARED}
        return RecurrentKANClassifier(2, channels, classes, **shared)
    if "kan_settings" in overrides:
        settings["kan_settings"] = {**overrides["kan_settings"], **CELLS[cell].get("kan_settings", {})}
    return DEQKANClassifier(2, channels, classes, **settings)


def load(options: argparse.Namespace) -> tuple[CacheDataset, tuple[torch.Tensor, torch.Tensor]]:
    """Return the augmented training images, read once for all runs, and the scored ones."""
    channels, axes = SETS[options.set]
    train, scored = split(options.data / options.set, options.fold)
    scale = load_and_scale(channels)
    return CacheDataset(train, Compose([*scale, *augmentation(axes)]), progress=False), load_all(scored, scale)


def run(options: argparse.Namespace, cell: str, seed: int, train: CacheDataset, scored: Any) -> dict[str, Any]:
    """Train and score one cell with one seed."""
    set_determinism(seed)
    classes = len(class_names(options.data / options.set))
    network = build(cell, options.network, SETS[options.set][0], classes)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    started = time.perf_counter()
    loss = fit(network, train, options.steps, options.batch_size)[0]
    seconds = time.perf_counter() - started
    result = {
        "cell": cell,
        "set": options.set,
        "seed": seed,
        "fold": options.fold,
        "steps": options.steps,
        "batch_size": options.batch_size,
        "overrides": options.network,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "train_seconds": round(seconds, 1),
        "train_loss": loss,
    }
    with SolveRecorder() as recorder:
        result.update(score(network, *scored, classes))
    if recorder.records:
        counts = recorder.evaluations().float()
        result["evaluations"] = [float(counts.min()), float(counts.mean()), float(counts.max())]
        result["converged"] = float(recorder.converged().float().mean())
    images = torch.stack([plain(train[index]["image"]) for index in range(options.batch_size)])
    labels = torch.tensor([train[index]["label"] for index in range(options.batch_size)])
    result["peak_mib"] = round(peak_mib(training_step(network.train(), images, labels)), 1)
    return result


def run_name(options: argparse.Namespace, cell: str, seed: int) -> str:
    name = cell.replace(",", "").replace(" ", "_")
    return f"{'fold' if options.fold else 'val'}-{options.set}-{name}-{seed}"


def table(options: argparse.Namespace) -> str:
    """Return a Markdown table of means and spreads over the seeds, and the missing cells by name."""
    lines = [
        f"{options.set}, {options.steps} steps of {options.batch_size}; mean (min-max) of the seeds",
        "",
        "| cell | AUC | accuracy | parameters | training, s | peak MiB | evaluations | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    missing = []
    for cell in options.cells:
        paths = [options.results / f"{run_name(options, cell, seed)}.json" for seed in options.seeds]
        missing += [path.stem for path in paths if not path.exists()]
        found = [json.loads(path.read_text()) for path in paths if path.exists()]
        if not found:
            continue
        counts = [result["evaluations"] for result in found if "evaluations" in result]
        lines.append(
            "| "
            + " | ".join(
                (
                    cell,
                    *(_spread([result[key] for result in found], 3) for key in ("auc", "accuracy")),
                    f"{found[0]['parameters'] / 1e3:.0f} k",
                    *(_spread([result[key] for result in found], 0) for key in ("train_seconds", "peak_mib")),
                    f"{min(c[0] for c in counts):.0f}-{max(c[2] for c in counts):.0f}" if counts else "",
                    str(len(found)),
                )
            )
            + " |"
        )
    return "\n".join([*lines, *([f"\nMissing: {', '.join(missing)}."] if missing else [])])


def _spread(values: list[float], digits: int) -> str:
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the sets")
    parser.add_argument("--results", type=Path, default=Path("results/ablation"), help="folder of the JSON files")
    parser.add_argument("--set", choices=SETS, default="tb_chest_xray")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--network", type=json.loads, default={}, help="settings of all networks, as JSON")
    parser.add_argument("--fold", action="store_true", help="score on a fifth of train in place of val")
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
