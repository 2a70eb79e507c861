import csv
import json
from types import SimpleNamespace

import pytest
import torch
from monai.data import MetaTensor

from monai_deqkan.handlers import MaskTable


class Fake:
    """As much of an engine as a handler needs."""

    def __init__(self, output):
        self.state = SimpleNamespace(output=output)
        self.calls = []

    def add_event_handler(self, event, function):
        self.calls.append(function)

    def run(self):
        for function in self.calls:
            function(self)


def image(path, pixels):
    return MetaTensor(pixels, meta={"filename_or_obj": str(path), "spatial_shape": list(pixels.shape[1:])})


def volume(path, pixels, affine):
    return MetaTensor(pixels, affine=affine, meta={"filename_or_obj": str(path), "mask_file": f"{path}_mask.nii.gz"})


def test_volumes_in_millilitres_and_shares(tmp_path):
    pixels = torch.zeros(1, 4, 5, 6)
    pixels[0, :2, :2, :3] = 1
    affine = torch.tensor([[0, -2.0, 0, 1], [3.0, 0, 0, 1], [0, 0.5, 5.0, 1], [0, 0, 0, 1]])
    path = tmp_path / "a.nii.gz"
    sample = {"image": image(path, torch.rand(1, 4, 5, 6)), "pred": volume(path, pixels, affine)}
    engine = Fake([sample])
    MaskTable(tmp_path, ["none", "tumour"], tmp_path, skipped=[{"file": "b", "reason": "cut off"}]).attach(engine)
    engine.run()
    with (tmp_path / "masks.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row == {"image": "a.nii.gz", "mask": "a.nii.gz_mask.nii.gz", "share_tumour": "0.1", "ml_tumour": "0.36"}
    assert json.loads((tmp_path / "masks.json").read_text())["skipped"] == [{"file": "b", "reason": "cut off"}]


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_even_images_have_statistics(tmp_path, value):
    mask = image(tmp_path / "m.png", torch.zeros(1, 8, 8))
    engine = Fake([{"image": image(tmp_path / "m.png", torch.full((1, 8, 8), value)), "pred": mask}])
    MaskTable(tmp_path, ["none", "some"], tmp_path, {"contrast": [0.1, 1.0]}).attach(engine)
    engine.run()
    assert json.loads((tmp_path / "masks.json").read_text())["images"][0]["unlike_training"] == ["contrast"]
