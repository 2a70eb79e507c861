import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist

from monai_deqkan.operators import (
    MASKS,
    equispaced_mask,
    gaussian_mask,
    gaussian_plane_mask,
    net_acceleration,
    poisson_disc_mask,
    pseudo_radial_mask,
    random_mask,
)

LINES = [random_mask, equispaced_mask, gaussian_mask]
PLANES = [gaussian_plane_mask, poisson_disc_mask, pseudo_radial_mask]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("function", LINES)
@pytest.mark.parametrize("num_lines", [168, 161, 320])
@pytest.mark.parametrize(("acceleration", "center_fraction"), [(1, 0.1), (2, 0.5), (4, 0.08), (8, 0.04), (3.3, 0.1)])
def test_masks_hit_the_net_acceleration_and_hold_the_centre(function, num_lines, acceleration, center_fraction):
    mask = function(num_lines, acceleration, center_fraction, generator=seeded())
    assert int(mask.sum()) == round(num_lines / acceleration)
    assert net_acceleration(mask) == pytest.approx(acceleration, rel=0.02)
    num_center = round(num_lines * center_fraction)
    start = num_lines // 2 - num_center // 2
    assert bool(mask[start : start + num_center].all())


@pytest.mark.parametrize("function", LINES)
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
    for function in LINES:
        total = sum(function(40, 4, 0.1, generator=seeded(seed)).long() for seed in range(200))
        assert int(total.min()) > 0
        assert int((total == 200).sum()) == 4


@pytest.mark.parametrize("function", LINES)
def test_an_impossible_mask_is_refused(function):
    with pytest.raises(ValueError, match="Lower one of the two"):
        function(100, 8, 0.2)
    with pytest.raises(ValueError, match="acceleration"):
        function(100, 0.5, 0.2)


@pytest.mark.parametrize("function", PLANES)
@pytest.mark.parametrize("space", [(48, 40), (41, 53)])
@pytest.mark.parametrize(("acceleration", "center_fraction"), [(1, 0.1), (1.5, 0.2), (4, 0.1), (10, 0.04)])
def test_plane_masks_hit_the_net_acceleration_and_hold_the_centre(function, space, acceleration, center_fraction):
    mask = function(space, acceleration, center_fraction, generator=seeded())
    assert net_acceleration(mask) == pytest.approx(acceleration, rel=0.005)
    (h, w), (ch, cw) = space, (max(round(n * center_fraction), 1) for n in space)
    top, left = h // 2 - ch // 2, w // 2 - cw // 2
    assert bool(mask[top : top + ch, left : left + cw].all())
    assert torch.equal(mask, function(space, acceleration, center_fraction, generator=seeded()))
    if acceleration > 1:
        assert not torch.equal(mask, function(space, acceleration, center_fraction, generator=seeded(1)))


def test_every_name_makes_a_mask_that_broadcasts_to_kspace():
    kspace = torch.ones(2, 5, 12, 14)
    for name, function in MASKS.items():
        flat = function((12, 14), 2, 0.2, generator=seeded())
        assert (kspace[0, 0] * flat).count_nonzero() == round(168 / 2)
        volume = function(kspace.shape[1:], 2, 0.2, generator=seeded())
        assert volume.ndim == 3
        assert volume.shape[0] == 1
        # The readout comes first, as in fastMRI: a line mask is the same along every axis but the last.
        assert flat.shape == ((12, 14) if function in PLANES else (1, 14)), name
        assert torch.equal(volume.reshape(flat.shape), flat)


def test_gaussian_masks_have_the_weights_of_draws_without_replacement():
    """The first draw of many, from a mask of one line beside the centre, has the Gaussian's frequencies."""
    counts = sum(gaussian_mask(21, 21 / 2, 0.04, width=0.15, generator=seeded(s)).double() for s in range(1500))
    counts[10] = 0
    expected = np.exp(-0.5 * ((np.arange(21) - 10) / (0.15 * 21)) ** 2)
    expected[10] = 0
    np.testing.assert_allclose(counts / 1500, expected / expected.sum(), atol=0.03)


def test_gaussian_plane_is_denser_inside_and_wider_with_width():
    y, x = torch.meshgrid(torch.arange(64) - 32, torch.arange(64) - 32, indexing="ij")
    radius = (x**2 + y**2).double().sqrt()
    narrow, wide = (
        radius[gaussian_plane_mask((64, 64), 8, 0.04, width=w, generator=seeded())].mean() for w in (0.1, 0.3)
    )
    assert narrow < wide < radius.mean()


@pytest.mark.parametrize("slope", [0.0, 2.0])
def test_poisson_disc_points_keep_their_distance(slope):
    mask = poisson_disc_mask((64, 64), 8, 0.02, slope=slope, generator=seeded()).numpy()
    mask[32, 32] = False
    points = np.argwhere(mask) - 32.0
    rho = np.linalg.norm(points / 32, axis=1)
    spacing = 1 + slope * rho
    pairs = np.stack(np.triu_indices(len(points), 1))
    least = np.minimum(spacing[pairs[0]], spacing[pairs[1]])
    ratio = (pdist(points) / least).min()
    # Random points of the same number come next to each other somewhere.
    assert ratio >= (2.0 if slope == 0 else 0.7)
    uniform = poisson_disc_mask((64, 64), 8, 0.02, slope=0.0, generator=seeded())
    inside = np.s_[16:48, 16:48]
    if slope > 0:
        assert mask[inside].sum() > 1.5 * int(uniform[inside].sum())


def test_pseudo_radial_points_lie_on_golden_angle_spokes():
    mask = pseudo_radial_mask((65, 65), 12, 0.01, generator=seeded())
    start = float(torch.rand((), generator=seeded(), dtype=torch.float64)) * np.pi
    num_spokes = 10
    angles = start + np.arange(num_spokes) * np.pi * (np.sqrt(5) - 1) / 2
    points = mask.nonzero().double().numpy() - 32
    offset = np.abs(points[:, :1] * np.cos(angles) - points[:, 1:] * np.sin(angles)).min(axis=1)
    assert offset.max() < 0.75


@pytest.mark.parametrize("function", PLANES)
def test_an_impossible_plane_mask_is_refused(function):
    with pytest.raises(ValueError, match="Lower one of the two"):
        function((20, 20), 8, 0.5)
    with pytest.raises(ValueError, match="two axes are phase encodings"):
        function(20)
    with pytest.raises(ValueError, match="acceleration"):
        function((20, 20), 0.5)


def test_fastmri_places_the_same_centre_and_meets_less_acceleration():
    subsample = pytest.importorskip("fastmri.data.subsample")
    theirs, num_center = subsample.EquispacedMaskFractionFunc([0.08], [4])((1, 320, 320, 2), seed=0)
    theirs = theirs.flatten() != 0
    ours = equispaced_mask((320, 320), 4, 0.08, generator=seeded())[0]
    both = ours & theirs
    start = (320 - num_center + 1) // 2
    assert num_center == round(320 * 0.08)
    assert bool(both[start : start + num_center].all())
    random = subsample.RandomMaskFunc([0.08], [4])((1, 320, 320, 2), seed=1)[0].flatten() != 0
    center = slice(start, start + num_center)
    assert bool(random[center].all())
    assert net_acceleration(ours) == 4
