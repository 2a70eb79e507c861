"""The fastMRI package's own functions agree with ours and open our files."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from monai_deqkan.data import write_kspace
from monai_deqkan.metrics import nmse, psnr, ssim
from monai_deqkan.operators import FourierOperator, simulate_kspace, smooth_coil_maps

fastmri = pytest.importorskip("fastmri")
fastmri_data = pytest.importorskip("fastmri.data")
fastmri_evaluate = pytest.importorskip("fastmri.evaluate")


def random_volume(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a reference and a prediction ``(slices, 1, H, W)`` whose slices differ in brightness."""
    generator = torch.Generator().manual_seed(seed)
    reference = torch.rand(3, 1, 20, 17, generator=generator) * torch.tensor([1.0, 3.0, 0.2]).view(3, 1, 1, 1)
    return reference, reference + 0.1 * torch.randn(reference.shape, generator=generator)


@pytest.mark.parametrize(("ours", "theirs"), [(nmse, "nmse"), (psnr, "psnr"), (ssim, "ssim")])
def test_metrics_of_each_slice_agree(ours, theirs: str) -> None:
    reference, prediction = random_volume()
    # A volume of one slice: on more, fastMRI takes one maximum for all slices, and we each slice's own.
    expected = [
        float(np.squeeze(getattr(fastmri_evaluate, theirs)(r.double().numpy(), p.double().numpy())))
        for r, p in zip(reference, prediction, strict=True)
    ]
    np.testing.assert_allclose(ours(prediction, reference).numpy(), expected, rtol=2e-5)


@pytest.mark.parametrize("shape", [(2, 6, 8), (2, 5, 8), (1, 7, 9)])
def test_fourier_transforms_agree(shape: tuple[int, ...]) -> None:
    image = torch.randn(shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    pairs = torch.view_as_real(image)
    fourier = FourierOperator(2)
    torch.testing.assert_close(torch.view_as_real(fourier(image)), fastmri.fft2c(pairs))
    torch.testing.assert_close(torch.view_as_real(fourier.adjoint(image)), fastmri.ifft2c(pairs))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    reference, _ = random_volume()
    generator = torch.Generator().manual_seed(1)
    kspace = simulate_kspace(reference[:, 0], smooth_coil_maps((20, 17), 4, generator=generator), generator=generator)
    write_kspace(tmp_path / "multicoil_val" / "volume.h5", kspace)
    return tmp_path / "multicoil_val"


def test_slice_dataset_opens_our_files(folder: Path) -> None:
    with h5py.File(folder / "volume.h5") as file:
        kspace, reference = file["kspace"][()], file["reconstruction_rss"][()]

    dataset = fastmri_data.SliceDataset(root=folder, challenge="multicoil")
    assert len(dataset) == 3
    for index, (slice_kspace, mask, target, attributes, name, number) in enumerate(dataset):
        np.testing.assert_array_equal(slice_kspace, kspace[index])
        np.testing.assert_array_equal(target, reference[index])
        assert (mask, name, number) == (None, "volume.h5", index)
        assert attributes["max"] == pytest.approx(reference.max())
        assert attributes["encoding_size"] == attributes["recon_size"] == (20, 17, 1)
        assert (attributes["padding_left"], attributes["padding_right"]) == (0, 17)


def test_our_reference_is_their_root_sum_of_squares(folder: Path) -> None:
    with h5py.File(folder / "volume.h5") as file:
        kspace, reference = torch.from_numpy(file["kspace"][()]), torch.from_numpy(file["reconstruction_rss"][()])
    images = fastmri.ifft2c(torch.view_as_real(kspace))
    torch.testing.assert_close(reference, fastmri.rss_complex(images, dim=1))
