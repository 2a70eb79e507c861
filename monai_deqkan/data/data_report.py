"""What a check of a data set found: as text for people, as JSON and CSV for programs."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from monai_deqkan._checks import check_empty_folder

__all__ = ["DataReport", "FilePair", "Finding"]

_DISCLAIMER = "Research only; not for clinical use."
_SHOWN = 5


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Args:
        level: ``"error"`` for leakage and unusable files, ``"warning"`` for what likely spoils results, or ``"note"``.
        topic: what it is about, in one word for programs, such as ``"near_copies_across_parts"``.
        text: what was found.
        advice: what to do about it.
        count: how many files, pairs or patients.
        examples: some of them.
    """

    level: str
    topic: str
    text: str
    advice: str = ""
    count: int = 0
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class FilePair:
    """Two files of the same content: ``"exact"`` bytes, ``"near"`` copies, or ``"mirrored"`` left to right."""

    kind: str
    correlation: float
    first: str
    second: str
    first_part: str = ""
    second_part: str = ""
    first_class: str = ""
    second_class: str = ""

    @property
    def is_leak(self) -> bool:
        """Whether the two lie in different parts."""
        return self.first_part != self.second_part


@dataclass(frozen=True)
class DataReport:
    """What a check of a data set found. Files are named by their path in the data set; patients are only counted.

    Args:
        dataset: name of the data set's folder.
        task: ``"classification"``, ``"segmentation"`` or ``"reconstruction"``.
        counts: number of files per part and class.
        sizes: number of files per size, such as ``"224 x 224"``.
        channels: number of files per number of channels, or of coils.
        findings: errors first.
        pairs: files of the same content.
        problems: unusable files, and why.
        shared_patients: files of patients that occur in several parts; the first entry numbers the patients from 1.
    """

    dataset: str
    task: str
    counts: Mapping[str, Mapping[str, int]]
    sizes: Mapping[str, int] = field(default_factory=dict)
    channels: Mapping[str, int] = field(default_factory=dict)
    findings: Sequence[Finding] = ()
    pairs: Sequence[FilePair] = ()
    problems: Mapping[str, str] = field(default_factory=dict)
    shared_patients: Sequence[tuple[int, str]] = ()

    @property
    def has_errors(self) -> bool:
        """Whether there is leakage between parts, or a file is unusable."""
        return any(finding.level == "error" for finding in self.findings)

    def text(self) -> str:
        """Return the report for people."""
        total = sum(sum(classes.values()) for classes in self.counts.values())
        lines = [f"Data check of {self.dataset}: {self.task}, {total} files", "", *self._count_table()]
        for name, found in (
            ("sizes", self.sizes),
            ("coils" if self.task == "reconstruction" else "channels", self.channels),
        ):
            if found:
                common = sorted(found.items(), key=lambda entry: -entry[1])
                more = f", and {len(common) - _SHOWN} more" if len(common) > _SHOWN else ""
                lines.append(f"  {name}: {', '.join(f'{key} ({count})' for key, count in common[:_SHOWN])}{more}")
        for finding in self.findings:
            lines += ["", f"{finding.level.upper():8}{finding.text}"]
            lines += [f"          {example}" for example in finding.examples[:_SHOWN]]
            if finding.count > _SHOWN and finding.examples:
                lines.append(f"          ... {finding.count - _SHOWN} more")
            lines += [f"        To do: {finding.advice}"] if finding.advice else []
        result = (
            "leakage or unusable files; mend them before training"
            if self.has_errors
            else "no leakage found by what was checked"
        )
        return "\n".join([*lines, "", f"Result: {result}. {_DISCLAIMER}"])

    def write(self, folder: str | Path) -> Path:
        """Write ``report.txt``, ``report.json``, ``pairs.csv``, ``problems.csv`` and ``shared_patients.csv``.

        Args:
            folder: absent, or empty.

        Returns:
            The folder.

        Raises:
            FileExistsError: if the folder holds something.
        """
        target = check_empty_folder(folder, "the report")
        target.mkdir(parents=True, exist_ok=True)
        # A file's name need not be UTF-8; one that is not must not cost the report.
        (target / "report.txt").write_text(self.text() + "\n", encoding="utf-8", errors="backslashreplace")
        content = {
            "dataset": self.dataset,
            "task": self.task,
            "has_errors": self.has_errors,
            "counts": self.counts,
            "sizes": self.sizes,
            "channels": self.channels,
            "findings": [asdict(finding) for finding in self.findings],
            "intended_use": _DISCLAIMER,
        }
        (target / "report.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        names = [*FilePair.__dataclass_fields__, "is_leak"]
        rows = [[getattr(pair, name) for name in names] for pair in self.pairs]
        _write_table(target / "pairs.csv", names, rows)
        _write_table(target / "problems.csv", ("file", "problem"), self.problems.items())
        _write_table(target / "shared_patients.csv", ("number", "file"), self.shared_patients)
        return target

    def _count_table(self) -> list[str]:
        classes = sorted({name for found in self.counts.values() for name in found})
        width = max([len(name) for name in classes] + [5])
        parts = [part or "all" for part in self.counts]
        head = f"  {'':{width}}" + "".join(f"{part:>8}" for part in parts)
        rows = [
            f"  {name or 'files':{width}}" + "".join(f"{found.get(name, 0):>8}" for found in self.counts.values())
            for name in classes
        ]
        return [head, *rows]


def _write_table(path: Path, names: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        csv.writer(file).writerows([names, *rows])
