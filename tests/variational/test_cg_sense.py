import pytest
import torch
from scipy.sparse.linalg import LinearOperator as ScipyOperator
from scipy.sparse.linalg import cg

from monai_deqkan.operators import (
    FourierOperator,
    MRIOperator,
    combine_map_sets,
    equispaced_mask,
    simulate_kspace,
    smooth_coil_maps,
    smooth_phase,
)
from monai_deqkan.variational import cg_sense, cg_sense_path


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(space=(12, 14), acceleration=2.0, snr_db=None):
    maps = smooth_coil_maps(space, 6, generator=seeded()).to(torch.complex128)
    image = torch.rand(2, *space, generator=seeded(), dtype=torch.float64)
    phase = smooth_phase(space, 1.0, generator=seeded()).double()
    mask = torch.stack([equispaced_mask(space[-1], acceleration, 0.2, generator=seeded(i)) for i in range(2)])
    mask = mask.reshape(2, 1, *[1] * (len(space) - 1), -1)
    kspace = simulate_kspace(image, maps, phase=phase, snr_db=snr_db, generator=seeded()) * mask
    return kspace, mask, maps[None], image


@pytest.mark.parametrize(("space", "l2_weight"), [((12, 14), 0.0), ((11, 13), 0.1), ((4, 5, 8), 0.05)])
def test_solution_is_that_of_the_dense_equation(space, l2_weight):
    kspace, mask, maps, _ = problem(space)
    x = cg_sense(kspace, mask, maps, l2_weight=l2_weight, max_iter=400, rtol=1e-12)
    n = x[0].numel()
    for b in range(2):
        operator = MRIOperator(mask[b : b + 1], maps, spatial_dims=len(space))
        matrix = operator(torch.eye(n, dtype=torch.complex128).reshape(n, *space)).reshape(n, -1).T
        equation = matrix.mH @ matrix + l2_weight * torch.eye(n)
        expected = torch.linalg.solve(equation, matrix.mH @ kspace[b].flatten())
        torch.testing.assert_close(x[b].flatten(), expected, rtol=1e-6, atol=1e-7)


