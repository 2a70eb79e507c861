import json
import math

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from torch import nn

from monai_deqkan.handlers import ClassificationCalibration
from monai_deqkan.handlers.calibration import calibrate_classifier
from monai_deqkan.metrics import image_statistics, outside_training

SHARPNESS = 3.0


class Scores(nn.Module):
    """Logits are the mean of each half of the image, too sure of themselves by a known factor."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, image):
        return self.scale * image.flatten(1).unflatten(1, (2, -1)).mean(2)


def dataset(count, seed):
    """Images whose log-odds of class 1 are exactly the difference of the halves, and labels drawn accordingly."""
    rng = np.random.default_rng(seed)
    items = []
    for odds in rng.normal(0.0, 1.5, count):
        pixels = torch.zeros(1, 8, 4)
        pixels[:, 4:] = odds
        image = MetaTensor(pixels, meta={"spatial_shape": np.array([80, 40]), "filename_or_obj": "x.png"})
        items.append({"image": image, "label": int(rng.random() < 1 / (1 + math.exp(-odds)))})
    return items


def calibrate(folder, val, train=None, **settings):
    network = Scores()
    torch.save({"scale": torch.tensor(SHARPNESS)}, folder / "model.pt")
    (folder / "model.json").write_text(json.dumps({"threshold": 0.5, "class_names": ["a", "b"]}))
    engine = Engine(lambda engine, batch: engine.terminate())  # an early stop calibrates too
    ClassificationCalibration(folder, network, val, train, batch_size=50, **settings).attach(engine)
    engine.run([0, 1], max_epochs=2)
    assert float(network.scale.detach()) == 1.0
    return json.loads((folder / "model.json").read_text())


def test_the_saved_weights_get_the_temperature_that_undoes_their_sharpness(tmp_path):
    record = calibrate(tmp_path, dataset(1500, 0))
    assert record["temperature"] == pytest.approx(SHARPNESS, rel=0.15)
    # The odds are right after division, so that the best threshold is a half.
    assert record["threshold"] == pytest.approx(0.5, abs=0.1)
    assert record["class_names"] == ["a", "b"]
    assert record["calibration"]["num_images"] == 1500
    assert record["calibration"]["ece_after"] < 0.04 < record["calibration"]["ece_before"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.pt"]


def test_few_images_change_little_and_the_log_says_so(tmp_path, caplog):
    record = calibrate(tmp_path, dataset(6, 1))
    assert 0.5 < record["temperature"] < SHARPNESS
    assert 0.2 < record["threshold"] < 0.8
    assert "so few validation images" in caplog.text


def test_ranges_are_those_of_the_training_images(tmp_path):
    train = dataset(40, 2)
    record = calibrate(tmp_path, dataset(30, 1), train, max_images=20)
    ranges = record["training_ranges"]
    flagged = [outside_training(image_statistics(item["image"], (80, 40)), ranges) for item in train]
    assert sum(map(bool, flagged)) <= 8  # 20 of the 40 were looked at
    assert outside_training(image_statistics(train[0]["image"], (80, 80)), ranges) == ["aspect_ratio"]
    assert "resolution" in outside_training(image_statistics(train[0]["image"], (4, 2)), ranges)


def test_more_classes_have_a_temperature_and_no_threshold():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    found = calibrate_classifier(5 * (np.eye(3)[labels] + rng.normal(0, 1, (300, 3))), labels)
    assert "threshold" not in found
    assert found["temperature"] > 2
    assert found["calibration"]["num_rarest"] == np.bincount(labels).min()


def test_without_a_saved_model_it_says_so_and_writes_nothing(tmp_path, caplog):
    engine = Engine(lambda engine, batch: None)
    ClassificationCalibration(tmp_path, Scores(), dataset(4, 0)).attach(engine)
    engine.run([0])
    assert "nothing to calibrate" in caplog.text
    assert list(tmp_path.iterdir()) == []
