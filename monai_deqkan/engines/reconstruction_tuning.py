"""Choose the weight of a classical reconstruction against known references, on data kept for that."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from monai_deqkan._checks import check_choice, check_int
from monai_deqkan.engines.reconstruction_cases import Case, SuiteSettings, list_slices, make_case
from monai_deqkan.engines.reconstruction_methods import RIVALS, ReconstructionMethod
from monai_deqkan.metrics import psnr

__all__ = ["search_weights", "tune_reconstruction"]


def tune_reconstruction(
    folder: str | Path,
    method: str,
    output: str | Path,
    settings: SuiteSettings | None = None,
    *,
    num_grid: int = 6,
    num_refine: int = 3,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Find the weight of highest mean PSNR for each mask, acceleration and noise, and write them as JSON.

    A logarithmic grid, then golden section between the neighbours of its best point. It looks at the references, so
    tune on data that are not scored.

    Args:
        folder: k-space files, see :func:`~monai_deqkan.engines.reconstruction_cases.list_slices`.
        method: a name of :data:`~monai_deqkan.engines.RIVALS` that has a weight.
        output: file to make.
        settings: as of the evaluation that is to follow, with the slices to tune on.
        num_grid: weights on the grid, at least 3.
        num_refine: further weights between the best one's neighbours.
        device: where the method runs.
        progress: whether to show a progress bar.

    Returns:
        What the file holds: per scenario the weight, its PSNR, and all that was tried.

    Raises:
        FileExistsError: if the file exists.
        ValueError: if the method has no weight.
    """
    target = Path(output).expanduser()
    if os.path.lexists(target):
        raise FileExistsError(f"{target} exists and was not touched. Name a new file for the weights.")
    chosen = RIVALS[check_choice("method", method, [name for name, rival in RIVALS.items() if rival.search])]
    check_int("num_grid", num_grid, minimum=3)
    check_int("num_refine", num_refine, minimum=0)
    settings = settings or SuiteSettings()
    items = list_slices(folder, settings)
    entries = []
    with tqdm(total=len(settings.scenarios()) * (num_grid + num_refine), disable=not progress, unit="weight") as bar:
        for scenario in settings.scenarios():
            cases = [make_case(i, os.path.relpath(i["kspace"], folder), scenario, settings) for i in items]

            def quality(weight: float, cases: Sequence[Case] = cases) -> float:
                bar.update()
                return _mean_psnr(chosen, cases, weight, device)

            tried = search_weights(quality, chosen, num_grid, num_refine)
            best = max(tried, key=tried.__getitem__)
            entries.append(
                {
                    "method": method,
                    **asdict(scenario),
                    "weight": best,
                    "psnr": tried[best],
                    "tried": sorted(tried.items()),
                    "at_the_edge": best in (min(tried), max(tried)),
                }
            )
    result = {
        "note": "Research only; not for clinical use. Chosen against references: do not score on the same slices.",
        "settings": asdict(settings),
        "num_slices": len(items),
        "entries": entries,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("x") as file:
        json.dump(result, file, indent=1)
    return result


def _mean_psnr(method: ReconstructionMethod, cases: Sequence[Case], weight: float, device: torch.device | str) -> float:
    values = []
    for case in cases:
        image = method(case.kspace.to(device), case.mask.to(device), case.maps.to(device), weight).image.cpu()
        values.append(float(psnr(image, case.reference, case.region)))
    return float(np.mean(values))


def search_weights(
    quality: Callable[[float], float], method: ReconstructionMethod, num_grid: int, num_refine: int
) -> dict[float, float]:
    """Search a method's weight of highest quality: a logarithmic grid, then golden sections about its best.

    Args:
        quality: tells the quality of a weight, the higher the better.
        method: names the range to search.
        num_grid: number of weights of the grid.
        num_refine: number of further weights.

    Returns:
        What was tried: weights and their quality.
    """
    low, high = method.search or (1.0, 1.0)
    tried: dict[float, float] = {}

    def at(log_weight: float) -> float:
        weight = math.exp(log_weight)
        weight = float(round(weight)) if method.whole else float(f"{weight:.3g}")
        if weight not in tried:
            tried[weight] = quality(weight)
        return tried[weight]

    grid = [float(value) for value in np.linspace(math.log(low), math.log(high), num_grid)]
    best = int(np.argmax([at(value) for value in grid]))
    left, right = grid[max(best - 1, 0)], grid[min(best + 1, num_grid - 1)]
    ratio = (math.sqrt(5) - 1) / 2
    inner = [right - ratio * (right - left), left + ratio * (right - left)]
    for step in range(num_refine):
        first = at(inner[0])
        if step == 0:
            continue  # two inner points before the first cut, one more before each other
        if first >= at(inner[1]):
            right, inner = inner[1], [inner[1] - ratio * (inner[1] - left), inner[0]]
        else:
            left, inner = inner[0], [inner[1], inner[0] + ratio * (right - inner[0])]
    return tried
