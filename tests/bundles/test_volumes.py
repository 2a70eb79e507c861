"""Training, evaluation and inference in 3-D by overrides alone, on a folder in the Decathlon's layout."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest
import torch

LUNG = "lung_xray_kanunet_segmentation"


def write_decathlon(root, rng):
    for folder in ("imagesTr", "labelsTr", "imagesTs"):
        (root / folder).mkdir(parents=True)
    affine = np.diag([-1.5, 1.5, 2.0, 1.0])
    for index in range(4):
        size = (22 + index, 20, 19)
        label = np.zeros(size, np.uint8)
        label[4:14, 5 : 12 + index, 6:14] = 1
        label[6:10, 7:11, 8:12] = 2
        channels = np.stack([100 * (label > 0), 80 * (label == 2)], -1) + 10 * rng.random((*size, 2))
        folder = "imagesTs" if index == 3 else "imagesTr"
        nib.save(nib.Nifti1Image(channels.astype(np.float32), affine), root / folder / f"case_{index}.nii.gz")
        if index < 3:
            nib.save(nib.Nifti1Image(label, affine), root / "labelsTr" / f"case_{index}.nii.gz")
    cases = [{"image": f"./imagesTr/case_{i}.nii.gz", "label": f"./labelsTr/case_{i}.nii.gz"} for i in range(3)]
    labels = {"0": "background", "1": "edema", "2": "core"}
    record = {"labels": labels, "training": cases[:2], "validation": cases[2:], "test": ["./imagesTs/case_3.nii.gz"]}
    (root / "dataset.json").write_text(json.dumps(record))


def test_volumes_train_evaluate_and_infer(make_bundle, tmp_path):
    bundle = make_bundle(LUNG)
    data = tmp_path / "decathlon"
    write_decathlon(data, np.random.default_rng(0))
    paths = {"dataset_dir": str(data), "ckpt_dir": str(tmp_path / "models")}
    settings = {
        "spatial_dims": 3,
        "in_channels": 2,
        "patch_size": [12, 12, 12],
        "pixdim": [2.0, 2.0, 2.0],
        "features": [2, 4],
        "batch_size": 2,
        "max_epochs": 2,
        "elastic_prob": 1.0,
    }
    bundle.run("train", **paths, **settings, output_dir=str(tmp_path / "logs"))
    task = json.loads((tmp_path / "models" / "model.json").read_text())
    assert task["class_names"] == ["background", "edema", "core"]
    assert task["preprocessing"] | {"image_size": 0} == {
        "spatial_dims": 3,
        "in_channels": 2,
        "image_size": 0,
        "patch_size": [12, 12, 12],
        "pixdim": [2.0, 2.0, 2.0],
    }
    weights = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
    assert any(value.ndim == 5 for value in weights.values())
    assert "training_ranges" not in task  # two volumes cannot tell

    bundle.run("evaluate", **paths, output_dir=str(tmp_path / "eval"))
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert metrics["val_mean_dice"] == pytest.approx(task["key_metric"]["value"], abs=1e-4)

    paths["dataset_dir"] = str(data / "imagesTs")
    bundle.run("inference", **paths, output_dir=str(tmp_path / "out"))
    image, mask = nib.load(data / "imagesTs" / "case_3.nii.gz"), nib.load(tmp_path / "out" / "case_3_mask.nii.gz")
    assert mask.shape == image.shape[:3]
    assert np.allclose(mask.affine, image.affine)
    with (tmp_path / "out" / "masks.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["ml_core"]) == pytest.approx((np.asarray(mask.dataobj) == 2).sum() * 4.5 / 1000, rel=1e-4)
