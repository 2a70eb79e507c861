import importlib

import pytest
import torch

from monai_deqkan.operators import (
    NUFFTOperator,
    golden_angle_trajectory,
    radial_trajectory,
    smooth_coil_maps,
    spiral_trajectory,
)
from monai_deqkan.testing import check_operator
from monai_deqkan.variational import cg_sense

pytest.importorskip("finufft")

SIZES = [(8, 10), (7, 9), (4, 5, 6)]


def randn(*shape, dtype=torch.complex128, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def trajectory(size, batch=None):
    spokes = golden_angle_trajectory(size, 6, 12)
    return spokes if batch is None else torch.stack([spokes.roll(b, dims=1) * (1 - 0.1 * b) for b in range(batch)])


def waves(points, size):
    """The explicit sum: e^{-2 pi i sum_d k_d r_d / n_d} as a matrix of points and pixels."""
    axes = [(torch.arange(n, dtype=torch.float64) - n // 2) / n for n in size]
    pixels = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, len(size))
    return torch.exp(-2j * torch.pi * (points.reshape(-1, len(size)) @ pixels.T))


@pytest.mark.parametrize("size", SIZES)
def test_operator_is_the_explicit_sum_within_its_tolerance(size):
    k, maps, x = trajectory(size), randn(1, 3, *size), randn(2, *size, seed=1)
    density = k.norm(dim=-1) + 0.1
    plain = (maps * x.unsqueeze(1)).reshape(2, 3, -1) @ waves(k, size).T
    expected = plain.reshape(2, 3, 6, 12) * density.sqrt()
    for tolerance in (1e-4, 1e-10):
        operator = NUFFTOperator(k, size, maps, density=density, tolerance=tolerance)
        y = operator(x)
        scale = (y.norm() / expected.norm()).item()
        assert (y / scale - expected).norm() < 10 * tolerance * expected.norm()
        torch.testing.assert_close(operator.weigh(plain.reshape(2, 3, 6, 12)), y, rtol=1e-2, atol=10 * tolerance)


@pytest.mark.parametrize("size", SIZES)
def test_norm_is_at_most_one_and_close_to_it(size):
    maps = smooth_coil_maps(size, 4, generator=torch.Generator().manual_seed(0)).to(torch.complex128)
    for density in (None, trajectory(size).norm(dim=-1)):
        operator = NUFFTOperator(trajectory(size), size, density=density)
        basis = torch.eye(len(randn(*size).flatten()), dtype=torch.complex128).reshape(-1, *size)
        norm = torch.linalg.matrix_norm(operator(basis).reshape(len(basis), -1).T, 2)
        assert 0.97 < norm <= 1
        with_coils = NUFFTOperator(trajectory(size), size, maps[None], density=density)
        norm = torch.linalg.matrix_norm(with_coils(basis).reshape(len(basis), -1).T, 2)
        assert norm <= with_coils.norm_bound[0] <= 1 + 1e-6


@pytest.mark.parametrize("size", SIZES)
def test_operator_conforms(size):
    maps = randn(3, 4, *size)
    per_sample = NUFFTOperator(trajectory(size, 3), size, maps, density=trajectory(size, 3).norm(dim=-1))
    check_operator(lambda dtype: per_sample, (3, *size))
    shared = NUFFTOperator(trajectory(size), size, randn(1, 2, 4, *size))
    check_operator(lambda dtype: shared, (3, 2, *size))
    check_operator(lambda dtype: NUFFTOperator(trajectory(size), size), (3, *size))


def test_twice_differentiable():
    operator = NUFFTOperator(golden_angle_trajectory((3, 4), 2, 4), (3, 4), randn(1, 2, 3, 4))
    x = randn(1, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(operator, x)
    assert torch.autograd.gradgradcheck(lambda x: operator(x).abs().square().sum(), x)


def test_cg_sense_recovers_the_image_from_radial_and_spiral_data():
    size = (24, 24)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 24), torch.linspace(-1, 1, 24), indexing="ij")
    image = ((x**2 + y**2 < 0.6) * (1 + 0.5 * torch.cos(5 * x + 3 * y))).double().unsqueeze(0)
    maps = smooth_coil_maps(size, 6, generator=torch.Generator().manual_seed(0)).unsqueeze(0)
    for k in (radial_trajectory(size, 18), golden_angle_trajectory(size, 18), spiral_trajectory(size, 6, 150)):
        coils = (maps * image.unsqueeze(1)).to(torch.complex128).reshape(6, -1)
        measured = (coils @ waves(k, size).T).reshape(1, 6, *k.shape[:2])
        operator = NUFFTOperator(k, size, maps, density=k.norm(dim=-1))
        got = cg_sense(operator.weigh(measured), operator=operator, max_iter=30, l2_weight=1e-6)
        # The corners of k-space are not measured.
        assert (got.abs() - image).norm() < 0.08 * image.norm()


def test_bad_input_is_refused(monkeypatch):
    k, size = trajectory((8, 8)), (8, 8)
    with pytest.raises(ValueError, match="cycles per field of view"):
        NUFFTOperator(2 * k, size)
    with pytest.raises(ValueError, match="`trajectory` must be real, of shape"):
        NUFFTOperator(k[..., :1], size)
    with pytest.raises(ValueError, match="finite"):
        NUFFTOperator(k * torch.nan, size)
    with pytest.raises(ValueError, match="density"):
        NUFFTOperator(k, size, density=-k.norm(dim=-1))
    operator = NUFFTOperator(k, size, randn(1, 3, 8, 8))
    with pytest.raises(ValueError, match="k-space of shape"):
        operator.adjoint(randn(1, 2, 6, 12))
    with pytest.raises(ValueError, match="finite"):
        operator.weigh(randn(1, 3, 6, 12) * torch.nan)
    with pytest.raises(ValueError, match="do not fit"):
        operator(randn(1, 7, 8))
    with pytest.raises(ValueError, match="images of size"):
        NUFFTOperator(k, size)(randn(1, 7, 8))
    with pytest.raises(ValueError, match="trajectories of 3 samples"):
        NUFFTOperator(trajectory(size, 3), size)(randn(2, 8, 8))

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"monai-deqkan\[nufft\]"):
        NUFFTOperator(k, size)
