"""Run the demonstration and write its summary and report."""

from __future__ import annotations

import json
import platform
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from monai_deqkan._checks import check_choice, check_empty_folder
from monai_deqkan.demo.classification import demo_classification
from monai_deqkan.demo.reconstruction import demo_reconstruction
from monai_deqkan.demo.section import Section
from monai_deqkan.demo.segmentation import demo_segmentation
from monai_deqkan.engines import free_folder
from monai_deqkan.visualize import Report

__all__ = ["TASKS", "run_demo"]

TASKS: dict[str, Callable[[Path, bool], Section]] = {
    "classification": demo_classification,
    "segmentation": demo_segmentation,
    "reconstruction": demo_reconstruction,
}


def run_demo(out: str | Path | None = None, only: str | None = None, quick: bool = False) -> Path:
    """Make the samples, train, evaluate and use each bundle, and write ``summary.json`` and ``report.html``.

    Args:
        out: folder for everything; absent or empty. By default ``deqkan-demo``, or the next of that name that is free.
        only: one of ``TASKS``, to run that one alone.
        quick: train for a moment only, to see the way through; the figures then mean nothing.

    Returns:
        The path of the report.

    Raises:
        FileExistsError: if ``out`` holds something.
        ValueError: if there is no such task.
    """
    names = list(TASKS) if only is None else [check_choice("only", only, TASKS)]
    folder = Path(free_folder("deqkan-demo")) if out is None else check_empty_folder(out, "the demonstration (`--out`)")
    folder.mkdir(parents=True, exist_ok=True)
    report = Report("monai-deqkan demonstration", _subtitle(quick))
    report.add_text(
        "The bundles were trained here on images of an average of 152 brains (MNI152, shipped with nilearn). "
        "Lesions, bias fields, coil sensitivities, phase and noise are simulated. The figures show that the way "
        "through works "
        "and that each network learns; they say nothing about patients."
    )
    start, sections = time.perf_counter(), {}
    for number, name in enumerate(names, start=1):
        tqdm.write(f"[{number}/{len(names)}] {name}")
        with warnings.catch_warnings():
            # MONAI, torch and Ignite announce changes of their own; nothing a user of the demonstration can act on.
            warnings.filterwarnings("ignore", module=r"(monai\.|torch|ignite|pydicom|numpy)")
            sections[name] = TASKS[name](folder / name, quick)
        sections[name].add_to(report)
    seconds = round(time.perf_counter() - start, 1)
    summary = {
        "quick": quick,
        "seconds": seconds,
        "environment": _environment(),
        **{name: section.numbers for name, section in sections.items()},
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    report.add_heading("How this was made")
    report.add_text(
        f"monai-deqkan demo{' --quick' if quick else ''}{f' --only {only}' if only else ''}; {seconds:.0f} seconds. "
        "Every number is in summary.json beside this page; data, trained models and outputs are in the folders there."
    )
    report.add_json("summary.json", summary)
    page = report.save(folder / "report.html")
    for section in sections.values():
        tqdm.write(f"{section.title}: " + "; ".join(f"{a} {b} ({c})" for a, b, c in section.key_figures))
    return page


def _subtitle(quick: bool) -> str:
    return (
        "Quick run: trained for a moment only, the figures mean nothing"
        if quick
        else "Trained from scratch on this machine"
    )


def _environment() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("monai-deqkan", "torch", "monai", "pytorch-ignite", "nilearn")},
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    }
