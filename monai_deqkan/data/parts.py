"""The parts of a data set, train, val and test: under which names they come, and which files stand for which part."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from monai_deqkan._checks import check_choice
from monai_deqkan.data.files import visible_folders

PARTS = ("train", "val", "test")
_ALIASES = {
    "training": "train",
    "valid": "val",
    "validation": "val",
    "validate": "val",
    "dev": "val",
    "testing": "test",
}
_PREFIXES = ("multicoil_", "singlecoil_")  # fastMRI's own folders


def part_name(text: str) -> str:
    """Return the part that a folder or a word in a table means; empty where it means none.

    Example:
        >>> [part_name(word) for word in ("Training", "valid", "multicoil_test", "glioma")]
        ['train', 'val', 'test', '']
    """
    word = text.strip().lower()
    for prefix in _PREFIXES:
        word = word.removeprefix(prefix)
    word = _ALIASES.get(word, word)
    return word if word in PARTS else ""


def part_folders(root: Path) -> dict[str, Path]:
    """Return the folders of the parts directly in ``root``, in the order train, val, test.

    Raises:
        ValueError: if two folders mean the same part.
    """
    found: dict[str, Path] = {}
    for folder in visible_folders(root):
        part = part_name(folder.name)
        if part in found:
            raise ValueError(
                f"{root} may hold one folder per part; {found[part].name} and {folder.name} both mean '{part}'. Keep "
                "one of them."
            )
        if part:
            found[part] = folder
    return {part: found[part] for part in PARTS if part in found}


def resolve_part(part: str, present: Collection[str]) -> tuple[str, str]:
    """Return which of the parts that a data set has stands for ``part``, and which side of it.

    Args:
        part: ``"train"``, ``"val"``, or ``"evaluate"``: ``test`` where there is one, else as ``"val"``.
        present: the parts that the data set has.

    Returns:
        The name of the part to read, and ``"train"`` or ``"val"`` where only that side of a split of it is meant,
        because there is no ``val``; empty for all of it.

    Example:
        >>> resolve_part("evaluate", {"train", "test"}), resolve_part("evaluate", {"train"})
        (('test', ''), ('train', 'val'))
    """
    check_choice("part", part, ("train", "val", "evaluate"))
    if part == "evaluate":
        if "test" in present:
            return "test", ""
        part = "val"
    if "val" in present:
        return part, ""
    return "train", part
