"""Gradients through a few steps at the solution: cheap, and inexact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from monai_deqkan._checks import check_int, check_range
from monai_deqkan.adjoints.base import ADJOINTS, Adjoint
from monai_deqkan.solvers import FixedPointSolver, Solution, solve_fixed_point
from monai_deqkan.solvers.solution import State, state_parts

__all__ = ["PhantomAdjoint"]


@ADJOINTS.register("phantom")
@dataclass(frozen=True, kw_only=True)
class PhantomAdjoint(Adjoint):
    r"""Differentiate ``num_steps`` damped steps from the solution, in place of the equilibrium.

    At the solution, where :math:`z_{k+1} = (1 - d)\, f(z_k, x) + d\, z_k` stays put, the gradient of a loss
    :math:`\ell` becomes

    .. math::
        u^H \frac{\partial f}{\partial x}, \qquad
        u = (1 - d) \sum_{k=0}^{n-1} \big[(1 - d)\, J^H + d\, I\big]^k \frac{\partial \ell}{\partial z^*},

    the first :math:`n` terms of a series for the implicit gradient. One undamped step, :math:`u = \partial \ell /
    \partial z^*`, is Jacobian-free backpropagation. No backward solve; memory of ``num_steps`` evaluations. The value
    is the solution's. Second derivatives are those of the steps, with :math:`z^*` held constant: inexact too.

    Args:
        num_steps: number of steps :math:`n`, at least 1.
        damping: weight :math:`d` of the old iterate, dimensionless, in ``[0, 1)``.

    Raises:
        ValueError: if a setting lies outside its range.

    Reference:
        Z. Geng, X.-Y. Zhang, S. Bai, Y. Wang and Z. Lin, "On training implicit models", NeurIPS 2021, the unrolled form
        of the phantom gradient; our :math:`d` is one minus their :math:`\lambda`, and the steps' value is not returned.
        S. Wu Fung, H. Heaton, Q. Li, D. McKenzie, S. Osher and W. Yin, "JFB: Jacobian-free backpropagation for implicit
        networks", AAAI 2022.
    """

    num_steps: int = 1
    damping: float = 0.0

    def __post_init__(self) -> None:
        check_int("num_steps", self.num_steps)
        check_range("damping", self.damping, 0.0, 1.0, open_high=True)

    def solve(self, cell: Callable[..., State], z0: State, solver: FixedPointSolver, x: Any) -> Solution:
        """Solve without a graph, then take the steps with one."""
        with torch.no_grad():
            solution = solve_fixed_point(cell, z0, solver, x)
        if not torch.is_grad_enabled():
            return solution
        single = isinstance(solution.z, Tensor)
        value = state_parts(solution.z)
        z = value
        for _ in range(self.num_steps):
            state = z[0] if single else z
            images = state_parts(cell(state) if x is None else cell(state, x))
            z = images if self.damping == 0 else tuple(map(self._damped, images, z))
        if not any(part.requires_grad for part in z):
            return solution
        z = _WithValue.apply(*value, *z)
        return replace(solution, z=z[0] if single else z)

    def _damped(self, image: Tensor, z: Tensor) -> Tensor:
        return (1 - self.damping) * image + self.damping * z


class _WithValue(torch.autograd.Function):
    """Returns the first half of the tensors; gradients go to the second."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.clone() for tensor in tensors[: len(tensors) // 2])

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (*((None,) * len(gradient)), *gradient)
