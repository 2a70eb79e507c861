import numpy as np
import pytest
import torch

from monai_deqkan.operators import drop_lines, estimate_noise_level, random_mask, simulate_kspace, smooth_coil_maps


def noise(shape, seed=0):
    return torch.randn(shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(seed))


def blob(height, width):
    y, x = np.mgrid[:height, :width]
    square = (y - height / 2) ** 2 + (x - width / 2) ** 2
    return torch.as_tensor(np.exp(-square / (0.2 * width) ** 2), dtype=torch.complex128)[None]


@pytest.mark.parametrize("masked", [False, True])
def test_noise_level_of_a_smooth_image_per_coil(masked):
    maps = smooth_coil_maps((96, 80), 3, generator=torch.Generator().manual_seed(0)).to(torch.complex128)
    levels = torch.tensor([[0.01, 0.02, 0.05], [0.03, 0.01, 0.02]], dtype=torch.float64)
    # torch's complex noise has E|n|^2 = 1, so 1 / sqrt(2) in each part.
    kspace = simulate_kspace(blob(96, 80).expand(2, -1, -1), maps)
    kspace = kspace + 2**0.5 * levels[..., None, None] * noise(kspace.shape)
    mask = random_mask(80, 2, 0.16, generator=torch.Generator().manual_seed(1)).view(1, 1, 1, -1) if masked else None
    data = kspace if mask is None else kspace * mask
    torch.testing.assert_close(estimate_noise_level(data, mask), levels, rtol=0.1, atol=0)
    torch.testing.assert_close(estimate_noise_level(data), levels, rtol=0.1, atol=0)  # zeros are no samples


def test_noise_level_leaves_padding_out_and_a_silent_coil_has_none():
    kspace = noise((1, 2, 64, 48))
    kspace[..., :8, :] = 0
    kspace[:, 1] = 0
    found = estimate_noise_level(kspace)
    assert float(found[0, 0]) == pytest.approx(0.5**0.5, rel=0.1)
    assert float(found[0, 1]) == 0


def test_noise_level_of_a_volume():
    assert float(estimate_noise_level(noise((1, 1, 16, 20, 24)), spatial_dims=3)) == pytest.approx(0.5**0.5, rel=0.1)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_dropped_lines_are_measured_ones_outside_the_centre(share):
    mask = random_mask(60, 2, 0.2, generator=torch.Generator().manual_seed(0)).view(1, 1, 1, -1)
    kspace = noise((3, 2, 8, 60)) * mask
    kept = drop_lines(kspace, mask, share, generator=torch.Generator().manual_seed(1))
    assert kept.shape == (3, 1, 1, 60)
    assert not (kept & ~mask).any()
    center = slice(60 // 2 - 5, 60 // 2 + 6)  # 12 lines from 24 to 35; the largest symmetric block has 11
    assert bool(kept[..., center].all())
    run = mask.flatten().tolist()
    low = high = 30
    while run[low - 1]:
        low -= 1
    while run[high + 1]:
        high += 1
    reach = min(30 - low, high - 30)
    outside = [i for i in range(60) if run[i] and abs(i - 30) > reach]
    # An even block has one line more on its left, which is protected with it.
    candidates = {len(outside), len(outside) - 1}
    for sample in kept:
        assert int(mask.sum()) - int(sample.sum()) in {round(share * count) for count in candidates}
    if share:
        assert not torch.equal(kept[0], kept[1])


def test_dropping_from_a_mask_in_a_plane_leaves_the_other_axes_alone():
    mask = torch.ones(1, 1, 1, 12, 10, dtype=torch.bool)
    mask[..., 0, :] = False
    kept = drop_lines(noise((2, 1, 4, 12, 10)), mask, 0.9, spatial_dims=3)
    assert kept.shape == (2, 1, 1, 12, 10)
    assert not kept[..., 0, :].any()
    assert bool(kept[..., 6, 5].all())


@pytest.mark.parametrize("share", [1.0, -0.1])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match="drop_share"):
        drop_lines(noise((1, 1, 4, 8)), None, share)


def test_dropped_lines_of_a_transposed_mask():
    mask = (torch.arange(20) % 2 == 0).view(1, 1, -1, 1).repeat(1, 1, 1, 16)
    mask[..., 8:13, :] = True
    across = mask.transpose(2, 3)  # dense, not contiguous
    found = [
        drop_lines(noise((2, 1, 16, 20)), given, 0.5, generator=torch.Generator().manual_seed(0))
        for given in (across, across.contiguous())
    ]
    assert torch.equal(*found)
    assert not bool((found[0] & ~across).any())
    assert int(found[0].sum()) < 2 * int(mask.sum())
