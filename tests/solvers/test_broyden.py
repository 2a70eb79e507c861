from __future__ import annotations

import pytest
import torch

from monai_deqkan.solvers import BroydenSolver, solve_fixed_point


def dense_broyden(f, z, steps, damping):
    """Return the relative residuals of Broyden's method with a whole inverse Jacobian, updated by his formula."""
    g = f(z) - z
    inverse = -(1.0 - damping) * torch.eye(len(z), dtype=z.dtype)
    residuals = [float(g.norm() / (g + z).norm())]
    for _ in range(steps):
        s = -(inverse @ g)
        z = z + s
        y = f(z) - z - g
        g = g + y
        residuals.append(float(g.norm() / (g + z).norm()))
        v = inverse.T @ s
        inverse = inverse + torch.outer(s - inverse @ y, v) / (v @ y)
    return residuals


@pytest.mark.parametrize("damping", [0.0, 0.4])
def test_iterates_are_those_of_a_dense_inverse_jacobian(damping):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(40, 40, generator=generator, dtype=torch.float64)
    matrix = 0.95 * (matrix + matrix.T) / torch.linalg.matrix_norm(matrix + matrix.T, 2)
    x = 0.1 * torch.randn(40, generator=generator, dtype=torch.float64)
    expected = dense_broyden(lambda z: torch.tanh(z @ matrix + x), torch.zeros(40, dtype=torch.float64), 20, damping)
    solver = BroydenSolver(rtol=0.0, max_iter=21, history_size=21, damping=damping, on_failure="ignore")
    solution = solve_fixed_point(
        lambda z, x: torch.tanh(z @ matrix + x), torch.zeros(1, 40, dtype=torch.float64), solver, x[None]
    )
    torch.testing.assert_close(solution.stats.history[:, 0].tolist(), expected, rtol=1e-5, atol=1e-13)
