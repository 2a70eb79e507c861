from __future__ import annotations

import csv
import hashlib
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from monai_deqkan.data import TableColumns, class_names, classification_items, convert_dataset
from monai_deqkan.transforms import LoadMedicalImage


def save(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 5), np.uint8)).save(path)
    return path


def manifest(folder: Path) -> list[dict[str, str]]:
    with (folder / "manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A folder per class, without parts: 30 patients with two images each, a third of them sick."""
    for patient in range(30):
        for index in range(2):
            name = "sick" if patient % 3 == 0 else "well"
            save(tmp_path / "plain" / name / f"p{patient:02}_{index}.png", 2 * patient + index)
    (tmp_path / "plain" / "sick" / "notes.txt").write_text("x")
    return tmp_path / "plain"


def test_folders_per_class_become_parts(plain: Path, tmp_path: Path) -> None:
    before = snapshot(plain)
    target = convert_dataset(plain, tmp_path / "new" / "data", val_fraction=0.2, test_fraction=0.1)
    rows = manifest(target)
    assert Counter((row["part"], row["label"]) for row in rows) == {
        ("train", "sick"): 14, ("train", "well"): 28, ("val", "sick"): 4, ("val", "well"): 8, ("test", "sick"): 2,
        ("test", "well"): 4,
    }  # fmt: skip
    for row in rows:
        assert (target / row["target"]).read_bytes() == (plain / row["source"]).read_bytes()
        assert row["sha256"] == hashlib.sha256((plain / row["source"]).read_bytes()).hexdigest()
        assert row["target"] == f"{row['part']}/{row['label']}/{Path(row['source']).name}"
    assert {str(file.relative_to(target)) for file in target.rglob("*.*")} == {row["target"] for row in rows} | {
        "manifest.csv"
    }
    assert snapshot(plain) == before
    assert class_names(target) == ["sick", "well"]
    assert len(classification_items(target, "evaluate")) == 6


def test_patients_are_kept_together(plain: Path, tmp_path: Path) -> None:
    def parts(folder: Path) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for row in manifest(folder):
            found.setdefault(Path(row["source"]).name[:3], set()).add(row["part"])
        return found

    mixed = parts(convert_dataset(plain, tmp_path / "mixed"))
    safe_folder = convert_dataset(plain, tmp_path / "safe", patients=r"^p(\d+)")
    assert max(map(len, mixed.values())) > 1
    assert all(len(found) == 1 for found in parts(safe_folder).values())
    assert Counter(row["part"] for row in manifest(safe_folder)) == {"train": 36, "val": 12, "test": 12}
    again = convert_dataset(plain, tmp_path / "again", patients=r"^p(\d+)")
    assert snapshot(again) == snapshot(safe_folder)
    assert snapshot(convert_dataset(plain, tmp_path / "other", patients=r"^p(\d+)", seed=1)) != snapshot(again)


def test_links(plain: Path, tmp_path: Path) -> None:
    target = convert_dataset(plain, tmp_path / "links", link=True)
    assert all((target / row["target"]).is_symlink() for row in manifest(target))
    assert len(classification_items(target, "train")) == 36


def test_parts_under_other_names_and_folders_in_classes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for part, seed in (("Training", 0), ("Testing", 10)):
        for name in ("a", "b"):
            save(source / part / name / "x" / "1.png", seed)
            save(source / part / name / "y" / "1.png", seed + 1)
            save(source / part / name / "2.png", seed + 2)
    target = convert_dataset(source, tmp_path / "target")
    found = {row["target"] for row in manifest(target) if row["label"] == "a"}
    assert found == {f"{part}/a/{name}" for part in ("train", "test") for name in ("x_1.png", "y_1.png", "2.png")}


def write_table(folder: Path, header: str, *, with_parts: bool = True) -> Path:
    lines = [header]
    for index in range(20):
        file = save(folder / "images" / f"{index}.png", index)
        path = file if index % 2 else Path("images") / file.name
        part = ("Train", "valid", "TEST")[index // 2 % 3]
        lines.append(f"{path},{'ab'[index // 10]}/{index // 10},{part if with_parts else ''},p{index // 2 % 3}")
    table = folder / "labels.csv"
    table.write_text("\n".join(lines))
    return table


def test_a_table_with_parts_and_patients(tmp_path: Path) -> None:
    target = convert_dataset(write_table(tmp_path / "source", "Path,Label,Split,Patient ID"), tmp_path / "target")
    rows = manifest(target)
    assert len(rows) == 20
    assert class_names(target) == ["a_0", "b_1"], "a slash cannot be in a folder's name"
    for row in rows:
        index = int(Path(row["source"]).stem)
        assert row["part"] == ("train", "val", "test")[index // 2 % 3]
        assert row["label"] == f"{'ab'[index // 10]}/{index // 10}"


def test_a_table_whose_columns_are_told(tmp_path: Path) -> None:
    table = write_table(tmp_path / "source", "where,what,unused,who")
    columns = TableColumns(file="where", label="what", patient="who")
    target = convert_dataset(table, tmp_path / "target", columns=columns, val_fraction=0.3, test_fraction=0.3)
    parts = {index % 3: set() for index in range(3)}
    for row in manifest(target):
        parts[int(Path(row["source"]).stem) // 2 % 3].add(row["part"])
    assert sorted(map(sorted, parts.values())) == [["test"], ["train"], ["val"]]


def test_parts_that_share_patients_are_refused(tmp_path: Path) -> None:
    table = write_table(tmp_path / "source", "path,label,split,other")
    with pytest.raises(ValueError, match=r"1 of 1 patients have images in several parts.*drawn by patient"):
        convert_dataset(table, tmp_path / "target", patients=r"(\.png)")
    assert not (tmp_path / "target").exists()


def medmnist(path: Path, shape: tuple[int, ...], classes: int = 2, **extra: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 5), ("val", 2), ("test", 3)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (count, *shape), np.uint8)
        arrays[f"{part}_labels"] = (np.arange(count) % classes)[:, None].astype(np.uint8)
    arrays.update(extra)
    np.savez_compressed(path, **arrays)
    return arrays


@pytest.mark.parametrize("shape", [(9, 8), (9, 8, 3), (6, 7, 8)])
def test_medmnist_archives_keep_every_value(tmp_path: Path, shape: tuple[int, ...]) -> None:
    arrays = medmnist(tmp_path / "tinymnist.npz", shape)
    target = convert_dataset(tmp_path / "tinymnist.npz", tmp_path / "target", class_names=["normal", "pneumonia"])
    rows = manifest(target)
    assert len(rows) == 10
    for row in rows:
        part, index = row["part"], int(row["source"].split("[")[1][:-1])
        file = target / row["target"]
        is_volume = shape == (6, 7, 8)
        pixels = np.asarray(nib.load(file).dataobj) if is_volume else np.asarray(Image.open(file))
        np.testing.assert_array_equal(pixels, arrays[f"{part}_images"][index])
        assert row["label"] == ["normal", "pneumonia"][int(arrays[f"{part}_labels"][index, 0])]
        assert row["source"] == f"tinymnist.npz:{part}_images[{index}]"
    image = LoadMedicalImage(3 if is_volume else 2, 3 if shape[-1] == 3 else 1)(target / rows[0]["target"])
    assert image.shape[0] == (3 if shape[-1] == 3 else 1)


def test_numbers_of_classes_sort_as_numbers(tmp_path: Path) -> None:
    labels = np.arange(11)[:, None]
    medmnist(tmp_path / "a.npz", (4, 4), train_images=np.zeros((11, 4, 4), np.uint8), train_labels=labels)
    assert class_names(convert_dataset(tmp_path / "a.npz", tmp_path / "b")) == [f"{index:02}" for index in range(11)]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"train_labels": np.zeros((5, 14), np.uint8)}, r"one class per image; got shape \(5, 14\)"),
        ({"train_labels": np.zeros((4, 1), np.uint8)}, "5 images and 4 labels in train"),
        ({"train_images": np.zeros((5, 4, 4), np.float32)}, r"8-bit.*got float32 of shape \(5, 4, 4\)"),
        ({"train_labels": np.full((5, 1), 2, np.uint8)}, "name each of the 3 classes"),
    ],
)
def test_archives_that_do_not_fit(tmp_path: Path, extra: dict[str, np.ndarray], message: str) -> None:
    medmnist(tmp_path / "a.npz", (4, 4), **extra)
    with pytest.raises(ValueError, match=message):
        convert_dataset(tmp_path / "a.npz", tmp_path / "b", class_names=["x", "y"])
    assert not (tmp_path / "b").exists()


