"""The bookkeeping that the studies in tests/benchmarks share."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "benchmarks" / "study_runs.py"


@pytest.fixture
def study_runs(monkeypatch):
    spec = importlib.util.spec_from_file_location("study_runs", FILE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "study_runs", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def start(study_runs, monkeypatch, tmp_path):
    """Return a function that runs a study of three cells as from the command line, and the list of what it ran."""
    ran = []

    def run(options, cell, seed):
        if cell == "lacking":
            raise ImportError("no such package")
        ran.append((cell, seed))
        return [{"data": place, "psnr": options.steps + seed, "ssim": None} for place in ("first", "second")]

    def begin(*arguments):
        study = study_runs.Study(
            "study",
            ["plain", "other", "lacking"],
            run,
            {"network": "cell", "data": "data"},
            {"PSNR": ("psnr", ".1f"), "SSIM": ("ssim", ".2f")},
        )
        parser = argparse.ArgumentParser()
        parser.add_argument("--steps", type=int, default=10)
        parser.add_argument("--device", default="cpu")
        monkeypatch.setattr(sys, "argv", ["study", "--results", str(tmp_path / "results"), *arguments])
        study_runs.run_study(study, parser)

    return begin, ran


def test_study_goes_on_where_it_was_stopped_and_names_what_is_missing(start, capsys, tmp_path):
    begin, ran = start
    begin("--only", "plain", "--seeds", "0", "2")
    begin("--seeds", "0", "2")
    assert ran == [("plain", 0), ("plain", 2), ("other", 0), ("other", 2)]
    capsys.readouterr()
    begin("--seeds", "0", "2", "--table")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "| network | data | PSNR | SSIM |",
        "|---|---|---|---|",
        "| plain | first | 11.0 (10.0 to 12.0) | - |",
    ]
    assert lines[-1] == "Missing: lacking-0, lacking-2."
    assert json.loads((tmp_path / "results" / "plain-2.json").read_text())["settings"] == {"steps": 10}


def test_folder_takes_no_runs_with_other_settings(start, tmp_path):
    begin, ran = start
    begin("--only", "plain")
    before = (tmp_path / "results" / "plain-0.json").read_text()
    with pytest.raises(SystemExit, match=r"other settings \(steps\)"):
        begin("--only", "other", "--steps", "20")
    assert ran == [("plain", 0)]
    assert (tmp_path / "results" / "plain-0.json").read_text() == before
