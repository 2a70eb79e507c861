import pytest
import torch

from monai_deqkan.solvers import LINEAR_SOLVERS, GMRESSolver, SolveStatus, solve_linear

DOUBLE = torch.float64


def matrices(count, size, dtype, seed=0, spread=0.8):
    noise = torch.randn(count, size, size, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return torch.eye(size, dtype=dtype) + spread * noise / size**0.5


def vectors(count, size, dtype):
    return torch.randn(count, size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def product(A):
    return lambda x: torch.einsum("bij,bj->bi", A, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.float32, torch.complex64])
def test_agrees_with_a_direct_solve_with_and_without_restart(dtype):
    A, b = matrices(3, 24, dtype), vectors(3, 24, dtype)
    double = dtype in (torch.float64, torch.complex128)
    for size in (10, 60):
        solver = GMRESSolver(rtol=1e-10 if double else 1e-5, max_iter=400, history_size=size)
        solution = solve_linear(product(A), b, solver)
        assert bool(solution.converged.all())
        residual = (product(A)(solution.z) - b).norm(dim=1) / b.norm(dim=1)
        assert bool((residual <= 2 * solver.rtol).all())
        assert torch.allclose(solution.z, torch.linalg.solve(A, b), rtol=0, atol=1e-8 if double else 1e-3)


def test_exact_in_as_many_applications_as_distinct_eigenvalues():
    diagonal = torch.tensor([1.0, -1.0, 2.0, 2.0, 5.0], dtype=DOUBLE)
    solution = solve_linear(lambda x: diagonal * x, torch.ones(1, 5, dtype=DOUBLE), GMRESSolver(rtol=1e-12))
    assert int(solution.stats.evaluations) == 4
    assert torch.allclose(solution.z, 1 / diagonal[None], rtol=1e-12)


def test_a_short_history_costs_applications_not_accuracy():
    A, b = matrices(2, 40, DOUBLE), vectors(2, 40, DOUBLE)
    long, short = (
        solve_linear(product(A), b, GMRESSolver(rtol=1e-8, history_size=m, max_iter=500)).stats.evaluations
        for m in (40, 5)
    )
    assert bool((long <= 40).all())
    assert bool((short > long).all())


def test_rotation_and_singular_matrices():
    # A rotation by 90 degrees makes no progress in its first step; a singular system has a solution or not.
    rotation = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=DOUBLE)
    b = torch.tensor([[1.0, 2.0]], dtype=DOUBLE)
    solution = solve_linear(lambda x: x @ rotation.T, b, GMRESSolver())
    assert solution.stats.evaluations.tolist() == [2]
    assert torch.allclose(solution.z, torch.tensor([[2.0, -1.0]], dtype=DOUBLE))

    diagonal = torch.tensor([1.0, 0.0, 2.0], dtype=DOUBLE)
    b = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]], dtype=DOUBLE)
    solution = solve_linear(lambda x: diagonal * x, b, GMRESSolver(on_failure="ignore"))
    assert solution.stats.status.tolist() == [SolveStatus.CONVERGED, SolveStatus.MAX_ITER]
    assert torch.allclose(solution.z[0], torch.tensor([1.0, 0.0, 0.5], dtype=DOUBLE))
    assert float(solution.stats.residual[1]) == pytest.approx((1 / 3) ** 0.5)  # the least there is


@pytest.mark.parametrize("name", LINEAR_SOLVERS.names())
def test_zero_right_hand_side_and_nan_leave_other_samples_alone(name):
    A = matrices(4, 8, DOUBLE)
    A = A @ A.mT
    b = vectors(4, 8, DOUBLE)
    solver = LINEAR_SOLVERS.build(name, rtol=1e-10, on_failure="ignore")
    clean = solve_linear(product(A), b, solver)
    bad = b.clone()
    bad[0], bad[1] = 0.0, float("nan")
    solution = solve_linear(product(A), bad, solver)
    assert solution.stats.status.tolist() == [0, SolveStatus.NON_FINITE, 0, 0]
    assert torch.equal(solution.z[0], torch.zeros(8, dtype=DOUBLE))
    assert bool(solution.z.isfinite().all())
    assert torch.allclose(solution.z[2:], clean.z[2:], rtol=0, atol=1e-12)
    assert torch.allclose(solution.z[2:], torch.linalg.solve(A, b)[2:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", LINEAR_SOLVERS.names())
def test_limit_is_kept_and_a_solution_is_recognized(name):
    A, b = matrices(1, 30, DOUBLE), vectors(1, 30, DOUBLE)
    A = A @ A.mT
    for limit in (0, 1, 2):
        calls = []

        def apply(x, calls=calls):
            calls.append(1)
            return product(A)(x)

        solver = LINEAR_SOLVERS.build(name, rtol=0.0, max_iter=limit, on_failure="ignore")
        solution = solve_linear(apply, b, solver)
        assert len(calls) == limit == int(solution.stats.evaluations)
        assert float(solution.stats.residual) <= float(b.norm() / 30**0.5)
    start = torch.linalg.solve(A, b)
    solution = solve_linear(product(A), b, LINEAR_SOLVERS.build(name), x0=start)
    assert solution.stats.evaluations.tolist() == [1]
    assert torch.equal(solution.z, start)


@pytest.mark.parametrize("name", LINEAR_SOLVERS.names())
def test_settings_are_checked(name):
    solver = LINEAR_SOLVERS.get(name)
    with pytest.raises(TypeError, match="tolerance"):
        solver(tolerance=1e-3)
    with pytest.raises(ValueError, match="rtol"):
        solver(rtol=-1.0)
    with pytest.raises(ValueError, match="history_size"):
        GMRESSolver(history_size=0)


def test_gradient_flows_through_the_right_hand_side():
    A = matrices(1, 6, DOUBLE)
    b = vectors(1, 6, DOUBLE).requires_grad_()
    z = solve_linear(product(A), b, GMRESSolver(rtol=1e-12)).z
    (gradient,) = torch.autograd.grad(z.sum(), b)
    assert torch.allclose(gradient, torch.linalg.solve(A.mT, torch.ones_like(b)), rtol=1e-6)