def test_nothing_is_overwritten_or_half_done(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        convert_dataset(plain, tmp_path / "mine")
    assert snapshot(tmp_path / "mine") == {"file": b"mine"}

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("monai_deqkan.data.convert.shutil.copy2", fail)
    with pytest.raises(OSError, match="disk full"):
        convert_dataset(plain, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "plain"]


def test_what_does_not_fit_is_said(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.npz").write_text("x")
    for source, options, message in (
        (plain, {"class_names": ["a"]}, "`class_names` is for a MedMNIST archive"),
        (plain, {"columns": TableColumns(file="x")}, "`columns` is for a CSV file"),
        (plain, {"val_fraction": 0.6, "test_fraction": 0.4}, "leave something for training"),
        (plain / "sick", {}, r"at least 2 classes; got \[\]"),
        (tmp_path / "bad.npz", {}, r"no \.npz archive"),
        (plain, {"patients": r"nobody(\d+)"}, "matches none of 60"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_dataset(source, tmp_path / "target", **options)
    with pytest.raises(FileNotFoundError):
        convert_dataset(tmp_path / "nowhere", tmp_path / "target")


def test_a_huge_class_number_is_refused_at_once(tmp_path: Path) -> None:
    medmnist(tmp_path / "a.npz", (4, 4), train_images=np.zeros((2, 4, 4), np.uint8), train_labels=np.array([0, 2**62]))
    with pytest.raises(ValueError, match="Class numbers must lie below 10000; got 4611686018427387904"):
        convert_dataset(tmp_path / "a.npz", tmp_path / "b")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
@pytest.mark.parametrize("link", [False, True])
def test_names_that_are_no_utf8_are_converted(plain: Path, tmp_path: Path, link: bool) -> None:
    odd = os.fsdecode(b"p\xff.png")
    save(plain / "sick" / "odd.png", 99).rename(plain / "sick" / odd)
    target = convert_dataset(plain, tmp_path / "data", link=link)
    assert [file.name for file in target.rglob("p?.png")] == [odd]
    assert sum(r"p\udcff.png" in row["source"] for row in manifest(target)) == 1
