from pathlib import Path

import numpy as np
import pytest
import torch

from monai_deqkan.operators import (
    FourierOperator,
    espirit_maps,
    estimate_sensitivity_maps,
    random_mask,
    simulate_kspace,
    smooth_coil_maps,
    smooth_phase,
)

REFERENCE = Path(__file__).parents[1] / "reference" / "espirit_sigpy.npz"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def phantom(*space):
    grid = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in space), indexing="ij")
    return ((sum(axis**2 for axis in grid) < 0.7).float() * (1 + 0.5 * torch.cos(7 * grid[-1]))).unsqueeze(0)


def test_agrees_with_sigpy_up_to_phase():
    stored = np.load(REFERENCE)
    maps = espirit_maps(torch.from_numpy(stored["kspace"])[None])[0]
    agreement = (maps.conj() * torch.from_numpy(stored["maps"])).sum(0).abs()
    # Its power iteration is slow where the second eigenvalue is near the first, outside of the object.
    inside = phantom(36, 33)[0] > 0
    assert agreement[inside].min() > 1 - 1e-5
    cropped = espirit_maps(torch.from_numpy(stored["kspace"])[None], crop=0.95)[0].abs().square().sum(0)
    eigenvalue = torch.from_numpy(stored["eigenvalue"][0])
    clear = (eigenvalue - 0.95).abs() > 0.005
    torch.testing.assert_close(cropped[clear], (eigenvalue > 0.95).float()[clear])


@pytest.mark.parametrize("space", [(64, 60), (18, 20, 22)])
def test_maps_agree_with_the_simulated_ones_and_beat_the_low_frequencies(space):
    truth = smooth_coil_maps(space, 6, generator=seeded())
    image = phantom(*space)
    phase = smooth_phase(space, generator=seeded())
    kspace = simulate_kspace(image, truth, phase=phase, snr_db=40, generator=seeded())
    mask = random_mask(space[-1], 3, 0.3, generator=seeded()).reshape(1, 1, *[1] * (len(space) - 1), -1)
    maps = espirit_maps(kspace * mask, mask, spatial_dims=len(space))
    rough = estimate_sensitivity_maps(kspace * mask, mask, spatial_dims=len(space))
    inside = image > 0
    missed, missed_by_rough = (1 - (s.conj() * truth).sum(1).abs()[inside].mean() for s in (maps, rough))
    assert missed < 0.003
    assert missed < 0.7 * missed_by_rough
    torch.testing.assert_close(maps.abs().square().sum(1), torch.ones(1, *space))
    # The phase is that of the low-frequency maps, whose product with themselves is real.
    turn = torch.angle((maps.conj() * rough).sum(1))
    torch.testing.assert_close(turn, torch.zeros_like(turn), atol=1e-4, rtol=0)


def test_matrices_of_pixels_equal_the_sum_over_kernels():
    """One set of every coil spans everything: the eigenvectors must diagonalize the plain definition."""
    kspace = simulate_kspace(phantom(20, 18), smooth_coil_maps((20, 18), 3, generator=seeded())).to(torch.complex128)
    maps = espirit_maps(kspace, num_sets=3, kernel_size=4, max_center_lines=12)[0].to(torch.complex128)
    center = kspace[0, :, 4:16, 3:15]
    rows = torch.stack([center[:, i : i + 4, j : j + 4].flatten() for i in range(9) for j in range(9)])
    _, values, vectors = torch.linalg.svd(rows / center.abs().max(), full_matrices=False)
    gram = torch.zeros(20, 18, 3, 3, dtype=torch.complex128)
    for kernel in vectors[values > 0.02 * values[0]].reshape(-1, 3, 4, 4):
        padded = torch.zeros(3, 20, 18, dtype=torch.complex128)
        padded[:, 8:12, 7:11] = kernel
        image = FourierOperator(2).adjoint(padded) * (20 * 18) ** 0.5 / 4
        gram += torch.einsum("kyx,lyx->yxkl", image, image.conj())
    rotated = torch.einsum("mkyx,yxkl,nlyx->yxmn", maps.conj(), gram, maps)
    values = rotated.diagonal(dim1=-2, dim2=-1).real
    torch.testing.assert_close(rotated, torch.diag_embed(values).to(rotated.dtype), atol=1e-5, rtol=0)
    assert torch.all(values[..., :-1] >= values[..., 1:] - 1e-5)
    torch.testing.assert_close(values.sum(-1), gram.diagonal(dim1=-2, dim2=-1).real.sum(-1), atol=1e-5, rtol=0)


