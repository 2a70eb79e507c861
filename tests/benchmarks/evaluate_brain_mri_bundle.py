"""Scores of ``brain_mri_deq_reconstruction`` on real data that it was not trained on, beside methods without learning.

Fully sampled k-space of ``DATA/mri`` is undersampled by ``monai-deqkan reconstruction evaluate``'s own cases; coil maps
come from the mask's own central lines, by ESPIRiT. TV has the weight of highest PSNR of each slice, found against the
reference: an oracle. One JSON file per slice, mask, acceleration and method; what is there is not computed again, and
the files of a network carry a mark of its weights. Run by ``reproduce_brain_mri_bundle.py --only evaluate``.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py

from monai_deqkan.data.files import file_sha256
from monai_deqkan.engines import RIVALS, SuiteSettings
from monai_deqkan.engines.reconstruction_cases import Case, Scenario, make_case
from monai_deqkan.engines.reconstruction_methods import ReconstructionMethod, load_method
from monai_deqkan.engines.reconstruction_tuning import search_weights
from monai_deqkan.metrics import psnr, ssim
from monai_deqkan.operators import espirit_maps
from monai_deqkan.solvers import SolveRecorder

__all__ = [
    "FINAL",
    "HEAD",
    "HEART",
    "HEART_ONE_COIL_VALIDATION",
    "HEART_VALIDATION",
    "KNEE",
    "LABELS",
    "VALIDATION",
    "WRAPPED",
    "WRAPPED_TWO_SETS",
    "DataSet",
    "Method",
    "bundle_methods",
    "case_of",
    "evaluate",
    "tables",
]

ACCELERATIONS = (4.0, 8.0)
# Of the cardiac images; the others are for the final scores only.
VALIDATION_IDS = range(1, 7)
CLASSICAL = ("zero_filled", "cg_sense", "tv")
TV_GRID, TV_REFINE = 6, 4


@dataclass(frozen=True)
class DataSet:
    """What is scored together.

    Attributes:
        name: what the tables call it.
        file: below ``DATA/mri``.
        masks: patterns.
        simulated_coils: number of coils that single-coil images are seen through; 0 takes the file's.
        num_map_sets: number of sets of ESPIRiT maps.
        validation: which images of a file with ``dataset_id``: those for validation or the others.
    """

    name: str
    file: str
    masks: tuple[str, ...] = ("random", "equispaced")
    simulated_coils: int = 0
    num_map_sets: int = 1
    validation: bool = False

    @property
    def settings(self) -> SuiteSettings:
        """The suite's settings."""
        return SuiteSettings(
            masks=self.masks,
            accelerations=ACCELERATIONS,
            simulated_coils=self.simulated_coils,
            maps_method="espirit",
        )

    def slices(self, folder: Path) -> list[int]:
        """Return the indices of its slices."""
        with h5py.File(folder / self.file, "r") as content:
            if "dataset_id" not in content:
                return list(range(len(content["kspace"])))
            chosen = [int(number) in VALIDATION_IDS for number in content["dataset_id"][()]]
        return [index for index, known in enumerate(chosen) if known == self.validation]


_CARDIAC = "singlecoil_cardiac_fatwater.h5"
_WRAPPED = "multicoil_brain_smallfov.h5"
KNEE = DataSet("knee, 1 coil", "singlecoil_knee_coronal.h5", ("random",))
HEAD = DataSet("head, 1 coil", "singlecoil_brain_sagittal.h5", ("random",))
HEART = DataSet("heart, 8 simulated coils", _CARDIAC, simulated_coils=8)
WRAPPED = DataSet("wrapped brain, 8 coils, 1 map set", _WRAPPED)
WRAPPED_TWO_SETS = DataSet("wrapped brain, 8 coils, 2 map sets", _WRAPPED, num_map_sets=2)
FINAL = (KNEE, HEAD, HEART, WRAPPED, WRAPPED_TWO_SETS)

HEART_ONE_COIL_VALIDATION = DataSet("heart, 1 coil", _CARDIAC, ("random",), validation=True)
HEART_VALIDATION = replace(HEART, validation=True)
VALIDATION = (HEART_ONE_COIL_VALIDATION, HEART_VALIDATION)


@dataclass(frozen=True)
class Method:
    """A method, the name of its column, and the mark of its weights in file names, empty without any."""

    name: str
    run: ReconstructionMethod
    mark: str = ""


def bundle_methods(bundle: Path) -> list[Method]:
    """Return the methods without learning, the bundle's model, and its certified model where it has one."""
    found = [Method(name, RIVALS[name]) for name in CLASSICAL]
    for name, folder in (("model", "models"), ("certified", "models/certified")):
        weights = bundle / folder / "model.pt"
        if weights.is_file():
            mark = f"_{file_sha256(weights)[:8]}{file_sha256(weights.with_name('model.json'))[:8]}"
            found.append(Method(name, load_method(weights), mark))
    return found


def case_of(folder: Path, data: DataSet, scenario: Scenario, index: int) -> Case:
    """Undersample one slice and estimate its maps."""
    case = make_case({"kspace": str(folder / data.file), "slice": index}, data.file, scenario, data.settings)
    if data.num_map_sets == 1:
        return case
    # A second set is noise where nothing folds over: espirit_maps says which eigenvalues to keep.
    return replace(case, maps=espirit_maps(case.kspace, case.mask, num_sets=data.num_map_sets, crop=0.8))


