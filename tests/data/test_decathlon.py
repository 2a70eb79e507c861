import json

import pytest

from monai_deqkan.data import hold_out, mask_class_names, mask_values, segmentation_items

LABELS = {"0": "background", "2": "tumour", "1": "liver"}


def write(root, **content):
    for index in range(6):
        for folder in ("imagesTr", "labelsTr"):
            (root / folder).mkdir(parents=True, exist_ok=True)
            (root / folder / f"c_{index}.nii.gz").touch()
    (root / "dataset.json").write_text(json.dumps({"labels": LABELS, **content}))
    return root


def cases(*numbers):
    return [{"image": f"./imagesTr/c_{n}.nii.gz", "label": f"./labelsTr/c_{n}.nii.gz"} for n in numbers]


def absolute(root, *numbers):
    return [{k: str(root / v.removeprefix("./")) for k, v in case.items()} for case in cases(*numbers)]


def test_lists_of_parts_are_followed(tmp_path):
    root = write(tmp_path, training=cases(3, 0, 1), validation=cases(4), test=["./imagesTs/c_9.nii.gz"])
    assert segmentation_items(root, "train") == absolute(root, 0, 1, 3)
    assert segmentation_items(root, "val") == segmentation_items(root, "evaluate") == absolute(root, 4)


def test_a_fifth_is_held_out_without_validation(tmp_path):
    root = write(tmp_path, training=cases(*range(6)), test=[])
    everything = absolute(root, *range(6))
    for part in ("train", "val"):
        assert segmentation_items(root, part, seed=3) == hold_out(everything, part, 3)


def test_test_cases_with_labels_are_evaluated_on(tmp_path):
    root = write(tmp_path, training=cases(0, 1), test=cases(5))
    assert segmentation_items(root, "evaluate") == absolute(root, 5)


@pytest.mark.parametrize("labels", [LABELS, {"tumour": 2, "background": 0, "liver": 1}])
def test_classes_come_from_the_file(tmp_path, labels):
    root = write(tmp_path, training=cases(0, 1), labels=labels)
    assert mask_values(root) == [0, 1, 2]
    assert mask_class_names([0, 1, 2], root) == ["background", "liver", "tumour"]
    assert mask_class_names([0, 5], root) == ["background", "foreground"]


def test_folders_count_before_the_list(tmp_path):
    root = write(tmp_path, training=cases(0, 1))
    for kind in ("images", "masks"):
        (root / "train" / kind).mkdir(parents=True)
        (root / "train" / kind / "mine.png").touch()
        (root / "train" / kind / "yours.png").touch()
    assert "mine.png" in segmentation_items(root, "train")[0]["image"] + segmentation_items(root, "val")[0]["image"]


@pytest.mark.parametrize(
    ("content", "error", "text"),
    [
        ({"training": []}, ValueError, "must list cases under 'training'"),
        ({"training": cases(0, 0)}, ValueError, "lists an image twice"),
        ({"training": [{"image": "./imagesTr/c_0.nii.gz"}, *cases(1)]}, ValueError, "1 of 2 do not"),
        ({"training": cases(0, 77)}, FileNotFoundError, "2 of the files .* are missing, such as .*c_77"),
    ],
)
def test_wrong_lists_are_refused(tmp_path, content, error, text):
    with pytest.raises(error, match=text):
        segmentation_items(write(tmp_path, **content), "train")


@pytest.mark.parametrize("labels", [None, {"0": "background"}, {"0": "a", "x": "b"}, {"whole": [1, 2], "b": 0}])
def test_wrong_labels_are_refused(tmp_path, labels):
    with pytest.raises(ValueError, match="must name at least two values of the masks"):
        mask_values(write(tmp_path, training=cases(0), labels=labels))


def test_damaged_file_is_named(tmp_path):
    (write(tmp_path) / "dataset.json").write_text("{")
    with pytest.raises(ValueError, match=r"dataset\.json cannot be read as JSON"):
        segmentation_items(tmp_path, "train")
