import json
import os

import pytest
import torch
from ignite.engine import Engine
from torch import nn

from monai_deqkan.handlers import BestModelSaver

TASK = {"class_names": ["a", "b"], "threshold": 0.3}


def evaluator(values):
    """An engine whose key metric takes these values, one per run."""
    values = iter(values)
    engine = Engine(lambda engine, batch: None)
    engine.state.key_metric_name = "val_score"

    def run():
        engine.state.metrics = {"val_score": next(values)}
        engine.run([0], max_epochs=1)

    return engine, run


def network():
    return nn.Linear(2, 1)


def train(folder, values, net=None, resume=False):
    net = net or network()
    engine, run = evaluator(values)
    BestModelSaver(folder, net, TASK, resume=resume).attach(engine)
    for step in range(len(values)):
        with torch.no_grad():
            net.weight.fill_(step)
        run()
    return net


def saved(folder):
    return torch.load(folder / "model.pt", weights_only=True), json.loads((folder / "model.json").read_text())


def test_keeps_the_weights_and_the_number_of_the_best_run(tmp_path):
    train(tmp_path / "new", [0.1, 0.5, 0.4, float("nan"), 0.5])
    state, record = saved(tmp_path / "new")
    assert state["weight"].tolist() == [[1.0, 1.0]]
    assert record == {**TASK, "key_metric": {"name": "val_score", "value": 0.5}, "epoch": 1}
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["model.json", "model.pt"]


@pytest.mark.parametrize(("resume", "value", "kept"), [(True, 0.4, 1.0), (True, 0.6, 0.0), (False, 0.4, 0.0)])
def test_resumed_training_must_beat_the_earlier_best(tmp_path, resume, value, kept):
    train(tmp_path, [0.1, 0.5])
    train(tmp_path, [value], resume=resume)
    state, record = saved(tmp_path)
    assert state["weight"][0, 0].item() == kept
    assert record["key_metric"]["value"] == (0.5 if kept else value)


def test_resume_without_an_earlier_model_starts_anew(tmp_path):
    train(tmp_path, [-3.0], resume=True)
    assert saved(tmp_path)[1]["key_metric"]["value"] == -3.0


def test_interrupted_write_leaves_the_older_model_intact(tmp_path, monkeypatch):
    train(tmp_path, [0.5])
    before = (tmp_path / "model.pt").read_bytes(), (tmp_path / "model.json").read_bytes()

    def cut_short(state, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", cut_short)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, [0.9], resume=True)
    assert ((tmp_path / "model.pt").read_bytes(), (tmp_path / "model.json").read_bytes()) == before


def test_files_are_replaced_never_written_in_place(tmp_path, monkeypatch):
    replaced = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (replaced.append(os.path.basename(b)), replace(a, b)))
    train(tmp_path, [0.5])
    assert replaced == ["model.pt", "model.json"]  # the number never stands beside weights that do not reach it
    assert not list(tmp_path.glob("*.part"))


def test_looks_through_the_wrapper_of_distributed_training(tmp_path):
    class Wrapper(nn.parallel.DistributedDataParallel):
        """Stands in for the real one, which needs a process group."""

        def __init__(self, module):
            nn.Module.__init__(self)
            self.module = module
            self.weight = module.weight

    train(tmp_path, [0.5], net=Wrapper(network()))
    assert set(saved(tmp_path)[0]) == {"weight", "bias"}


def test_task_must_be_json(tmp_path):
    with pytest.raises(TypeError, match="JSON"):
        BestModelSaver(tmp_path, network(), {"device": torch.device("cpu")})


@pytest.mark.parametrize("text", ['{"a', "{}", '{"key_metric": {"value": null}}'])
def test_a_damaged_record_of_the_best_model_is_named(tmp_path, text):
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(ValueError, match=r"model\.json does not tell the best metric"):
        BestModelSaver(tmp_path, network(), TASK, resume=True)
    assert (tmp_path / "model.json").read_text() == text


def test_a_metric_that_is_no_number_keeps_no_model_and_says_so(tmp_path, caplog):
    train(tmp_path, [float("nan")])
    assert "is not a number" in caplog.text
    assert not (tmp_path / "model.pt").exists()
