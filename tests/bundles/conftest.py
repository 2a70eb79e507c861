"""Three tiny data sets in the documented layouts, and each bundle with settings small enough for a test."""

import shutil
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from PIL import Image

from monai_deqkan.data import write_kspace
from monai_deqkan.operators import simulate_kspace, smooth_coil_maps

BUNDLES = Path(__file__).parents[2] / "bundles"


def disc(height, width, radius, row=0.5, column=0.5):
    rows, columns = np.mgrid[:height, :width]
    return ((rows - row * height) ** 2 + (columns - column * width) ** 2) < radius**2


def save_png(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(image, dtype=np.uint8)).save(path)


def write_classes(root, rng):
    for part, count in (("train", 4), ("val", 2), ("test", 2)):
        for index in range(count):
            for name, radius in (("NORMAL", 4), ("PNEUMONIA", 10)):
                image = 60 * rng.random((30, 36)) + 160 * disc(30, 36, radius)
                save_png(root / part / name / f"{name.lower()}_{index}.png", image)


def write_masks(root, rng):
    for part, count in (("train", 4), ("val", 2), ("test", 2)):
        for index in range(count):
            # Sizes differ, and neither side is a multiple of 16: outputs must come back in the image's own size.
            height, width = 40 + 6 * index, 50
            lung = disc(height, width, 11, column=0.35 + 0.1 * index)
            save_png(root / part / "images" / f"case_{index}.png", 200 * lung + 50 * rng.random((height, width)))
            save_png(root / part / "masks" / f"case_{index}.png", 255 * lung)


def write_scans(root, rng):
    maps = smooth_coil_maps((32, 28), 4, generator=torch.Generator().manual_seed(0))
    for part, count in (("train", 2), ("val", 1), ("test", 1)):
        for index in range(count):
            images = np.stack([disc(32, 28, 10 + slice_) - 0.5 * disc(32, 28, 4 + index) for slice_ in range(2)])
            kspace = simulate_kspace(torch.as_tensor(images, dtype=torch.complex64), maps)
            write_kspace(root / part / f"scan_{index}.h5", 1e-4 * kspace)


CASES = {
    "chest_xray_deqkan_classification": (write_classes, {"image_size": [32, 32], "batch_size": 4}),
    "lung_xray_kanunet_segmentation": (
        write_masks,
        {"image_size": [32, 32], "features": [2, 4, 4, 4], "batch_size": 2},
    ),
    "brain_mri_deq_reconstruction": (
        write_scans,
        {
            "form": "contracting",
            "prior": "ridge",
            "num_layers": 2,
            "features": 4,
            "num_cg_steps": 2,
            "rtol": 1e-2,
            "max_iter": 30,
            "batch_size": 2,
        },
    ),
}
COMMON = {"device": "cpu", "progress": False}


@dataclass(frozen=True)
class Bundle:
    """A bundle, its tiny data set, and a folder for what it makes."""

    name: str
    folder: Path
    dataset_dir: Path
    work: Path
    tiny: dict

    def workflow(self, kind, **override):
        files = {"train": ["train.json"], "evaluate": ["evaluate.json"], "inference": ["inference.json"]}[kind]
        return self.workflow_of(files, "infer" if kind == "inference" else "train", **override)

    def workflow_of(self, files, workflow_type, **override):
        paths = [str(self.folder / "configs" / file) for file in files]
        settings = {**COMMON, "bundle_root": str(self.work), "dataset_dir": str(self.dataset_dir), **override}
        return ConfigWorkflow(paths, logging_file=False, workflow_type=workflow_type, **settings)

    def run(self, kind, **override):
        workflow = self.workflow(kind, **override)
        workflow.initialize()
        workflow.run()
        workflow.finalize()
        return workflow

    def train(self, ckpt_dir, **override):
        settings = {**self.tiny, "ckpt_dir": str(ckpt_dir), "max_epochs": 1, **override}
        return self.run("train", **settings)

    @cached_property
    def trained(self):
        """The folder of a model trained for one epoch; not to be written to."""
        folder = self.work / "trained"
        self.train(folder, output_dir=str(self.work / "trained_logs"))
        return folder

    def copy_of_trained(self, target):
        shutil.copytree(self.trained, target)
        return target


@pytest.fixture(scope="session", params=list(CASES))
def bundle(request, tmp_path_factory):
    write, tiny = CASES[request.param]
    data = tmp_path_factory.mktemp("data")
    write(data, np.random.default_rng(0))
    return Bundle(request.param, BUNDLES / request.param, data, tmp_path_factory.mktemp("work"), tiny)


@pytest.fixture
def make_bundle(tmp_path):
    """Return a function from a bundle's name to the bundle with a data set of its own, free to be spoiled."""

    def make(name):
        write, tiny = CASES[name]
        write(tmp_path / "data", np.random.default_rng(0))
        return Bundle(name, BUNDLES / name, tmp_path / "data", tmp_path / "work", tiny)

    return make


@pytest.fixture(autouse=True)
def _keep_search_path(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))  # ConfigWorkflow.run adds the bundle's folder.


# Warnings that other libraries give about each other.
OTHERS_WARNINGS = [
    # MONAI's EarlyStopHandler calls Ignite's by old names.
    "ignore:'(min_delta|cumulative_delta)' is deprecated:DeprecationWarning",
    # MONAI's Hausdorff distance calls its own function so.
    "ignore:.*always_return_as_numpy:FutureWarning",
]


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            for warning in OTHERS_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))
