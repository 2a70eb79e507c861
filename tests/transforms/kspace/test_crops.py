import h5py
import numpy as np
import pytest
import torch

from monai_deqkan.operators import FourierOperator
from monai_deqkan.transforms import CropCoilImagesd, CropKspace, CropKspaced


def waves(height, width, frequencies):
    """An image of complex waves of whole cycles per field of view, sampled at index n // 2 = 0."""
    y = (torch.arange(height) - height // 2) / height
    x = (torch.arange(width) - width // 2) / width
    total = sum(torch.exp(2j * torch.pi * (u * y[:, None] + v * x[None])) for u, v in frequencies)
    return total.to(torch.complex64)[None]


@pytest.mark.parametrize("size", [(12, 10), (13, 9), (-1, 8), (11, -1), (40, 40)])
def test_crop_of_kspace_keeps_low_waves_on_larger_pixels_and_drops_high_ones(size):
    height, width = 24, 21
    low, high = [(0, 0), (2, -1), (-3, 3)], [(9, 0), (0, 8)]
    fourier = FourierOperator(2)
    wanted = [n if s == -1 else min(s, n) for s, n in zip(size, (height, width), strict=True)]
    kept = [(u, v) for u, v in low + high if abs(u) < wanted[0] / 2 and abs(v) < wanted[1] / 2]
    got = fourier.adjoint(CropKspace(size)(fourier(waves(height, width, low + high))))
    torch.testing.assert_close(got, waves(*wanted, kept), rtol=1e-4, atol=1e-4)


def test_dictionary_form_tells_how_much_pixels_grew():
    kspace = torch.randn(2, 12, 10, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    item = CropKspaced(spatial_size=(6, -1))({"kspace": kspace})
    assert torch.equal(item["kspace"], CropKspace((6, -1))(kspace))
    assert item["pixel_scale"] == [2.0, 1.0]


def test_field_of_view_of_the_scanner_s_image(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["reconstruction_rss"] = np.zeros((1, 6, 20))
    kspace = torch.randn(2, 12, 10, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    item = CropCoilImagesd(spatial_size="recon")({"kspace": kspace, "source": str(tmp_path / "a.h5")})
    fourier = FourierOperator(2)
    torch.testing.assert_close(fourier.adjoint(item["kspace"]), fourier.adjoint(kspace)[:, 3:9])
    with pytest.raises(KeyError, match="source"):
        CropCoilImagesd(spatial_size="recon")({"kspace": kspace})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda k: CropKspace((4,))(k), "does not fit"),
        (lambda k: CropKspace((4, 0)), "at least 1"),
        (lambda k: CropKspace((4, 4))(k.real), "complex"),
        (lambda k: CropCoilImagesd(spatial_size="reconstruction"), "'recon'"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 8, 8, dtype=torch.complex64))
