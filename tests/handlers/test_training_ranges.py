import json
from types import SimpleNamespace

import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import ResizeWithPadOrCrop

from monai_deqkan.handlers import MaskTable, TrainingRangeWriter
from monai_deqkan.handlers.training_ranges import rescaled_statistics
from monai_deqkan.metrics import image_statistics, kspace_statistics, outside_training


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


def test_training_ranges_do_not_depend_on_the_scale_and_find_other_images(tmp_path, caplog):
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0, 1, 32).expand(1, 32, 32)
    data = [{"image": image(f"{i}", ramp + 0.05 * torch.rand(1, 32, 32, generator=generator))} for i in range(40)]
    (tmp_path / "model.json").write_text(json.dumps({"task": "segmentation"}))
    trainer = Fake(None)
    TrainingRangeWriter(tmp_path, data, max_images=30).attach(trainer)
    trainer.run()
    record = json.loads((tmp_path / "model.json").read_text())
    assert record["task"] == "segmentation"
    low, high = record["training_ranges"]["median"]
    assert low < image_statistics(ramp)["median"] < high

    noise = image(tmp_path / "noise.png", torch.rand(1, 32, 32, generator=generator))
    same = image(tmp_path / "same.png", 300 * data[0]["image"].as_tensor() - 7)
    mask = image(tmp_path / "m.png", torch.zeros(1, 32, 32))
    engine = Fake([{"image": same, "pred": mask}, {"image": noise, "pred": mask}])
    MaskTable(tmp_path / "out", ["none", "some"], tmp_path, record["training_ranges"]).attach(engine)
    engine.run()
    rows = json.loads((tmp_path / "out" / "masks.json").read_text())["images"]
    assert [bool(row["unlike_training"]) for row in rows] == [False, True]
    assert "1 of 2 images are unlike the training images" in caplog.text


def test_items_of_crops_are_lists_of_samples(tmp_path):
    generator = torch.Generator().manual_seed(0)
    data = [{"image": image(f"{i}", torch.rand(1, 16, 16, generator=generator))} for i in range(25)]
    found = []
    for items in (data, [[item] for item in data]):
        (tmp_path / "model.json").write_text("{}")
        trainer = Fake(None)
        TrainingRangeWriter(tmp_path, items).attach(trainer)
        trainer.run()
        found.append(json.loads((tmp_path / "model.json").read_text())["training_ranges"])
    assert found[0] == found[1]


def test_padding_is_no_part_of_an_image():
    pixels = torch.rand(1, 16, 12, generator=torch.Generator().manual_seed(0))
    numbers = [rescaled_statistics(pad(image("a", pixels))) for pad in (lambda x: x, ResizeWithPadOrCrop((16, 16)))]
    del numbers[0]["resolution"], numbers[1]["resolution"]  # relative to the longest side of what is there
    assert numbers[0] == pytest.approx(numbers[1])


def test_ranges_of_kspace(tmp_path):
    (tmp_path / "model.json").write_text("{}")
    items = [{"kspace": torch.ones(coils, 8, 8, dtype=torch.complex64)} for coils in (4, 8) for _ in range(15)]
    trainer = Fake(None)
    TrainingRangeWriter(tmp_path, items, describe=lambda item: kspace_statistics(item["kspace"])).attach(trainer)
    trainer.run()
    ranges = json.loads((tmp_path / "model.json").read_text())["training_ranges"]
    assert outside_training(kspace_statistics(items[0]["kspace"]), ranges) == []
    assert outside_training(kspace_statistics(torch.ones(1, 8, 9, dtype=torch.complex64)), ranges) == [
        "coils",
        "columns",
    ]


def test_few_images_have_no_ranges(tmp_path):
    (tmp_path / "model.json").write_text("{}")
    trainer = Fake(None)
    TrainingRangeWriter(tmp_path, [{"image": image("a", torch.rand(1, 8, 8))}] * 19).attach(trainer)
    trainer.run()
    assert (tmp_path / "model.json").read_text() == "{}"


def test_no_model_no_ranges(tmp_path, caplog):
    trainer = Fake(None)
    TrainingRangeWriter(tmp_path, []).attach(trainer)
    trainer.run()
    assert "no ranges to add" in caplog.text
    assert list(tmp_path.iterdir()) == []
