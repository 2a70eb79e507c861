import warnings
from dataclasses import replace

import pytest
import torch

from monai_deqkan.solvers import (
    SOLVERS,
    AndersonSolver,
    ConvergenceError,
    ConvergenceWarning,
    FixedPointIteration,
    SolveRecorder,
    SolveStatus,
    solve_fixed_point,
    take,
)
from monai_deqkan.testing import check_solver


@pytest.mark.parametrize("name", SOLVERS.names())
def test_conformance(name):
    check_solver(SOLVERS.build(name))


@pytest.mark.parametrize("solver", [FixedPointIteration(damping=0.3), AndersonSolver(damping=0.3, history_size=2)])
def test_conformance_with_other_settings(solver):
    check_solver(solver)


def test_picard_counts_are_those_of_the_contraction_factor():
    # |z_k - z*| = 0.5^k for f(z) = z / 2 + 1 from 0; rms(f - z) / rms(f) <= 1e-3 first at k = 10 evaluations.
    solution = solve_fixed_point(lambda z: z / 2 + 1, torch.zeros(1, 3), FixedPointIteration(rtol=1e-3))
    assert int(solution.stats.evaluations) == 10
    assert torch.allclose(solution.z, torch.full((1, 3), 2 * (1 - 0.5**9)))


def test_damping_averages_old_and_new():
    solver = FixedPointIteration(damping=0.25)
    z, _ = solver.step(solver.init(torch.zeros(1, 1)), torch.tensor([[4.0]]), torch.tensor([[8.0]]))
    assert float(z) == 7.0


def test_anderson_solves_a_linear_map_in_dimension_plus_two_evaluations():
    # Anderson on a linear map is equivalent to GMRES: exact after as many steps as dimensions.
    torch.manual_seed(0)
    matrix = torch.randn(5, 5, dtype=torch.float64)
    b = torch.randn(2, 5, dtype=torch.float64)
    solution = solve_fixed_point(lambda z: z @ matrix + b, torch.zeros_like(b), AndersonSolver(rtol=1e-9, max_iter=12))
    assert bool(solution.converged.all())
    assert int(solution.stats.evaluations.max()) <= 8
    assert torch.allclose(solution.z, b @ torch.linalg.inv(torch.eye(5) - matrix), rtol=1e-6)


def test_anderson_does_not_depend_on_the_unit_of_the_state():
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64))[0]
    matrix = basis @ torch.diag(torch.linspace(0, 0.99, 30, dtype=torch.float64)) @ basis.T
    b = torch.randn(1, 30, dtype=torch.float64)
    counts = {
        int(
            solve_fixed_point(
                lambda z, s=scale: z @ matrix + s * b, torch.zeros_like(b), AndersonSolver(rtol=1e-6, max_iter=100)
            ).stats.evaluations
        )
        for scale in (1e3, 1.0, 1e-4, 1e-8)
    }
    assert len(counts) == 1


@pytest.mark.parametrize("name", SOLVERS.names())
@pytest.mark.parametrize("exponent", [-83, -40, 40, 60, 80])  # 1e-25 to 1e24
def test_statistics_do_not_depend_on_the_unit_in_float32(name, exponent):
    # A power of two changes no digit, so even the rounding errors are the same.
    matrix = torch.diag(torch.tensor([0.9, 0.5, -0.3, 0.1]))
    solver = SOLVERS.build(name, rtol=1e-4, max_iter=200)

    def solved(unit):
        b = unit * torch.tensor([[1.0, -2.0, 3.0, 0.5]])
        return solve_fixed_point(lambda z: z @ matrix + b, torch.zeros_like(b), solver)

    scale = 2.0**exponent
    one, other = solved(1.0), solved(scale)
    assert bool(other.converged.all())
    assert torch.equal(other.stats.evaluations, one.stats.evaluations)
    torch.testing.assert_close(other.stats.residual / scale, one.stats.residual, rtol=1e-6, atol=0)
    torch.testing.assert_close(other.stats.history, one.stats.history, rtol=1e-6, atol=0)
    torch.testing.assert_close(other.z / scale, one.z, rtol=1e-6, atol=0)


def test_anderson_restarts_from_its_best_iterate():
    # A cubic without contraction far from its root: a single bad extrapolation must not lose the sample.
    def f(z):
        return torch.where(z.abs() < 2, 0.5 * z, 20 * z)

    start = torch.tensor([[1.0], [1.5]])
    solution = solve_fixed_point(f, start, AndersonSolver(rtol=1e-3, atol=1e-6, restart_growth=2.0))
    assert bool(solution.converged.all())


def test_stopped_samples_are_not_evaluated_again():
    seen = []

    def f(z, x):
        seen.append(z.shape[0])
        assert z.shape == x.shape
        return x * z + 1

    x = torch.tensor([[0.0], [0.5], [0.9]])
    solution = solve_fixed_point(f, torch.zeros(3, 1), FixedPointIteration(rtol=1e-4, max_iter=200), x)
    assert torch.allclose(solution.z, 1 / (1 - x), rtol=1e-2)
    assert sum(seen) == int(solution.stats.evaluations.sum())
    assert seen[0] == 3
    assert seen[-1] == 1


