from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from monai_deqkan.data import DataReport, check_dataset, write_kspace


def picture(seed: int, size: tuple[int, int] = (48, 40)) -> np.ndarray:
    noise = np.random.default_rng(seed).random(size)
    smooth = ndimage.gaussian_filter(noise, 4, mode="wrap")
    return np.uint8(255 * (smooth - smooth.min()) / np.ptp(smooth))


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def topics(report: DataReport) -> dict[str, tuple[str, int]]:
    return {finding.topic: (finding.level, finding.count) for finding in report.findings}


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    """Different images of 15 patients, DoeNN, each in one part."""
    seed = 0
    for part, count in (("train", 6), ("val", 3), ("test", 3)):
        for name in ("sick", "well"):
            for index in range(count):
                patient = {"train": 0, "val": 10, "test": 20}[part] + index // 2
                save(tmp_path / "set" / part / name / f"Doe{patient:02}{name}_{index}.png", picture(seed))
                seed += 1
    return tmp_path / "set"


def test_a_clean_set_has_no_errors(clean: Path) -> None:
    report = check_dataset(clean, patients=r"Doe(\d+)", mirrored=True)
    assert not report.has_errors
    assert report.counts == {part: {"sick": n, "well": n} for part, n in (("train", 6), ("val", 3), ("test", 3))}
    assert (report.sizes, report.channels) == ({"40 x 48": 24}, {"1": 24})
    assert topics(report) == {"patients": ("note", 7), "patients_of_several_classes": ("note", 7)}
    text = report.text()
    assert text.startswith("Data check of set: classification, 24 files")
    assert text.endswith("Result: no leakage found by what was checked. Research only; not for clinical use.")
    assert "ERROR" not in text


def test_every_planted_fault_is_found(clean: Path) -> None:
    train, val = clean / "train", clean / "val"
    first = train / "sick" / "Doe00sick_0.png"
    (val / "sick" / "copy.png").write_bytes(first.read_bytes())
    save(clean / "test" / "sick" / "near.jpg", np.uint8(0.8 * picture(1) + 20))
    save(train / "well" / "wrong.jpg", picture(2))  # of train/sick
    save(train / "sick" / "again.jpg", picture(3))
    save(val / "well" / "mirrored.png", picture(4)[:, ::-1])
    (train / "sick" / "cut.png").write_bytes(first.read_bytes()[:200])
    save(train / "well" / "blank.png", np.full((48, 40), 7, np.uint8))
    save(train / "well" / "color.png", np.stack([picture(80), picture(81), picture(82)], -1))
    save(val / "well" / "Doe02well_9.png", picture(90))
    (train / "sick" / "Thumbs.db").write_text("x")
    report = check_dataset(clean, patients=r"Doe(\d+)", mirrored=True)
    assert report.has_errors
    found = topics(report)
    assert found["unusable"] == ("error", 1)
    assert found["exact_copies_across_parts"] == ("error", 1)
    assert found["near_copies_across_parts"] == ("error", 2)
    assert found["near_copies_across_classes"] == ("warning", 2)  # the wrong and the mirrored one
    assert found["near_copies_within_part"] == ("note", 1)
    assert found["patients_across_parts"] == ("error", 1)
    assert found["constant"] == ("warning", 1)
    assert found["channels"] == ("warning", 2)
    assert found["ignored_files"] == ("note", 1)
    leaks = {(pair.kind, pair.first, pair.second) for pair in report.pairs if pair.is_leak}
    assert leaks == {
        ("exact", "train/sick/Doe00sick_0.png", "val/sick/copy.png"),
        ("near", "train/sick/Doe00sick_1.png", "test/sick/near.jpg"),
        ("mirrored", "train/sick/Doe02sick_4.png", "val/well/mirrored.png"),
    }
    assert list(report.problems) == ["train/sick/cut.png"]
    assert str(clean) not in report.text(), "names are relative to the data set"
    assert [level for level in (finding.level for finding in report.findings)] == sorted(
        (finding.level for finding in report.findings), key=["error", "warning", "note"].index
    )
    assert topics(check_dataset(clean))["near_copies_across_parts"] == ("error", 1), "mirrored ones only on demand"


