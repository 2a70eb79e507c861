"""The reconstruction bundle: pre-training of the denoiser, and fine-tuning from it, on images alone."""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

BRAIN = "brain_mri_deq_reconstruction"
TINY = {"features": [4, 8], "num_layers": 1}
PRETRAIN = {
    **TINY,
    "max_epochs": 1,
    "epoch_length": 2,
    "batch_size": 2,
    "patch_size": [16, 16],
    "val_size": [24, 24],
    "ema_momentum": 0.1,
}
FINE_TUNE = {
    **TINY,
    "max_epochs": 1,
    "epoch_length": 2,
    "batch_size": 3,
    "crop_size": [24, 20],
    "num_coils": [1, 3],
    "acceleration": [2.0, 3.0],
    "center_fraction": [0.2, 0.3],
    "pattern": ["random", "equispaced"],
    "num_cg_steps": 2,
    "max_iter": 6,
}


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def states(*folders, name="checkpoint_epoch=2.pt"):
    return [torch.load(folder / name, weights_only=True) for folder in folders]


@pytest.fixture
def brain(make_bundle, tmp_path):
    """The bundle with a data set of images in place of k-space."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 3), ("val", 1)):
        for source, radius in (("a", 5), ("b", 8)):
            (tmp_path / "images" / part / source).mkdir(parents=True)
            for index in range(count):
                rows, columns = np.mgrid[: 26 + 4 * index, :30]
                disc = (rows - 13) ** 2 + (columns - 15) ** 2 < (radius + index) ** 2
                pixels = (60 * rng.random(disc.shape) + 180 * disc).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / part / source / f"{index}.png")
    return replace(make_bundle(BRAIN), dataset_dir=tmp_path / "images")


def pretrain(bundle, name, **settings):
    folder = bundle.work / name
    over = {**PRETRAIN, "ckpt_dir": str(folder / "models"), "output_dir": str(folder / "logs"), **settings}
    workflow = bundle.workflow_of(["pretrain.json"], "train", **over)
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    return folder


def fine_tune(bundle, name, **settings):
    folder = bundle.work / name
    over = {**FINE_TUNE, "ckpt_dir": str(folder / "models"), "output_dir": str(folder / "logs"), **settings}
    bundle.run("train", **over)
    return folder


def test_pretraining_that_goes_on_equals_an_uninterrupted_one(brain):
    whole = pretrain(brain, "whole", max_epochs=2)
    pretrain(brain, "cut")
    cut = pretrain(brain, "cut", max_epochs=2, resume=True)
    first, second = states(whole / "models", cut / "models")
    for part in ("model", "ema"):
        assert all(torch.equal(value, second[part][name]) for name, value in first[part].items())
    assert any(not torch.equal(value, first["ema"][name]) for name, value in first["model"].items())
    assert rows_of(cut / "logs" / "history.csv") == rows_of(whole / "logs" / "history.csv")
    record = json.loads((cut / "models" / "model.json").read_text())
    assert record["task"] == "denoising"
    assert "not for clinical use" in record["intended_use"]
    psnr = [float(rows_of(cut / "logs" / "history.csv")[0][f"val_psnr_{level}"]) for level in ("0.02", "0.05", "0.1")]
    assert psnr == sorted(psnr, reverse=True)


@pytest.mark.parametrize("prior", ["dncnn", "ridge", "complex_ridge"])
def test_other_denoisers_learn_too(brain, prior):
    settings = {"prior": prior, "features": 4, "num_layers": 3, "epoch_length": 6, "max_epochs": 3, "ema_momentum": 0}
    folder = pretrain(brain, prior, **settings, noise_range=[0.1, 0.1], learning_rate=0.01)
    rows = rows_of(folder / "logs" / "history.csv")
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert "ema" not in states(folder / "models")[0]


def test_fine_tuning_starts_from_the_denoiser_and_keeps_what_rebuilds_it(brain):
    denoiser = pretrain(brain, "denoiser") / "models" / "model.pt"
    settings = {"pretrained": str(denoiser), "learning_rate": 0.0, "jacobian_weight": 0.1, "ema_momentum": 0.1}
    folder = fine_tune(brain, "tuned", **settings, loss_weights={"l1": 1.0, "ssim": 0.1})
    prior = "equilibrium.cell.prior."
    (tuned,) = states(folder / "models", name="model.pt")
    for name, value in torch.load(denoiser, weights_only=True).items():
        assert torch.allclose(tuned[prior + name], value, atol=1e-6)  # an average of equal weights rounds
    network = json.loads((folder / "models" / "model.json").read_text())["network"]
    assert network["form"] == "cg"
    assert network["features"] == [4, 8]
    # The same epoch without the penalty: its part of the loss is positive.
    plain = fine_tune(brain, "plain", **{**settings, "jacobian_weight": 0.0}, loss_weights={"l1": 1.0, "ssim": 0.1})
    loss = [float(rows_of(run / "logs" / "history.csv")[0]["train_loss"]) for run in (folder, plain)]
    assert loss[0] > loss[1] > 0


def test_an_energy_is_learned_goes_on_and_reconstructs(brain):
    network = {"form": "reweighted", "prior": "weakly_convex_ridge", "features": [4, 3], "num_layers": 3}
    coarse = pretrain(brain, "coarse", **network, error="log_mse", learning_rate=0.01, ema_momentum=0) / "models"
    start = {"pretrained": str(coarse / "model.pt"), "learning_rate": 0.0, "ema_momentum": 0}
    fine = pretrain(brain, "fine", **network, **start) / "models"
    before, after = states(coarse, fine, name="model.pt")
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    folder = fine_tune(brain, "energy", **network, pretrained=str(fine / "model.pt"), learning_rate=0.01, weight=0.2)
    (tuned,) = states(folder / "models", name="model.pt")
    changed = [
        name for name, value in before.items() if not torch.equal(tuned["equilibrium.cell.prior." + name], value)
    ]
    assert set(changed) == set(before) - {"raw_level_weights"}  # which only denoising uses
    assert 10 * float(tuned["equilibrium.cell.raw_weight"]) == pytest.approx(math.log(0.2), abs=0.3)
    assert float(rows_of(folder / "logs" / "history.csv")[0]["solve_residual"]) < 1


def test_a_denoiser_that_does_not_fit_moves_no_model_aside(brain):
    denoiser = pretrain(brain, "other", features=[2, 4]) / "models" / "model.pt"
    models = brain.work / "kept"
    models.mkdir()
    (models / "model.pt").write_text("of an earlier training")
    with pytest.raises(Exception, match="Failed to evaluate"):
        brain.run(
            "train", **FINE_TUNE, pretrained=str(denoiser), ckpt_dir=str(models), output_dir=str(brain.work / "o")
        )
    assert [path.name for path in models.iterdir()] == ["model.pt"]


def test_fine_tuning_that_goes_on_equals_an_uninterrupted_one(brain):
    whole = fine_tune(brain, "whole", max_epochs=2, ema_momentum=0.1)
    fine_tune(brain, "cut", ema_momentum=0.1)
    cut = fine_tune(brain, "cut", max_epochs=2, ema_momentum=0.1, resume=True)
    first, second = states(whole / "models", cut / "models")
    for part in ("model", "ema"):
        assert all(torch.equal(value, second[part][name]) for name, value in first[part].items())


def test_validation_and_evaluation_on_k_space(brain, tmp_path):
    folder = fine_tune(brain, "scans", val_dataset_dir=str(tmp_path / "data"), val_slices="0")
    row = rows_of(folder / "logs" / "history.csv")[0]
    assert 0 < float(row["val_ssim"]) <= 1
    # The validation part, as evaluation rebuilds the network from model.json and draws the same masks.
    (tmp_path / "data" / "test").rename(tmp_path / "test")
    settings = {"ckpt_dir": str(folder / "models"), "dataset_dir": str(tmp_path / "data"), "slices": "0"}
    brain.run("evaluate", **settings, output_dir=str(folder / "eval"))
    metrics = json.loads((folder / "eval" / "metrics.json").read_text())
    assert metrics["val_psnr"] == pytest.approx(float(row["val_psnr"]), abs=1e-4)
