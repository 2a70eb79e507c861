import math

import pytest
import torch

from monai_deqkan.operators import (
    FourierOperator,
    add_complex_noise,
    simulate_kspace,
    smooth_coil_maps,
    smooth_phase,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("space", [(32, 24), (31, 33), (12, 14, 16)])
@pytest.mark.parametrize("num_coils", [1, 8])
def test_coil_maps_are_normalized_smooth_and_deterministic(space, num_coils):
    maps = smooth_coil_maps(space, num_coils, generator=seeded())
    torch.testing.assert_close(maps.abs().square().sum(0), torch.ones(space))
    for axis in range(1, len(space) + 1):
        assert maps.diff(dim=axis).abs().max() < 6 / space[axis - 1]
    assert torch.equal(maps, smooth_coil_maps(space, num_coils, generator=seeded()))
    assert not torch.equal(maps, smooth_coil_maps(space, num_coils, generator=seeded(1)))


def test_coils_see_different_sides():
    maps = smooth_coil_maps((33, 33), 8, generator=seeded())
    brightest = maps.abs().flatten(1).argmax(dim=1)
    assert len(set(brightest.tolist())) == 8
    matrix = maps.flatten(1) / maps.flatten(1).norm(dim=1, keepdim=True)
    assert torch.linalg.cond(matrix) < 100


@pytest.mark.parametrize("space", [(16, 20), (6, 7, 8)])
def test_phase_has_the_given_extent_and_is_quadratic(space):
    phase = smooth_phase(space, 1.2, generator=seeded())
    assert float(phase.abs().max()) == pytest.approx(1.2, rel=1e-5)
    for axis in range(len(space)):
        assert float(phase.diff(n=3, dim=axis).abs().max()) < 1e-5


def test_noise_has_the_given_power_per_sample_and_equal_parts():
    kspace = torch.ones(2, 4, 64, 64, dtype=torch.complex128) * torch.tensor([1.0, 100.0]).reshape(2, 1, 1, 1)
    noise = add_complex_noise(kspace, 20, generator=seeded()) - kspace
    power = noise.abs().square().mean((1, 2, 3))
    torch.testing.assert_close(power, torch.tensor([1e-2, 1e2], dtype=torch.float64), rtol=0.03, atol=0)
    torch.testing.assert_close(
        noise.real.std() / noise.imag.std(), torch.ones((), dtype=torch.float64), rtol=0.05, atol=0
    )


def test_noise_of_each_sample_has_its_own_ratio_and_repeats():
    kspace = torch.randn(3, 2, 64, 64, dtype=torch.complex128, generator=seeded())
    snr = torch.tensor([0.0, 10.0, 30.0])
    noisy = add_complex_noise(kspace, snr, generator=seeded(1))
    power = (noisy - kspace).abs().square().mean((1, 2, 3)) / kspace.abs().square().mean((1, 2, 3))
    torch.testing.assert_close(power, torch.tensor([1.0, 0.1, 0.001]).double(), rtol=0.05, atol=0)
    assert torch.equal(noisy, add_complex_noise(kspace, snr, generator=seeded(1)))
    torch.testing.assert_close(noisy[:1], add_complex_noise(kspace, 0.0, generator=seeded(1))[:1])
    with pytest.raises(ValueError, match="one per sample"):
        add_complex_noise(kspace, snr[:2])
    with pytest.raises(ValueError, match="finite"):
        add_complex_noise(kspace, snr * torch.nan)


def test_simulated_kspace_gives_the_image_back():
    image = torch.rand(2, 12, 15, generator=seeded())
    maps = smooth_coil_maps((12, 15), 5, generator=seeded())
    phase = smooth_phase((12, 15), math.pi / 3, generator=seeded())
    coils = FourierOperator(2).adjoint(simulate_kspace(image, maps, phase=phase))
    combined = (maps.conj() * coils).sum(1)
    torch.testing.assert_close(combined.abs(), image, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(combined.angle(), phase.expand(2, -1, -1), rtol=1e-3, atol=1e-4)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="spatial_dims"):
        smooth_coil_maps((4,))
    with pytest.raises(ValueError, match="do not fit"):
        simulate_kspace(torch.ones(1, 4, 4), smooth_coil_maps((5, 5)))
    with pytest.raises(TypeError, match="complex"):
        add_complex_noise(torch.ones(1, 1, 4, 4), 30)
