import logging
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from monai_deqkan.data import (
    class_names,
    classification_items,
    image_files,
    mask_values,
    segmentation_items,
)


def save_png(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4), value, np.uint8)).save(path)


def save_mask(path: Path, values: list[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.resize(np.array(values, np.uint8), (4, 4))).save(path)


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    for part, count in (("train", 10), ("val", 2), ("test", 3)):
        for name in ("sick", "healthy"):
            for index in range(count):
                save_png(tmp_path / part / name / f"{index}.png")
    return tmp_path


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    for index in range(10):
        save_png(tmp_path / "train" / "images" / f"{index}.png")
        save_mask(tmp_path / "train" / "masks" / f"{index}.png", [0, 85, 255] if index == 7 else [0, 170])
    return tmp_path


def remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    folder.rmdir()


def test_classification_lists_every_image_of_a_part_with_its_label(classes: Path) -> None:
    for clutter in ("Thumbs.db", ".DS_Store", "README.md", "labels.csv", ".hidden.png"):
        (classes / "train" / "sick" / clutter).write_text("x")
    (classes / "train" / ".cache").mkdir()
    assert class_names(classes) == ["healthy", "sick"]
    items = classification_items(classes, "train")
    assert [item["label"] for item in items] == [0] * 10 + [1] * 10
    assert all(Path(item["image"]).parent.name == class_names(classes)[item["label"]] for item in items)
    assert len(classification_items(classes, "evaluate")) == 6
    remove(classes / "test")
    assert classification_items(classes, "evaluate") == classification_items(classes, "val")


def test_classification_takes_labels_in_the_order_of_a_trained_model(classes: Path) -> None:
    remove(classes / "train")
    items = classification_items(classes, "evaluate", class_names=["sick", "healthy"])
    assert [Path(item["image"]).parent.name for item in items] == ["sick"] * 3 + ["healthy"] * 3


def test_without_val_a_fifth_of_each_class_is_held_out_and_said_once(
    classes: Path, caplog: pytest.LogCaptureFixture
) -> None:
    remove(classes / "val")
    with caplog.at_level(logging.INFO):
        train, val = classification_items(classes, "train", 5), classification_items(classes, "val", 5)
    assert [item["label"] for item in val] == [0, 0, 1, 1]
    assert not {item["image"] for item in train} & {item["image"] for item in val}
    assert len(train) == 16
    assert [record.message for record in caplog.records] == [
        f"No folder 'val' in {classes}: 4 items of 'train' are held out for validation."
    ]


def test_classification_errors_show_the_layout(classes: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        classification_items(tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match="must be one of train, val, evaluate"):
        classification_items(classes, "test")
    with pytest.raises(FileNotFoundError, match=r"folder 'train'.*Expected layout"):
        classification_items(classes / "train", "train")
    save_png(classes / "test" / "unsure" / "0.png")
    with pytest.raises(ValueError, match=r"unknown \['unsure'\].*Expected layout"):
        classification_items(classes, "evaluate")
    remove(classes / "val" / "sick")
    with pytest.raises(ValueError, match=r"missing \['sick'\].*Expected layout"):
        classification_items(classes, "val")
    for file in (classes / "train" / "sick").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"sick must hold at least one image; got 0.*Expected layout"):
        classification_items(classes, "train")
    remove(classes / "train" / "sick")
    with pytest.raises(ValueError, match=r"at least 2 class folders.*Expected layout"):
        class_names(classes)


@pytest.fixture
def persons(tmp_path: Path) -> Path:
    """Twelve patients with 1 to 3 images each; one has images of both classes."""
    for patient in range(12):
        for index in range(patient % 3 + 1):
            name = "sick" if patient % 2 or (patient, index) == (8, 1) else "healthy"
            save_png(tmp_path / "train" / name / f"person{patient}_{index}.png")
    return tmp_path


def people(items: list[dict[str, Any]]) -> set[str]:
    return {Path(item["image"]).name.split("_")[0] for item in items}


def test_images_of_a_patient_stay_on_one_side(persons: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        train, val = (classification_items(persons, part, 1, patients=r"person(\d+)") for part in ("train", "val"))
    assert len(train) + len(val) == 24
    assert not people(train) & people(val)
    assert {item["label"] for item in val} == {0, 1}
    assert [item["label"] for item in train] == sorted(item["label"] for item in train)
    assert any("12 patients" in line and "1 of them with images of several classes" in line for line in caplog.messages)
    assert val == classification_items(persons, "evaluate", 1, patients=r"person(\d+)")
    plain = [classification_items(persons, part, 1) for part in ("train", "val")]
    assert people(plain[0]) & people(plain[1]), "without the pattern they were mixed"


def test_patients_in_two_given_parts_are_told(persons: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_png(persons / "val" / "sick" / "person3_9.png")
    save_png(persons / "val" / "healthy" / "person99_0.png")
    classification_items(persons, "val", patients=r"person(\d+)")
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        f"1 patients have images in both train and val of {persons}: scores on val will be too good. Split by patient."
    ]


def test_a_table_is_a_data_set(persons: Path) -> None:
    files = sorted(persons.rglob("*.png"))
    lines = [f"{file.relative_to(persons)},{file.parent.name},{file.name.split('_')[0]}" for file in files]
    table = persons / "list.csv"
    table.write_text("\n".join(["file,label,patient", *lines]))
    assert class_names(table) == class_names(persons)
    for part in ("train", "val", "evaluate"):
        assert classification_items(table, part) == classification_items(persons, part, patients=r"person(\d+)")


def test_a_table_with_parts(persons: Path) -> None:
    rows = ["train/healthy/person0_0.png,a,train", "train/sick/person1_0.png,b,train"]
    rows += ["train/healthy/person2_0.png,a,Testing", "train/sick/person3_0.png,b,Testing"]
    table = persons / "list.csv"
    table.write_text("\n".join(["path,class,split", *rows]))
    found = [Path(item["image"]).name for item in classification_items(table, "evaluate")]
    assert found == ["person2_0.png", "person3_0.png"]
    with pytest.raises(ValueError, match=r"at least 2 images where there is no val"):
        classification_items(table, "train")
    with pytest.raises(FileNotFoundError, match="no table"):
        class_names(persons / "none.csv")


def test_segmentation_pairs_files_of_the_same_name(pairs: Path) -> None:
    images, masks = pairs / "test" / "images", pairs / "test" / "masks"
    save_mask(masks / "a.png", [0, 170])
    save_png(images / "a.jpg")
    for folder in (images, masks):
        nib.save(nib.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4)), folder / "b.1.nii.gz")
    items = segmentation_items(pairs, "evaluate")
    assert [(Path(item["image"]).name, Path(item["label"]).name) for item in items] == [
        ("a.jpg", "a.png"),
        ("b.1.nii.gz", "b.1.nii.gz"),
    ]
    assert len(segmentation_items(pairs, "train")) == 8
    assert len(segmentation_items(pairs, "val")) == 2


