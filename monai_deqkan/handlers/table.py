"""What handlers that write tables of images share: the file, and how an image is named in it."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["image_name", "write_table"]


def image_name(sample: Mapping[str, Any], folder: str | os.PathLike[str]) -> str:
    """Return the path of a sample's ``image`` below ``folder``, or below the folder of a file that is given instead."""
    base = Path(folder).expanduser()
    path = os.path.relpath(sample["image"].meta["filename_or_obj"], base.parent if base.is_file() else base)
    return Path(path).as_posix()


def write_table(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a CSV file, in a folder that is made where absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
