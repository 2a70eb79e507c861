"""What k-space files hold, remembered between runs: opening thousands of files takes minutes on a network drive."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py

from monai_deqkan.transforms.kspace.array import kspace_file_shape

__all__ = ["KspaceFile", "describe_kspace_files"]

_FEW = 32  # files that are looked into without a cache unless a folder for it is named
_VERSION = 1


@dataclass(frozen=True)
class KspaceFile:
    """What a k-space file holds.

    Attributes:
        path: the file.
        shape: ``(slices, K, H, W)`` of its k-space; None where it is unusable.
        undersampled: whether it was measured undersampled, as its data set ``mask`` tells: then it has no reference.
        problem: why it is unusable; empty where it is not.
    """

    path: Path
    shape: tuple[int, int, int, int] | None
    undersampled: bool
    problem: str


def describe_kspace_files(
    files: Sequence[str | Path], index_dir: str | os.PathLike[str] | None = None
) -> list[KspaceFile]:
    """Look into k-space files, without reading their k-space; unusable ones are told, not raised.

    What was found is kept in JSON files, one per data folder, and taken from there as long as a file's size and time of
    change are the same. Nothing but paths and shapes is kept, and nothing in the data's folder.

    Args:
        files: k-space files.
        index_dir: folder for those JSON files; a folder that cannot be written to is replaced by one in the system's
            folder for temporary files. None takes the user's cache folder (``$XDG_CACHE_HOME`` or ``~/.cache``), and
            keeps nothing about fewer than 32 files.

    Returns:
        One description per file, in their order.
    """
    paths = [Path(file) for file in files]
    keeps = index_dir is not None or len(paths) >= _FEW
    folders = sorted({path.absolute().parent for path in paths})
    known = {folder: _read(folder, index_dir) if keeps else {} for folder in folders}
    found, changed = [], set()
    for path in paths:
        entries = known[path.absolute().parent]
        try:
            state = path.stat()
        except OSError as error:
            found.append(KspaceFile(path, None, False, str(error)))
            continue
        stamp = [state.st_size, state.st_mtime_ns]
        entry = entries.get(path.name)
        if entry is None or entry["stamp"] != stamp:
            described = asdict(_look_into(path))
            del described["path"]
            entries[path.name] = entry = {"stamp": stamp, **described}
            changed.add(path.absolute().parent)
        shape = entry["shape"]
        found.append(KspaceFile(path, tuple(shape) if shape else None, entry["undersampled"], entry["problem"]))
    for folder in changed:
        if keeps:
            _write(folder, known[folder], index_dir)
    return found


def _look_into(path: Path) -> KspaceFile:
    try:
        shape = kspace_file_shape(path)
        with h5py.File(path, "r") as file:
            return KspaceFile(path, shape, "mask" in file, "")
    except (OSError, ValueError, RuntimeError) as error:
        return KspaceFile(path, None, False, str(error))


def _places(folder: Path, index_dir: str | os.PathLike[str] | None) -> list[Path]:
    """Return where the index of a data folder may be, in the order of preference."""
    name = f"kspace-{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}.json"
    user = getattr(os, "getuid", lambda: "user")()
    temporary = Path(tempfile.gettempdir()) / f"monai-deqkan-{user}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "monai-deqkan"
    return [(cache if index_dir is None else Path(index_dir).expanduser()) / name, temporary / name]


def _read(folder: Path, index_dir: str | os.PathLike[str] | None) -> dict[str, Any]:
    for path in _places(folder, index_dir):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        # A damaged index is read anew from the files, whatever it holds.
        if isinstance(content, dict) and content.get("version") == _VERSION and content.get("folder") == str(folder):
            entries = content.get("files")
            if isinstance(entries, dict) and all(isinstance(entry, dict) for entry in entries.values()):
                return {name: entry for name, entry in entries.items() if "stamp" in entry}
    return {}


def _write(folder: Path, entries: dict[str, Any], index_dir: str | os.PathLike[str] | None) -> None:
    text = json.dumps({"version": _VERSION, "folder": str(folder), "files": entries})
    for path in _places(folder, index_dir):
        draft = path.with_suffix(f".{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            # Renamed, so that processes which write at the same time leave one whole file.
            draft.write_text(text, encoding="utf-8")
            draft.replace(path)
        except OSError:
            continue
        return
