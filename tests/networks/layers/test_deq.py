import copy

import pytest
import torch
from torch import nn

from monai_deqkan.adjoints import ImplicitAdjoint, UnrolledAdjoint
from monai_deqkan.networks.layers import DEQLayer, certified_spectral_norm
from monai_deqkan.solvers import AndersonSolver, ConvergenceWarning, FixedPointIteration, SolveRecorder, SolveStatus

TIGHT = AndersonSolver(rtol=1e-12, max_iter=200, on_failure="ignore")


class TanhCell(nn.Module):
    def __init__(self, size=5, bound=0.8):
        super().__init__()
        self.linear = certified_spectral_norm(nn.Linear(size, size), bound)
        self.dtypes = []

    def forward(self, z, x):
        out = torch.tanh(self.linear(z)) + x
        self.dtypes.append((z.dtype, x.dtype, self.linear(z).dtype))
        return out


class LinearCell(nn.Module):
    """``z = W z + x``, whose equilibrium is known."""

    def __init__(self, size=5):
        super().__init__()
        matrix = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        self.W = nn.Parameter(0.9 * matrix / torch.linalg.matrix_norm(matrix, 2))

    def forward(self, z, x):
        return z @ self.W.T + x


def layer(dtype=torch.float64, **settings):
    torch.manual_seed(0)
    return DEQLayer(TanhCell(), **{"solver": TIGHT, "adjoint": ImplicitAdjoint(solver=TIGHT), **settings}).to(dtype)


def data(size=4, dtype=torch.float64):
    return torch.randn(size, 5, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("solver", ["anderson", "fixed_point_iteration"])
def test_linear_equilibrium_and_its_gradients_in_closed_form(solver):
    cell, x = LinearCell(), data().requires_grad_()
    settings = {"rtol": 1e-12, "max_iter": 1000}
    deq = DEQLayer(cell, (solver, settings), ("implicit", {"solver": TIGHT}))
    z = deq(x)
    inverse = torch.linalg.inv(torch.eye(5, dtype=torch.float64) - cell.W.detach())
    exact = x.detach() @ inverse.T
    assert torch.allclose(z, exact, atol=1e-9)
    weight = data().cos()
    (z * weight).sum().backward()
    u = weight @ inverse  # (I - W)^-T applied to the gradient of the loss
    assert torch.allclose(x.grad, u, atol=1e-8)
    assert torch.allclose(cell.W.grad, u.T @ exact, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_residual_at_the_output(dtype):
    deq, x = layer(dtype, solver=AndersonSolver(rtol=1e-5)), data(dtype=dtype)
    solution = deq.solve(x)
    fz = deq.cell(solution.z, x)
    rms = (fz - solution.z).square().mean(1).sqrt() / fz.square().mean(1).sqrt()
    assert rms.max().item() <= 1.1e-5
    assert torch.equal(deq(x), solution.z)
    assert bool((solution.stats.status == SolveStatus.CONVERGED).all())


def test_sample_alone_equals_it_in_a_batch():
    deq, x = layer(), data()
    together = deq(x)
    for row in range(len(x)):
        assert torch.allclose(deq(x[row : row + 1]), together[row : row + 1], rtol=1e-11)


def test_nan_in_one_sample_leaves_the_others_intact():
    deq, x = layer(), data()
    clean = deq(x)
    spoiled = x.clone()
    spoiled[1, 2] = float("nan")
    solution = deq.solve(spoiled)
    assert torch.allclose(solution.z[[0, 2, 3]], clean[[0, 2, 3]], rtol=1e-11)
    converged = (solution.stats.status == SolveStatus.CONVERGED).tolist()
    assert converged == [True, False, True, True]


def test_autocast_outside_keeps_the_solve_in_float32():
    deq, x = layer(torch.float32, solver=AndersonSolver(rtol=1e-6)), data(dtype=torch.float32)
    plain = deq(x)
    deq.cell.dtypes.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = deq.solve(x)
        half = deq.solve(x.bfloat16())
    assert {dtype for call in deq.cell.dtypes for dtype in call} == {torch.float32}
    assert torch.equal(solution.z, plain)
    assert half.z.dtype == torch.float32
    assert bool((solution.stats.status == SolveStatus.CONVERGED).all())
    assert bool((half.stats.status == SolveStatus.CONVERGED).all())


def test_gradient_of_the_parameters_equals_the_unrolled_one():
    gradients = []
    for adjoint in (ImplicitAdjoint(solver=TIGHT), UnrolledAdjoint()):
        deq, x = layer(adjoint=adjoint), data().requires_grad_()
        (deq(x) * data().sin()).sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in deq.parameters())])
    assert len(gradients[0]) == 3
    for implicit, unrolled in zip(*gradients, strict=True):
        assert float(implicit.abs().max()) > 0
        assert torch.allclose(implicit, unrolled, rtol=1e-7, atol=1e-10)


