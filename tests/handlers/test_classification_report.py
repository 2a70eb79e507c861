import csv
import json

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import nn

from monai_deqkan.handlers import ClassificationReport, ProbabilityTable, SaliencyWriter
from monai_deqkan.networks.nets import DEQKANClassifier
from monai_deqkan.solvers import FixedPointIteration, solve_fixed_point


class Head(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.head = nn.Linear(5, classes)

    def forward(self, image):
        return self.head(image.flatten(1)[:, :5])


def evaluation(network, count, classes, folder, seed=0):
    """An engine that runs a network over random images, two a batch, and gives probabilities and labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 1, 6, 6, generator=generator)
    labels = torch.arange(count) % classes

    def step(engine, start):
        with torch.no_grad():
            chances = network(images[start : start + 2]).softmax(1)
        rows = range(start, min(start + 2, count))
        if start >= count:
            raise IndexError(start)
        named = [MetaTensor(images[i], meta={"filename_or_obj": str(folder / f"{i}.png")}) for i in rows]
        return [
            {"image": image, "pred": chance, "label": labels[i]}
            for image, chance, i in zip(named, chances, rows, strict=True)
        ]

    return Engine(step), list(range(0, count, 2)), labels.numpy()


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("classes", "count"), [(2, 8), (3, 32)])
def test_report_of_a_run(tmp_path, classes, count):
    torch.manual_seed(0)
    network = Head(classes)
    engine, steps, labels = evaluation(network, count, classes, tmp_path)
    names = ["well", "sick", "<b>odd</b>"][:classes]
    ClassificationReport(tmp_path / "out", network, names, tmp_path, threshold=0.4, num_resamples=20).attach(engine)
    engine.run(steps)
    rows = rows_of(tmp_path / "out" / "predictions.csv")
    table = np.array([[float(row[f"probability_{name}"]) for name in names] for row in rows])
    assert [row["label"] for row in rows] == [names[label] for label in labels]
    expected = roc_auc_score(labels, table[:, 1] if classes == 2 else table, multi_class="ovr")
    scores = {row["metric"]: row for row in rows_of(tmp_path / "out" / "metrics.csv")}
    assert float(scores["auc"]["value"]) == pytest.approx(expected, abs=1e-5)
    assert float(scores["auc"]["low_95"]) <= expected <= float(scores["auc"]["high_95"])
    assert engine.state.metrics["val_auc"] == pytest.approx(expected, abs=1e-5)
    right = np.mean([row["prediction"] == row["label"] for row in rows])
    assert float(scores["accuracy"]["value"]) == pytest.approx(right, abs=1e-6)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<img") == 5
    assert "<b>odd" not in page
    assert ("from a probability of 0.400 on" in page) == (classes == 2)
    assert "Worst mistakes" in page
    assert not network.head._forward_pre_hooks


def test_a_run_that_failed_leaves_nothing_in_the_next(tmp_path):
    network = Head(2)
    engine, _, _ = evaluation(network, 4, 2, tmp_path)
    report = ClassificationReport(tmp_path / "out", network, ["a", "b"], tmp_path, num_resamples=2)
    report.attach(engine)
    with pytest.raises(IndexError):
        engine.run([0, 99])
    assert not (tmp_path / "out").exists()
    engine, steps, _ = evaluation(network, 4, 2, tmp_path)
    report.attach(engine)
    engine.run(steps)
    assert len(report._features) == 2
    assert not network.head._forward_pre_hooks


def test_solves_and_unlike_images_have_columns(tmp_path, caplog):
    def step(engine, batch):
        # The second sample starts at the solution.
        solve_fixed_point(lambda z: 0.5 * z, torch.tensor([[1.0], [0.0]]), FixedPointIteration(atol=1e-3, rtol=0.0))
        image = torch.rand(1, 10, 10, generator=torch.Generator().manual_seed(0))
        return [
            {"image": MetaTensor(factor * image, meta={"filename_or_obj": str(tmp_path / name)}), "pred": torch.ones(2)}
            for factor, name in ((1.0, "a"), (0.01, "b"))
        ]

    engine = Engine(step)
    ranges, skipped = {"contrast": (0.2, 0.4), "median": (0.3, 0.7)}, [{"file": "c", "reason": "cut off"}]
    ProbabilityTable(tmp_path, ["x", "y"], tmp_path, training_ranges=ranges, skipped=skipped).attach(engine)
    engine.run([0])
    first, second = rows_of(tmp_path / "predictions.csv")
    assert (first["solve_status"], second["solve_status"]) == ("converged", "converged")
    assert int(first["evaluations"]) > int(second["evaluations"]) == 1
    assert (first["unlike_training"], second["unlike_training"]) == ("", "median; contrast")
    assert "1 of 2 images are unlike the training images" in caplog.text
    record = json.loads((tmp_path / "predictions.json").read_text())
    assert record["skipped"] == skipped
    assert record["images"][1]["unlike_training"] == ["median", "contrast"]


def test_saliency_is_where_the_only_lit_feature_is_and_leaves_the_network_alone(tmp_path):
    torch.manual_seed(0)
    bright = nn.Conv2d(1, 2, 1, bias=False)  # the map of features is the image itself, in both channels
    nn.init.ones_(bright.weight)
    network = DEQKANClassifier(2, 1, 2, backbone=bright, backbone_channels=2, hidden_features=4, pool="avg").eval()
    image = torch.zeros(1, 16, 16)
    image[0, 2:5, 9:12] = 1.0  # x from 2, y from 9: in a picture below, to the left
    sample = {"image": MetaTensor(image, meta={"filename_or_obj": str(tmp_path / "a.png")})}
    overlays = []
    for chosen in (0, 1):
        engine = Engine(lambda engine, batch: [{**sample, "pred": torch.eye(2)[batch]}])
        SaliencyWriter(tmp_path / str(chosen), network, tmp_path).attach(engine)
        engine.run([chosen])
        overlays.append(np.asarray(Image.open(tmp_path / str(chosen) / "saliency" / "a.png_saliency.png")))
    colored = [(o.max(axis=2) - o.min(axis=2)) > 30 for o in overlays]
    # Brighter raises the score of one class and lowers that of the other.
    assert sorted(c.any() for c in colored) == [False, True]
    where = np.argwhere(colored[0] | colored[1])
    assert where.min(axis=0).tolist() == [9, 2]
    assert where.max(axis=0).tolist() == [11, 4]
    assert all(p.grad is None for p in network.parameters())


def test_saliency_names_a_missing_layer(tmp_path):
    engine = Engine(lambda engine, batch: [])
    SaliencyWriter(tmp_path, Head(2), tmp_path, target_layer="backbone").attach(engine)
    with pytest.raises(ValueError, match=r"no module 'backbone'.*it has head"):
        engine.run([0])
