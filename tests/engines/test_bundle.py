import json
import sys
from pathlib import Path

import pytest
import torch
from monai.networks import nets as monai_nets
from torch import nn

from monai_deqkan.engines import (
    check_output_folder,
    find_bundle_root,
    free_folder,
    latest_checkpoint,
    load_task,
    load_weights,
    network_class,
    say_where,
    start_training,
    training_folder,
)
from monai_deqkan.networks import nets


@pytest.mark.parametrize(
    ("arguments", "root"),
    [
        (["run", "--config_file", "/a/b/configs/train.json"], "/a/b"),
        (["run", "--config_file=/a/b/configs/train.json"], "/a/b"),
        (["run", "--config_file", "['/a/b/configs/train.json','/a/b/configs/multi_gpu_train.json']"], "/a/b"),
        (["run", "--config_file=['/a b/configs/train.json', 'x/configs/evaluate.json']"], "/a b"),
        (["run", "--config_file", '["/a/b/configs/train.json"]'], "/a/b"),
        (["run", "--config-file", "/a/b/configs/train.json"], "/a/b"),
        (["run", "--config-file=/a/b/configs/train.json"], "/a/b"),
        (["run", "--config_file", "['/a, b/configs/train.json', '/c/configs/evaluate.json']"], "/a, b"),
        (["run", "--config_file", "'/a/b/configs/train.json'"], "/a/b"),
        (["run", "--config_file", "[/a/b/configs/train.json,/c/configs/evaluate.json]"], "/a/b"),
        (["run", "--config_file", "/a/b/configs/train.json,/c/configs/evaluate.json"], "/a/b"),
        (["run", "--config_file", "3"], "."),
        (["run", "-config_file", "b/configs/train.json", "--max_epochs", "3"], "b"),
        (["run", "--max_epochs", "3", "--config_file", "b/configs/inference.json"], "b"),
        (["run", "--config_file", "configs/train.json"], "."),
        (["run", "--config_file", "elsewhere/train.json"], "."),
        (["run"], "."),
        (["run", "--config_file"], "."),
    ],
)
def test_bundle_root_from_the_command_line(monkeypatch, caplog, arguments, root):
    monkeypatch.setattr(sys, "argv", ["monai.bundle", *arguments])
    with caplog.at_level("INFO"):
        assert find_bundle_root() == root
    said = [message.rpartition(": ")[2] for message in caplog.messages]
    assert said == ([] if "configs/" not in str(arguments) else [str(Path(root).absolute())])


def test_free_folder_is_the_first_that_holds_nothing(tmp_path):
    wanted = tmp_path / "eval"
    assert free_folder(wanted) == str(wanted)
    wanted.mkdir()
    assert free_folder(wanted) == str(wanted)
    (wanted / "x").write_text("")
    assert free_folder(wanted) == f"{wanted}_2"
    (tmp_path / "eval_2").write_text("a file")
    assert free_folder(wanted) == f"{wanted}_3"


def test_resumed_training_goes_on_in_the_latest_folder(tmp_path):
    wanted = tmp_path / "logs"
    assert training_folder(wanted) == training_folder(wanted, resume=True) == str(wanted)
    for folder, following in ((wanted, f"{wanted}_2"), (tmp_path / "logs_2", f"{wanted}_3")):
        folder.mkdir()
        (folder / "history.csv").write_text("")
        assert training_folder(wanted, resume=True) == str(folder)
        assert training_folder(wanted) == following


def test_output_folder_in_use_is_refused(tmp_path):
    check_output_folder(tmp_path / "new")
    check_output_folder(tmp_path)
    (tmp_path / "x").write_text("mine")
    with pytest.raises(FileExistsError, match=r"already holds files.*Nothing was written"):
        check_output_folder(tmp_path)
    with pytest.raises(NotADirectoryError):
        check_output_folder(tmp_path / "x")
    check_output_folder(tmp_path, resume=True)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_new_training_moves_earlier_models_aside_and_loses_nothing(tmp_path):
    names = ("model.pt", "model.json", "checkpoint_epoch=3.pt", "training_images.csv")
    for run in range(3):
        for name in names:
            (tmp_path / name).write_text(f"{name} of run {run}")
        (tmp_path / "notes.txt").write_text("mine")
        start_training(tmp_path)
    expected = {f"{folder}/{name}": f"{name} of run {run}" for run, folder in enumerate(PREVIOUS) for name in names}
    assert contents(tmp_path) == {**expected, "notes.txt": "mine"}


PREVIOUS = ("previous", "previous_2", "previous_3")


def test_resumed_training_moves_nothing(tmp_path):
    (tmp_path / "model.pt").write_text("x")
    start_training(tmp_path, resume=True)
    assert contents(tmp_path) == {"model.pt": "x"}


def test_first_training_makes_the_folder(tmp_path):
    start_training(tmp_path / "a" / "models")
    assert list((tmp_path / "a" / "models").iterdir()) == []


