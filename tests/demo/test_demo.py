import json

import pytest
import torch

from monai_deqkan.demo import TASKS, run_demo
from monai_deqkan.demo.section import Section
from monai_deqkan.demo.workflow import read_history
from monai_deqkan.visualize import plot_learning_curves


def fake_task(folder, quick):
    folder.mkdir(parents=True)
    figure = plot_learning_curves({"train_loss": [(1, 1.0), (2, 0.5)]})
    return Section(
        "A task",
        ["Text."],
        [("AUC", "0.900", "linear 0.700")],
        ("Measure", "Value"),
        [("AUC", "0.900")],
        {"auc": 0.9, "quick": quick},
        [(figure, "Curves.", "Curves.")],
    )


@pytest.fixture
def fake_tasks(monkeypatch):
    for name in TASKS:
        monkeypatch.setitem(TASKS, name, fake_task)


def test_summary_and_report_hold_every_task(tmp_path, fake_tasks):
    page = run_demo(tmp_path / "out", quick=True)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["quick"] is True
    assert all(summary[name] == {"auc": 0.9, "quick": True} for name in TASKS)
    text = page.read_text(encoding="utf-8")
    assert page.name == "report.html"
    assert text.count("linear 0.700") == len(TASKS)
    assert "clinical" in text


def test_only_one_task(tmp_path, fake_tasks):
    run_demo(tmp_path / "out", only="segmentation")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert set(summary) & set(TASKS) == {"segmentation"}


def test_wrong_arguments_write_nothing(tmp_path, fake_tasks):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="already holds"):
        run_demo(tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["note.txt"]
    with pytest.raises(ValueError, match="Did you mean 'segmentation'"):
        run_demo(tmp_path / "new", only="segmentaton")
    assert not (tmp_path / "new").exists()


def test_default_folder_is_the_next_free_one(tmp_path, fake_tasks, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_demo(only="classification").parent.name == "deqkan-demo"
    assert run_demo(only="classification").parent.name == "deqkan-demo_2"


def test_history_is_read_back(tmp_path):
    (tmp_path / "history.csv").write_text("epoch,train_loss,val_auc\n1.0,0.5,\n2.0,0.25,0.75\n")
    assert read_history(tmp_path / "history.csv") == {"train_loss": [(1, 0.5), (2, 0.25)], "val_auc": [(2, 0.75)]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "measure", "baseline"),
    [
        ("classification", "auc", "linear_model_auc"),
        ("segmentation", "mean_dice", "thresholds_mean_dice"),
        ("reconstruction", "psnr", "cg_sense_psnr"),
    ],
)
def test_each_bundle_beats_its_baseline(tmp_path, task, measure, baseline):
    torch.manual_seed(0)
    run_demo(tmp_path / "out", only=task)
    numbers = json.loads((tmp_path / "out" / "summary.json").read_text())[task]
    assert numbers[measure] > numbers["baseline"][baseline]