def test_two_sets_hold_a_folded_field_of_view():
    """An object larger than the field of view: its coil images lie in the span of two sets, not of one."""
    truth = smooth_coil_maps((48, 64), 8, generator=seeded())
    coils = truth * phantom(48, 64)
    folded = coils[..., 16:48].clone()
    folded[..., 16:] += coils[..., :16]
    folded[..., :16] += coils[..., 48:]
    kspace = FourierOperator(2)(folded)[None]

    def share_left_out(maps):  # (M, K, *space), orthonormal at each pixel
        combined = (maps.conj() * folded).sum(1, keepdim=True)
        return float((folded - (maps * combined).sum(0)).abs().square().sum() / folded.abs().square().sum())

    one = espirit_maps(kspace, threshold=0.01)[0][None]
    two = espirit_maps(kspace, num_sets=2, crop=0.8, threshold=0.01)[0]
    assert share_left_out(two) < 0.2 * share_left_out(one)
    powers = two.abs().square().sum(1)
    torch.testing.assert_close(two[0], one[0] * powers[0].round(), atol=1e-4, rtol=0)
    assert torch.all((powers < 1e-6) | ((powers - 1).abs() < 1e-5))
    # The sides are folded, the middle is not.
    assert powers[1][20:28, 15:17].max() < 1e-6 < 0.9 < powers[1][20:28, 8:11].min()
    assert torch.all(espirit_maps(kspace, num_sets=2, crop=1.0).abs().square().sum(2) < 1 + 1e-5)


def test_maps_depend_on_the_centre_alone_and_not_on_scale_or_batch_mates():
    kspace = simulate_kspace(phantom(32, 33).expand(2, -1, -1), smooth_coil_maps((32, 33), 4, generator=seeded()))
    kspace = kspace + 0.01 * torch.randn(kspace.shape, dtype=torch.complex64, generator=seeded())
    mask = torch.zeros(2, 1, 1, 33)
    mask[0, ..., 12:20] = 1
    mask[1, ..., 10:23] = 1
    mask[..., 0] = 1
    maps = espirit_maps(kspace * mask, mask)
    for row in range(2):
        own = slice(row, row + 1)
        torch.testing.assert_close(espirit_maps(kspace[own] * mask[own], mask[own]), maps[own])
    changed = kspace * mask
    changed[..., 0] *= 50
    torch.testing.assert_close(espirit_maps(changed, mask), maps)
    torch.testing.assert_close(espirit_maps(1e-6 * kspace * mask, mask), maps, atol=1e-3, rtol=0)
    assert espirit_maps(kspace.to(torch.complex128)).dtype == torch.complex128


def test_a_centre_that_is_no_block_is_narrowed_to_one():
    space = (20, 24, 24)
    kspace = simulate_kspace(phantom(*space), smooth_coil_maps(space, 4, generator=seeded()))
    cross = torch.zeros(1, 1, 1, 24, 24)
    cross[..., 7:17, 7:17] = 1
    cross[..., 12, :] = 1
    cross[..., :, 12] = 1
    square = torch.zeros_like(cross)
    square[..., 7:17, 7:17] = 1
    maps, expected = (espirit_maps(kspace * mask, mask, spatial_dims=3) for mask in (cross, square))
    # Same block, so the same directions; phases come from windows of different widths.
    torch.testing.assert_close((maps.conj() * expected).sum(1).abs(), torch.ones(1, *space))


def test_single_coil_is_one_and_zero_kspace_is_zero():
    kspace = torch.randn(2, 1, 8, 8, dtype=torch.complex64, generator=seeded())
    assert torch.equal(espirit_maps(kspace), torch.ones_like(kspace))
    zeros = torch.zeros(1, 4, 8, 8, dtype=torch.complex64)
    assert torch.equal(espirit_maps(zeros, torch.ones(1, 1, 1, 8), num_sets=2), torch.zeros(1, 2, 4, 8, 8) + 0j)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_sets": 4}, "at most the number of coils, 3"),
        ({"threshold": 0.0}, "`threshold`"),
        ({"crop": 1.5}, "`crop`"),
        ({"kernel_size": 0}, "`kernel_size`"),
        ({"mask": torch.arange(8).reshape(1, 1, 1, 8) < 2}, "zero frequency"),
        ({"mask": torch.ones(1, 8)}, "`mask` must have shape"),
        ({"spatial_dims": 3}, "3 spatial axes"),
    ],
)
def test_bad_input_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        espirit_maps(torch.randn(2, 3, 8, 8, dtype=torch.complex64, generator=seeded()), **settings)
