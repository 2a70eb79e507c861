"""Conformance check for adjoints, own ones and plug-ins."""

from __future__ import annotations

import torch
from torch import Tensor

from monai_deqkan.adjoints import Adjoint
from monai_deqkan.solvers import AndersonSolver

__all__ = ["check_adjoint"]


def check_adjoint(adjoint: Adjoint, rtol: float = 1e-5) -> None:
    r"""Check an adjoint's gradient against the closed form of a linear cell, at several scales of the loss.

    For :math:`f(z, x) = z W + x` the equilibrium is :math:`x (I - W)^{-1}`; gradients with respect to ``x`` and ``W``
    follow from it by automatic differentiation.

    Args:
        adjoint: the adjoint; its own tolerance must be below ``rtol``.
        rtol: largest relative error of a gradient.

    Raises:
        AssertionError: naming the first promise that is broken.
    """
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    matrix = 0.7 * matrix / torch.linalg.matrix_norm(matrix, 2)
    data = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    target = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    solver = AndersonSolver(rtol=1e-12, max_iter=200)
    for scale in (1.0, 1e-8):

        def gradients(equilibrium: str, scale: float = scale) -> tuple[Tensor, ...]:
            W, x = matrix.clone().requires_grad_(), data.clone().requires_grad_()
            if equilibrium == "closed form":
                z = x @ torch.linalg.inv(torch.eye(6, dtype=torch.float64) - W)
            else:
                solution = adjoint.solve(lambda z, x: z @ W + x, torch.zeros_like(data), solver, x).z
                z = solution if isinstance(solution, Tensor) else solution[0]
            return torch.autograd.grad(scale * ((z - target) ** 2).sum(), (W, x))

        for found, exact in zip(gradients("adjoint"), gradients("closed form"), strict=True):
            error = float((found - exact).norm() / exact.norm())
            if not error <= rtol:
                raise AssertionError(
                    f"The adjoint breaks a promise: its gradient at loss scale {scale:g} is off by {error:.1e}."
                )
    with torch.no_grad():
        plain = adjoint.solve(lambda z, x: 0.5 * z + x, torch.zeros_like(data), solver, data).z
    if (plain if isinstance(plain, Tensor) else plain[0]).requires_grad:
        raise AssertionError("The adjoint breaks a promise: without gradients enabled it makes no graph.")
