"""Pictures of ``brain_mri_deq_reconstruction`` for its model card; ``reproduce_brain_mri_bundle.py`` calls them."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from evaluate_brain_mri_bundle import (
    HEAD,
    HEART,
    HEART_ONE_COIL_VALIDATION,
    HEART_VALIDATION,
    KNEE,
    LABELS,
    VALIDATION,
    WRAPPED,
    WRAPPED_TWO_SETS,
    Method,
    case_of,
)
from PIL import Image
from torch import Tensor

from monai_deqkan.solvers import SolveRecorder, solve_budget
from monai_deqkan.visualize import plot_reconstruction, plot_residuals
from monai_deqkan.visualize.learning import COLORS, new_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_examples", "draw_residuals", "draw_tolerances", "save_small"]

# Set, mask, acceleration, and the place of the slice among the set's.
EXAMPLES = {
    "example_head": (HEAD, "random", 4.0, 0),
    "example_knee": (KNEE, "random", 4.0, 0),
    "example_heart": (HEART, "equispaced", 8.0, 3),
    "example_wrapped_brain": (WRAPPED_TWO_SETS, "random", 4.0, 0),
}
VALIDATION_EXAMPLES = {
    "example_heart_1_coil": (HEART_ONE_COIL_VALIDATION, "random", 4.0, 2),
    "example_heart": (HEART_VALIDATION, "equispaced", 8.0, 2),
}
EXACT = 1e-5  # residual down to which solves are drawn
LONGEST = 30  # evaluations


def draw_examples(
    folder: Path,
    out: Path,
    methods: Sequence[Method],
    records: Sequence[dict[str, Any]],
    *,
    validate: bool,
    max_slices: int | None = None,
) -> list[Path]:
    """Draw reference, reconstructions and errors of a few slices, TV with the weights in the records."""
    written = []
    for name, (data, mask, acceleration, place) in (VALIDATION_EXAMPLES if validate else EXAMPLES).items():
        scenario = next(s for s in data.settings.scenarios() if (s.mask, s.acceleration) == (mask, acceleration))
        index = data.slices(folder)[:max_slices][-1 if max_slices else place]
        case = case_of(folder, data, scenario, index)
        images: dict[str, Tensor] = {}
        scores: dict[str, str] = {}
        for method in methods:
            about = {
                "set": data.name,
                "slice": index,
                "mask": mask,
                "acceleration": acceleration,
                "method": method.name,
            }
            record = next((r for r in records if about.items() <= r.items()), None)
            if record is None or method.name == "cg_sense":
                continue
            label = "TV, best weight" if method.name == "tv" else LABELS[method.name]
            images[label] = method.run(case.kspace, case.mask, case.maps, record["weight"]).image[0, 0]
            scores[label] = f"{record['psnr']:.1f} dB, SSIM {record['ssim']:.3f}"
        if not images:
            continue
        figure = plot_reconstruction(
            case.reference[0, 0], images, scores, title=f"{data.name}: {mask} mask, {acceleration:g}x, slice {index}"
        )
        written.append(save_small(figure, out / f"{name}.png"))
    return written


@torch.no_grad()
def draw_residuals(
    folder: Path, out: Path, methods: Sequence[Method], *, validate: bool, max_cases: int | None = None
) -> list[Path]:
    """Draw residual against evaluations of each network: first slices of the smaller scans, in all ways."""
    sets = VALIDATION if validate else (HEAD, HEART, WRAPPED)
    cases = [
        case_of(folder, data, scenario, data.slices(folder)[0])
        for data in sets
        for scenario in data.settings.scenarios()
    ][:max_cases]
    written = []
    for method in methods:
        if not method.mark:
            continue
        histories = []
        for case in cases:
            with (
                solve_budget(rtol=EXACT, max_iter=10 if max_cases else LONGEST, on_failure="ignore"),
                SolveRecorder() as recorder,
            ):
                method.run(case.kspace, case.mask, case.maps)
            solve = next(record for record in recorder.records if record.kind == "forward")
            found = solve.stats.history[:, 0]
            histories.append(found[found.isfinite()].cpu())
        figure = plot_residuals(histories, rtol=1e-3, title=f"Residual against evaluations: {LABELS[method.name]}")
        written.append(save_small(figure, out / f"residuals_{method.name}.png"))
    return written


def draw_tolerances(budgets: Path, out: Path) -> Path:
    """Draw PSNR and the distance to the exact solution against the tolerance, one line per file of ``budgets``."""
    records = [json.loads(file.read_text()) for file in sorted(budgets.glob("*.json"))]
    names = [name for name in records[0]["entries"] if name.startswith("rtol ")]
    tolerances = [float(name.removeprefix("rtol ")) for name in names]
    figure, axes = new_figure(1, 2, 3.8, "The same weights at several tolerances")
    for panel, key, label in zip(
        axes[0],
        ("psnr", "distance"),
        ("PSNR minus the exact solution's (dB)", "distance to the exact solution"),
        strict=True,
    ):
        values = np.array(
            [
                [record["entries"][n][key] - (record["exact"]["psnr"] if key == "psnr" else 0) for n in names]
                for record in records
            ]
        )
        panel.plot(tolerances, values.T, color=COLORS[5], alpha=0.5, linewidth=1.0)
        panel.plot(tolerances, np.median(values, 0), color=COLORS[0], linewidth=2.0, marker="o", label="median")
        style_axes(panel, x_label="tolerance (relative residual)", y_label=label)
        panel.set_xscale("log")
        panel.invert_xaxis()
        panel.legend()
    axes[0, 1].set_yscale("log")
    return save_small(figure, out / "tolerances.png")


def save_small(figure: Figure | Path, path: Path) -> Path:
    """Write a figure, or a picture file, as PNG with 256 colours: a third of the size, without a visible difference."""
    source: Path | io.BytesIO = io.BytesIO()
    if isinstance(figure, Path):
        source = figure
    else:
        figure.savefig(source, dpi=100)
    path.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(source) as image:
        image.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE).save(path, optimize=True)
    return path
