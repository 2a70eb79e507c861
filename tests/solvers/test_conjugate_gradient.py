import pytest
import torch

from monai_deqkan.solvers import ConjugateGradientSolver, SolveStatus, solve_linear


def positive_matrices(count, size, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(count, size, size, dtype=dtype, generator=generator)
    return root @ root.mH / size + 0.1 * torch.eye(size, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.float32, torch.complex64])
def test_agrees_with_a_direct_solve(dtype):
    A = positive_matrices(3, 20, dtype)
    b = torch.randn(3, 20, dtype=dtype, generator=torch.Generator().manual_seed(1))
    double = dtype in (torch.float64, torch.complex128)
    solver = ConjugateGradientSolver(rtol=1e-10 if double else 1e-5, max_iter=100)
    solution = solve_linear(lambda x: torch.einsum("bij,bj->bi", A, x), b, solver)
    assert bool(solution.converged.all())
    assert torch.allclose(solution.z, torch.linalg.solve(A, b), rtol=0, atol=1e-8 if double else 1e-3)


def test_exact_in_as_many_steps_as_distinct_eigenvalues():
    diagonal = torch.tensor([1.0, 1.0, 2.0, 5.0], dtype=torch.float64)
    solution = solve_linear(lambda x: diagonal * x, torch.ones(1, 4, dtype=torch.float64), ConjugateGradientSolver())
    assert int(solution.stats.evaluations) == 3
    assert torch.allclose(solution.z, 1 / diagonal[None])


def test_start_at_the_solution_costs_one_application():
    x = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    solution = solve_linear(lambda v: 3 * v, 3 * x, ConjugateGradientSolver(), x0=x)
    assert solution.stats.evaluations.tolist() == [1, 1]
    assert torch.equal(solution.z, x)


def test_zero_right_hand_side_and_nan_leave_other_samples_alone():
    A = positive_matrices(3, 8, torch.float64)
    b = torch.ones(3, 8, dtype=torch.float64)
    b[0], b[1] = 0.0, float("nan")
    solution = solve_linear(lambda x: torch.einsum("bij,bj->bi", A, x), b, ConjugateGradientSolver(on_failure="ignore"))
    assert torch.equal(solution.z[0], torch.zeros(8, dtype=torch.float64))
    assert solution.stats.status.tolist() == [SolveStatus.CONVERGED, SolveStatus.NON_FINITE, SolveStatus.CONVERGED]
    assert torch.allclose(solution.z[2], torch.linalg.solve(A[2], b[2]), atol=1e-5)


def test_limit_is_kept():
    A = positive_matrices(1, 30, torch.float64)
    for limit in (0, 1, 2):
        calls = []

        def apply(x, calls=calls):
            calls.append(1)
            return torch.einsum("bij,bj->bi", A, x)

        solver = ConjugateGradientSolver(rtol=0.0, max_iter=limit, on_failure="ignore")
        solution = solve_linear(apply, torch.ones(1, 30, dtype=torch.float64), solver)
        assert len(calls) == limit == int(solution.stats.evaluations)


def test_gradient_flows_through_the_right_hand_side():
    A = positive_matrices(1, 6, torch.float64)
    b = torch.randn(1, 6, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    solver = ConjugateGradientSolver(rtol=1e-12)
    z = solve_linear(lambda x: torch.einsum("bij,bj->bi", A, x), b, solver).z
    (gradient,) = torch.autograd.grad(z.sum(), b)
    assert torch.allclose(gradient, torch.linalg.solve(A, torch.ones_like(b)), rtol=1e-6)
