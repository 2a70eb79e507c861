import h5py
import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from monai_deqkan.data import kspace_items, simulate_kspace_folder
from monai_deqkan.operators import FourierOperator
from monai_deqkan.transforms import read_kspace_header


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    for part in ("train", "val"):
        (folder / part).mkdir(parents=True)
    picture = rng.integers(0, 255, (20, 14), dtype=np.uint8)
    Image.fromarray(picture).save(folder / "train" / "a.png")
    volume = rng.random((10, 12, 4)).astype(np.float32)
    nib.save(nib.Nifti1Image(volume, np.diag([0.5, 0.75, 3.0, 1.0])), folder / "val" / "v.nii.gz")
    nib.save(nib.Nifti1Image(volume - 1, np.eye(4)), folder / "val" / "negative.nii.gz")
    return folder, picture, volume


def rss(path):
    with h5py.File(path) as file:
        coils = FourierOperator(2).adjoint(torch.as_tensor(file["kspace"][:]))
    return coils.abs().square().sum(1).sqrt().numpy()


def test_pictures_and_volumes_become_files_that_say_what_they_are(images, tmp_path, caplog):
    folder, picture, volume = images
    out = tmp_path / "kspace"
    written = simulate_kspace_folder(folder, out, num_coils=4, snr_db=None, progress=False)
    assert [path.relative_to(out).as_posix() for path in written] == ["train/a.h5", "val/v.h5"]
    assert "negative.nii.gz" in caplog.text
    assert "1 of 3 images" in caplog.text
    # Rows run down the picture; a volume's first axis is x, from left to right.
    np.testing.assert_allclose(rss(written[0])[0], picture, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(rss(written[1]), volume.transpose(2, 1, 0), rtol=1e-4, atol=1e-5)
    for path in written:
        with h5py.File(path) as file:
            assert bool(file.attrs["simulated"])
            assert file.attrs["acquisition"] == "simulated"
    assert read_kspace_header(written[0]).pixel_size(20, 14) is None
    assert read_kspace_header(written[1]).pixel_size(12, 10) == pytest.approx((0.75, 0.5, 3.0))
    assert "not for clinical use" in (out / "README.md").read_text()
    assert len(kspace_items(out, "val")) == 4


def test_noise_has_its_ratio_and_comes_from_the_seed(images, tmp_path):
    clean, noisy, again, other = (
        simulate_kspace_folder(images[0] / "train", tmp_path / name, snr_db=snr, seed=seed, progress=False)[0]
        for name, snr, seed in (("a", None, 0), ("b", 20, 0), ("c", 20, 0), ("d", 20, 1))
    )
    data = []
    for path in (clean, noisy, again, other):
        with h5py.File(path) as file:
            data.append(file["kspace"][:])
    noise = data[1] - data[0]
    ratio = 10 * np.log10((np.abs(data[0]) ** 2).sum() / (np.abs(noise) ** 2).sum())
    assert ratio == pytest.approx(20, abs=0.3)
    np.testing.assert_array_equal(data[1], data[2])
    assert not np.allclose(data[1], data[3])


def test_nothing_is_overwritten_and_nothing_usable_is_an_error(images, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match="already holds files"):
        simulate_kspace_folder(images[0], tmp_path / "full", progress=False)
    with pytest.raises(ValueError, match="None of the 3 images"):
        simulate_kspace_folder(images[0], tmp_path / "none", slices="9", progress=False)
