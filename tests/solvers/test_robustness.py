"""What every fixed-point solver keeps in bad company: batches, divergence, units, expanding maps, mixed states."""

import pytest
import torch

from monai_deqkan.solvers import SOLVERS, AndersonSolver, SolveStatus, solve_fixed_point

DOUBLE = torch.float64
NAMES = SOLVERS.names()


def mixed_problem():
    """Return ``f(z, (x, gain))`` with samples that contract by 0.1 to 0.95, so that they begin and end at all times."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.linalg.qr(torch.randn(20, 20, dtype=DOUBLE, generator=generator))[0]
    x = torch.randn(6, 20, dtype=DOUBLE, generator=generator)
    gain = torch.tensor([0.95, 0.1, 0.5, 0.9, 0.3, 0.8], dtype=DOUBLE)[:, None]

    def f(z, data):
        bad = data[2] if len(data) > 2 else 0.0
        return torch.tanh(data[1] * (z @ matrix) + data[0]) + bad * (1.0 + 1e3 * z.abs())

    return f, x, gain


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [0.0, 1.0, float("nan")])
def test_a_sample_does_not_depend_on_its_batch(name, bad):
    f, x, gain = mixed_problem()
    solver = SOLVERS.build(name, rtol=1e-8, max_iter=120, on_failure="ignore")
    broken = torch.zeros_like(gain)
    broken[2] = bad
    together = solve_fixed_point(f, torch.zeros_like(x), solver, (x, gain, broken))
    assert bool(together.z.isfinite().all())
    for row in range(6):
        if row == 2 and bad != 0.0:
            assert not bool(together.converged[row])
            continue
        part = torch.tensor([row])
        alone = solve_fixed_point(f, torch.zeros(1, 20, dtype=DOUBLE), solver, (x[part], gain[part]))
        assert int(alone.stats.status) == int(together.stats.status[row])
        assert abs(int(alone.stats.evaluations) - int(together.stats.evaluations[row])) <= 1
        # Rounding at most: extrapolation multiplies it by the condition of a small system.
        torch.testing.assert_close(together.z[part], alone.z, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_divergence_ends_with_the_best_iterate(name):
    # No fixed point: the residual 1 + |z| is least, 1, at the start. The second sample overflows at once.
    def f(z, x):
        return z + x * (1.0 + z.abs())

    x = torch.tensor([[1.0], [1e300]], dtype=DOUBLE)
    solver = SOLVERS.build(name, max_iter=30, on_failure="ignore")
    solution = solve_fixed_point(f, torch.zeros(2, 1, dtype=DOUBLE), solver, x)
    assert int(solution.stats.status[0]) == SolveStatus.MAX_ITER
    assert int(solution.stats.evaluations[0]) == 30
    assert float(solution.stats.residual[0]) <= 1.0
    assert float((f(solution.z, x) - solution.z)[0].abs()) == pytest.approx(float(solution.stats.residual[0]))
    assert not bool(solution.converged.any())
    assert bool(solution.z.isfinite().all())


def test_overflow_is_non_finite():
    solver = SOLVERS.build("fixed_point_iteration", max_iter=200, on_failure="ignore")
    solution = solve_fixed_point(lambda z: 10.0 * z + 1.0, torch.zeros(1, 1), solver)
    assert int(solution.stats.status) == SolveStatus.NON_FINITE
    assert 38 <= int(solution.stats.evaluations) <= 41
    assert float(solution.z) == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_evaluations_do_not_depend_on_the_unit(name):
    f, x, gain = mixed_problem()
    counts = []
    for unit in (1e-4, 1e-2, 1.0, 1e3):
        solver = SOLVERS.build(name, rtol=1e-5, max_iter=300)
        start = torch.zeros_like(x).float()
        data = (x.float(), gain.float())
        solution = solve_fixed_point(
            lambda z, d, u=unit: (u * f((z / u).double(), [p.double() for p in d])).float(), start, solver, data
        )
        counts.append(solution.stats.evaluations)
    spread = torch.stack(counts).amax(0) - torch.stack(counts).amin(0)
    assert int(spread.max()) <= 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [8, 16, 64])
@pytest.mark.parametrize("linear", [True, False])
def test_spectral_radius_three_is_solved_or_reported(name, size, linear):
    generator = torch.Generator().manual_seed(size)
    matrix = torch.randn(size, size, dtype=DOUBLE, generator=generator)
    matrix = 3.0 * matrix / torch.linalg.eigvals(matrix).abs().max()
    x = torch.randn(2, size, dtype=DOUBLE, generator=generator)

    def f(z, x):
        return (z @ matrix if linear else torch.tanh(z @ matrix)) + x

    solver = SOLVERS.build(name, rtol=1e-5, max_iter=150, on_failure="ignore")
    solution = solve_fixed_point(f, torch.zeros_like(x), solver, x)
    image = f(solution.z, x)
    relative = (image - solution.z).norm(dim=1) / image.norm(dim=1)
    assert torch.allclose(relative, solution.stats.relative_residual)
    assert torch.equal(solution.converged, relative <= 1e-5)
    if linear and (size == 8 or (size == 16 and name == "broyden")) and name != "fixed_point_iteration":
        assert bool(solution.converged.all())
        exact = torch.linalg.solve((torch.eye(size, dtype=DOUBLE) - matrix).T, x.T).T
        assert torch.allclose(solution.z, exact, rtol=0, atol=1e-3 * float(exact.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_states_of_two_resolutions(name):
    # A fine and a coarse image that feed each other: linear, so the exact state comes from one dense solve.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 4, 4, dtype=DOUBLE, generator=generator)

    def f(z, x):
        fine, coarse = z
        up = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return 0.5 * fine - 0.3 * up + x, 0.4 * torch.nn.functional.avg_pool2d(fine, 2) + 0.6 * coarse

    start = (torch.zeros_like(x), torch.zeros(2, 1, 2, 2, dtype=DOUBLE))
    solver = SOLVERS.build(name, rtol=1e-9, max_iter=200)
    fine, coarse = solve_fixed_point(f, start, solver, x).z

    def flat(v):
        parts = v[:16].view(1, 1, 4, 4), v[16:].view(1, 1, 2, 2)
        return torch.cat([part.flatten() for part in f(parts, torch.zeros(1, 1, 4, 4, dtype=DOUBLE))])

    jacobian = torch.func.jacrev(flat)(torch.zeros(20, dtype=DOUBLE))
    source = torch.cat((x.flatten(1), torch.zeros(2, 4, dtype=DOUBLE)), dim=1)
    exact = torch.linalg.solve(torch.eye(20, dtype=DOUBLE) - jacobian, source.T).T
    assert torch.allclose(torch.cat((fine.flatten(1), coarse.flatten(1)), dim=1), exact, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_states_are_solved_in_float32_at_least(name, dtype):
    seen = []
    solver = SOLVERS.build(name, rtol=1e-6 if dtype == DOUBLE else 1e-3, max_iter=100, on_failure="ignore")
    step = type(solver).step

    class Spy(type(solver)):
        def step(self, state, z, fz):
            seen.append(z.dtype)
            return step(self, state, z, fz)

    solution = solve_fixed_point(lambda z: 0.75 * z + 1, torch.zeros(1, 4, dtype=dtype), Spy(**vars(solver)))
    assert set(seen) == {DOUBLE if dtype == DOUBLE else torch.float32}
    assert solution.z.dtype == dtype
    assert torch.allclose(solution.z.double(), torch.full((1, 4), 4.0, dtype=DOUBLE), rtol=0, atol=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_warm_start_costs_one_evaluation(name):
    f, x, gain = mixed_problem()
    tight = SOLVERS.build(name, rtol=1e-9, max_iter=300)
    z = solve_fixed_point(f, torch.zeros_like(x), tight, (x, gain)).z
    again = solve_fixed_point(f, z, SOLVERS.build(name, rtol=1e-8), (x, gain))
    assert again.stats.evaluations.tolist() == [1] * 6
    assert torch.equal(again.z, z)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_through_every_step(name):
    # Unrolled to convergence, the gradient is that of the solution of a linear system.
    matrix = 0.6 * torch.linalg.qr(torch.randn(5, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(0)))[0]
    x = torch.randn(2, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(1)).requires_grad_()
    solver = SOLVERS.build(name, rtol=1e-10, max_iter=200)
    z = solve_fixed_point(lambda z, x: z @ matrix + x, torch.zeros_like(x), solver, x).z
    (gradient,) = torch.autograd.grad(z[:, 0].sum(), x)
    exact = torch.linalg.inv(torch.eye(5, dtype=DOUBLE) - matrix)[:, 0]
    assert torch.allclose(gradient, exact.expand(2, 5), rtol=0, atol=1e-6)


def test_contraction_estimate_is_the_spectral_radius_in_plain_iteration():
    gain = torch.tensor([[0.9], [0.5], [0.0]], dtype=DOUBLE)
    solver = SOLVERS.build("fixed_point_iteration", rtol=1e-8, max_iter=300)
    stats = solve_fixed_point(lambda z, g: g * z + 1, torch.zeros(3, 2, dtype=DOUBLE), solver, gain).stats
    assert torch.allclose(stats.contraction_estimate[:2], gain[:2, 0], rtol=1e-3)
    assert bool(stats.contraction_estimate[2].isnan())  # solved by its second evaluation: residuals 1 and 0
    none = solve_fixed_point(torch.cos, torch.zeros(2, 1), SOLVERS.build("auto", max_iter=0, on_failure="ignore"))
    assert bool(none.stats.contraction_estimate.isnan().all())


def in_place(z):
    return z.mul_(0.5).add_(1.0)


def relu_in_place(z):
    return torch.tanh(z.sub_(0.1).relu_()) + 1.0


def one_memory():
    """Return a map that writes every image into the same memory."""
    memory = torch.empty(2, 3)
    return lambda z: torch.add(0.5 * z, 1.0, out=memory)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("f", [in_place, relu_in_place])
def test_a_map_that_changes_its_argument_is_refused(name, mode, f):
    # Such a map returned its own argument, so that the first evaluation passed for a solution.
    start = torch.zeros(2, 3)
    with mode(), pytest.raises(ValueError, match="must not write into its argument"):
        solve_fixed_point(f, start.clone(), SOLVERS.build(name))


@pytest.mark.parametrize("name", ["auto", "fixed_point_iteration"])
def test_a_map_that_returns_the_same_memory_each_time_is_refused(name):
    with torch.no_grad(), pytest.raises(ValueError, match="the same memory each time"):
        solve_fixed_point(one_memory(), torch.zeros(2, 3), SOLVERS.build(name))


@pytest.mark.parametrize("name", NAMES)
def test_one_number_per_sample(name):
    x = torch.tensor([0.1, 2.0, -1.0], dtype=DOUBLE)
    solution = solve_fixed_point(lambda z, x: 0.5 * z + x, torch.zeros(3, dtype=DOUBLE), SOLVERS.build(name), x)
    assert bool(solution.converged.all())
    torch.testing.assert_close(solution.z, 2 * x, rtol=1e-3, atol=0)


@pytest.mark.parametrize("image", [None, 1.0, {"z": torch.zeros(2, 3)}, (torch.zeros(2, 3), None)])
def test_an_image_that_is_no_state_is_named(image):
    with pytest.raises(TypeError, match=f"must return a tensor.*returned {type(image).__name__}"):
        solve_fixed_point(lambda z: image, torch.zeros(2, 3), SOLVERS.build("anderson"))


@pytest.mark.parametrize("x", [torch.ones(3), (torch.ones(2, 3), torch.ones(3)), torch.ones(1, 3), torch.tensor(1.0)])
def test_data_that_are_not_per_sample_are_refused(x):
    with pytest.raises(ValueError, match="batch of the state, 2, first"):
        solve_fixed_point(lambda z, x: 0.5 * z, torch.zeros(2, 3), AndersonSolver(), x)


def test_data_of_an_unknown_kind_are_refused():
    with pytest.raises(TypeError, match="Per-sample data"):
        solve_fixed_point(lambda z, x: 0.5 * z, torch.zeros(2, 3), AndersonSolver(), {"x": torch.zeros(2, 3)})
