import csv
import json

import h5py
import numpy as np
import pytest
import torch

from monai_deqkan.engines import load_spread_factor
from monai_deqkan.networks.nets import DEQReconstructor

BRAIN = "brain_mri_deq_reconstruction"
TASK = {
    "split_seed": 0,
    "sampling": {
        "acceleration": 2,
        "center_fraction": 0.3,
        "pattern": "random",
        "crop_size": [-1, -1],
        "maps_method": "low_frequency",
    },
    "network": {
        "form": "contracting",
        "prior": "ridge",
        "num_layers": 2,
        "features": 4,
        "contraction": 0.9,
        "num_cg_steps": 2,
        "rtol": 1e-3,
        "max_iter": 100,
    },
    "training_ranges": {"coils": [8, 16], "rows": [32, 32]},
}
pytestmark = pytest.mark.parametrize("bundle", [BRAIN], indirect=True)


def write_model(folder, seed):
    """Write an untrained model with small random weights."""
    torch.manual_seed(seed)
    network = DEQReconstructor(2, "ridge", form="contracting", num_layers=2, features=4, contraction=0.9)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder.mkdir()
    torch.save(network.state_dict(), folder / "model.pt")
    (folder / "model.json").write_text(json.dumps(TASK))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("uncertainty") / "models", 0)


def infer(bundle, models, output, *files, **override):
    source = bundle.dataset_dir / "test"
    settings = {"ckpt_dir": str(models), "output_dir": str(output), "dataset_dir": str(source), **override}
    workflow = bundle.workflow_of(["inference.json", *files], "infer", **settings)
    workflow.initialize()
    workflow.run()
    with h5py.File(output / "scan_0.h5") as file:
        return {name: file[name][:] for name in ("reconstruction", "spread") if name in file}


def test_calibration_and_the_spreads_that_it_scales(bundle, models, tmp_path, caplog):
    settings = {"ckpt_dir": str(models), "output_dir": str(tmp_path / "c"), "num_samples": 3, "num_slices": 2}
    workflow = bundle.workflow_of(["evaluate.json", "uncertainty_calibration.json"], "train", **settings)
    workflow.initialize()
    workflow.run()
    file = tmp_path / "c" / "spread_calibration.json"
    record = json.loads(file.read_text())
    assert record["num_slices"] == {"validation": 2, "test": 2, "in_both": 0}
    assert record["factor"] == load_spread_factor(file, "noise") > 0
    assert (tmp_path / "c" / "spread_calibration.png").stat().st_size > 1000
    assert "scan" not in file.read_text()

    plain = infer(bundle, models, tmp_path / "plain", "uncertainty.json", num_samples=3)
    assert "no calibration of the spread" in caplog.text
    scaled = infer(bundle, models, tmp_path / "s", "uncertainty.json", num_samples=3, calibration=str(file))
    np.testing.assert_array_equal(scaled["reconstruction"], plain["reconstruction"])
    assert plain["spread"].max() > 0
    np.testing.assert_allclose(scaled["spread"], record["factor"] * plain["spread"], rtol=1e-5)


def test_lines_and_ensembles(bundle, models, tmp_path):
    # Fully sampled scans: half of the lines outside the centre are dropped.
    settings = {"spread_method": "mask", "drop_share": 0.5, "num_samples": 3}
    lines = infer(bundle, models, tmp_path / "lines", "uncertainty.json", **settings)
    other = write_model(tmp_path / "other", 1)
    settings = {"spread_method": "ensemble", "ensemble": [str(other / "model.pt")]}
    ensemble = infer(bundle, models, tmp_path / "ensemble", "uncertainty.json", **settings)
    alone = [infer(bundle, folder, tmp_path / f"of_{folder.name}")["reconstruction"] for folder in (models, other)]
    peak = alone[0].max()
    for found in (lines, ensemble):
        np.testing.assert_allclose(found["reconstruction"], alone[0], atol=1e-5 * peak)
    # Of two networks the standard deviation is their difference over the root of two.
    np.testing.assert_allclose(ensemble["spread"], np.abs(alone[1] - alone[0]) / 2**0.5, atol=1e-5 * peak)
    assert ensemble["spread"].max() > 1e-3 * peak


def test_errors_and_warnings_stand_in_the_table(bundle, models, tmp_path):
    infer(bundle, models, tmp_path / "o", estimate_error=True, rtol=1e-4)
    with (tmp_path / "o" / "slices.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    for row in rows:
        assert float(row["relative_residual"]) <= 1e-4
        assert float(row["certified_factor"]) < 0.9
        assert 0 < float(row["estimated_error"]) <= 1.05 * float(row["error_bound"])
        assert row["unlike_training"] == "coils"