def test_segmentation_names_what_does_not_match(pairs: Path) -> None:
    folder = pairs / "train"
    save_png(folder / "images" / "3.jpg")
    with pytest.raises(ValueError, match=r"images: each name may come once.* 3 come twice"):
        segmentation_items(pairs, "train")
    (folder / "images" / "3.jpg").unlink()
    for index in range(6):
        (folder / "masks" / f"{index}.png").unlink()
    with pytest.raises(ValueError, match=r"0, 1, 2, 3, 4 and 1 more have none.*Expected layout"):
        segmentation_items(pairs, "train")
    for file in (folder / "images").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"each mask must have an image.* 6, 7, 8, 9 have none"):
        segmentation_items(pairs, "train")
    remove(folder / "masks")
    with pytest.raises(FileNotFoundError, match=r"folder 'masks'.*Expected layout"):
        segmentation_items(pairs, "train")


def test_mask_values_are_those_of_all_training_masks(pairs: Path) -> None:
    assert mask_values(pairs) == [0, 85, 170, 255]


def test_mask_values_refuses_what_is_no_label_map(pairs: Path) -> None:
    masks = pairs / "train" / "masks"
    nib.save(nib.Nifti1Image(np.array([[[0.0, 0.5]]]), np.eye(4)), masks / "p.nii")
    save_png(pairs / "train" / "images" / "p.png")
    with pytest.raises(ValueError, match=r"p\.nii holds 2 distinct values such as 0, 0\.5.*Threshold"):
        mask_values(pairs)
    (masks / "p.nii").unlink()
    save_mask(masks / "p.png", list(range(16)))
    for index in range(10):
        save_mask(masks / f"{index}.png", list(range(16 * index, 16 * index + 16)))
    with pytest.raises(ValueError, match="at most 64 distinct values"):
        mask_values(pairs)


