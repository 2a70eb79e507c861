import os
import subprocess
import sys

import pytest
import torch
from monai.bundle import ConfigParser


def test_merged_config_wraps_the_same_network_and_splits_the_same_data(bundle):
    configs = [bundle.folder / "configs" / name for name in ("train.json", "multi_gpu_train.json")]
    plain, merged = ConfigParser.load_config_file(configs[0]), ConfigParser.load_config_files(configs)
    for key in ("network_def", "optimizer", "loss", "checkpoint_items", "run", "task"):
        assert merged[key] == plain[key]
    assert merged["network"]["module"] == plain["network"]
    parser = ConfigParser(merged)
    for part in ("train", "validate"):
        assert parser[f"{part}#dataloader#sampler"] == f"@{part}#sampler"
        assert parser[f"{part}#sampler#dataset"] == parser[f"{part}#dataloader#dataset"] == f"@{part}#dataset"
        assert parser[f"{part}#dataloader#shuffle"] is False
    # Every sample of the validation counts once; in training the processes must take the same number of steps.
    assert parser["train#sampler#even_divisible"]
    assert not parser["validate#sampler#even_divisible"]
    assert any("start_training" in step for step in merged["initialize"])
    # Masks and augmentations differ between processes; the split between training and validation does not.
    assert any("set_determinism(seed=@seed + dist.get_rank())" in step for step in merged["initialize"])
    assert all("seed=@seed" in parser[f"{part}#dataset#data"] for part in ("train", "validate"))
    assert "rank" not in str(merged["task"])


def run_two_processes(bundle, folder, names, **settings):
    """Run configurations laid over each other in two processes, and return what they wrote to the error stream."""
    configs = [str(bundle.folder / "configs" / name) for name in names]
    settings = {
        **{"dataset_dir": bundle.dataset_dir, "bundle_root": folder, "max_epochs": 1, "progress": False},
        **{"device": "cpu", **bundle.tiny, **settings},
    }
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1", "--nproc_per_node=2"]
    finished = subprocess.run(
        [*launcher, "-m", "monai.bundle", "run", "--config_file", str(configs), *options],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stderr


@pytest.mark.slow
def test_two_processes_train_one_model(bundle, tmp_path):
    written = run_two_processes(bundle, tmp_path, ["train.json", "multi_gpu_train.json"])
    assert "find_unused_parameters" not in written
    checkpoint = torch.load(tmp_path / "models" / "checkpoint_epoch=1.pt", weights_only=True)
    assert checkpoint["trainer"]["epoch_length"] * 2 * bundle.tiny["batch_size"] >= 4
    names = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
    assert not [name for name in names if name.startswith("module.")]


@pytest.mark.slow
def test_two_processes_prune_one_model(make_bundle, tmp_path):
    bundle = make_bundle("lung_xray_kanunet_segmentation")
    run_two_processes(bundle, tmp_path, ["train.json", "multi_gpu_train.json"])
    run_two_processes(bundle, tmp_path, ["train.json", "prune.json", "multi_gpu_train.json"])
    weights = torch.load(tmp_path / "models" / "pruned" / "model.pt", weights_only=True)
    zeros = sum(int((value == 0).sum()) for value in weights.values())
    assert zeros / sum(value.numel() for value in weights.values()) == pytest.approx(0.5, abs=0.01)
