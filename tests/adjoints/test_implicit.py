import gc
import itertools
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from monai_deqkan.adjoints import ImplicitAdjoint, UnrolledAdjoint
from monai_deqkan.networks.blocks import KANCell
from monai_deqkan.networks.layers import DEQLayer
from monai_deqkan.solvers import (
    AndersonSolver,
    BroydenSolver,
    ConvergenceError,
    ConvergenceWarning,
    FixedPointIteration,
    GMRESSolver,
    SolveRecorder,
    SolveStatus,
)

TIGHT = AndersonSolver(rtol=1e-14, max_iter=200, on_failure="ignore")
GMRES = GMRESSolver(rtol=1e-14, max_iter=100, on_failure="ignore")
STEPS = FixedPointIteration(rtol=0.0, max_iter=60, on_failure="ignore")  # derivatives of plain steps converge fast
EXACT = ImplicitAdjoint(solver=TIGHT)


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def contraction(size, factor=0.8, dtype=torch.float64, seed=0):
    matrix = random(size, size, dtype=torch.float64 if dtype == torch.float32 else dtype, seed=seed)
    return (factor * matrix / torch.linalg.matrix_norm(matrix, 2)).to(dtype)


def plain(adjoint, x, W, solver=TIGHT):
    return adjoint.solve(lambda z, x: torch.sin(z) @ W + x * x, torch.zeros_like(x), solver, x).z


def with_computed_tensors(adjoint, x, W):
    # x and V were computed before, V from W, x from both; the cell uses all of them, and x's own source too.
    V = 0.9 * W

    def cell(z, y):
        return torch.sin(z) @ V + y + 0.1 * x.sin().sum(0) + 0.1 * V[0] + 0.1 * W[1]

    return adjoint.solve(cell, torch.zeros_like(x), TIGHT, torch.tanh(x) * V.diagonal()).z


def with_tuples(adjoint, x, W):
    def cell(z, x):
        first = torch.sin(z[0]) @ W + x[0] + 0.2 * z[1].mean(1, keepdim=True)
        return first, 0.3 * torch.cos(z[1]) + 0.1 * x[1] * z[0][:, 1:]

    return adjoint.solve(cell, (torch.zeros_like(x), torch.zeros_like(x[:, 1:])), TIGHT, (x, x[:, :-1])).z


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize(
    ("equilibrium", "solver"), [(plain, TIGHT), (plain, GMRES), (with_computed_tensors, TIGHT), (with_tuples, TIGHT)]
)
def test_gradcheck_and_gradgradcheck(equilibrium, dtype, solver):
    x, W = random(2, 2, dtype=dtype, seed=1).requires_grad_(), contraction(2, 0.3, dtype).requires_grad_()
    adjoint = ImplicitAdjoint(solver=solver)
    assert torch.autograd.gradcheck(lambda x, W: equilibrium(adjoint, x, W), (x, W), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x, W: equilibrium(adjoint, x, W), (x, W), fast_mode=True)


def test_third_and_fourth_derivatives_equal_the_unrolled_ones():
    def derivatives(adjoint, solver):
        x, W = random(1, 2, seed=2).requires_grad_(), contraction(2, 0.4).requires_grad_()
        (first,) = torch.autograd.grad(plain(adjoint, x, W, solver).pow(3).sum(), W, create_graph=True)
        (second,) = torch.autograd.grad(first.sin().sum(), x, create_graph=True)
        third = torch.autograd.grad(second.pow(2).sum(), (W, x), create_graph=True)
        fourth = torch.autograd.grad(sum(part.pow(2).sum() for part in third), (W, x))
        return [part.detach() for part in (first, second, *third, *fourth)]

    for implicit, unrolled in zip(derivatives(EXACT, TIGHT), derivatives(UnrolledAdjoint(), STEPS), strict=True):
        assert torch.allclose(implicit, unrolled, rtol=1e-6, atol=1e-8)


def test_gradient_penalty_through_parametrized_weights():
    def gradients(adjoint, solver):
        torch.manual_seed(0)
        cell = DampedLinear().eval()
        x = random(2, 3, seed=3).requires_grad_()
        (slope,) = torch.autograd.grad(DEQLayer(cell, solver, adjoint)(x).pow(2).sum(), x, create_graph=True)
        slope.pow(2).sum().backward()
        return [x.grad, *(parameter.grad for parameter in cell.parameters())]

    for implicit, unrolled in zip(gradients(EXACT, TIGHT), gradients(UnrolledAdjoint(), STEPS), strict=True):
        assert torch.allclose(implicit, unrolled, rtol=1e-6, atol=1e-9)


