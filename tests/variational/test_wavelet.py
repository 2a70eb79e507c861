import pytest
import torch

from monai_deqkan.operators import MRIOperator, random_mask, simulate_kspace, smooth_coil_maps
from monai_deqkan.variational import inverse_wavelet_transform, wavelet_sense, wavelet_transform


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(space=(24, 20), batch=2):
    maps = smooth_coil_maps(space, 3, generator=seeded()).to(torch.complex128)
    image = torch.rand(batch, *space, generator=seeded(), dtype=torch.float64)
    image = image.cumsum(-1).cumsum(-2) / image[0].numel()
    mask = torch.stack([random_mask(space[-1], 2.0, 0.2, generator=seeded(i)) for i in range(batch)])
    mask = mask.reshape(batch, 1, *[1] * (len(space) - 1), -1)
    operator = MRIOperator(mask, maps[None], spatial_dims=len(space))
    return simulate_kspace(image, maps, snr_db=25, generator=seeded()) * mask, operator


@pytest.mark.parametrize(("space", "levels"), [((16, 24), 3), ((4, 8), 2), ((4, 8, 12), 2)])
def test_transform_is_orthonormal(space, levels):
    n = torch.Size(space).numel()
    identity = torch.eye(n, dtype=torch.float64).reshape(n, *space)
    matrix = wavelet_transform(identity, levels, len(space)).reshape(n, n)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    back = inverse_wavelet_transform(matrix.reshape(n, *space), levels, len(space))
    torch.testing.assert_close(back, identity, rtol=0, atol=1e-12)
    z = torch.complex(identity[:2], identity[1:3])
    torch.testing.assert_close(wavelet_transform(z, levels, len(space)).imag, matrix[1:3].reshape(2, *space))


def test_four_moments_vanish():
    position = torch.arange(64, dtype=torch.float64)
    for power in range(5):
        details = wavelet_transform((position / 64)[None] ** power, 1, 1)[0, 32:]
        # The last three windows wrap around.
        inner = float(details[:-3].abs().max())
        assert (inner < 1e-12) == (power < 4)


@pytest.mark.parametrize("space", [(24, 20), (17, 19), (6, 10, 9)])
def test_solution_satisfies_the_optimality_condition_and_the_long_solve(space):
    kspace, operator = problem(space)
    weight = 0.01
    solution = wavelet_sense(kspace, operator=operator, weight=weight, levels=1, rtol=1e-4)
    long = wavelet_sense(kspace, operator=operator, weight=weight, levels=1, rtol=1e-9, max_iter=20000)
    assert bool(solution.converged.all())
    assert bool(long.converged.all())
    assert float((solution.objective / long.objective - 1).abs().max()) < 1e-3
    assert float((solution.image - long.image).norm()) < 2e-2 * float(long.image.norm())
    # Subgradient: details of A^H (y - A x), in the extended image, are at most the weight where x has none.
    dims, pads = len(space), [n for size in reversed(space) for n in (0, size % 2)]
    scale = operator.adjoint(kspace).abs().flatten(1).amax(1).reshape(-1, *[1] * dims)
    pull = torch.nn.functional.pad(operator.adjoint(kspace) - operator.normal(long.image), pads)
    dual = wavelet_transform(pull, 1, dims) / (weight * scale)
    assert float(dual.abs().max()) < 1 + 1e-5
    coarse = dual[(slice(None), *(slice(0, (size + 1) // 2) for size in space))]
    assert float(coarse.abs().max()) < 1e-5


def test_unit_of_kspace_does_not_matter_and_samples_are_independent():
    kspace, operator = problem()
    weight = torch.tensor([2e-3, 2e-2], dtype=torch.float64)
    together = wavelet_sense(kspace, operator=operator, weight=weight, rtol=1e-6)
    scaled = wavelet_sense(1e-5 * kspace, operator=operator, weight=weight, rtol=1e-6)
    torch.testing.assert_close(scaled.image, 1e-5 * together.image, rtol=1e-6, atol=1e-12)
    for b in range(2):
        rows = torch.tensor([b])
        alone = wavelet_sense(kspace[rows], operator=operator.take(rows), weight=float(weight[b]), rtol=1e-6)
        torch.testing.assert_close(alone.image[0], together.image[b])
        assert int(alone.stats.evaluations) == int(together.stats.evaluations[b])


def test_norm_is_measured_where_the_operator_does_not_tell_it():
    kspace, operator = problem(batch=1)
    # A composed operator has no `norm_bound`.
    composed = operator.H.H @ MRIOperator(torch.ones(1, 1, 1, 20)).H @ MRIOperator(torch.ones(1, 1, 1, 20))
    assert not hasattr(composed, "norm_bound")
    expected = wavelet_sense(kspace, operator=operator, rtol=1e-6, max_iter=2000)
    found = wavelet_sense(kspace, operator=composed, rtol=1e-6, max_iter=2000)
    torch.testing.assert_close(found.image, expected.image, rtol=0, atol=1e-4)


def test_random_shifts_repeat_and_never_count_as_converged():
    kspace, operator = problem()
    runs = [
        wavelet_sense(kspace, operator=operator, random_shifts=3, max_iter=30, on_failure="ignore") for _ in range(2)
    ]
    torch.testing.assert_close(runs[0].image, runs[1].image)
    assert not runs[0].converged.any()
    assert runs[0].stats.evaluations.tolist() == [30, 30]


def test_edges_of_use():
    kspace, operator = problem()
    silent = wavelet_sense(0 * kspace, operator=operator)
    assert bool(silent.converged.all())
    assert not silent.image.any()
    assert not wavelet_sense(kspace, operator=operator, max_iter=0, on_failure="ignore").converged.any()
    for call, message in (
        (lambda: wavelet_transform(torch.ones(1, 10, 8), 2, 2), "multiple of 4"),
        (lambda: wavelet_sense(kspace, operator=operator, levels=0), "levels"),
        (lambda: wavelet_sense(kspace, operator=operator, on_failure="quiet"), "on_failure"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
