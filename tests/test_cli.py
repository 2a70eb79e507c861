from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import monai_deqkan
from monai_deqkan import cli
from monai_deqkan.data import SAMPLES, bundle_metadata, bundle_names
from monai_deqkan.networks import nets


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that runs the command and returns its exit status, output and error output."""

    def run(*words: str | Path) -> tuple[int, str, str]:
        try:
            status = cli.main([str(word) for word in words])
        except SystemExit as end:
            status = int(end.code or 0)
        output, errors = capsys.readouterr()
        return status, output, errors

    return run


def fail_with(error: BaseException) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def test_version_from_a_shell() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "monai_deqkan", "--version"], capture_output=True, text=True, timeout=300, check=True
    )
    assert run.stdout.startswith(f"monai-deqkan {monai_deqkan.__version__} (torch ")


def test_list_names_everything(told: Any) -> None:
    status, output, errors = told("list")
    assert (status, errors) == (0, "")
    lines = {line.split()[0]: line for line in output.splitlines() if line.startswith("  ")}
    assert set(lines) == {*SAMPLES, *bundle_names(), *nets.__all__}
    assert all(len(line.split()) > 3 for line in lines.values()), "each has a description"
    for name in bundle_names():
        assert bundle_metadata(name)["task"] in lines[name]
    for part in ("anderson", "fixed_point_iteration", "conjugate_gradient", "implicit", "unrolled", "bspline"):
        assert part in output


def test_samples_are_written_where_asked(told: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "write_sample", lambda name, folder: folder / name)
    status, output, _ = told("samples", "brain_tissue", tmp_path)
    assert status == 0
    assert str(tmp_path / "brain_tissue") in output


def test_unknown_sample(told: Any, tmp_path: Path) -> None:
    status, output, errors = told("samples", "brain_lesions", tmp_path / "new")
    assert (status, output) == (2, "")
    assert errors.startswith("monai-deqkan: error: ")
    assert errors.count("\n") == 1
    assert "brain_tissue" in errors
    assert "Did you mean 'brain_lesion'?" in errors


@pytest.mark.parametrize("name", bundle_names())
def test_bundle_copy_prints_commands_that_fit_the_copy(told: Any, tmp_path: Path, name: str) -> None:
    target = tmp_path / "my copy"
    status, output, _ = told("bundle", "copy", name, target)
    assert status == 0
    assert json.loads((target / "configs" / "metadata.json").read_text()) == bundle_metadata(name)
    commands = [line for line in output.splitlines() if line.startswith("  ")]
    assert len(commands) == 4
    for config, command in zip(("train", "evaluate", "inference"), commands[1:], strict=True):
        assert f"-m monai.bundle run --config_file '{target / 'configs' / config}.json'" in command
    sample = next(word for word in commands[0].split() if word.startswith("brain_"))
    assert sample in SAMPLES


def test_bundle_copy_touches_nothing(told: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    status, _, errors = told("bundle", "copy", bundle_names()[0], tmp_path)
    assert status == 2
    assert "already holds files" in errors
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_unknown_bundle(told: Any, tmp_path: Path) -> None:
    status, _, errors = told("bundle", "copy", "lung_segmentation", tmp_path / "new")
    assert status == 2
    assert all(name in errors for name in bundle_names())


def test_demo_hands_its_options_on(told: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def run_demo(out: Path | None, *, only: str | None, quick: bool) -> Path:
        calls.append((out, only, quick))
        return tmp_path / "report.html"

    monkeypatch.setattr(cli, "run_demo", run_demo)
    status, output, _ = told("demo")
    assert status == 0
    assert str(tmp_path / "report.html") in output
    told("demo", "--quick", "--only", "segmentation", "--out", tmp_path)
    assert calls == [(None, None, False), (tmp_path, "segmentation", True)]


def test_demo_knows_its_tasks(told: Any, tmp_path: Path) -> None:
    status, _, errors = told("demo", "--only", "segmentations", "--out", tmp_path / "new")
    assert status == 2
    assert "Did you mean 'segmentation'?" in errors
    assert not (tmp_path / "new").exists()


def save_images(folder: Path, count: int, first: int = 0) -> None:
    folder.mkdir(parents=True)
    for index in range(count):
        pixels = np.random.default_rng(first + index).integers(0, 256, (40, 32), np.uint8)
        Image.fromarray(pixels).save(folder / f"p{index // 2}_{index}.png")


def test_data_are_converted_and_checked(told: Any, tmp_path: Path) -> None:
    for number, name in enumerate(("sick", "well")):
        save_images(tmp_path / "source" / name, 20, 100 * number)
    words = ("--patients", r"^p(\d+)", "--val", "0.1", "--test", "0.3", "--link")
    status, output, _ = told("data", "convert", tmp_path / "source", tmp_path / "new data", *words)
    assert status == 0
    assert f"-m monai_deqkan data check '{tmp_path / 'new data'}'" in output
    assert sum(1 for _ in (tmp_path / "new data").rglob("*.png")) == 40
    status, output, _ = told(
        "data", "check", tmp_path / "new data", "--patients", r"^p(\d+)", "--out", tmp_path / "out"
    )
    assert (status, "There are 10 patients." in output) == (0, True)
    file = next((tmp_path / "new data" / "train" / "sick").iterdir())
    (tmp_path / "new data" / "val" / "well" / "copy.png").write_bytes(file.read_bytes())
    status, output, errors = told("data", "check", tmp_path / "new data")
    assert (status, errors) == (1, "")
    assert "1 pairs of exact copies lie in different parts" in output
    status, _, errors = told("data", "check", tmp_path / "new data", "--out", tmp_path / "out")
    assert status == 2
    assert "already holds files" in errors


def test_columns_of_a_table_are_told(told: Any, tmp_path: Path) -> None:
    save_images(tmp_path / "pictures", 8)
    lines = [f"p{index // 2}_{index},{'ab'[index % 2]},train" for index in range(8)]
    (tmp_path / "list.csv").write_text("\n".join(["who,what,when", *lines]))
    words = ("data", "convert", tmp_path / "list.csv", tmp_path / "out", "--images", tmp_path / "pictures")
    status, _, errors = told(*words, "--file-column", "who", "--label-column", "wat")
    assert status == 2
    assert "Did you mean 'what'?" in errors
    columns = ("--file-column", "who", "--label-column", "what", "--part-column", "when")
    assert told(*words, *columns)[0] == 0
    assert sorted(path.name for path in (tmp_path / "out" / "train" / "a").iterdir()) == [
        f"p{index // 2}_{index}.png" for index in range(0, 8, 2)
    ]


def test_our_message_is_told_from_inside_monais(told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    outer = RuntimeError("Failed to parse the configuration")
    outer.__cause__ = RuntimeError("Failed to evaluate")
    outer.__cause__.__cause__ = ValueError("The class `a` is\nempty.")
    monkeypatch.setattr(cli, "run_demo", fail_with(outer))
    status, _, errors = told("demo")
    assert (status, errors) == (2, "monai-deqkan: error: The class `a` is empty.\n")


def test_traceback_on_demand(told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "run_demo", fail_with(FileNotFoundError("gone")))
    for words in (("--traceback", "demo"), ("demo", "--traceback")):
        status, _, errors = told(*words)
        assert status == 2
        assert errors.startswith("Traceback")
        assert errors.endswith("monai-deqkan: error: gone\n")


def test_defects_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("Failed to evaluate")
    error.__cause__ = KeyError("a")
    monkeypatch.setattr(cli, "run_demo", fail_with(error))
    with pytest.raises(RuntimeError, match="Failed to evaluate"):
        cli.main(["demo"])


def test_interruption(told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "run_demo", fail_with(KeyboardInterrupt()))
    assert told("demo")[::2] == (130, "monai-deqkan: interrupted\n")


@pytest.mark.parametrize("words", [(), ("demos",), ("bundle",), ("samples", "brain_lesion"), ("demo", "--fast")])
def test_words_that_it_does_not_understand(told: Any, words: tuple[str, ...]) -> None:
    status, output, errors = told(*words)
    assert (status, output) == (2, "")
    assert errors.startswith("usage: monai-deqkan")