def test_second_derivative_of_a_kan_cell():
    torch.manual_seed(0)
    deq, x = DEQLayer(KANCell(3).double(), TIGHT, EXACT), random(2, 3).requires_grad_()
    assert torch.autograd.gradgradcheck(deq, x, fast_mode=True)


class DampedLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = spectral_norm(nn.Linear(3, 3)).double()

    def forward(self, z, x):
        return 0.6 * torch.sin(self.linear(z)) + x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("solver", [AndersonSolver, BroydenSolver, GMRESSolver, FixedPointIteration])
@pytest.mark.parametrize("factor", [0.3, 0.6, 0.9])
def test_gradient_is_as_near_the_dense_solution_as_the_tolerance_says(factor, solver, dtype):
    tolerances = (1e-3, 1e-4) if dtype == torch.float32 else (1e-3, 1e-6, 1e-9)
    for seed, (scale, rtol) in enumerate((s, t) for s in (1.0, 1e-4, 1e-8) for t in tolerances):
        W, x = contraction(8, factor, dtype, seed), random(3, 8, seed=seed + 50).to(dtype).requires_grad_()
        forward = AndersonSolver(rtol=1e-6 if dtype == torch.float32 else 1e-14, max_iter=300, on_failure="ignore")
        adjoint = ImplicitAdjoint(solver=solver(rtol=rtol, max_iter=500))
        z = adjoint.solve(lambda z, x, W=W: torch.tanh(z) @ W + x, torch.zeros_like(x), forward, x).z
        weight = scale * random(3, 8, seed=seed + 90).to(dtype)
        (found,) = torch.autograd.grad(z, x, weight)
        for row in range(3):
            J = W.detach().double().T @ torch.diag(1 - torch.tanh(z[row].detach().double()) ** 2)
            exact = torch.linalg.solve(torch.eye(8, dtype=torch.float64) - J.T, weight[row].double())
            limit = 3 * rtol if factor <= 0.6 else 3 * rtol / (1 - float(torch.linalg.matrix_norm(J, 2)))
            assert float((found[row] - exact).norm() / exact.norm()) <= limit


def test_tiny_losses_do_not_underflow_in_float32():
    W = contraction(8, 0.8, torch.float32)
    for scale in (1.0, 1e-8, 1e-25, 1e-34):  # the squares of the last are zero in float32
        x = random(2, 8, dtype=torch.float32).requires_grad_()
        adjoint = ImplicitAdjoint(solver=AndersonSolver(rtol=1e-4))
        z = adjoint.solve(lambda z, x: torch.tanh(z) @ W + x, torch.zeros_like(x), TIGHT, x).z
        (found,) = torch.autograd.grad(z, x, torch.full_like(x, scale))
        J = torch.diag_embed(1 - torch.tanh(z.detach().double()) ** 2) @ W.double()  # of rows
        exact = torch.linalg.solve(torch.eye(8).double() - J, torch.full((2, 8, 1), scale).double())[..., 0]
        assert float((found - exact).norm() / exact.norm()) < 1e-3


@pytest.mark.parametrize(("solver", "evaluations"), [(TIGHT, 1), (GMRES, 0)])
def test_samples_without_gradient_cost_nothing_and_a_nan_stays_alone(solver, evaluations):
    W = contraction(4)

    def gradient(weight):
        x = random(4, 4).requires_grad_()
        with SolveRecorder() as recorder:
            z = plain(ImplicitAdjoint(solver=solver), x, W)
        return torch.autograd.grad(z, x, weight)[0], recorder

    weight = random(4, 4, seed=5)
    clean, _ = gradient(weight)
    weight[1], weight[2, 0] = 0.0, float("nan")
    found, recorder = gradient(weight)
    assert torch.allclose(found[[0, 3]], clean[[0, 3]], rtol=1e-12)
    assert not bool(found[1].any())
    assert int(recorder.evaluations("backward")[1]) == evaluations
    assert int(recorder.status("backward")[2]) == SolveStatus.NON_FINITE
    assert bool(torch.isnan(found[2]).any())


@pytest.mark.parametrize("solver", [FixedPointIteration, GMRESSolver])
def test_a_backward_solve_that_fails_says_so(solver):
    def equilibrium(on_failure):
        x = random(2, 4).requires_grad_()
        with SolveRecorder() as recorder:
            z = plain(ImplicitAdjoint(solver=solver(rtol=1e-13, max_iter=2, on_failure=on_failure)), x, contraction(4))
        return z.sum(), recorder

    loss, recorder = equilibrium("warn")
    with pytest.warns(ConvergenceWarning, match=rf"{solver.__name__} \(backward solve\): 2 of 2 samples"):
        loss.backward()
    assert recorder.evaluations("backward").tolist() == [2, 2]
    loss, recorder = equilibrium("raise")
    with pytest.raises(ConvergenceError, match="backward solve"):
        loss.backward()
    assert not bool(recorder.converged("backward").any())
    loss, recorder = equilibrium("ignore")
    loss.backward()
    assert recorder.status("backward").tolist() == [SolveStatus.MAX_ITER] * 2


