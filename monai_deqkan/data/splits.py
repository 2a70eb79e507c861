"""Hold out a share of a data set by chance but repeatably, and keep the images of a patient together."""

from __future__ import annotations

import logging
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from pathlib import Path, PurePosixPath
from typing import TypeVar

from monai_deqkan._checks import check_choice, check_int, check_range
from monai_deqkan.data.files import image_stem
from monai_deqkan.data.tables import read_columns

__all__ = ["hold_out", "hold_out_patients", "patients_of"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


def hold_out(items: Sequence[T], part: str, seed: int = 0, fraction: float = 0.2) -> list[T]:
    """Split a list by chance but repeatably, and return one side in the list's own order.

    Args:
        items: at least two items.
        part: ``"val"`` for the held-out share, ``"train"`` for the rest.
        seed: the same seed gives the same split.
        fraction: share held out, in ``(0, 1)``; each side gets at least one item.

    Raises:
        ValueError: if there are fewer than two items, or an argument lies outside its range.

    Example:
        >>> hold_out(["a", "b", "c", "d", "e"], "val"), hold_out(["a", "b", "c", "d", "e"], "train")
        (['d'], ['a', 'b', 'c', 'e'])
    """
    _check_arguments(part, seed, fraction)
    if len(items) < 2:
        raise ValueError(f"Holding out a part for validation takes at least 2 items; got {len(items)}. Add data.")
    held_out = set(random.Random(seed).sample(range(len(items)), _share(len(items), fraction)))
    return [item for index, item in enumerate(items) if (index in held_out) == (part == "val")]


def hold_out_patients(
    items: Sequence[T],
    part: str,
    patients: Sequence[Hashable],
    labels: Sequence[Hashable],
    seed: int = 0,
    fraction: float = 0.2,
) -> list[T]:
    r"""Split a list by chance but repeatably, with all items of a patient on one side.

    Patients are gone through in an order drawn by the seed, until nothing changes. One is held out or put back if that
    brings the counts of the classes nearer to their targets, in the sum of squared relative differences, and leaves no
    class without a training item. A class that is then missing among the held-out items gets the smallest patient that
    training can spare.

    Args:
        items: the items.
        part: ``"val"`` for the held-out share, ``"train"`` for the rest.
        patients: who each item is of.
        labels: the class of each item; a patient may have several.
        seed: the same seed gives the same split.
        fraction: share of each class to hold out, in ``(0, 1)``.

    Returns:
        One side, in the list's own order.

    Raises:
        ValueError: if the lengths differ, nothing can be held out, or an argument lies outside its range.

    Example:
        >>> hold_out_patients(["a1", "a2", "b1", "b2", "c1"], "val", ["a", "a", "b", "b", "c"], [0, 0, 0, 0, 0])
        ['c1']
    """
    _check_arguments(part, seed, fraction)
    if not len(items) == len(patients) == len(labels):
        raise ValueError(
            "`items`, `patients` and `labels` must have one entry per item; their lengths are "
            f"{len(items)}, {len(patients)} and {len(labels)}."
        )
    groups: dict[Hashable, Counter[Hashable]] = defaultdict(Counter)
    for patient, label in zip(patients, labels, strict=True):
        groups[patient][label] += 1
    held_out = _held_out_patients(groups, Counter(labels), seed, fraction)
    if not held_out:
        raise ValueError(
            f"No patient can be held out for validation: the {len(groups)} patient(s) of {len(items)} items cannot be "
            "parted so that training keeps every class. Add patients, or make a folder val yourself."
        )
    return [item for item, patient in zip(items, patients, strict=True) if (patient in held_out) == (part == "val")]


def patients_of(files: Sequence[str | Path], patients: str | Path) -> list[str]:
    r"""Tell which patient each file is of, from its name or a table.

    Args:
        files: image files.
        patients: a regular expression that is searched in the name of each file, and whose first group that takes part
            in the match is the patient: ``r"person(\d+)|IM-(\d+)"``, where the two groups are different people. Files
            that it does not match count as a patient each, which the log tells. Or the path of a CSV file (its name
            ends with .csv or .tsv) with a column for the file (``file``, ``image``, ``path``, ...) and one for the
            ``patient``; its files are matched by as much of the path as they give, with or without the suffix.

    Returns:
        One key per file, equal for files of the same patient. It may hold an identifier: do not write it down.

    Raises:
        FileNotFoundError: if the CSV file is missing.
        ValueError: if the expression is invalid, has no group or matches no file; or if a file is missing in the CSV,
            or in it with two patients.

    Example:
        >>> keys = patients_of(["person7_virus_1.png", "person7_virus_2.png", "person8_virus_1.png"], r"person(\d+)")
        >>> keys[0] == keys[1] != keys[2]
        True
    """
    paths = [Path(file) for file in files]
    if str(patients).lower().endswith((".csv", ".tsv")):
        return _patients_of_table(paths, Path(patients))
    return _patients_of_pattern(paths, str(patients))


def _check_arguments(part: str, seed: int, fraction: float) -> None:
    check_choice("part", part, ("train", "val"))
    check_int("seed", seed, minimum=0)
    check_range("fraction", fraction, 0, 1, open_low=True, open_high=True)


def _share(count: int, fraction: float) -> int:
    return min(max(round(fraction * count), 1), count - 1)


def _held_out_patients(
    groups: dict[Hashable, Counter[Hashable]], totals: Counter[Hashable], seed: int, fraction: float
) -> set[Hashable]:
    order = list(groups)
    random.Random(seed).shuffle(order)
    wanted = {label: _share(count, fraction) for label, count in totals.items()}
    taken: Counter[Hashable] = Counter()
    chosen: set[Hashable] = set()

    def distance() -> float:
        return sum(((taken[label] - wanted[label]) / totals[label]) ** 2 for label in totals)

    def is_spare(patient: Hashable) -> bool:
        return patient not in chosen and all(
            taken[label] + count < totals[label] for label, count in groups[patient].items()
        )

    def move(patient: Hashable) -> None:
        (taken.subtract if patient in chosen else taken.update)(groups[patient])
        chosen.symmetric_difference_update({patient})

    moved = True
    while moved:  # ends, as each move brings the counts strictly nearer
        moved = False
        for patient in order:
            if patient in chosen or is_spare(patient):
                before = distance()
                move(patient)
                if distance() < before:
                    moved = True
                else:
                    move(patient)
    for label in totals:
        spare = [patient for patient in order if label in groups[patient] and is_spare(patient)]
        if taken[label] == 0 and spare:
            move(min(spare, key=lambda patient: sum(groups[patient].values())))
        elif taken[label] == 0:
            logger.warning("All images of class %s are of patients that training needs: validation has none.", label)
    return chosen


def _patients_of_pattern(paths: Sequence[Path], pattern: str) -> list[str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"`patients` must be a regular expression or a CSV file; got {pattern!r}: {error}.") from None
    if expression.groups == 0:
        raise ValueError(
            f"`patients` must have a group, in parentheses, that is the patient; got {pattern!r}. Write for example "
            r"'person(\d+)'."
        )
    keys, unmatched = [], 0
    for path in paths:
        match = expression.search(path.name)
        group = next((index for index, text in enumerate(match.groups()) if text is not None), None) if match else None
        if match is None or group is None:
            unmatched += 1
            keys.append(f"file:{path}")
        else:
            keys.append(f"{group}:{match.groups()[group]}")
    if unmatched == len(paths):
        example = f", such as {paths[0].name}" if paths else ""
        raise ValueError(f"`patients` must match file names; {pattern!r} matches none of {len(paths)}{example}.")
    if unmatched:
        logger.warning(
            "The pattern of patients matches %d of %d file names: each other image counts as a patient of its own.",
            len(paths) - unmatched,
            len(paths),
        )
    return keys


def _patients_of_table(paths: Sequence[Path], table: Path) -> list[str]:
    known: dict[str, set[str]] = defaultdict(set)
    for row in read_columns(table, ("file", "patient")):
        entry = PurePosixPath(row["file"].replace("\\", "/"))
        for name in {
            str(entry),
            entry.name,
            str(entry.with_name(image_stem(Path(entry.name)))),
            image_stem(Path(entry.name)),
        }:
            known[name].add(row["patient"])
    keys, missing = [], []
    for path in paths:
        found = next((known[name] for name in _names_of(path) if name in known), None)
        if found is None:
            missing.append(path.name)
        elif len(found) > 1:
            raise ValueError(
                f"{table} must tell one patient for each file; {path.name} has {len(found)}. Give more of its path, or "
                "mend the table."
            )
        else:
            keys.append(f"patient:{min(found)}")
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ValueError(f"{table} must tell the patient of every image; it lacks {', '.join(missing[:5])}{more}.")
    return keys


def _names_of(path: Path) -> list[str]:
    """Return the names under which a table may list a file, the most telling first."""
    parts = Path(os.path.abspath(path)).parts[1:]
    tails = ["/".join(parts[start:]) for start in range(len(parts))]
    stem = image_stem(path)
    return [
        Path(os.path.abspath(path)).as_posix(),
        *tails,
        *(tail[: len(tail) - len(path.name)] + stem for tail in tails),
    ]