def cells(
    folder: Path, sets: tuple[DataSet, ...], max_slices: int | None = None
) -> Iterator[tuple[str, DataSet, Scenario, int]]:
    """Return all slices of all sets in all ways of undersampling, with the beginning of their files' names."""
    for data in sets:
        for scenario in data.settings.scenarios():
            for index in data.slices(folder)[:max_slices]:
                coils = f"_coils{data.simulated_coils}" if data.simulated_coils else ""
                name = f"{Path(data.file).stem}_{index}{coils}_maps{data.num_map_sets}_{scenario.name}"
                yield name, data, scenario, index


def evaluate(
    folder: Path,
    out: Path,
    methods: list[Method],
    sets: tuple[DataSet, ...],
    max_slices: int | None = None,
    report: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Score what has not been scored yet; return a record per slice, mask, acceleration and method.

    Args:
        folder: ``DATA/mri``.
        out: folder of the JSON files.
        methods: see :func:`bundle_methods`.
        sets: ``FINAL`` or ``VALIDATION``.
        max_slices: take so many slices of each set; None takes all.
        report: called with a line per slice that was scored.
    """
    out.mkdir(parents=True, exist_ok=True)
    records = []
    for name, data, scenario, index in cells(folder, sets, max_slices):
        files = {method.name: out / f"{name}_{method.name}{method.mark}.json" for method in methods}
        missing = [method for method in methods if not files[method.name].is_file()]
        if missing:
            case = case_of(folder, data, scenario, index)
            about = {
                "set": data.name,
                "file": data.file,
                "slice": index,
                "mask": scenario.mask,
                "acceleration": scenario.acceleration,
                "net_acceleration": case.net_acceleration,
            }
            for method in missing:
                scored = score(method, case)
                _write(files[method.name], {**about, "method": method.name, **scored})
                report(f"{name} {method.name}: {scored['psnr']:.2f} dB, SSIM {scored['ssim']:.4f}")
        records += [json.loads(file.read_text()) for file in files.values()]
    return records


def score(method: Method, case: Case) -> dict[str, Any]:
    """Reconstruct and score one slice: TV with the weight that is best for it, others with their default."""
    weight: float | None = None
    tried: dict[float, float] = {}
    if method.name == "tv":

        def quality(value: float) -> float:
            image = method.run(case.kspace, case.mask, case.maps, value).image
            return float(psnr(image, case.reference, case.region))

        tried = search_weights(quality, method.run, TV_GRID, TV_REFINE)
        weight = max(tried, key=tried.__getitem__)
    with SolveRecorder() as recorder:
        started = time.perf_counter()
        result = method.run(case.kspace, case.mask, case.maps, weight)
        seconds = time.perf_counter() - started
    solved = len(recorder.evaluations()) > 0
    return {
        "psnr": float(psnr(result.image, case.reference, case.region)),
        "ssim": float(ssim(result.image, case.reference, case.region)),
        "seconds": seconds,
        "converged": result.converged,
        "evaluations": int(recorder.evaluations().max()) if solved else None,
        "relative_residual": float(recorder.relative_residual().max()) if solved else None,
        "weight": weight,
        "at_the_edge": weight in (min(tried), max(tried)) if tried else None,
    }


def _write(target: Path, content: dict[str, Any]) -> None:
    draft = target.with_suffix(".part")
    draft.write_text(json.dumps(content, indent=1))
    os.replace(draft, target)


def tables(records: list[dict[str, Any]]) -> dict[str, str]:
    """Return the tables ``accuracy`` and ``solves`` as Markdown."""
    names = list(dict.fromkeys(record["method"] for record in records))
    groups: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["set"], record["mask"], record["acceleration"]), []).append(record)
    heads = [LABELS[name] for name in names]
    networks = [name for name in names if name not in CLASSICAL]
    gained = networks if "tv" in names else []
    gains = [f"{LABELS[name]} - TV" for name in gained]
    accuracy = [f"| set | mask | slices | {' | '.join(heads + gains)} |", "|---" * (3 + len(heads) + len(gains)) + "|"]
    for (name, mask, acceleration), rows in groups.items():
        own = {method: [row for row in rows if row["method"] == method] for method in names}
        values = [f"{_mean(own[method], 'psnr'):.2f} / {_mean(own[method], 'ssim'):.3f}" for method in names]
        values += [_gain(own[method], own["tv"]) for method in gained]
        accuracy.append(f"| {name} | {mask} {acceleration:g}x | {len(own[names[0]])} | {' | '.join(values)} |")
    heads = ["model", "set", "mask", "converged", "evaluations, mean (most)", "largest residual", "seconds"]
    solves = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for method in networks:
        for (name, mask, acceleration), rows in groups.items():
            chosen = [row for row in rows if row["method"] == method]
            evaluations = [row["evaluations"] for row in chosen]
            solves.append(
                f"| {LABELS[method]} | {name} | {mask} {acceleration:g}x | {_mean(chosen, 'converged'):.0%} | "
                f"{_mean(chosen, 'evaluations'):.1f} ({max(evaluations)}) | "
                f"{max(row['relative_residual'] for row in chosen):.1e} | {_mean(chosen, 'seconds'):.1f} |"
            )
    return {"accuracy": "\n".join(accuracy), "solves": "\n".join(solves)}


LABELS = {
    "zero_filled": "zero-filled",
    "cg_sense": "CG-SENSE",
    "tv": "TV, best weight per slice",
    "model": "model",
    "certified": "certified model",
}


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    return math.fsum(row[key] for row in rows) / len(rows)


def _gain(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> str:
    return " / ".join(
        f"{_mean(rows, key) - _mean(others, key):+.{digits}f}" for key, digits in (("psnr", 2), ("ssim", 3))
    )
