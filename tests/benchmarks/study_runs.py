"""Runs of a study that can go on where it was stopped: one JSON file per run, a table that names what is missing.

Shared by the studies beside it. A study is a set of cells, each run with each seed; a run gives rows, as a cell may be
scored in several places. A run that has its JSON below ``--results`` is not repeated. ``--only`` takes some of the
cells, so several processes can share a study.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["Study", "run_study"]

# What may differ between the runs of one folder: everything else is kept in the files and must agree.
_FREE = ("data", "results", "only", "seeds", "threads", "table", "device")
NOTE = "Research only; not for clinical use."


@dataclass(frozen=True)
class Study:
    """What a study varies, and how its table looks.

    Attributes:
        name: short name, of the default folder of results.
        cells: what is compared, in the table's order.
        run: makes the rows of a cell: mappings of plain values. An ImportError leaves the cell missing.
        labels: title of a column: key of the rows that are told apart by it; the cell's is ``"cell"``.
        values: title of a column: key and format of the numbers whose mean over the seeds it shows.
    """

    name: str
    cells: Sequence[str]
    run: Callable[[argparse.Namespace, str, int], list[dict[str, Any]]]
    labels: Mapping[str, str]
    values: Mapping[str, tuple[str, str]]


def run_study(study: Study, parser: argparse.ArgumentParser) -> None:
    """Read the command line, then run the cells that are missing, or print the table of those that are there."""
    parser.add_argument("--results", type=Path, default=Path("results") / study.name, help="folder of the JSON files")
    parser.add_argument("--only", nargs="+", choices=study.cells, help="run only these cells")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    options = parser.parse_args()
    if options.table:
        print(table(study, options))
        return
    torch.set_num_threads(options.threads)
    options.results.mkdir(parents=True, exist_ok=True)
    settings = _settings(options)
    for path in sorted(options.results.glob("*.json")):
        _check_settings(path, settings)
    for seed in options.seeds:
        for cell in options.only or study.cells:
            path = _path(options, cell, seed)
            if path.exists():
                continue
            try:
                rows = study.run(options, cell, seed)
            except ImportError as error:
                print(f"{path.stem}: left out, {error}", flush=True)
                continue
            result = {
                "note": NOTE,
                "cell": cell,
                "seed": seed,
                "settings": settings,
                "on": _machine(options),
                "rows": rows,
            }
            part = path.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps(result, indent=1) + "\n")
            part.rename(path)
            print(f"{path.stem}: {_short(study, rows[0])}", flush=True)
    print(table(study, options))


def table(study: Study, options: argparse.Namespace) -> str:
    """Return a Markdown table of means, with the range over several seeds, and the missing cells by name."""
    lines = [
        f"| {' | '.join([*study.labels, *study.values])} |",
        f"|{'---|' * (len(study.labels) + len(study.values))}",
    ]
    missing: list[str] = []
    runs: list[dict[str, Any]] = []
    for cell in study.cells:
        groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for seed in options.seeds:
            path = _path(options, cell, seed)
            if not path.exists():
                missing.append(path.stem)
                continue
            runs.append(json.loads(path.read_text()))
            for row in runs[-1]["rows"]:
                labels = {**row, "cell": cell}
                groups.setdefault(tuple(str(labels.get(key, "")) for key in study.labels.values()), []).append(row)
        for names, rows in groups.items():
            texts = [_mean([row.get(key) for row in rows], form) for key, form in study.values.values()]
            lines.append(f"| {' | '.join([*names, *texts])} |")
    if runs:
        settings = ", ".join(f"{key} {value}" for key, value in runs[0]["settings"].items() if value not in (None, []))
        machines = sorted({run["on"] for run in runs})
        lines.append(f"\n{settings}; seeds {', '.join(map(str, options.seeds))}; on {', '.join(machines)}.")
    return "\n".join([*lines, *([f"\nMissing: {', '.join(missing)}."] if missing else [])])


def _path(options: argparse.Namespace, cell: str, seed: int) -> Path:
    return Path(options.results) / f"{cell}-{seed}.json"


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that decide about the numbers; of files and folders only the names."""

    def plain(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return value.name if isinstance(value, Path) else value

    return {key: plain(value) for key, value in sorted(vars(options).items()) if key not in _FREE}


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    known = json.loads(path.read_text()).get("settings", {})
    if known != settings:
        differing = sorted(key for key in {*known, *settings} if known.get(key) != settings.get(key))
        raise SystemExit(
            f"{path} was made with other settings ({', '.join(differing)}). Nothing was changed: repeat them, or "
            "name a new folder by --results."
        )


def _machine(options: argparse.Namespace) -> str:
    on_gpu = str(options.device).startswith("cuda")
    return torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} thread(s)"


def _short(study: Study, row: Mapping[str, Any]) -> str:
    return ", ".join(f"{title} {_mean([row.get(key)], form)}" for title, (key, form) in study.values.items())


def _mean(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = format(sum(known) / len(known), form)
    return mean if len(known) == 1 else f"{mean} ({min(known):{form}} to {max(known):{form}})"