def test_soft_sense_recovers_an_object_that_wraps_around():
    """Two map sets: the field of view is half of the object, whose far half folds onto the near one."""
    maps = smooth_coil_maps((16, 32), 8, generator=seeded()).to(torch.complex128)
    image = torch.rand(1, 16, 32, generator=seeded(), dtype=torch.float64)
    sets = torch.stack([maps[..., :16], maps[..., 16:]]).unsqueeze(0)  # (1, 2, 8, 16, 16)
    parts = torch.stack([image[..., :16], image[..., 16:]], dim=1)
    folded = (sets * parts.unsqueeze(2)).sum(1)
    mask = equispaced_mask(16, 1.5, 0.25, generator=seeded()).reshape(1, 1, 1, -1)
    kspace = FourierOperator(2)(folded) * mask
    x = cg_sense(kspace, mask, sets, max_iter=400, rtol=1e-12)
    torch.testing.assert_close(x.abs(), parts, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(combine_map_sets(x).abs(), parts.square().sum(1).sqrt(), rtol=1e-4, atol=1e-4)
    one_set = cg_sense(kspace, mask, sets[:, 0], max_iter=100)
    assert (one_set.abs() - parts[:, 0]).norm() > 0.2 * parts[:, 0].norm()


def test_path_is_scipys_path_and_ends_in_the_solution():
    kspace, mask, maps, _ = problem()
    operator = MRIOperator(mask, maps)
    path = list(cg_sense_path(kspace, mask, maps, l2_weight=0.01, max_iter=8))
    single = operator.take(torch.tensor([1]))
    shape = path[0][1:].shape

    def normal(vector):
        x = torch.from_numpy(vector).reshape(shape)
        return (single.normal(x) + 0.01 * x).flatten().numpy()

    iterates = []
    b = single.adjoint(kspace[1:]).flatten().numpy()
    cg(
        ScipyOperator((b.size, b.size), normal, dtype=b.dtype),
        b,
        rtol=0,
        maxiter=8,
        callback=lambda x: iterates.append(x.copy()),
    )
    for got, expected in zip(path, iterates, strict=True):
        torch.testing.assert_close(got[1].flatten(), torch.from_numpy(expected), rtol=1e-8, atol=1e-10)
    long = list(cg_sense_path(kspace, mask, maps, l2_weight=0.01, max_iter=200))[-1]
    torch.testing.assert_close(cg_sense(kspace, operator=operator, l2_weight=0.01, max_iter=200, rtol=1e-10), long)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_path_stays_at_the_solution_while_other_samples_go_on(dtype):
    """A sample that only one coil sees is solved in one step; rounding then grew to 10^8 times the image."""
    kspace, mask, maps, _ = problem((16, 18))
    maps = maps.repeat(2, 1, 1, 1)
    maps[0] = 0
    maps[0, 0] = 1
    kspace[0, 0] = kspace[0].sum(0)
    kspace[0, 1:] = 0
    operator = MRIOperator(mask, maps.to(dtype))
    path = list(cg_sense_path(kspace.to(dtype), operator=operator, max_iter=8))
    solution = operator.adjoint(kspace.to(dtype))[0]
    for image in path:
        assert (image[0] - solution).norm() <= 10 * torch.finfo(dtype).eps * solution.norm()
    alone = cg_sense_path(kspace[1:].to(dtype), operator=operator.take(torch.tensor([1])), max_iter=8)
    for got, expected in zip(path, alone, strict=True):
        torch.testing.assert_close(got[1:], expected)
    assert (path[-1][1] - path[-2][1]).norm() > 1e-5 * path[-1][1].norm()


def test_one_sample_alone_equals_it_in_a_batch():
    kspace, mask, maps, _ = problem(snr_db=30)
    together = cg_sense(kspace, mask, maps)
    torch.testing.assert_close(cg_sense(kspace[1:], mask[1:], maps), together[1:])


def test_noisy_path_has_a_best_iterate_that_beats_zero_filling():
    y, x = torch.meshgrid(torch.linspace(-1, 1, 48), torch.linspace(-1, 1, 48), indexing="ij")
    image = ((x**2 + y**2 < 0.6) * (1 + 0.5 * torch.cos(9 * x + 4 * y))).unsqueeze(0)
    maps = smooth_coil_maps((48, 48), 6, generator=seeded())
    mask = equispaced_mask(48, 3, 0.12, generator=seeded()).reshape(1, 1, 1, -1)
    kspace = simulate_kspace(image, maps, snr_db=20, generator=seeded()) * mask
    errors = [float((x.abs() - image).norm()) for x in cg_sense_path(kspace, mask, maps[None], max_iter=30)]
    zero_filled = float((MRIOperator(mask, maps[None]).adjoint(kspace).abs() - image).norm())
    best = min(range(30), key=errors.__getitem__)
    assert errors[best] < 0.7 * zero_filled
    assert 0 < best < 15
    assert errors[-1] > 1.5 * errors[best]


def test_mask_and_maps_are_found_where_not_given():
    kspace, mask, _, _ = problem((32, 32))
    expected = cg_sense(kspace, operator=MRIOperator.from_kspace(kspace, mask))
    torch.testing.assert_close(cg_sense(kspace), expected)


def test_bad_input_is_refused():
    kspace, mask, maps, _ = problem()
    with pytest.raises(ValueError, match="either"):
        cg_sense(kspace, mask, operator=MRIOperator(mask, maps))
    with pytest.raises(ValueError, match="finite"):
        cg_sense(kspace * torch.nan, operator=MRIOperator(mask, maps))
    with pytest.raises(ValueError, match="l2_weight"):
        cg_sense(kspace, mask, maps, l2_weight=-1.0)
    with pytest.raises(TypeError, match="kspace"):
        cg_sense(None)