def test_latest_checkpoint_is_the_newest_that_can_be_read(tmp_path, caplog):
    for epoch in (2, 9, 10):
        torch.save({"model": torch.ones(100)}, tmp_path / f"checkpoint_epoch={epoch}.pt")
    torch.save({}, tmp_path / "model.pt")
    assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint_epoch=10.pt")
    whole = (tmp_path / "checkpoint_epoch=10.pt").read_bytes()
    (tmp_path / "checkpoint_epoch=10.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "checkpoint_epoch=11.pt").write_bytes(b"")
    with caplog.at_level("WARNING"):
        assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint_epoch=9.pt")
    assert [record.getMessage().split("=")[1][:5] for record in caplog.records] == ["11.pt", "10.pt"]


def test_no_checkpoint_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No readable checkpoint.*--resume False"):
        latest_checkpoint(tmp_path)


def test_task_is_that_of_the_model_over_the_default(tmp_path, caplog):
    file = tmp_path / "model.json"
    assert load_task(file, {"threshold": 0.5}) == {"threshold": 0.5}
    assert "model.json: the model is taken for what the bundle was made for, {'threshold': 0.5}." in caplog.text
    file.write_text('{"threshold": 0.2, "class_names": ["a"]}')
    assert load_task(file, {"threshold": 0.5, "size": 3}) == {"threshold": 0.2, "class_names": ["a"], "size": 3}
    assert load_task(file) == {"threshold": 0.2, "class_names": ["a"]}


def test_task_that_cannot_be_had(tmp_path):
    file = tmp_path / "model.json"
    with pytest.raises(
        FileNotFoundError, match=r"No trained model at .*model\.pt\. Run the bundle's train\.json first"
    ):
        load_task(file)
    file.write_text('{"threshold": 0')
    with pytest.raises(ValueError, match=r"cannot be read: .*model\.json .*Train anew"):
        load_task(file, {})
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"model\.json lacks 'split_seed'"):
        load_task(file)["split_seed"]
    assert load_task(file).get("split_seed", 3) == 3
    file.write_text("[1]")
    with pytest.raises(ValueError, match="must be a JSON object"):
        load_task(file)


def test_last_line_says_where_results_are(tmp_path, caplog):
    with caplog.at_level("INFO"):
        say_where(tmp_path)
    assert str(tmp_path) in caplog.messages[-1]


def test_task_of_another_kind(tmp_path):
    file = tmp_path / "model.json"
    file.write_text('{"task": "denoising"}')
    assert load_task(file, kind="denoising") == {"task": "denoising"}
    with pytest.raises(ValueError, match=r"is for denoising, this configuration for reconstruction.*`ckpt_dir`"):
        load_task(file, {}, kind="reconstruction")


def test_weights_are_loaded(tmp_path):
    torch.manual_seed(0)
    source, target = nn.Linear(2, 3), nn.Linear(2, 3)
    torch.save(source.state_dict(), tmp_path / "model.pt")
    assert load_weights(target, tmp_path / "model.pt") is target
    assert torch.equal(target.weight, source.weight)


def test_weights_that_cannot_be_loaded(tmp_path):
    file = tmp_path / "model.pt"
    with pytest.raises(
        FileNotFoundError, match=r"No trained weights at .*model\.pt\. Run the bundle's train\.json first"
    ):
        load_weights(nn.Linear(2, 3), file)
    torch.save(nn.Linear(2, 3).state_dict(), file)
    with pytest.raises(ValueError, match=r"(?s)do not fit this network.*size mismatch.*trained with"):
        load_weights(nn.Linear(2, 4), file)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="or the file is damaged"):
        load_weights(nn.Linear(2, 3), file)


class Payload:
    def __reduce__(self):
        return (sys.exit, ("executed",))


def test_files_that_would_run_code_are_refused(tmp_path):
    torch.save({"weight": Payload()}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="do not fit this network"):
        load_weights(nn.Linear(2, 3), tmp_path / "model.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    state = nn.Linear(2, 3).state_dict()
    state["bias"][1] = value
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt must be finite; bias hold NaN or infinity"):
        load_weights(nn.Linear(2, 3), tmp_path / "model.pt")


def test_a_description_that_is_no_text_is_named(tmp_path):
    (tmp_path / "model.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"cannot be read: .*model\.json"):
        load_task(tmp_path / "model.json")


def test_networks_are_found_by_name_ours_before_monais():
    assert network_class("KANUNet") is nets.KANUNet
    assert network_class("SegResNet") is monai_nets.SegResNet


@pytest.mark.parametrize("name", ["Unknown", "os.system", "__builtins__", "kan_unet", None])
def test_nothing_but_networks_is_found(name):
    with pytest.raises(ValueError, match=r"`network_name` must be a network of .*KANUNet"):
        network_class(name)


def test_a_training_goes_on_with_its_own_task_only(tmp_path):
    task = {"features": (4, 8), "threshold": 0.5, "preprocessing": {"image_size": [96, 96]}}
    start_training(tmp_path, resume=True, task=task)  # nothing was saved yet
    record = {**task, "threshold": 0.3, "epoch": 3}
    (tmp_path / "model.json").write_text(json.dumps(record))
    start_training(tmp_path, resume=True, task=task)
    other = {**task, "preprocessing": {"image_size": [64, 64]}}
    with pytest.raises(
        ValueError, match=r"preprocessing was .*96, 96.* now it is .*64, 64.*same settings as at its start"
    ):
        start_training(tmp_path, resume=True, task=other)
    start_training(tmp_path, task=other)  # a new one
