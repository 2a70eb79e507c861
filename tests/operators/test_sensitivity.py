import pytest
import torch

from monai_deqkan.operators import (
    FourierOperator,
    espirit_maps,
    estimate_sensitivity_maps,
    low_frequency_images,
    random_mask,
    simulate_kspace,
    smooth_coil_maps,
    smooth_phase,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def phantom(*space):
    grid = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in space), indexing="ij")
    radius = sum(axis**2 for axis in grid)
    return ((radius < 0.7).float() * (1 + 0.5 * torch.cos(7 * grid[-1]))).unsqueeze(0)


def coherence(maps, truth, inside):
    """|<S, S_true>| per pixel: one where the maps agree up to a common phase."""
    return (maps.conj() * truth).sum(1).abs()[inside]


@pytest.mark.parametrize("space", [(64, 60), (61, 63), (24, 28, 26)])
def test_maps_agree_with_the_simulated_ones_up_to_phase(space):
    truth = smooth_coil_maps(space, 8, generator=seeded())
    image = phantom(*space)
    phase = smooth_phase(space, generator=seeded())
    kspace = simulate_kspace(image, truth, phase=phase, snr_db=40, generator=seeded())
    mask = random_mask(space[-1], 2, 0.3, generator=seeded()).reshape(1, 1, *[1] * (len(space) - 1), -1)
    maps = estimate_sensitivity_maps(kspace * mask, mask, spatial_dims=len(space))
    assert coherence(maps, truth[None], image > 0).mean() > 0.99
    assert torch.all(maps.abs().square().sum(1) <= 1 + 1e-6)
    torch.testing.assert_close(maps.abs().square().sum(1)[image > 0], torch.ones(int((image > 0).sum())))
    # Found from k-space alone, the same maps.
    torch.testing.assert_close(estimate_sensitivity_maps(kspace * mask, spatial_dims=len(space)), maps)


def test_only_the_centre_counts_and_more_lines_give_better_maps():
    truth = smooth_coil_maps((64, 64), 8, generator=seeded())
    image = phantom(64, 64)
    kspace = simulate_kspace(image, truth)
    outside = torch.ones(64)
    outside[26:38] = 0
    changed = kspace * (1 + 3 * outside)
    expected = estimate_sensitivity_maps(kspace, num_center_lines=12)
    torch.testing.assert_close(estimate_sensitivity_maps(changed, num_center_lines=12), expected)
    few, more = (estimate_sensitivity_maps(kspace, num_center_lines=n) for n in (4, 24))
    inside = image > 0
    assert coherence(few, truth[None], inside).mean() < coherence(more, truth[None], inside).mean()


def test_block_found_from_a_mask_is_the_given_number_of_lines():
    kspace = torch.randn(2, 3, 32, 33, dtype=torch.complex128, generator=seeded())
    mask = torch.zeros(2, 1, 1, 33)
    mask[0, ..., 16 - 4 : 16 + 4] = 1
    mask[1, ..., 16 - 3 : 16 + 4] = 1
    mask[..., 0] = 1
    maps = estimate_sensitivity_maps(kspace * mask, mask)
    for row, lines in enumerate((8, 7)):
        expected = estimate_sensitivity_maps(kspace[row : row + 1], num_center_lines=lines)
        torch.testing.assert_close(maps[row : row + 1], expected)
    assert not torch.allclose(
        estimate_sensitivity_maps(kspace, max_center_lines=8), estimate_sensitivity_maps(kspace, max_center_lines=16)
    )


def test_maps_do_not_depend_on_scale_batch_mates_or_masked_pixels():
    kspace = torch.randn(3, 4, 16, 16, dtype=torch.complex128, generator=seeded())
    maps = estimate_sensitivity_maps(kspace)
    torch.testing.assert_close(estimate_sensitivity_maps(kspace[1:2]), maps[1:2])
    torch.testing.assert_close(estimate_sensitivity_maps(1e-9 * kspace), maps)


def test_single_coil_is_one_and_zero_kspace_is_finite():
    kspace = torch.randn(2, 1, 8, 8, dtype=torch.complex64, generator=seeded())
    assert torch.equal(estimate_sensitivity_maps(kspace), torch.ones_like(kspace))
    kspace = torch.zeros(2, 4, 8, 8, dtype=torch.complex64)
    kspace[0] = torch.randn(4, 8, 8, dtype=torch.complex64, generator=seeded())
    maps = estimate_sensitivity_maps(kspace.requires_grad_(), torch.ones(1, 1, 1, 8))
    assert torch.equal(maps[1], torch.zeros_like(maps[1]))
    maps.abs().sum().backward()
    assert bool(torch.isfinite(kspace.grad).all())


def test_combination_with_own_maps_keeps_the_root_sum_of_squares():
    image = phantom(48, 48)
    kspace = simulate_kspace(image, smooth_coil_maps((48, 48), 6, generator=seeded()))
    coils = FourierOperator(2).adjoint(kspace)
    combined = (estimate_sensitivity_maps(kspace).conj() * coils).sum(1).abs()
    assert ((combined - image).abs()[image > 0]).mean() < 0.01


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda k: estimate_sensitivity_maps(k, torch.ones(1, 8)), "`mask` must have shape"),
        (lambda k: estimate_sensitivity_maps(k[0]), "spatial axes"),
        (lambda k: estimate_sensitivity_maps(k, num_center_lines=0), "num_center_lines"),
        (lambda k: estimate_sensitivity_maps(k, torch.arange(8).reshape(1, 1, 1, 8) < 2), "zero frequency"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(2, 3, 8, 8, dtype=torch.complex64, generator=seeded()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("estimate", [estimate_sensitivity_maps, espirit_maps, low_frequency_images])
def test_kspace_that_is_not_finite_is_refused(estimate, bad):
    kspace = torch.randn(2, 3, 8, 8, dtype=torch.complex64, generator=seeded())
    kspace[1, 0, 4, 4] = bad
    with pytest.raises(ValueError, match="1 of 384 values are NaN or infinite"):
        estimate(kspace)
