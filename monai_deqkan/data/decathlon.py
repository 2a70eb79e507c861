"""Data sets in the Medical Segmentation Decathlon's layout: ``dataset.json`` beside ``imagesTr`` and ``labelsTr``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from monai.data import load_decathlon_datalist

_PARTS = {"train": "training", "val": "validation", "test": "test"}


def is_decathlon(dataset_dir: str | Path) -> bool:
    """Tell whether a folder has the Decathlon's ``dataset.json`` (and no folder ``train`` that would count first)."""
    root = Path(dataset_dir)
    return (root / "dataset.json").is_file() and not (root / "train").is_dir()


def decathlon_parts(dataset_dir: str | Path) -> dict[str, list[dict[str, str]]]:
    """Return image and label of each case by part; only parts whose every case has a label.

    Raises:
        ValueError: if the list is damaged, has no training cases, or lists a case without a label, or twice.
        FileNotFoundError: if a listed file is missing.
    """
    listed = _read(dataset_dir)
    parts = {}
    for part, key in _PARTS.items():
        cases = listed.get(key) or []
        labelled = [isinstance(case, dict) and "label" in case and "image" in case for case in cases]
        if all(labelled) and cases:
            items = load_decathlon_datalist(str(_file(dataset_dir)), data_list_key=key)
            parts[part] = _checked(dataset_dir, key, items)
        elif part != "test" and cases:  # the Decathlon's own test cases have no labels
            raise ValueError(
                f"Each case of '{key}' in {_file(dataset_dir)} must have an 'image' and a 'label'; "
                f"{labelled.count(False)} of {len(cases)} do not."
            )
    if "train" not in parts:
        raise ValueError(f"{_file(dataset_dir)} must list cases under 'training'; it has {sorted(listed)}.")
    return parts


def decathlon_labels(dataset_dir: str | Path) -> dict[int, str]:
    """Return the class names by value of the masks, sorted, from ``labels``; also in nnU-Net's form, names first.

    Raises:
        ValueError: if there are fewer than two, or a value is no integer.
    """
    listed = _read(dataset_dir).get("labels")
    pairs = list(listed.items()) if isinstance(listed, dict) else []
    if pairs and all(isinstance(value, int) for _, value in pairs):
        pairs = [(value, name) for name, value in pairs]
    try:
        labels = {int(value): str(name) for value, name in pairs}
    except (TypeError, ValueError):
        labels = {}
    if len(labels) < 2 or len(set(labels.values())) < len(pairs):
        raise ValueError(
            f"`labels` in {_file(dataset_dir)} must name at least two values of the masks, each differently, such as "
            f'{{"0": "background", "1": "tumour"}}; got {listed}.'
        )
    return dict(sorted(labels.items()))


def _file(dataset_dir: str | Path) -> Path:
    return Path(dataset_dir) / "dataset.json"


def _read(dataset_dir: str | Path) -> dict[str, Any]:
    try:
        listed = json.loads(_file(dataset_dir).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{_file(dataset_dir)} cannot be read as JSON: {error}. Mend the file.") from None
    if not isinstance(listed, dict):
        raise ValueError(f"{_file(dataset_dir)} must hold a JSON object, as the Decathlon's; got {type(listed)}.")
    return listed


def _checked(dataset_dir: str | Path, key: str, items: list[dict[str, Any]]) -> list[dict[str, str]]:
    found = sorted(({"image": str(item["image"]), "label": str(item["label"])} for item in items), key=str)
    images = [item["image"] for item in found]
    if len(set(images)) < len(images):
        raise ValueError(f"'{key}' in {_file(dataset_dir)} lists an image twice. Each case may come once.")
    missing = [path for item in found for path in item.values() if not Path(path).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the files that {_file(dataset_dir)} lists under '{key}' are missing, such as "
            f"{missing[0]}. Unpack the data set whole."
        )
    return found
