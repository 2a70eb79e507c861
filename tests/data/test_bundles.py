from __future__ import annotations

import json
from pathlib import Path

import pytest

from monai_deqkan.data import bundle_folder, bundle_metadata, bundle_names, bundles, copy_bundle

REPOSITORY = Path(__file__).parents[2]


def contents(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def make_bundle(folder: Path) -> None:
    for part in ("configs", "docs", "models", "eval", "eval_2", "predictions", "logs", "dataset/train"):
        (folder / part).mkdir(parents=True)
        (folder / part / "some.file").write_text(part)
    (folder / "configs" / "metadata.json").write_text('{"task": "a task"}')
    (folder / "configs" / "__pycache__").mkdir()
    (folder / "configs" / "__pycache__" / "a.pyc").write_text("")
    (folder / "LICENSE").write_text("terms")


@pytest.fixture
def only_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_bundle(tmp_path / "bundles" / "one")
    (tmp_path / "bundles" / "no_bundle").mkdir()
    monkeypatch.setattr(bundles, "_bundles", lambda: tmp_path / "bundles")
    return tmp_path


def test_the_three_bundles_are_found_in_the_checkout() -> None:
    folders = sorted(path.parent.parent for path in (REPOSITORY / "bundles").glob("*/configs/metadata.json"))
    assert bundle_names() == [folder.name for folder in folders]
    assert [bundle_folder(name) for name in bundle_names()] == folders
    assert {name.rpartition("_")[2] for name in bundle_names()} >= {"classification", "segmentation", "reconstruction"}


def test_metadata_are_those_of_the_file() -> None:
    name = bundle_names()[0]
    file = REPOSITORY / "bundles" / name / "configs" / "metadata.json"
    assert bundle_metadata(name) == json.loads(file.read_text())


def test_bundles_in_the_package_go_before_those_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "monai_deqkan"
    package.mkdir()
    monkeypatch.setattr(bundles, "files", lambda name: tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no bundles"):
        bundle_names()
    make_bundle(tmp_path / "bundles" / "beside")
    assert bundle_names() == ["beside"]
    make_bundle(package / "bundles" / "within")
    assert bundle_names() == ["within"]


def test_copy_leaves_out_what_runs_made(only_one: Path) -> None:
    copy = copy_bundle("one", only_one / "new" / "copy")
    assert copy == only_one / "new" / "copy"
    assert contents(copy) == {"LICENSE", "configs/metadata.json", "configs/some.file", "docs/some.file"}
    assert (copy / "docs" / "some.file").read_text() == "docs"
    assert [path.name for path in (only_one / "new").iterdir()] == ["copy"]


def test_all_that_was_published_is_copied(tmp_path: Path) -> None:
    for name in bundle_names():
        published = {"model.pt", "model.json", "training_images.csv", "spread_calibration.json"}
        models = REPOSITORY / "bundles" / name / "models"
        # By name and place: a checkout that was trained in holds more.
        there = {
            f"models/{path.relative_to(models).as_posix()}"
            for path in [*models.glob("*"), *models.glob("certified/*")]
            if path.name in published
        }
        assert {part for part in contents(copy_bundle(name, tmp_path / name)) if part.startswith("models/")} == there


def test_copy_into_an_empty_folder(only_one: Path) -> None:
    (only_one / "empty").mkdir()
    assert "LICENSE" in contents(copy_bundle("one", only_one / "empty"))


def test_copy_touches_nothing_that_is_there(only_one: Path) -> None:
    (only_one / "taken").mkdir()
    (only_one / "taken" / "mine").write_text("mine")
    (only_one / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="already holds files"):
        copy_bundle("one", only_one / "taken")
    with pytest.raises(NotADirectoryError, match="it is a file"):
        copy_bundle("one", only_one / "file")
    assert contents(only_one / "taken") == {"mine"}


def test_unknown_names_list_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lung_xray_kanunet_segmentation.*Did you mean 'brain_mri_deq_recon"):
        copy_bundle("brain_mri_reconstruction", tmp_path / "new")
    assert not (tmp_path / "new").exists()
