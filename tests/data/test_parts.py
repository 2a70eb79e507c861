from __future__ import annotations

from pathlib import Path

import pytest

from monai_deqkan.data.parts import part_folders, resolve_part


@pytest.mark.parametrize(
    ("part", "present", "expected"),
    [
        ("train", "train val test", ("train", "")),
        ("val", "train val test", ("val", "")),
        ("evaluate", "train val test", ("test", "")),
        ("evaluate", "train val", ("val", "")),
        ("train", "train test", ("train", "train")),
        ("val", "train test", ("train", "val")),
        ("evaluate", "train", ("train", "val")),
        ("evaluate", "test", ("test", "")),
    ],
)
def test_every_case_of_missing_parts(part: str, present: str, expected: tuple[str, str]) -> None:
    assert resolve_part(part, present.split()) == expected


def test_folders_are_found_under_other_names(tmp_path: Path) -> None:
    for name in ("Testing", "singlecoil_train", "masks", ".val"):
        (tmp_path / name).mkdir()
    (tmp_path / "valid").write_text("a file")
    assert {part: folder.name for part, folder in part_folders(tmp_path).items()} == {
        "train": "singlecoil_train",
        "test": "Testing",
    }
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=r"singlecoil_train and train both mean 'train'"):
        part_folders(tmp_path)