def test_solvers_by_name():
    assert ImplicitAdjoint(solver="gmres") == ImplicitAdjoint(solver=GMRESSolver())
    assert ImplicitAdjoint(solver=("broyden", {"rtol": 1e-3})).solver == BroydenSolver(rtol=1e-3)
    assert ImplicitAdjoint(solver=("gmres", {"history_size": 3})).solver == GMRESSolver(history_size=3)
    with pytest.raises(ValueError, match="Did you mean 'gmres'"):
        ImplicitAdjoint(solver="gmers")
    with pytest.raises(TypeError, match="steps"):
        ImplicitAdjoint(solver=("anderson", {"steps": 3}))
    with pytest.raises(TypeError, match="FixedPointSolver"):
        ImplicitAdjoint(solver=3)


class _Scaled:
    """Per-sample data that is no tensor."""

    def __init__(self, factor):
        self.factor = factor

    def take(self, rows):
        return _Scaled(self.factor[rows])


def test_data_of_any_kind():
    W, source = contraction(3, 0.5), random(2, 3, seed=4).requires_grad_()
    cells = {
        "none": (lambda z: torch.sin(z) @ W + source.detach().sum(0) * source[0], lambda: None),
        "object": (lambda z, x: torch.sin(z) @ W + x.factor, lambda: _Scaled(source.exp())),
        "tuple": (lambda z, x: torch.sin(z) @ W + x[0] * x[1][0], lambda: (source.exp(), (source.sin(),))),
    }
    for cell, data in cells.values():
        results = []
        for adjoint, solver in ((EXACT, TIGHT), (UnrolledAdjoint(), STEPS)):
            z = adjoint.solve(cell, torch.zeros_like(source), solver, data()).z
            (first,) = torch.autograd.grad(z.pow(2).sum(), source, create_graph=True)
            results.append((first.detach(), *torch.autograd.grad(first.pow(2).sum(), source)))
        for implicit, unrolled in zip(*results, strict=True):
            assert torch.allclose(implicit, unrolled, rtol=1e-8, atol=1e-10)


def test_hooks_and_retained_gradients_see_each_gradient_once():
    def gradients(adjoint):
        calls, x, W = [], random(2, 3).requires_grad_(), contraction(3, 0.5).requires_grad_()
        y = x.tanh()
        y.retain_grad()
        y.register_hook(lambda g: 2 * g)
        W.register_hook(lambda g: 3 * g)
        z = plain(adjoint, y, W)
        z.register_hook(lambda g: calls.append(1) or 0.5 * g)
        first = torch.autograd.grad(z.pow(2).sum(), (x, W), create_graph=True)
        retained, y.grad = y.grad, None
        sum(part.pow(2).sum() for part in first).backward()
        return len(calls), [part.detach() for part in (*first, retained, y.grad, x.grad, W.grad)]

    (count, implicit), (expected_count, unrolled) = gradients(EXACT), gradients(UnrolledAdjoint())
    assert count == expected_count == 2
    for one, other in zip(implicit, unrolled, strict=True):
        assert torch.allclose(one, other, rtol=1e-8)


def test_backward_twice_and_once_for_each_parameter():
    deq = DEQLayer(DampedLinear(), TIGHT, EXACT)
    weight, bias = deq.cell.linear.parametrizations.weight.original, deq.cell.linear.bias
    calls = []
    for parameter in (weight, bias):
        parameter.register_post_accumulate_grad_hook(lambda parameter: calls.append(parameter.shape))
    loss = deq(random(2, 3)).pow(2).sum()
    loss.backward(retain_graph=True)
    assert sorted(calls) == sorted([weight.shape, bias.shape])
    once = weight.grad.clone()
    loss.backward()
    assert torch.allclose(weight.grad, 2 * once, rtol=1e-12)
    assert len(calls) == 4


