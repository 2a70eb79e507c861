import pytest
import torch

from monai_deqkan.operators import equispaced_mask, infer_mask, net_acceleration, random_mask

MASKS = [random_mask, equispaced_mask]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("function", MASKS)
@pytest.mark.parametrize("num_lines", [168, 161, 320])
@pytest.mark.parametrize(("acceleration", "center_fraction"), [(1, 0.1), (2, 0.5), (4, 0.08), (8, 0.04), (3.3, 0.1)])
def test_masks_hit_the_net_acceleration_and_hold_the_centre(function, num_lines, acceleration, center_fraction):
    mask = function(num_lines, acceleration, center_fraction, generator=seeded())
    assert int(mask.sum()) == round(num_lines / acceleration)
    assert net_acceleration(mask) == pytest.approx(acceleration, rel=0.02)
    num_center = round(num_lines * center_fraction)
    start = num_lines // 2 - num_center // 2
    assert bool(mask[start : start + num_center].all())


@pytest.mark.parametrize("function", MASKS)
def test_masks_follow_the_generator(function):
    first, again, other = (function(160, 4, 0.08, generator=seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_equispaced_lines_are_evenly_spaced_and_random_ones_are_not():
    outer = equispaced_mask(320, 4, 0.08, generator=seeded()).nonzero().flatten()
    gaps = outer.diff()
    left = gaps[outer[:-1] < 320 // 2 - 14]
    assert int(left.max() - left.min()) <= 1
    assert int(left.min()) >= 5
    random_gaps = random_mask(320, 4, 0.08, generator=seeded()).nonzero().flatten().diff()
    assert int(random_gaps.max()) > int(gaps.max())


def test_every_outer_line_can_be_drawn():
    for function in MASKS:
        total = sum(function(40, 4, 0.1, generator=seeded(seed)).long() for seed in range(200))
        assert int(total.min()) > 0
        assert int((total == 200).sum()) == 4


@pytest.mark.parametrize("function", MASKS)
def test_an_impossible_mask_is_refused(function):
    with pytest.raises(ValueError, match="Lower one of the two"):
        function(100, 8, 0.2)
    with pytest.raises(ValueError, match="acceleration"):
        function(100, 0.5, 0.2)


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
