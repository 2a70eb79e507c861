"""Score methods of reconstruction over masks, accelerations and noise, in a run that can go on where it stopped."""

from __future__ import annotations

import csv
import json
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from monai_deqkan._checks import check_empty_folder
from monai_deqkan.engines.reconstruction_cases import (
    Case,
    Scenario,
    SuiteSettings,
    is_simulated,
    list_slices,
    make_case,
)
from monai_deqkan.engines.reconstruction_methods import ReconstructionMethod, TunedWeights, load_method
from monai_deqkan.metrics import nmse, psnr, ssim, vif, volume_metrics
from monai_deqkan.visualize import reconstruction_suite_report

__all__ = ["evaluate_reconstructions"]

METRICS: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "psnr": psnr,
    "ssim": ssim,
    "nmse": nmse,
    "vif": vif,
}
NOTE = "Research only; not for clinical use."


@dataclass(frozen=True)
class _Cell:
    """One file, undersampled in one way, reconstructed by one method."""

    file: str
    scenario: Scenario
    method: ReconstructionMethod
    weight: float | None

    def path(self, folder: Path) -> Path:
        text = f"{self.file}/{self.scenario.name}/{self.method.name}"
        readable = re.sub(r"[^\w.-]+", "_", text.replace("/", "__"))
        return folder / "cells" / f"{readable}_{zlib.crc32(text.encode()):08x}.json"


def evaluate_reconstructions(
    folder: str | Path,
    output_dir: str | Path,
    methods: Sequence[str | Path] = ("zero_filled", "cg_sense", "tv", "wavelet"),
    settings: SuiteSettings | None = None,
    *,
    weights: TunedWeights | Sequence[str | Path] = (),
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Score methods on fully sampled k-space files that are undersampled in many ways.

    Writes ``slices.csv``, ``volumes.csv``, ``summary.csv``, ``summary.json`` and ``report.html``. The results of each
    file, scenario and method are kept in ``cells``; a run that was cut short goes on from them when it is called again
    in the same way.

    Args:
        folder: k-space files, see :func:`~monai_deqkan.engines.reconstruction_cases.list_slices`.
        output_dir: a new or empty folder, or that of the same run cut short.
        methods: names of :data:`~monai_deqkan.engines.RIVALS`, folders of trained bundles or their weights.
        settings: what to vary and how to score; None takes the defaults.
        weights: tuned weights, or files of them; methods without take their default.
        device: where methods run.
        progress: whether to show a progress bar.

    Returns:
        What ``summary.json`` holds: the settings, one entry per scenario and method, and the profile.

    Raises:
        FileExistsError: if the folder holds something else, or a run with other settings.
        ValueError: if a setting does not fit the data.
    """
    settings = settings or SuiteSettings()
    tuned = weights if isinstance(weights, TunedWeights) else TunedWeights.load(weights)
    chosen = [load_method(name, device) for name in methods]
    names = [method.name for method in chosen]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"`methods` must name at least one method, each once; got {names}.")
    items = list_slices(folder, settings)
    files: dict[str, list[dict[str, Any]]] = {}
    for item in items:
        files.setdefault(_relative(item["kspace"], folder), []).append(item)
    cells = [
        _Cell(file, scenario, method, _weight(tuned, method, scenario))
        for file in files
        for scenario in settings.scenarios()
        for method in chosen
    ]
    out = Path(output_dir).expanduser()
    _claim(out, settings, cells, [[_relative(i["kspace"], folder), i["slice"]] for i in items])
    profiled: set[str] = set()
    missing = [cell for cell in cells if not cell.path(out).is_file()]
    with tqdm(total=sum(len(files[cell.file]) for cell in missing), disable=not progress, unit="slice") as bar:
        for group in _groups(missing):
            _run_group(group, files[group[0].file], settings, torch.device(device), out, profiled, bar)
    simulated = sum(is_simulated(Path(folder).expanduser() / file) for file in files)
    return _finish(
        out, settings, cells, f"{simulated} of {len(files)} files hold SIMULATED k-space." if simulated else ""
    )


def _relative(path: str, folder: str | Path) -> str:
    return Path(os.path.relpath(path, Path(folder).expanduser())).as_posix()


def _weight(tuned: TunedWeights, method: ReconstructionMethod, scenario: Scenario) -> float | None:
    if method.search is None:
        return None
    found = tuned.find(method.name, scenario.mask, scenario.acceleration, scenario.snr_db)
    return method.default_weight if found is None else found


def _claim(out: Path, settings: SuiteSettings, cells: Sequence[_Cell], slices: list[Any]) -> None:
    """Make the folder this run's, or make sure that it already is."""
    plan = json.loads(
        json.dumps(
            {
                "note": NOTE,
                "settings": asdict(settings),
                "slices": slices,
                "cells": [[cell.file, cell.scenario.name, cell.method.name, cell.weight] for cell in cells],
            }
        )
    )
    file = out / "run.json"
    if not file.is_file():
        check_empty_folder(out, "the evaluation (`output_dir`)")
        (out / "cells").mkdir(parents=True, exist_ok=True)
        _write(file, json.dumps(plan, indent=1))
    elif _read_json(file) != plan:
        raise FileExistsError(
            f"The folder {out} holds an evaluation with other data, methods or settings. Nothing was changed; name a "
            "new folder, or repeat the command that began it."
        )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}. Delete it, and repeat the command that began it.") from None


