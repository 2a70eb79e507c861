"""ProbabilityTable and MetricsWriter."""

import csv
import json

import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor

from monai_deqkan.handlers import MetricsWriter, ProbabilityTable


def engine_giving(batches):
    return Engine(lambda engine, index: batches[index]), range(len(batches))


def image(path):
    return MetaTensor(torch.zeros(1, 2, 2), meta={"filename_or_obj": str(path), "PatientName": "secret"})


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize(("threshold", "decisions"), [(0.5, ["sick", "well"]), (0.2, ["sick", "sick"])])
def test_probabilities(tmp_path, threshold, decisions):
    data = tmp_path / "data"
    one = {"image": image(data / "a" / "x.png"), "pred": torch.tensor([0.25, 0.75]), "label": torch.tensor(1)}
    two = {"image": image(data / "a" / "y.png"), "pred": torch.tensor([0.7, 0.3]), "label": torch.tensor([1, 0])}
    engine, steps = engine_giving([[one], [two]])
    ProbabilityTable(tmp_path / "out", ["well", "sick"], data, threshold).attach(engine)
    for _ in range(2):  # a second run replaces the rows of the first
        engine.run(steps)
    assert rows_of(tmp_path / "out" / "predictions.csv") == [
        ["image", "probability_well", "probability_sick", "prediction", "label"],
        ["a/x.png", "0.250000", "0.750000", decisions[0], "sick"],
        ["a/y.png", "0.700000", "0.300000", decisions[1], "well"],
    ]
    assert "secret" not in (tmp_path / "out" / "predictions.csv").read_text()


def test_probabilities_without_labels(tmp_path):
    sample = {"image": image(tmp_path / "x.png"), "pred": torch.tensor([0.2, 0.1, 0.7])}
    engine, steps = engine_giving([[sample]])
    ProbabilityTable(tmp_path / "out", ["a", "b", "c"], tmp_path).attach(engine)
    engine.run(steps)
    header, row = rows_of(tmp_path / "out" / "predictions.csv")
    assert header == ["image", "probability_a", "probability_b", "probability_c", "prediction"]
    assert row == ["x.png", "0.200000", "0.100000", "0.700000", "c"]


def test_metrics_as_json(tmp_path):
    engine = Engine(lambda engine, batch: None)

    @engine.on(Events.EPOCH_COMPLETED)
    def _(engine):
        values = {"score": 0.25, "tensor": torch.tensor(2.0), "nan": float("nan"), "inf": float("inf")}
        engine.state.metrics = {**values, "curve": torch.ones(3), "text": "x", "count": 3}

    MetricsWriter(tmp_path / "a" / "b").attach(engine)
    engine.run([0])
    text = (tmp_path / "a" / "b" / "metrics.json").read_text()
    assert json.loads(text) == {"score": 0.25, "tensor": 2.0, "nan": None, "inf": None, "count": 3.0}
    assert "NaN" not in text
