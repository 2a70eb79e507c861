"""Robustness of the networks that bench_classification.py trained: corruptions, attacks, gradients and margins.

    python tests/benchmarks/bench_robustness.py DATA --results results/classification
    python tests/benchmarks/bench_robustness.py DATA --results results/classification --table

Reads ``<results>/val-<set>-<network>-<seed>.json`` and ``<results>/weights/<same name>.pt``, and writes one
``<results>/robustness/<same name>.json`` per run. A run that has one is not repeated, unless its weights are newer, so
the command can be called again as trainings end. All val images are corrupted by the fixed table; the first
``--attacked`` of a balanced, seeded choice are attacked by FGSM and PGD. ``--table`` prints means and spreads over the
seeds, names the missing cells, and draws ``<results>/robustness/<set>-{auc,accuracy}.png``.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_classification import NETWORKS, SETS, load_all, load_and_scale, run_name, split, spread
from torch import Tensor, nn

from monai_deqkan.data import class_names
from monai_deqkan.engines import attack_gradient_error, attack_scores, robustness_score
from monai_deqkan.engines.robustness import balanced_rows
from monai_deqkan.networks import margin_bound
from monai_deqkan.networks.layers import DEQLayer
from monai_deqkan.solvers import SolveRecorder
from monai_deqkan.visualize import plot_robustness

SEED = 0  # of corruptions, attacks and the choice of attacked images: the same for every network


def main() -> None:
    options = _options()
    if options.table:
        print(table(options))
        draw(options)
        return
    torch.set_num_threads(options.threads)
    for name in options.sets:
        images: tuple[Tensor, Tensor] | None = None
        for seed in options.seeds:
            for network in options.networks:
                path = result_path(options, network, name, seed)
                weights = options.results / "weights" / f"{path.stem}.pt"
                if not weights.exists() or not (options.results / path.name).exists():
                    continue
                if path.exists() and path.stat().st_mtime > weights.stat().st_mtime:
                    continue
                if images is None:
                    images = load_all(split(options.data / name, options.fold)[1], load_and_scale(SETS[name][0]))
                try:
                    trained = load(network, SETS[name][0], len(class_names(options.data / name)), weights)
                except RuntimeError as error:
                    print(f"{path.stem}: the weights are of another network ({str(error).splitlines()[0]})", flush=True)
                    continue
                result = {"network": network, "set": name, "seed": seed, **run(trained, *images, options.attacked)}
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(result, indent=1) + "\n")
                print(f"{path.stem}: score {result['score']:.4f} in {result['seconds']:.0f} s", flush=True)


def load(network: str, channels: int, classes: int, weights: Path) -> nn.Module:
    built = NETWORKS[network](channels, classes)
    built.load_state_dict(torch.load(weights, weights_only=True))
    return built.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


def run(network: nn.Module, images: Tensor, labels: Tensor, attacked: int) -> dict[str, Any]:
    """Return everything about one trained network."""
    started = time.perf_counter()
    with SolveRecorder() as recorder:
        result = robustness_score(network, images, labels, seed=SEED).to_dict()
    rows = balanced_rows(labels, attacked, SEED)
    result["images"], result["attacked_images"] = len(images), len(rows)
    result["attacks"] = [asdict(cell) for cell in attack_scores(network, images[rows], labels[rows], seed=SEED)]
    if any(isinstance(part, DEQLayer) for part in network.modules()):
        # Of the corrupted images, which no training has seen: are their equilibria found, and at what cost?
        stats = [record.stats for record in recorder.records]
        result["solve_converged"] = float(torch.cat([part.converged for part in stats]).double().mean())
        result["solve_evaluations"] = float(recorder.evaluations().double().mean())
        error = attack_gradient_error(network, images[rows[::4]], labels[rows[::4]])
        result["gradient_error_median"], result["gradient_error_max"] = float(error.median()), float(error.max())
        try:
            bound = margin_bound(network, images)  # type: ignore[arg-type]
        except (TypeError, ValueError) as reason:
            result["margin"] = str(reason)
        else:
            quartiles = torch.quantile(bound.relative_radius, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
            result["relative_radius_quartiles"] = quartiles.tolist()
    result["seconds"] = round(time.perf_counter() - started, 1)
    return result


def result_path(options: argparse.Namespace, network: str, name: str, seed: int) -> Path:
    return options.results / "robustness" / f"{run_name(options, network, name, seed)}.json"


def found(options: argparse.Namespace, network: str, name: str) -> list[dict[str, Any]]:
    paths = [result_path(options, network, name, seed) for seed in options.seeds]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def table(options: argparse.Namespace) -> str:
    """Return Markdown tables of the score, the attacks, and what is special to equilibria; then the missing cells."""
    levels = [f"{attack} {level:g}/255" for attack in ("fgsm", "pgd") for level in (1, 2, 4)]
    scores = [
        "| set | network | score: mean AUC (min-max) | mean accuracy | clean AUC | seeds |",
        "|---|---|---|---|---|---|",
    ]
    attacks = [f"| set | network | clean | {' | '.join(levels)} |", f"|---|---|{'---|' * (len(levels) + 1)}"]
    checks = [
        "| set | network | gradient error median, max | solved | evaluations | relative radius, median |",
        "|---|---|---|---|---|---|",
    ]
    missing = []
    for name in options.sets:
        for network in options.networks:
            results = found(options, network, name)
            there = {result["seed"] for result in results}
            missing += [run_name(options, network, name, seed) for seed in options.seeds if seed not in there]
            if not results:
                continue
            cells = [spread([result[key] for result in results]) for key in ("score", "accuracy")]
            clean = spread([result["clean"]["auc"] for result in results])
            scores.append(f"| {name} | {network} | {cells[0]} | {cells[1]} | {clean} | {len(results)} |")
            pairs = [
                tuple(np.mean([r["attacks"][index][key] for r in results]) for key in ("accuracy", "auc"))
                for index in range(len(levels) + 1)
            ]
            attacks.append(f"| {name} | {network} | {' | '.join(f'{a:.3f} / {b:.3f}' for a, b in pairs)} |")
            if "gradient_error_median" in results[0]:
                radii = [r["relative_radius_quartiles"][1] for r in results if "relative_radius_quartiles" in r]
                checks.append(
                    f"| {name} | {network} | {np.mean([r['gradient_error_median'] for r in results]):.1e}, "
                    f"{max(r['gradient_error_max'] for r in results):.1e} | "
                    f"{min(r['solve_converged'] for r in results):.2%} | "
                    f"{np.mean([r['solve_evaluations'] for r in results]):.1f} | "
                    f"{f'{np.mean(radii):.2e}' if radii else 'not certified'} |"
                )
    parts = ["\n".join(scores), "Accuracy / AUC under attack, mean of the seeds:\n\n" + "\n".join(attacks)]
    parts += ["\n".join(checks)] if len(checks) > 2 else []
    parts += [f"Missing: {', '.join(missing)}."] if missing else []
    return "\n\n".join(parts)


def draw(options: argparse.Namespace) -> None:
    for name in options.sets:
        for value, label in (("auc", "AUC"), ("accuracy", "accuracy")):
            curves: dict[str, dict[str, list[list[float]]]] = {}
            for network in options.networks:
                for result in found(options, network, name):
                    for corruption in dict.fromkeys(cell["name"] for cell in result["cells"]):
                        cells = [cell for cell in result["cells"] if cell["name"] == corruption]
                        row = [result["clean"][value], *(cell[value] for cell in cells)]
                        curves.setdefault(network, {}).setdefault(corruption, []).append(row)
            if curves:
                figure = plot_robustness(curves, value_name=label, title=f"Robustness on {name}")
                figure.savefig(options.results / "robustness" / f"{name}-{value}.png", dpi=100)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the sets")
    parser.add_argument(
        "--results", type=Path, default=Path("results/classification"), help="of bench_classification.py"
    )
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS)[:3])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--attacked", type=int, default=96, help="number of attacked images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fold", action="store_true", help="the runs that bench_classification.py made with --fold")
    parser.add_argument(
        "--table", action="store_true", help="only print the tables and draw the curves of what is there"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
