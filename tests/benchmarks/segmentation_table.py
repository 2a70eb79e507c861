"""Markdown tables of the runs of ``bench_segmentation.py``: scores, differences from MONAI's networks, and costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

__all__ = ["costs", "differences", "scores"]

Results = Mapping[tuple[str, str], Mapping[int, Mapping[str, Any]]]
"""What the runs found, by set and network, then by seed."""


def scores(results: Results, sets: Sequence[str], networks: Sequence[str], measure: str) -> str:
    """Return a table of a measure's mean, smallest and largest value over the seeds: networks down, sets across."""
    lines = _head("network", *sets)
    for network in networks:
        cells = [_spread([run[measure] for run in results.get((name, network), {}).values()]) for name in sets]
        lines.append(_row(network, *cells))
    return "\n".join(lines)


def differences(results: Results, sets: Sequence[str], networks: Sequence[str], baselines: Sequence[str]) -> str:
    """Return a table of how far networks are above the baseline that has the best mean Dice on each set.

    The mean of the differences at the same seed; in brackets the smallest and the largest, and in which interval the
    mean lies for 95 % of 2000 resamplings of the images.
    """
    lines = _head("set", "best baseline", *networks)
    for name in sets:
        dice = {
            network: {seed: np.array(run["each_dice"]) for seed, run in results[name, network].items()}
            for network in (*networks, *baselines)
            if results.get((name, network))
        }
        ran = [network for network in baselines if network in dice]
        if not ran:
            continue
        best = max(ran, key=lambda network: np.nanmean([*dice[network].values()]))
        cells = []
        for network in networks:
            shared = dice.get(network, {}).keys() & dice[best].keys()
            cells.append(_difference(np.array([dice[network][seed] - dice[best][seed] for seed in shared])))
        lines.append(_row(name, best, *cells))
    return "\n".join(lines)


def costs(results: Results, networks: Sequence[str]) -> str:
    """Return a table of what networks cost, on the set whose images take most.

    The time of an image is the shortest of all runs: what else the machine did could only add to it. Steps and seconds
    of training are means.
    """
    lines = _head("network", "parameters", "multiply-adds (G)", "ms per image", "peak of a step (MiB)", "steps", "s")
    for network in networks:
        runs = [run for (_, ran), seeds in results.items() if ran == network for run in seeds.values()]
        if not runs:
            continue
        most = max(runs, key=lambda run: run["multiply_adds"])
        lines.append(
            _row(
                network,
                f"{most['parameters'] / 1e6:.2f} M",
                f"{most['multiply_adds'] / 1e9:.2f}",
                f"{min(run['infer_ms'] for run in runs):.0f}",
                f"{most['peak_mib']:.0f}",
                f"{fmean(run['steps'] for run in runs):.0f}",
                f"{fmean(run['train_seconds'] for run in runs):.0f}",
            )
        )
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "not run"
    mean, low, high = (f"{value:.3f}" for value in (fmean(values), min(values), max(values)))
    return f"{mean} ({low} to {high})" if len(values) > 1 else f"{mean} (one seed)"


def _difference(values: NDArray[Any]) -> str:
    """Describe differences per seed and image."""
    if not len(values):
        return "not run"
    images = np.nanmean(values, axis=0)
    images = images[~np.isnan(images)]
    seeds = np.nanmean(values, axis=1)
    drawn = bootstrap((images,), np.mean, n_resamples=2000, method="percentile", random_state=0)
    low, high = drawn.confidence_interval
    spread = f"seeds {seeds.min():+.3f} to {seeds.max():+.3f}" if len(seeds) > 1 else "one seed"
    return f"{seeds.mean():+.3f} ({spread}; images {low:+.3f} to {high:+.3f})"


def _head(*titles: str) -> list[str]:
    return [_row(*titles), "|" + len(titles) * "---|"]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