def saved_bytes(adjoint, steps):
    """Bytes that autograd keeps for the backward pass, counted once per storage."""
    deq = layer(solver=FixedPointIteration(rtol=0.0, max_iter=steps, on_failure="ignore"), adjoint=adjoint)
    deq.cell.dtypes = []
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        z = deq(data(64))
    assert z.requires_grad
    return sum(storages.values())


def test_training_memory_does_not_grow_with_the_number_of_steps():
    assert saved_bytes(ImplicitAdjoint(), 10) == saved_bytes(ImplicitAdjoint(), 60)
    assert saved_bytes(UnrolledAdjoint(), 60) > 3 * saved_bytes(UnrolledAdjoint(), 10)


def test_normalized_weights_are_computed_once_per_solve(monkeypatch):
    deq = layer()
    norm = deq.cell.linear.parametrizations.weight[0]
    calls = []
    forward = type(norm).forward
    monkeypatch.setattr(type(norm), "forward", lambda self, weight: calls.append(1) or forward(self, weight))
    with SolveRecorder() as recorder:
        deq(data())
    assert int(recorder.evaluations().max()) > 3
    assert len(calls) == 1


def test_warm_start_at_the_solution_takes_one_evaluation():
    deq, x = layer(solver=AndersonSolver(rtol=1e-8)), data()
    with SolveRecorder() as recorder:
        again = deq(x, deq(x).detach())
    assert recorder.evaluations()[len(x) :].tolist() == [1] * len(x)
    assert torch.allclose(again, deq(x), rtol=1e-7)


def test_the_cell_says_where_to_start():
    cell = TanhCell().double()
    cell.initial_state = lambda x: 7 * torch.ones_like(x)
    deq = DEQLayer(cell, FixedPointIteration(max_iter=1, on_failure="ignore", rtol=0.0))
    assert torch.equal(deq(data()), cell.initial_state(data()))


def test_failed_solve_warns():
    with pytest.warns(ConvergenceWarning, match="FixedPointIteration"):
        layer(solver=FixedPointIteration(rtol=1e-12, max_iter=2))(data())


def test_reload_and_deepcopy_give_the_same_output():
    deq, x = layer(), data()
    with torch.no_grad():
        deq.cell.linear.bias.add_(0.3)
    other = layer()
    other.load_state_dict(deq.state_dict())
    assert torch.equal(other(x), deq(x))
    twin = copy.deepcopy(deq)
    assert torch.equal(twin(x), deq(x))
    with torch.no_grad():
        twin.cell.linear.bias.add_(1.0)
    assert not torch.allclose(twin(x), deq(x))


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="Did you mean 'anderson'"):
        DEQLayer(TanhCell(), "andersen")
    with pytest.raises(ValueError, match="implicit"):
        DEQLayer(TanhCell(), adjoint="implict")
    with pytest.raises(TypeError, match="max_steps"):
        DEQLayer(TanhCell(), ("anderson", {"max_steps": 3}))
    with pytest.raises(TypeError, match=r"Pass `z0`, or give the cell a method `initial_state\(x\)`"):
        DEQLayer(TanhCell())((data(), data()))
    assert "AndersonSolver" in repr(layer())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_parameters_are_refused_and_float_again_is_as_good(dtype):
    deq, x = layer(torch.float32).to(dtype), data(dtype=torch.float32)
    with pytest.raises(TypeError, match=r"in float32 at least; the cell's parameters are .*Call `\.float\(\)`"):
        deq(x)
    z = deq.float()(x)
    assert torch.allclose(deq.cell(z, x), z, atol=1e-5)
