import pytest
import torch

from monai_deqkan.operators import infer_mask, net_acceleration, random_mask


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_infer_mask_finds_the_lines_of_each_sample():
    mask = torch.stack([random_mask(12, 2, 0.1, generator=seeded(seed)) for seed in range(3)])[:, None, None]
    kspace = torch.randn(3, 2, 5, 12, dtype=torch.complex64, generator=seeded())
    assert torch.equal(infer_mask(kspace * mask), mask)
    assert bool(infer_mask(kspace).all())
    # One sample that happens to be zero does not make its line unmeasured.
    kspace[:, 0, 3, :] = 0
    assert torch.equal(infer_mask(kspace * mask), mask)


def test_infer_mask_finds_both_phase_encodings_in_3d():
    mask = torch.rand(2, 1, 1, 6, 7, generator=seeded()) > 0.5
    kspace = torch.randn(2, 3, 4, 6, 7, dtype=torch.complex64, generator=seeded())
    assert torch.equal(infer_mask(kspace * mask, spatial_dims=3), mask)


def test_infer_mask_refuses_empty_and_misshapen_kspace():
    kspace = torch.zeros(2, 1, 4, 4, dtype=torch.complex64)
    kspace[0] = 1
    with pytest.raises(ValueError, match=r"samples \[1\]"):
        infer_mask(kspace)
    with pytest.raises(ValueError, match="coil axis"):
        infer_mask(kspace[:, 0])
    with pytest.raises(ValueError, match="at least one"):
        net_acceleration(torch.zeros(3))