def _groups(cells: Sequence[_Cell]) -> Iterator[list[_Cell]]:
    """Put together the methods that share file and scenario, so that each slice is prepared once."""
    groups: dict[tuple[str, Scenario], list[_Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.file, cell.scenario), []).append(cell)
    yield from groups.values()


def _run_group(
    group: Sequence[_Cell],
    items: Sequence[dict[str, Any]],
    settings: SuiteSettings,
    device: torch.device,
    out: Path,
    profiled: set[str],
    bar: Any,
) -> None:
    file, scenario = group[0].file, group[0].scenario
    rows: dict[str, list[dict[str, Any]]] = {cell.method.name: [] for cell in group}
    images: dict[str, list[Tensor]] = {cell.method.name: [] for cell in group}
    references, regions, examples = [], [], {}
    example = items[len(items) // 2]
    memory: dict[str, float | None] = {}
    for item in items:
        case = make_case(item, file, scenario, settings)
        reference, region = (_cropped(part, case, settings) for part in (case.reference, case.region))
        references.append(reference)
        regions.append(region)
        for cell in group:
            bar.set_postfix_str(f"{scenario.name} {cell.method.name}")
            row, image = _score(cell, case, item, settings, device, (reference, region))
            rows[cell.method.name].append(row)
            images[cell.method.name].append(image)
            if item is example:
                examples[cell.method.name] = image[0, 0].numpy()
                if cell.method.name not in profiled:
                    profiled.add(cell.method.name)
                    memory[cell.method.name] = _peak_memory(cell, case, device)
            bar.update()
    for cell in group:
        name = cell.method.name
        shapes = {image.shape for image in images[name]}
        volume = (
            volume_metrics(torch.cat(images[name]), torch.cat(references), torch.cat(regions))
            if len(shapes) == 1
            else None
        )
        middle = references[len(items) // 2][0, 0].numpy()
        target = cell.path(out)
        np.savez_compressed(target.with_suffix(".npz"), image=examples[name], reference=middle)
        content = {
            "rows": rows[name],
            "volume": volume,
            "peak_memory_mib": memory.get(name),
            "example_row": len(items) // 2,
        }
        _write(target, json.dumps(content))


def _score(
    cell: _Cell,
    case: Case,
    item: Mapping[str, Any],
    settings: SuiteSettings,
    device: torch.device,
    target: tuple[Tensor, Tensor],
) -> tuple[dict[str, Any], Tensor]:
    """Reconstruct one slice; return its line of the table and the image as it is scored."""
    start = time.perf_counter()
    try:
        result = cell.method(case.kspace.to(device), case.mask.to(device), case.maps.to(device), cell.weight)
    except ValueError as error:
        raise ValueError(f"{cell.method.name} failed on slice {item['slice']} of {cell.file}: {error}") from error
    image = _cropped(result.image.cpu(), case, settings)
    row = {
        "file": cell.file,
        "slice": int(item["slice"]),
        **asdict(cell.scenario),
        "net_acceleration": round(case.net_acceleration, 4),
        "method": cell.method.name,
        "weight": cell.weight,
        "seconds": time.perf_counter() - start,
        "converged": result.converged,
        **{f"seconds: {part}": seconds for part, seconds in case.seconds.items()},
    }
    row.update({name: float(measure(image, *target)) for name, measure in METRICS.items()})
    return row, image


def _cropped(image: Tensor, case: Case, settings: SuiteSettings) -> Tensor:
    """Return an image as it lies in the file, its centre where a crop is asked for."""
    image = image.transpose(-1, -2) if case.turned else image
    if settings.crop is None:
        return image
    for axis, size in zip((-2, -1), settings.crop, strict=True):
        full = image.shape[axis]
        image = image.narrow(axis, full // 2 - min(size, full) // 2, min(size, full))
    return image


def _peak_memory(cell: _Cell, case: Case, device: torch.device) -> float | None:
    """Return the peak of what the method allocates on one slice, in MiB, from a second, profiled run."""
    tensors = (case.kspace.to(device), case.mask.to(device), case.maps.to(device))
    method = replace(cell.method, run=cell.method.brief or cell.method.run)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        method(*tensors, cell.weight)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        method(*tensors, cell.weight)
    results = getattr(profiler.profiler, "kineto_results", None)
    if results is None:
        return None
    now = peak = 0
    for event in results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak / 2**20


def _finish(out: Path, settings: SuiteSettings, cells: Sequence[_Cell], source: str) -> dict[str, Any]:
    """Write the tables and the report from the cells; ``source`` tells of data that were not measured."""
    contents = [(cell, _read_json(cell.path(out))) for cell in cells]
    slices = [row for _, content in contents for row in content["rows"]]
    volumes = [
        {
            "file": cell.file,
            **asdict(cell.scenario),
            "method": cell.method.name,
            "weight": cell.weight,
            **content["volume"],
        }
        for cell, content in contents
        if content["volume"] is not None
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in slices:
        groups.setdefault((_scenario(row).name, row["method"]), []).append(row)
    summary = [_summarize(name, rows, volumes) for (name, _), rows in groups.items()]
    result = {
        "note": NOTE,
        "settings": asdict(settings),
        "statement": f"{source} {statement(settings)}".strip(),
        "results": summary,
        "profile": _profile(slices, contents),
    }
    for name, rows in (("slices", slices), ("volumes", volumes), ("summary", summary)):
        _write_table(out / f"{name}.csv", rows)
    _write(out / "summary.json", json.dumps(result, indent=1))
    if not (out / "report.html").exists():
        reconstruction_suite_report(result, _examples(out, cells)).save(out / "report.html")
    return result


def statement(settings: SuiteSettings) -> str:
    """Return in words what the numbers were measured against."""
    reference = {
        "rss": "the root sum of squares of the fully sampled coil images",
        "sense": "the combination of the fully sampled coil images with maps from their own centre",
    }[settings.reference]
    region = {
        "head": "pixels where that root sum of squares exceeds 0.1 of the slice's maximum, holes filled",
        "all": "all pixels",
    }[settings.region]
    maps = {"low_frequency": "from the low frequencies", "espirit": "by ESPIRiT from the central lines"}[
        settings.maps_method
    ]
    coils = f" Coils: {settings.simulated_coils}, SIMULATED." if settings.simulated_coils else ""
    crop = "" if settings.crop is None else f" Scored on the central {settings.crop[0]} x {settings.crop[1]} pixels."
    return (
        f"Reference: {reference}. Data range: the reference's maximum, per slice or per volume. Region: {region}."
        f"{crop} Phase encoding along the {settings.phase_axis} axis.{coils} All methods get the same coil maps, "
        f"estimated {maps} of the undersampled data. A trained bundle may have learned with other "
        "masks, accelerations and maps. CG-SENSE's weight is its number of iterations."
    )


def _scenario(row: Mapping[str, Any]) -> Scenario:
    return Scenario(row["mask"], row["acceleration"], row["center_fraction"], row["snr_db"])


def _summarize(name: str, rows: Sequence[Mapping[str, Any]], volumes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = rows[0]
    own = [v for v in volumes if v["method"] == first["method"] and _scenario(v) == _scenario(first)]
    solved = [row["converged"] for row in rows if row["converged"] is not None]
    summary: dict[str, Any] = {
        "scenario": name,
        **asdict(_scenario(first)),
        "net_acceleration": float(np.mean([row["net_acceleration"] for row in rows])),
        "method": first["method"],
        "weight": first["weight"],
        "num_slices": len(rows),
        "num_volumes": len(own),
        "share_converged": float(np.mean(solved)) if solved else None,
        "seconds": float(np.median([row["seconds"] for row in rows])),
    }
    for metric in METRICS:
        values = np.array([row[metric] for row in rows])
        summary[metric] = float(values.mean())
        summary[f"{metric}_sd"] = float(values.std(ddof=1)) if len(values) > 1 else None
        summary[f"volume_{metric}"] = float(np.mean([v[metric] for v in own])) if own else None
    return summary


def _profile(slices: Sequence[Mapping[str, Any]], contents: Sequence[tuple[_Cell, Any]]) -> list[dict[str, Any]]:
    """Return the median time of each part per slice, and the largest memory peak of the methods."""
    parts = [key for key in slices[0] if key.startswith("seconds: ")]
    rows: list[dict[str, Any]] = [
        {
            "part": key.removeprefix("seconds: "),
            "seconds": float(np.median([row[key] for row in slices])),
            "peak_memory_mib": None,
        }
        for key in parts
    ]
    for name in dict.fromkeys(cell.method.name for cell, _ in contents):
        seconds = [row["seconds"] for row in slices if row["method"] == name]
        peaks = [content["peak_memory_mib"] for cell, content in contents if cell.method.name == name]
        known = [peak for peak in peaks if peak is not None]
        rows.append(
            {"part": name, "seconds": float(np.median(seconds)), "peak_memory_mib": max(known) if known else None}
        )
    return rows


def _examples(out: Path, cells: Sequence[_Cell]) -> dict[str, dict[str, Any]]:
    """Return, per scenario, the first file's middle slice: its reference, and image and PSNR by method."""
    examples: dict[str, dict[str, Any]] = {}
    for cell in cells:
        if cell.file != cells[0].file:
            continue
        path = cell.path(out)
        content = _read_json(path)
        with np.load(path.with_suffix(".npz")) as arrays:
            entry = examples.setdefault(
                cell.scenario.name, {"reference": arrays["reference"], "images": {}, "scores": {}}
            )
            entry["images"][cell.method.name] = arrays["image"]
        row = content["rows"][content["example_row"]]
        entry["scores"][cell.method.name] = f"{row['psnr']:.1f} dB, SSIM {row['ssim']:.3f}"
    return examples


def _write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    draft = path.with_name(f".{path.name}.part")
    with draft.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else ["file"])
        writer.writeheader()
        writer.writerows(rows)
    os.replace(draft, path)


def _write(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.part")
    draft.write_text(text)
    os.replace(draft, path)
