"""Reconstructions as fastMRI-style HDF5 volumes, with a table of how each slice's solve went."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from ignite.engine import Engine, Events
from numpy.typing import NDArray

from monai_deqkan.handlers.iteration_recorder import IterationRecorder
from monai_deqkan.solvers import SolveStatus

__all__ = ["ReconstructionWriter"]


class ReconstructionWriter:
    """Write ``<file>.h5`` with a data set ``reconstruction`` for each k-space file, and ``slices.csv``.

    ``reconstruction`` holds magnitudes ``(slices, H, W)``, float32, in the unit of the file's k-space; slices that were
    left out are missing from it, and the attribute ``slices`` lists those that are there. The table has one line per
    slice: file, slice, number of evaluations, relative residual and status of its solve. A volume is written as soon as
    its last slice is done; slices of one file must follow each other. Files of one name from several folders outside
    ``dataset_dir`` get numbers: ``a.h5``, ``a_2.h5``. Nothing is overwritten.

    Args:
        output_dir: folder to write into; made where absent.
        dataset_dir: folder that files were read from; folders below it are kept.

    Raises:
        FileExistsError: in a run, if a file to be written is there already.
        ValueError: in a run, if slices of one file do not follow each other.
    """

    def __init__(self, output_dir: str | os.PathLike[str], dataset_dir: str | os.PathLike[str]) -> None:
        self.output_dir = Path(output_dir)
        self.root = Path(dataset_dir).absolute()
        self._recorder: IterationRecorder | None = None
        self._source = ""
        self._targets: dict[str, Path] = {}
        self._slices: list[tuple[int, NDArray[np.float32]]] = []

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator whose output has ``pred`` and whose batch has ``source``, ``slice`` and ``scale``."""
        self._recorder = IterationRecorder.of(engine)
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.COMPLETED, lambda _: self._flush())

    @property
    def table(self) -> Path:
        """The path of the table."""
        return self.output_dir / "slices.csv"

    def _start(self, engine: Engine) -> None:
        self._source, self._targets, self._slices = "", {}, []
        self.output_dir.mkdir(parents=True, exist_ok=True)
        with self.table.open("w", newline="") as file:
            csv.writer(file).writerow(["file", "slice", "evaluations", "relative_residual", "status"])

    def _collect(self, engine: Any) -> None:
        if self._recorder is None:
            return
        recorder = self._recorder.last
        evaluations, residual, status = recorder.evaluations(), recorder.relative_residual(), recorder.status()
        rows: list[list[Any]] = []
        for row, (sample, output) in enumerate(zip(engine.state.batch, engine.state.output, strict=True)):
            source, index = str(sample["source"]), int(sample["slice"])
            if source != self._source:
                self._flush()
                self._targets[source] = self._new_target(source)
                self._source = source
            magnitude = torch.linalg.vector_norm(torch.as_tensor(output["pred"]).detach().float(), dim=0)
            self._slices.append((index, (magnitude * float(sample["scale"])).cpu().numpy()))
            solve: list[Any] = ["", "", ""]
            if row < len(status):
                solve = [
                    int(evaluations[row]),
                    f"{float(residual[row]):.3e}",
                    SolveStatus(int(status[row])).name.lower(),
                ]
            rows.append([self._targets[source].relative_to(self.output_dir).as_posix(), index, *solve])
        with self.table.open("a", newline="") as file:
            csv.writer(file).writerows(rows)

    def _flush(self) -> None:
        if not self._slices:
            return
        indices, images = zip(*sorted(self._slices, key=lambda item: item[0]), strict=True)
        target = self._targets[self._source]
        target.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(target, "x") as file:
            file.create_dataset("reconstruction", data=np.stack(images).astype(np.float32))
            file.attrs["slices"] = np.asarray(indices)
            file.attrs["note"] = "monai-deqkan reconstruction; not for clinical use"
        self._slices = []

    def _new_target(self, source: str) -> Path:
        if source in self._targets:
            raise ValueError(
                f"The slices of one file must follow each other; {source} came again after another file. Read the "
                "slices in order: no shuffling, one process."
            )
        target = first = self.output_dir / self._relative(source)
        number = 1
        while target in self._targets.values():
            number += 1
            target = first.with_name(f"{first.stem}_{number}{first.suffix}")
        if target.exists():
            raise FileExistsError(f"{target} exists and was not touched. Name a new `output_dir`, or move it away.")
        return target

    def _relative(self, source: str) -> Path:
        path = Path(source).absolute()
        return path.relative_to(self.root) if self.root in path.parents else Path(path.name)