def test_history_has_one_row_per_evaluation_and_nan_after_the_stop():
    x = torch.tensor([[0.1], [0.9]])
    solution = solve_fixed_point(lambda z, x: x * z + 1, torch.zeros(2, 1), FixedPointIteration(max_iter=300), x)
    history, evaluations = solution.stats.history, solution.stats.evaluations
    assert history.shape == (int(evaluations.max()), 2)
    assert (~torch.isnan(history)).sum(0).tolist() == evaluations.tolist()
    assert float(history[int(evaluations[0]) - 1, 0]) == float(solution.stats.relative_residual[0])


def test_best_finite_iterate_is_returned():
    # Converges towards 2 for some steps, then breaks.
    calls = []

    def f(z):
        calls.append(1)
        return z / 2 + 1 if len(calls) < 5 else z * float("nan")

    solution = solve_fixed_point(f, torch.zeros(1, 1), FixedPointIteration(on_failure="ignore"))
    assert int(solution.stats.status) == SolveStatus.NON_FINITE
    assert float(solution.z) == pytest.approx(1.75)
    assert float(solution.stats.residual) == pytest.approx(0.125)


def test_state_is_kept_in_float32_and_returned_in_its_dtype():
    # In bfloat16 the increments below 1/256 of the iterate would be lost: 2 is not reached.
    z0 = torch.zeros(1, 4, dtype=torch.bfloat16)
    z = solve_fixed_point(lambda z: z * 0.5 + 1, z0, FixedPointIteration(rtol=1e-2)).z
    assert z.dtype == torch.bfloat16
    assert torch.allclose(z.float(), torch.full((1, 4), 2.0), atol=0.05)


@pytest.mark.parametrize(
    ("on_failure", "expected"), [("warn", ConvergenceWarning), ("raise", ConvergenceError), ("ignore", None)]
)
def test_failure_is_reported_as_asked(on_failure, expected):
    def run():
        return solve_fixed_point(lambda z: 2 * z + 1, torch.zeros(2, 1), FixedPointIteration(on_failure=on_failure))

    if expected is ConvergenceWarning:
        with pytest.warns(ConvergenceWarning, match="2 of 2 samples did not converge within 50"):
            run()
    elif expected is ConvergenceError:
        with pytest.raises(ConvergenceError, match="2 of 2"):
            run()
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run()


def test_empty_batch():
    solution = solve_fixed_point(lambda z: z / 2, torch.zeros(0, 3), AndersonSolver())
    assert solution.z.shape == (0, 3)


def test_map_that_changes_shape_is_refused():
    with pytest.raises(ValueError, match="must keep the shape"):
        solve_fixed_point(lambda z: z[:, :1], torch.zeros(2, 3), AndersonSolver())
    with pytest.raises(ValueError, match="batch size 2"):
        solve_fixed_point(lambda z: z[:1], torch.zeros(2, 3), AndersonSolver())


def test_wrong_settings():
    with pytest.raises(TypeError):
        AndersonSolver(tolerance=1e-3)
    with pytest.raises(ValueError, match="history_size"):
        AndersonSolver(history_size=0)
    with pytest.raises(ValueError, match="damping"):
        FixedPointIteration(damping=1.0)
    with pytest.raises(ValueError, match="Did you mean 'anderson'"):
        SOLVERS.build("andersen")
    with pytest.raises(ValueError, match="on_failure"):
        replace(AndersonSolver(), on_failure="shout")


def test_wrong_states():
    with pytest.raises(ValueError, match="floating point"):
        solve_fixed_point(lambda z: z, torch.zeros(2, 2, dtype=torch.int64), AndersonSolver())
    with pytest.raises(TypeError, match=r"torch\.Tensor"):
        solve_fixed_point(lambda z: z, (1.0,), AndersonSolver())
    with pytest.raises(ValueError, match="one batch size"):
        solve_fixed_point(lambda z: z, (torch.zeros(2, 1), torch.zeros(3, 1)), AndersonSolver())


def test_take_handles_tensors_tuples_and_objects():
    class Rows:
        def __init__(self, values):
            self.values = values

        def take(self, rows):
            return Rows([self.values[int(row)] for row in rows])

    rows = torch.tensor([2, 0])
    tensor, (inner, nothing), thing = take((torch.arange(3), (torch.arange(3) * 10, None), Rows("abc")), rows)
    assert tensor.tolist() == [2, 0]
    assert inner.tolist() == [20, 0]
    assert nothing is None
    assert thing.values == ["c", "a"]
    with pytest.raises(TypeError, match=r"take\(rows\)"):
        take({"a": 1}, rows)


def test_nested_recorders_each_collect():
    def run():
        solve_fixed_point(lambda z: z / 2 + 1, torch.zeros(2, 1), FixedPointIteration())

    with SolveRecorder() as outer:
        run()
        with SolveRecorder() as inner:
            run()
    run()
    assert len(outer.records) == 2
    assert len(inner.records) == 1
    assert outer.evaluations().tolist() == [14, 14, 14, 14]
    assert bool((outer.relative_residual() <= 1e-4).all())
    assert outer.evaluations("backward").numel() == 0
