"""The settings of the segmentation bundle's training, one short run each."""

import csv
import json
import math

import pytest
import torch

LUNG = "lung_xray_kanunet_segmentation"
# Evaluation scores the test part where there is one; this is the part that a training is judged by.
ON_VAL = {
    "validate#dataset#data": "@val_data",
    "val_data": "$monai_deqkan.data.segmentation_items(@dataset_dir, 'val', seed=@seed)",
}
UNET = {"network_name": "UNet", "network_settings": {"channels": [4, 8], "strides": [2]}}


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def lung(make_bundle):
    return make_bundle(LUNG)


def losses(bundle, name, **settings):
    """The training loss of each epoch of a run of its own."""
    bundle.train(bundle.work / name / "models", output_dir=str(bundle.work / name / "logs"), **settings)
    return [float(row["train_loss"]) for row in rows_of(bundle.work / name / "logs" / "history.csv")]


def test_resumed_training_equals_an_uninterrupted_one(lung):
    models = lung.work / "models"
    whole = losses(lung, "whole", max_epochs=2, **UNET)
    lung.train(models, max_epochs=1, **UNET)
    lung.train(models, max_epochs=2, resume=True, **UNET)
    resumed = [float(row["train_loss"]) for row in rows_of(lung.work / "logs" / "history.csv")]
    assert resumed == whole
    states = [torch.load(f / "checkpoint_epoch=2.pt", weights_only=True) for f in (models, lung.work / "whole/models")]
    assert all(torch.equal(value, states[1]["model"][name]) for name, value in states[0]["model"].items())


def test_losses_and_penalties_have_their_effect(lung):
    found = {name: losses(lung, name, loss_name=name, **UNET)[0] for name in ("ce", "weighted_ce", "dice", "tversky")}
    found["dice_ce"] = losses(lung, "dice_ce", **UNET)[0]
    assert len({round(value, 6) for value in found.values()}) == 5
    own = {"losses#own": {"_target_": "torch.nn.MSELoss"}, "loss_name": "own"}
    with pytest.raises(RuntimeError):  # one channel of labels against two of logits
        losses(lung, "own", **own, **UNET, batch_size=4)
    penalized = [losses(lung, f"sparsity_{weight}", sparsity=weight)[0] for weight in (0.0, 10.0)]
    assert penalized[1] > penalized[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"network_name": "SegResNetDS", "network_settings": {"init_filters": 8, "blocks_down": [1, 1], "dsdepth": 2}},
        {"network_name": "BasicUNetPlusPlus", "network_settings": {"features": [4] * 6, "deep_supervision": True}},
        {"network_name": "HybridKANUNet", "network_settings": {"features": [4, 4, 8], "deep_supervision": True}},
        {"network_name": "HybridKANUNet", "image_size": [64, 64]},  # its own defaults, not KANUNet's settings
    ],
    ids=["SegResNetDS", "BasicUNetPlusPlus", "HybridKANUNet", "by name alone"],
)
def test_deep_supervision(lung, settings):
    assert math.isfinite(losses(lung, "run", **settings)[0])
    models = lung.work / "run" / "models"
    lung.run("evaluate", ckpt_dir=str(models), output_dir=str(lung.work / "eval"), **ON_VAL)
    found = json.loads((lung.work / "eval" / "metrics.json").read_text())["val_mean_dice"]
    # The network is rebuilt from model.json alone, and gives the finest of its outputs.
    assert found == pytest.approx(json.loads((models / "model.json").read_text())["key_metric"]["value"], abs=1e-5)


def test_grids_on_a_schedule_then_pruning(lung, caplog):
    caplog.set_level("INFO", logger="monai_deqkan.handlers.kan_grid")
    models = lung.work / "models"
    settings = {"max_epochs": 2, "refit_every": 1, "refit_until": 1, "extend_at": {"1": 7}, "learning_rate": 0.01}
    lung.train(models, **settings)
    assert sum("refitted" in message for message in caplog.messages) == 1
    assert sum("extended to 7 intervals" in message for message in caplog.messages) == 1
    weights = (models / "model.pt").read_bytes()
    settings = {"trained_dir": str(models), "ckpt_dir": str(models / "pruned"), "output_dir": str(lung.work / "p")}
    files = ["train.json", "prune.json"]
    workflow = lung.workflow_of(files, "train", **settings, batch_size=2, max_epochs=1, prune_amount=0.25)
    workflow.initialize()
    workflow.run()
    record = json.loads((lung.work / "p" / "pruning.json").read_text())
    gone = sum(layer["num_units"] - layer["num_left"] for layer in record["layers"])
    assert gone == round(0.25 * sum(layer["num_units"] for layer in record["layers"]))
    assert (models / "model.pt").read_bytes() == weights
    values = {}
    for name, folder in (("before", models), ("fine_tuned", models / "pruned")):
        lung.run(
            "evaluate",
            ckpt_dir=str(folder),
            output_dir=str(lung.work / name),
            **ON_VAL,
        )
        values[name] = json.loads((lung.work / name / "metrics.json").read_text())["val_mean_dice"]
    assert values == pytest.approx({name: record[name] for name in values}, abs=1e-5)


def test_networks_without_kan_layers_have_no_grids(lung, caplog):
    caplog.set_level("INFO", logger="monai_deqkan.handlers.kan_grid")
    losses(lung, "run", refit_every=1, extend_at={1: 7}, **UNET)
    assert not any("grids of" in message for message in caplog.messages)
