import pytest
import torch

from monai_deqkan.adjoints import PhantomAdjoint
from monai_deqkan.solvers import AndersonSolver

TIGHT = AndersonSolver(rtol=1e-14, max_iter=200, on_failure="ignore")


def problem(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(4, 4, dtype=dtype, generator=generator)
    matrix = 0.7 * matrix / torch.linalg.matrix_norm(matrix, 2)
    return matrix.requires_grad_(), torch.randn(3, 4, dtype=dtype, generator=generator).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize(("num_steps", "damping"), [(1, 0.0), (1, 0.3), (2, 0.0), (5, 0.5), (200, 0.2)])
def test_gradient_is_the_truncated_neumann_series(num_steps, damping, dtype):
    W, x = problem(dtype)
    adjoint = PhantomAdjoint(num_steps=num_steps, damping=damping)
    z = adjoint.solve(lambda z, x: torch.sin(z) @ W + x, torch.zeros_like(x), TIGHT, x).z
    weight = torch.randn(3, 4, dtype=dtype, generator=torch.Generator().manual_seed(1))
    found_x, found_W = torch.autograd.grad(z, (x, W), weight)
    z, eye = z.detach(), torch.eye(4, dtype=dtype)
    expected_W = torch.zeros_like(W)
    for row in range(3):
        jacobian_H = torch.diag(torch.cos(z[row])).conj() @ W.detach().conj()  # of a column: J = W^T diag(cos z)
        step = (1 - damping) * jacobian_H + damping * eye
        series = sum(torch.linalg.matrix_power(step, power) for power in range(num_steps))
        u = (1 - damping) * series @ weight[row]
        assert torch.allclose(found_x[row], u, rtol=1e-9, atol=1e-11)
        if num_steps == 200:
            exact = torch.linalg.solve(eye - jacobian_H, weight[row])
            assert torch.allclose(u, exact, rtol=1e-6, atol=1e-9)
        expected_W += torch.outer(torch.sin(z[row]).conj(), u)
    assert torch.allclose(found_W, expected_W, rtol=1e-9, atol=1e-11)


def test_value_is_the_solution_and_a_tuple_stays_one():
    W, x = problem()

    def cell(z, x):
        return torch.sin(z[1]) @ W + x, 0.5 * z[0]

    start = (torch.zeros_like(x), torch.zeros_like(x))
    loose = AndersonSolver(rtol=1e-2)
    with torch.no_grad():
        plain = PhantomAdjoint().solve(cell, start, loose, x).z
    found = PhantomAdjoint(num_steps=3, damping=0.1).solve(cell, start, loose, x).z
    assert torch.equal(found[0], plain[0])
    assert torch.equal(found[1], plain[1])
    assert not plain[0].requires_grad
    (one,) = torch.autograd.grad(PhantomAdjoint().solve(cell, start, TIGHT, x).z[1].sum(), x, allow_unused=True)
    assert one is None or not bool(one.any())  # x reaches the second part in the second step only
    (two,) = torch.autograd.grad(PhantomAdjoint(num_steps=2).solve(cell, start, TIGHT, x).z[1].sum(), x)
    assert torch.allclose(two, torch.full_like(two, 0.5))


def test_no_graph_where_nothing_wants_a_gradient():
    x = torch.ones(1, 2)
    assert not PhantomAdjoint(damping=0.5).solve(lambda z, x: 0.5 * z + x, x * 0, TIGHT, x).z.requires_grad


def test_wrong_settings():
    with pytest.raises(ValueError, match="num_steps"):
        PhantomAdjoint(num_steps=0)
    with pytest.raises(ValueError, match="damping"):
        PhantomAdjoint(damping=1.0)
    with pytest.raises(TypeError, match="steps"):
        PhantomAdjoint(steps=2)