def test_frozen_parameters_get_no_gradient():
    deq, x = DEQLayer(DampedLinear(), TIGHT, EXACT), random(2, 3)
    full = torch.autograd.grad(deq(x).sum(), deq.cell.linear.bias)[0]
    deq.cell.linear.parametrizations.weight.original.requires_grad_(False)
    deq(x).sum().backward()
    assert deq.cell.linear.parametrizations.weight.original.grad is None
    assert torch.allclose(deq.cell.linear.bias.grad, full, rtol=1e-6)  # the norm's estimate moves on
    deq.requires_grad_(False)
    assert not deq(x).requires_grad


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_around_the_layer(use_reentrant):
    torch.manual_seed(0)
    deq = DEQLayer(KANCell(3).double(), TIGHT, EXACT)

    deq(random(2, 3))

    def gradients(call):
        x = random(2, 3).requires_grad_()
        deq.zero_grad()
        call(x.sin()).pow(2).sum().backward()
        return [x.grad, *(parameter.grad for parameter in deq.parameters())]

    found = gradients(lambda x: checkpoint(deq, x, use_reentrant=use_reentrant))
    for checkpointed, right in zip(found, gradients(deq), strict=True):
        assert torch.allclose(checkpointed, right, rtol=1e-10)


def test_double_backward_through_activation_checkpointing():
    deq = DEQLayer(DampedLinear().eval(), TIGHT, EXACT)

    def penalty_gradients(call):
        x = random(2, 3).requires_grad_()
        (slope,) = torch.autograd.grad(call(x).pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(slope.pow(2).sum(), (x, deq.cell.linear.bias))

    found = penalty_gradients(lambda x: checkpoint(deq, x, use_reentrant=False))
    for checkpointed, right in zip(found, penalty_gradients(deq), strict=True):
        assert torch.allclose(checkpointed, right, rtol=1e-9)


def test_no_grad_inference_mode_and_autocast():
    W, x = contraction(3, dtype=torch.float32), random(2, 3, dtype=torch.float32)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not plain(ImplicitAdjoint(), x.requires_grad_(), W).requires_grad
    deq = DEQLayer(DampedLinear().float().eval(), AndersonSolver(rtol=1e-6), ImplicitAdjoint(solver="gmres"))

    def gradients():
        y = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(deq(y).pow(2).sum(), y, create_graph=True)
        return slope.detach(), *torch.autograd.grad(slope.pow(2).sum(), y)

    right = gradients()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = x.detach().requires_grad_()
        loss = deq(y).pow(2).sum()
    (slope,) = torch.autograd.grad(loss, y, create_graph=True)
    for found, exact in zip((slope, *torch.autograd.grad(slope.pow(2).sum(), y)), right, strict=True):
        assert torch.allclose(found, exact, rtol=1e-5)


def test_compiled_cell():
    W, x = contraction(3).requires_grad_(), random(2, 3).requires_grad_()

    def cell(z, x):
        return torch.sin(z) @ W + x

    def gradient(cell):
        z = EXACT.solve(cell, torch.zeros_like(x), TIGHT, x).z
        return torch.autograd.grad(z.pow(2).sum(), (x, W))

    compiled = torch.compile(cell, backend="eager", fullgraph=True)
    for found, right in zip(gradient(compiled), gradient(cell), strict=True):
        assert torch.allclose(found, right, rtol=1e-12)


def test_nothing_outlives_a_double_backward():
    def run():
        x, W = random(2, 3).requires_grad_(), contraction(3).requires_grad_()
        V = 0.9 * W
        (slope,) = torch.autograd.grad(plain(EXACT, x, V).pow(2).sum(), x, create_graph=True)
        slope.pow(2).sum().backward()
        return weakref.ref(V)

    gc.disable()
    try:
        assert run()() is None
    finally:
        gc.enable()


class ConvCell(nn.Module):
    def __init__(self, channels=32, depth=8):
        super().__init__()
        widths = [2, *[channels] * (depth - 1), 2]
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths))

    def forward(self, z, x):
        for layer in self.layers[:-1]:
            z = torch.tanh(layer(z))
        return 0.5 * torch.tanh(self.layers[-1](z)) + x


def test_peak_memory_of_a_training_step_is_flat_in_the_number_of_steps():
    def peak(adjoint, steps):
        torch.manual_seed(0)
        deq = DEQLayer(ConvCell(), FixedPointIteration(rtol=0.0, max_iter=steps, on_failure="ignore"), adjoint)
        x = random(1, 2, 48, 48, dtype=torch.float32)
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
            deq(x).pow(2).sum().backward()
        events = profiler.profiler.kineto_results.events()
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        used = highest = 0
        for _, change in changes:
            used += change
            highest = max(highest, used)
        return highest

    backward = AndersonSolver(rtol=1e-3, on_failure="ignore")
    at_30, at_50 = (peak(ImplicitAdjoint(solver=backward), steps) for steps in (30, 50))
    assert at_50 <= 1.2 * at_30
    assert at_50 <= 0.05 * peak(UnrolledAdjoint(), 50)
