import gc

import pytest
import torch
from torch import nn

from monai_deqkan.adjoints import ADJOINTS, ImplicitAdjoint, UnrolledAdjoint
from monai_deqkan.solvers import AndersonSolver, ConvergenceWarning, FixedPointIteration, SolveRecorder

TIGHT = AndersonSolver(rtol=1e-13, max_iter=200, on_failure="ignore")


def cell_of(W):
    return lambda z, x: torch.tanh(z) @ W + x


def contraction(size=4):
    matrix = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return 0.8 * matrix / torch.linalg.matrix_norm(matrix, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_implicit_equals_unrolled(dtype):
    def gradients(adjoint):
        W = contraction().to(dtype).requires_grad_()
        x = torch.randn(3, 4, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()
        z = adjoint.solve(lambda z, x: torch.sin(z) @ W * 0.5 + x, torch.zeros_like(x), TIGHT, x).z
        return torch.autograd.grad((z * z.conj()).real.sum(), (W, x))

    for implicit, unrolled in zip(gradients(ImplicitAdjoint(solver=TIGHT)), gradients(UnrolledAdjoint()), strict=True):
        assert torch.allclose(implicit, unrolled, rtol=1e-8, atol=1e-10)


def test_tuple_state_and_tuple_data():
    def gradients(adjoint):
        a = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        b = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()

        def cell(z, x):
            return 0.5 * torch.sin(z[0]) + 0.2 * z[1].mean(1, keepdim=True) + x[0], 0.3 * torch.cos(z[1]) + x[1]

        z = adjoint.solve(cell, (a.detach() * 0, b.detach() * 0), TIGHT, (a, b)).z
        return torch.autograd.grad((z[0] ** 2).sum() + z[1].sum(), (a, b))

    for implicit, unrolled in zip(gradients(ImplicitAdjoint(solver=TIGHT)), gradients(UnrolledAdjoint()), strict=True):
        assert torch.allclose(implicit, unrolled, rtol=1e-8)


def test_parameters_get_their_gradient_through_backward():
    torch.manual_seed(0)
    linear = nn.Linear(4, 4).double()
    with torch.no_grad():
        linear.weight.mul_(0.5)
    x = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def cell(z, x):
        return torch.tanh(linear(z)) + x

    found = []
    for adjoint in (ImplicitAdjoint(solver=TIGHT), UnrolledAdjoint()):
        linear.zero_grad()
        adjoint.solve(cell, torch.zeros_like(x), TIGHT, x).z.pow(2).sum().backward()
        found.append(linear.weight.grad.clone())
    assert torch.allclose(*found, rtol=1e-8)


def test_value_is_the_solution_itself():
    x = torch.ones(1, 4, dtype=torch.float64, requires_grad=True)
    solver = FixedPointIteration(rtol=1e-2)
    with torch.no_grad():
        plain = ImplicitAdjoint().solve(cell_of(contraction()), torch.zeros_like(x), solver, x).z
    graph = ImplicitAdjoint().solve(cell_of(contraction()), torch.zeros_like(x), solver, x).z
    assert torch.equal(plain, graph)
    assert graph.requires_grad
    assert not plain.requires_grad


def test_no_graph_where_nothing_wants_a_gradient():
    x = torch.ones(1, 4, dtype=torch.float64)
    z = ImplicitAdjoint().solve(cell_of(contraction()), torch.zeros_like(x), TIGHT, x).z
    assert not z.requires_grad


def test_backward_solve_is_recorded_and_reports_failure():
    x = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
    adjoint = ImplicitAdjoint(solver=FixedPointIteration(rtol=1e-12, max_iter=3))
    with SolveRecorder() as recorder:
        z = adjoint.solve(cell_of(contraction()), torch.zeros_like(x), TIGHT, x).z
    with pytest.warns(ConvergenceWarning, match="backward"):
        z.sum().backward()
    assert recorder.evaluations("backward").tolist() == [3, 3]
    assert not bool(recorder.converged("backward").any())


def test_nan_in_one_sample_leaves_the_gradient_of_the_others_intact():
    def gradient(data):
        x = data.clone().requires_grad_()
        adjoint = ImplicitAdjoint(solver=TIGHT)
        z = adjoint.solve(cell_of(contraction()), torch.zeros_like(x), TIGHT, x).z
        return torch.autograd.grad(z.pow(2).sum(), x)[0]

    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    clean = gradient(x)
    x[1] = float("nan")
    poisoned = gradient(x)
    assert torch.allclose(poisoned[[0, 2]], clean[[0, 2]])


def saved_bytes(adjoint, steps):
    """Bytes that autograd keeps for the backward pass, counted once per storage."""
    W = (0.99 * torch.eye(64)).requires_grad_()
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    solver = FixedPointIteration(rtol=0.0, max_iter=steps, on_failure="ignore")
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        z = adjoint.solve(cell_of(W), torch.zeros_like(x), solver, x).z
    del z
    gc.collect()
    return sum(storages.values())


def test_memory_of_the_implicit_gradient_does_not_grow_with_the_number_of_steps():
    assert saved_bytes(ImplicitAdjoint(), 10) == saved_bytes(ImplicitAdjoint(), 50)
    assert saved_bytes(UnrolledAdjoint(), 50) > 3 * saved_bytes(UnrolledAdjoint(), 10)


def test_names():
    assert ADJOINTS.names() == ["implicit", "phantom", "unrolled"]
