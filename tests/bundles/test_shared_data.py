"""One short epoch of each bundle on real images and measured k-space, where those are at hand.

The data are in the folder that the variable ``MONAI_DEQKAN_SHARED_DATA`` names, else in ``shared/data`` beside the
repository.
"""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

BESIDE = Path(__file__).parents[3] / "shared" / "data"
ROOT = Path(os.environ.get("MONAI_DEQKAN_SHARED_DATA", BESIDE))
pytestmark = pytest.mark.shared_data


def shared(name):
    path = ROOT / name
    if not path.exists():
        pytest.skip(f"No shared data: {name}")
    return path


def some(folder, count):
    return sorted(folder.iterdir())[:count]


def copy(files, target):
    target.mkdir(parents=True)
    for file in files:
        shutil.copy(file, target)


def train_and_evaluate(bundle, data, work, **settings):
    """Train for one epoch, evaluate and infer; return the metrics of the evaluation and the predictions' folder."""
    paths = {"dataset_dir": str(data), "ckpt_dir": str(work / "models")}
    bundle.run("train", **{**bundle.tiny, **settings, **paths}, max_epochs=1, output_dir=str(work / "logs"))
    bundle.run("evaluate", **paths, output_dir=str(work / "eval"))
    paths["dataset_dir"] = str(data / "val")
    bundle.run("inference", **paths, output_dir=str(work / "predictions"))
    return json.loads((work / "eval" / "metrics.json").read_text()), work / "predictions"


@pytest.mark.parametrize("bundle", ["chest_xray_deqkan_classification"], indirect=True)
def test_classification_of_chest_x_rays(bundle, tmp_path):
    source = shared("classification/tb_chest_xray")
    for part, count in (("train", 12), ("val", 6)):
        for folder in some(source / part, 2):
            copy(some(folder, count), tmp_path / "data" / part / folder.name)
    metrics, predictions = train_and_evaluate(bundle, tmp_path / "data", tmp_path, image_size=[64, 64])
    assert metrics["solve_converged"] == 1
    with (predictions / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    decided = [row["prediction"] == row["image"].split("/")[0] for row in rows]
    assert len(rows) == 12
    assert metrics["val_accuracy"] == pytest.approx(np.mean(decided))


@pytest.mark.parametrize("bundle", ["lung_xray_kanunet_segmentation"], indirect=True)
def test_segmentation_of_lung_fields(bundle, tmp_path):
    source = shared("segmentation/lung_fields_chest_xray")
    for part, count in (("train", 16), ("val", 4)):
        for kind in ("images", "masks"):
            copy(some(source / part / kind, count), tmp_path / "data" / part / kind)
    settings = {"image_size": [64, 64], "features": [4, 8, 8, 8], "learning_rate": 0.01}
    metrics, predictions = train_and_evaluate(bundle, tmp_path / "data", tmp_path, **settings)
    shares = [np.mean(np.asarray(Image.open(file)) > 0) for file in (tmp_path / "data/val/masks").iterdir()]
    assert metrics["val_mean_dice"] > np.mean([2 * share / (1 + share) for share in shares])  # of an all-lung mask
    assert len(list((predictions / "images").glob("*_mask.png"))) == 4


COLOR = {"in_channels": 3, "flip_axes": [0, 1]}
SETS = {
    "busi_breast_ultrasound": {},
    "glas_glands": COLOR,
    "cvc_clinicdb_polyps": {**COLOR, "loss_name": "tversky"},
    "isic2018_skin_lesions": {**COLOR, "elastic_prob": 1.0},
    "monuseg_nuclei": {**COLOR, "image_size": [64, 64]},
    "drive_retina_vessels": {**COLOR, "image_size": [57, 59], "loss_name": "weighted_ce"},
    "isbi2012_em_membranes": {"flip_axes": [0, 1], "image_size": [64, 64], "refit_every": 1, "extend_at": {"1": 6}},
}


@pytest.mark.parametrize("name", SETS)
def test_segmentation_of_other_images_by_overrides_alone(make_bundle, name):
    source, bundle = shared(f"segmentation/{name}"), make_bundle("lung_xray_kanunet_segmentation")
    data = bundle.work / "data"
    for part in ("train", "val"):
        for kind in ("images", "masks"):
            copy(some(source / part / kind, 2), data / part / kind)
    paths = {"dataset_dir": str(data), "ckpt_dir": str(bundle.work / "models")}
    bundle.run("train", **{**bundle.tiny, "max_epochs": 1, "features": [2, 4], **SETS[name], **paths})
    bundle.run("evaluate", **paths, output_dir=str(bundle.work / "eval"))
    with (bundle.work / "eval" / "images.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    metrics = json.loads((bundle.work / "eval" / "metrics.json").read_text())
    assert metrics["val_mean_dice"] == pytest.approx(np.mean([float(row["dice_foreground"]) for row in rows]), abs=1e-4)
    assert [row["image"] for row in rows] == sorted(
        f"val/images/{path.name}" for path in (data / "val/images").iterdir()
    )
    assert (bundle.work / "eval" / "worst.png").is_file()


@pytest.mark.parametrize("bundle", ["brain_mri_deq_reconstruction"], indirect=True)
def test_reconstruction_of_measured_kspace(bundle, tmp_path):
    source = shared("mri/multicoil_brain_smallfov.h5")
    for part in ("train", "val"):
        copy([source], tmp_path / "data" / part)
    # The equilibrium starts from CG-SENSE: one step of training gives an image already.
    metrics, predictions = train_and_evaluate(bundle, tmp_path / "data", tmp_path, batch_size=1)
    assert metrics["solve_converged"] == 1
    assert metrics["val_nmse"] < 0.1
    assert (predictions / source.name).is_file()