def test_patients_are_counted_and_never_named(clean: Path, tmp_path: Path) -> None:
    table = tmp_path / "patients.csv"
    files = sorted(clean.rglob("*.png"))
    names = [f"{file.relative_to(clean)},Jane-{index // 5}" for index, file in enumerate(files)]
    table.write_text("\n".join(["file,patient", *names]))
    report = check_dataset(clean, patients=table)
    groups = {}
    for index, file in enumerate(files):
        groups.setdefault(index // 5, set()).add(file.relative_to(clean).parts[0])
    expected = sum(len(parts) > 1 for parts in groups.values())
    assert topics(report)["patients_across_parts"] == ("error", expected)
    out = report.write(tmp_path / "report")
    written = "".join(file.read_text() for file in out.iterdir())
    assert "Jane" not in written
    with (out / "shared_patients.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["number"] for row in rows} == {str(number) for number in range(1, expected + 1)}


def test_the_written_report(clean: Path, tmp_path: Path) -> None:
    (clean / "val" / "sick" / "copy.png").write_bytes((clean / "train" / "sick" / "Doe00sick_0.png").read_bytes())
    report = check_dataset(clean)
    out = report.write(tmp_path / "report")
    content = json.loads((out / "report.json").read_text())
    assert content["has_errors"] is True
    assert content["counts"]["val"] == {"sick": 4, "well": 3}
    assert content["findings"][0]["topic"] == "exact_copies_across_parts"
    with (out / "pairs.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["kind"], row["first_part"], row["second_part"], row["is_leak"]) == ("exact", "train", "val", "True")
    with pytest.raises(FileExistsError):
        report.write(out)


def test_imbalance_and_differing_classes(clean: Path) -> None:
    for index in range(12):
        save(clean / "train" / "well" / f"more_{index}.png", picture(200 + index))
    save(clean / "val" / "unsure" / "a.png", picture(300))
    (clean / "test" / "empty").mkdir()
    report = check_dataset(clean)
    found = topics(report)
    assert "train has 3.0 times as many well as sick." in report.text()
    assert found["imbalance"][0] == "warning"
    assert "The classes of val and train differ: ['unsure']." in report.text()
    assert found["empty_classes"] == ("warning", 1)


def test_a_set_without_parts(clean: Path) -> None:
    assert topics(check_dataset(clean / "train"))["no_parts"][0] == "note"
    assert check_dataset(clean / "train").counts == {"": {"sick": 6, "well": 6}}


def test_masks(tmp_path: Path) -> None:
    for part, value in (("train", 255), ("val", 128)):
        for index in range(3):
            save(tmp_path / part / "images" / f"{index}.jpg", picture(index + value))
            mask = np.zeros((48, 40), np.uint8)
            mask[:10] = value if index else 0
            save(tmp_path / part / "masks" / f"{index}.png", mask)
    save(tmp_path / "train" / "images" / "alone.png", picture(1000))
    save(tmp_path / "train" / "images" / "wide.png", picture(1001))
    save(tmp_path / "train" / "masks" / "wide.png", np.zeros((40, 48), np.uint8))
    report = check_dataset(tmp_path)
    found = topics(report)
    assert report.task == "segmentation"
    assert report.problems == {"train/images/wide.png": "the mask has size (48, 40), the image (40, 48)"}
    assert found["unpaired"] == ("warning", 1)
    assert found["unknown_mask_values"] == ("warning", 1)
    assert found["empty_masks"] == ("note", 3)
    assert "Masks hold 3 values: 0, 128, 255." in report.text()


def test_lossy_masks(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.png", picture(0))
    save(tmp_path / "masks" / "a.jpg", np.uint8(255 * (picture(1) > 128)))
    assert topics(check_dataset(tmp_path))["mask_format"] == ("warning", 1)


def test_kspace(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for part, count in (("multicoil_train", 2), ("multicoil_val", 1)):
        for index in range(count):
            kspace = rng.normal(size=(2, 3, 8, 6)) + 1j * rng.normal(size=(2, 3, 8, 6))
            write_kspace(tmp_path / part / f"{index}.h5", kspace)
    train = tmp_path / "multicoil_train"
    (tmp_path / "multicoil_val" / "copy.h5").write_bytes((train / "0.h5").read_bytes())
    (train / "cut.h5").write_bytes((train / "0.h5").read_bytes()[:500])
    with h5py.File(train / "nan.h5", "w") as file:
        file["kspace"] = np.full((1, 2, 4, 4), np.nan, np.complex64)
    report = check_dataset(tmp_path)
    assert report.task == "reconstruction"
    assert sorted(report.problems) == ["multicoil_train/cut.h5", "multicoil_train/nan.h5"]
    assert (report.sizes, report.channels) == ({"2 x 8 x 6": 4}, {"3": 4})
    assert topics(report)["exact_copies_across_parts"] == ("error", 1)
    assert report.counts == {"train": {"": 4}, "val": {"": 2}}


def test_folders_that_are_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"No data set was found .* data convert"):
        check_dataset(tmp_path)
    with pytest.raises(FileNotFoundError):
        check_dataset(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="min_correlation"):
        check_dataset(tmp_path, min_correlation=1.5)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_no_utf8_are_reported(clean: Path, tmp_path: Path) -> None:
    file = next(clean.rglob("*.png"))
    (file.parent / os.fsdecode(b"copy\xff.png")).write_bytes(file.read_bytes())
    target = check_dataset(clean).write(tmp_path / "report")
    assert r"copy\udcff.png" in (target / "report.txt").read_text(encoding="utf-8")
    assert r"copy\udcff.png" in (target / "pairs.csv").read_text(encoding="utf-8")
