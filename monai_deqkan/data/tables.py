"""Tables of images, as CSV files: columns found by name, rows as images with label, part and patient."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from monai_deqkan._checks import did_you_mean
from monai_deqkan.data.files import IMAGE_SUFFIXES
from monai_deqkan.data.parts import part_name

__all__ = ["TableColumns"]

# Names of these columns in public data sets, in lower case and with "_" for "-" and space; the likeliest first.
_NAMES = {
    "file": ("file", "image", "path", "filename", "file_name", "filepath", "file_path", "image_path", "image_file",
             "image_name", "image_index", "image_id"),
    "label": ("label", "class", "class_name", "category", "target", "diagnosis", "finding", "dx"),
    "part": ("part", "split", "set", "subset", "dataset_type"),
    "patient": ("patient", "patient_id", "patientid", "subject", "subject_id", "person", "person_id", "case_id",
                "lesion_id"),
}  # fmt: skip


@dataclass(frozen=True)
class TableColumns:
    """Which columns of a table hold what; None finds a column by its usual names.

    Args:
        file: path of the image, absolute, or relative to the table's folder or a given one.
        label: class, a word or a number.
        part: train, val or test, or a word such as "training".
        patient: who the image is of.
    """

    file: str | None = None
    label: str | None = None
    part: str | None = None
    patient: str | None = None


@dataclass(frozen=True)
class ImageRow:
    """One image of a table; ``part`` and ``patient`` are empty where the table does not tell them."""

    file: Path
    label: str
    part: str = ""
    patient: str = ""


def read_columns(
    table: Path,
    required: Sequence[str],
    optional: Sequence[str] = (),
    columns: TableColumns = TableColumns(),
) -> list[dict[str, str]]:
    """Read some columns of a CSV file (comma, semicolon or tab).

    Args:
        table: the file, in UTF-8, with a line of column names.
        required: which of file, label, part and patient it must have.
        optional: which of them are read too where it has them.
        columns: their names in the file.

    Returns:
        One dictionary per row, with the words above as keys; values are stripped.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a column is missing, a value of a required one is empty, or the file has no rows or is no UTF-8.
    """
    if not table.is_file():
        raise FileNotFoundError(f"There is no table {table}. Check the path.")
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            header = file.readline()
            file.seek(0)
            reader = csv.DictReader(file, delimiter=max(",;\t", key=header.count))
            found = _find_columns(table, list(reader.fieldnames or []), required, optional, columns)
            rows = [{key: (row[name] or "").strip() for key, name in found.items()} for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"The table {table} must be a CSV file in UTF-8; it cannot be read ({error}). Save it as one."
        ) from None
    if not rows:
        raise ValueError(f"The table {table} must have at least one row below its column names; it has none.")
    for key in required:
        empty = [number for number, row in enumerate(rows, start=2) if not row[key]]
        if empty:
            raise ValueError(
                f"The table {table} must tell the {key} of every image; column '{found[key]}' is empty in "
                f"{len(empty)} row(s), the first on line {empty[0]}."
            )
    return rows


def read_image_table(
    table: Path,
    columns: TableColumns = TableColumns(),
    images_dir: Path | None = None,
) -> list[ImageRow]:
    """Read a table of images with their labels.

    Raises:
        FileNotFoundError: if the table, or an image that it names, is missing.
        ValueError: as from ``read_columns``, or if an image comes twice or has several classes, or a part is unknown.
    """
    rows = read_columns(table, ("file", "label"), ("part", "patient"), columns)
    root = table.parent if images_dir is None else images_dir
    found = [
        ImageRow(_image_file(root, row["file"]), row["label"], row.get("part", ""), row.get("patient", ""))
        for row in rows
    ]
    missing = [row["file"] for row, image in zip(rows, found, strict=True) if not image.file.is_file()]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise FileNotFoundError(
            f"{len(missing)} of {len(rows)} images of {table} are not below {root}: {', '.join(missing[:5])}{more}. "
            "Name the folder that the paths are relative to, or take the rows out."
        )
    # "a.png" and "./a.png" are one image, which must not come into two parts or classes.
    twice = [file for file, count in Counter(os.path.abspath(row.file) for row in found).items() if count > 1]
    if twice:
        raise ValueError(
            f"The table {table} may name each image once; {len(twice)} come more often, such as {twice[0]}. "
            "Take rows out."
        )
    several = next((row.label for row in found if "|" in row.label), None)
    if several is not None:
        raise ValueError(f"The table {table} must tell one class per image; got '{several}'. Choose one of them.")
    return [_with_part(table, row) for row in found] if "part" in rows[0] else found


def _find_columns(
    table: Path, names: Sequence[str], required: Sequence[str], optional: Sequence[str], columns: TableColumns
) -> dict[str, str]:
    given: Mapping[str, str | None] = {field.name: getattr(columns, field.name) for field in fields(columns)}
    plain = {name.strip().lower().replace("-", "_").replace(" ", "_"): name for name in names}
    found = {}
    for key in (*required, *optional):
        wanted = given[key]
        if wanted is not None and wanted not in names:
            raise ValueError(
                f"The table {table} has no column '{wanted}' for the {key}; it has {', '.join(names)}."
                f"{did_you_mean(wanted, names)}"
            )
        name = wanted if wanted is not None else next((plain[word] for word in _NAMES[key] if word in plain), None)
        if name is not None:
            found[key] = name
        elif key in required:
            raise ValueError(
                f"The table {table} must have a column for the {key}, such as {', '.join(_NAMES[key][:3])}; it has "
                f"{', '.join(names)}. Rename the column, or name the one that is meant."
            )
    return found


def _image_file(root: Path, name: str) -> Path:
    """Return the path of an image; a name without suffix, as an image's id often is, gets the one that exists."""
    path = root / Path(name.replace("\\", "/")).expanduser()
    if not path.is_file():
        candidates = (path.with_name(path.name + suffix) for suffix in IMAGE_SUFFIXES)
        return next((candidate for candidate in candidates if candidate.is_file()), path)
    return path


def _with_part(table: Path, row: ImageRow) -> ImageRow:
    part = part_name(row.part)
    if not part:
        raise ValueError(
            f"The part of each image in {table} must be train, val or test; {row.file.name} has '{row.part}'. Rename "
            "it, or take the column out to have parts drawn."
        )
    return ImageRow(row.file, row.label, part, row.patient)