def test_mask_values_refuses_lossy_masks(pairs: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 2, (16, 16), np.uint8) * 255
    Image.fromarray(pixels).save(pairs / "train" / "masks" / "p.jpg")
    save_png(pairs / "train" / "images" / "p.png")
    with pytest.raises(ValueError, match="JPEG changes the values"):
        mask_values(pairs)


def test_mask_values_refuses_smoothed_edges(pairs: Path) -> None:
    ramp = np.array([0, 3, 250, 252, 253, 255], np.uint8)
    Image.fromarray(np.tile(ramp, (6, 1))).save(pairs / "train" / "masks" / "p.png")
    save_png(pairs / "train" / "images" / "p.png")
    with pytest.raises(ValueError, match=r"holds 6 distinct values .* smoothed edges"):
        mask_values(pairs)


@pytest.mark.parametrize("values", [(0, 1, 2, 3, 4, 255), (0, 1000, 1001, 1002, 1003), (0, 250, 251, 252, 253, 254)])
def test_labels_near_the_ends_are_no_smoothed_edges(tmp_path: Path, values: tuple[int, ...]) -> None:
    for folder in ("images", "masks"):
        (tmp_path / "train" / folder).mkdir(parents=True)
        mask = np.tile(np.array(values, np.int16), (6, 1))
        nib.save(nib.Nifti1Image(mask, np.eye(4)), tmp_path / "train" / folder / "a.nii")
    assert mask_values(tmp_path) == list(values)


def test_mask_values_refuses_empty_masks(tmp_path: Path) -> None:
    save_png(tmp_path / "train" / "images" / "a.png")
    save_png(tmp_path / "train" / "masks" / "a.png")
    with pytest.raises(ValueError, match=r"at least two values.*\[0\]"):
        mask_values(tmp_path)


def test_image_files_looks_below_and_knows_dicom_by_content(tmp_path: Path) -> None:
    save_png(tmp_path / "b.png")
    save_png(tmp_path / "deep" / "er" / "A.PNG")
    (tmp_path / "IM0001").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "notes.txt").write_text("x")
    save_png(tmp_path / ".trash" / "c.png")
    found = [str(path.relative_to(tmp_path)) for path in image_files(tmp_path)]
    assert found == ["IM0001", "b.png", "deep/er/A.PNG"]
    with pytest.raises(ValueError, match=r"No image was found below .*\.nii\.gz"):
        image_files((tmp_path / "empty").mkdir() or tmp_path / "empty")


def test_a_class_of_a_single_patient_cannot_be_held_out(tmp_path):
    for name in ("p1_0", "p1_1", "p1_2"):
        (tmp_path / "train" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / "a" / f"{name}.png").write_bytes(b"")
    for name in ("p2_0", "p3_0", "p4_0", "p5_0"):
        (tmp_path / "train" / "b").mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / "b" / f"{name}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"val side of .* no image of a: .* at least two patients"):
        classification_items(tmp_path, "val", patients=r"^p(\d+)")
