import pytest
import torch

from monai_deqkan.solvers import jacobian_frobenius_norm, jacobian_norm, spectral_radius

DTYPES = [torch.float64, torch.complex128]


def matrices(dtype):
    return torch.randn(3, 6, 6, dtype=dtype, generator=torch.Generator().manual_seed(0))


def mapped(z, M):
    return torch.einsum("bij,bj->bi", M, z)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_maps(dtype):
    M = matrices(dtype)
    z = torch.zeros(3, 6, dtype=dtype)
    radius = torch.linalg.eigvals(M).abs().amax(1)
    norm = torch.linalg.matrix_norm(M, 2)
    assert torch.allclose(spectral_radius(mapped, z, M, num_iter=400), radius, rtol=0.03)
    assert torch.allclose(jacobian_norm(mapped, z, M, num_iter=150), norm, rtol=1e-6)
    assert torch.allclose(jacobian_frobenius_norm(mapped, z, M, num_probes=300), torch.linalg.matrix_norm(M), rtol=0.1)


def test_the_point_matters_and_samples_are_apart():
    z = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    slope = 1 - torch.tanh(z[:, 0]) ** 2
    assert torch.allclose(jacobian_norm(torch.tanh, z), slope)
    assert torch.allclose(spectral_radius(torch.tanh, z), slope)
    assert torch.allclose(jacobian_frobenius_norm(torch.tanh, z, num_probes=400), slope * 2**0.5, rtol=0.15)


def test_a_tuple_state_is_one_vector():
    # Blocks [[0, a], [b, 0]]: radius sqrt(a b), norm max(a, b), Frobenius norm 2 sqrt(a^2 + b^2), on 4 entries each.
    z = (torch.zeros(1, 4, dtype=torch.float64), torch.zeros(1, 2, 2, dtype=torch.float64))

    def f(z):
        return 0.5 * z[1].flatten(1), 2.0 * z[0].view(-1, 2, 2)

    assert float(spectral_radius(f, z, num_iter=40)) == pytest.approx(1.0, rel=0.05)
    assert float(jacobian_norm(f, z, num_iter=40)) == pytest.approx(2.0)
    assert float(jacobian_frobenius_norm(f, z, num_probes=300)) == pytest.approx(17**0.5, rel=0.1)


def test_jacobian_norm_grows_from_below_and_nilpotent_maps_have_radius_zero():
    M = matrices(torch.float64)
    estimates = [jacobian_norm(mapped, torch.zeros(3, 6, dtype=torch.float64), M, num_iter=n) for n in (1, 3, 10)]
    assert bool((estimates[0] < estimates[1]).all() and (estimates[1] < estimates[2]).all())
    nilpotent = torch.diag(torch.ones(3, dtype=torch.float64), 1)
    assert float(spectral_radius(lambda z: z @ nilpotent, torch.zeros(1, 4, dtype=torch.float64))) == 0.0
    assert float(spectral_radius(torch.ones_like, torch.zeros(1, 4))) == 0.0


def test_results_repeat_and_follow_the_generator():
    M, z = matrices(torch.float64), torch.zeros(3, 6, dtype=torch.float64)
    one, same = (jacobian_frobenius_norm(mapped, z, M) for _ in range(2))
    other = jacobian_frobenius_norm(mapped, z, M, generator=torch.Generator().manual_seed(1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_wrong_counts():
    z = torch.zeros(1, 2)
    for function, setting in ((spectral_radius, "num_iter"), (jacobian_norm, "num_iter")):
        with pytest.raises(ValueError, match=setting):
            function(torch.tanh, z, num_iter=0)
    with pytest.raises(ValueError, match="num_probes"):
        jacobian_frobenius_norm(torch.tanh, z, num_probes=0)
    with pytest.raises(TypeError):
        spectral_radius(torch.tanh, z, steps=3)
