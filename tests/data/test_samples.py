import hashlib
import itertools
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from monai_deqkan.data import SAMPLES, samples, tissue_volumes, write_sample

SLICED = tuple(samples._SLABS)


@pytest.fixture
def few_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    slabs = {"train": ((20, 22), (33, 33)), "val": ((-3, -2),), "test": ((50, 52),)}
    monkeypatch.setattr(samples, "_SLABS", dict.fromkeys(SLICED, slabs))
    monkeypatch.setattr(samples, "_LESION_PICTURES", {"train": 4, "val": 2, "test": 2})
    monkeypatch.setattr(tissue_volumes, "_COUNTS", {"train": 4, "val": 2, "test": 2})
    monkeypatch.setattr(tissue_volumes, "_SIZES", ((36, 40),) * 3)


def hashes(folder: Path) -> dict[str, str]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.usefixtures("few_slices")
@pytest.mark.parametrize("name", SAMPLES)
def test_two_runs_write_the_same_files_and_no_two_pictures_are_equal(tmp_path: Path, name: str) -> None:
    first, second = (hashes(write_sample(name, tmp_path / run)) for run in ("first", "second"))
    assert first == second
    data = [value for file, value in first.items() if "masks" not in file]
    assert len(set(data)) == len(data) > 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]
    text = (tmp_path / "first" / "README.md").read_text(encoding="utf-8")
    assert all(words in text for words in ("**Real:**", "**Simulated:**", "Not for clinical use", "152 people"))


@pytest.mark.parametrize("name", SLICED)
def test_parts_are_at_least_ten_millimetres_apart(name: str) -> None:
    positions = {part: np.array(samples._positions(name, part)) for part in ("train", "val", "test")}
    for first, second in itertools.combinations(positions.values(), 2):
        assert np.abs(first[:, None] - second).min() >= 10
    assert len(positions["train"]) > len(positions["test"])


@pytest.mark.usefixtures("few_slices")
def test_lesion_pictures_are_balanced_and_stay_in_their_slab(tmp_path: Path) -> None:
    folder = write_sample("brain_lesion", tmp_path / "sample")
    for part in ("train", "val", "test"):
        counts = []
        for name in ("lesion", "no_lesion"):
            files = list((folder / part / name).iterdir())
            assert {int(file.name[1:4]) for file in files} == set(samples._positions("brain_lesion", part))
            counts.append(len(files))
        assert counts[0] == counts[1]


@pytest.mark.usefixtures("few_slices")
def test_lesions_have_the_stated_size_place_and_contrast() -> None:
    rng = np.random.default_rng(0)
    template = samples._load_template("brain_lesion")[50]
    places = samples._lesion_places(template)
    angles = np.linspace(0, 2 * np.pi, 361)
    for _ in range(200):
        lesion = samples._draw_lesion(rng, places)
        widths = lesion.outline(angles) + lesion.outline(angles + np.pi)
        assert 6 <= widths.min() <= widths.max() <= 25
        row, column = (round(value) for value in lesion.center)
        assert template.brain[row, column] > 0
        darker = template.t1 - samples._insert(template, lesion)
        assert darker.min() >= 0
        assert 0.05 <= darker.max() / template.white_level <= 0.30
        inside = lesion.profile(template.t1.shape) > 0.5
        assert 6 <= 2 * np.sqrt(inside.sum() / np.pi) <= 25
        assert inside[row, column]


@pytest.mark.usefixtures("few_slices")
def test_tissue_masks_hold_four_values_in_order_of_brightness(tmp_path: Path) -> None:
    folder = write_sample("brain_tissue", tmp_path / "sample")
    for part in ("train", "val", "test"):
        images = sorted((folder / part / "images").iterdir())
        masks = sorted((folder / part / "masks").iterdir())
        assert [file.name for file in images] == [file.name for file in masks]
        pixels = np.stack([np.asarray(Image.open(file)) for file in images])
        labels = np.stack([np.asarray(Image.open(file)) for file in masks])
        assert np.unique(labels).tolist() == [0, 85, 170, 255]
        means = [pixels[labels == value].mean() for value in (0, 85, 170, 255)]
        assert means == sorted(means)
        assert means[3] > 1.15 * means[2] > 1.3 * means[1]


@pytest.mark.usefixtures("few_slices")
def test_kspace_is_that_of_the_slices_at_30_db(tmp_path: Path) -> None:
    folder = write_sample("brain_kspace", tmp_path / "sample")
    slices = samples._load_template("brain_kspace")
    with h5py.File(folder / "test" / "brain_00.h5") as file:
        kspace, reference = file["kspace"][:], file["reconstruction_rss"][:]
    assert kspace.dtype == np.complex64
    assert kspace.shape == (1, 8, *samples._SHAPE)
    # numpy's FFT as the independent transform
    axes = (-2, -1)
    images = np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(kspace, axes=axes), norm="ortho"), axes=axes)
    rss = np.sqrt((np.abs(images) ** 2).sum(1))
    np.testing.assert_allclose(reference, rss, rtol=1e-4, atol=1e-6)
    truth = samples._to_picture(slices[50].t1, samples._still(flipped=False))
    brain = truth > 0.2
    assert np.linalg.norm((rss[0] - truth)[brain]) / np.linalg.norm(truth[brain]) < 0.03
    # Outside of the brain there is only noise: 30 dB below the mean power of k-space.
    corner = (np.abs(images[0, :, :6, :6]) ** 2).mean()
    assert 10 * np.log10((np.abs(kspace) ** 2).mean() / corner) == pytest.approx(30, abs=0.6)


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="already holds files"):
        write_sample("brain_lesion", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_unknown_sample_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"brain_lesion, brain_tissue, .*brain_kspace.*Did you mean 'brain_tissue'"):
        write_sample("brain_tisue", tmp_path / "sample")
    assert not (tmp_path / "sample").exists()


@pytest.mark.usefixtures("few_slices")
def test_a_failed_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> None:
        (folder / "half.png").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setitem(samples._WRITERS, "brain_tissue", fail)
    with pytest.raises(KeyboardInterrupt):
        write_sample("brain_tissue", tmp_path / "sample")
    assert list(tmp_path.iterdir()) == []
