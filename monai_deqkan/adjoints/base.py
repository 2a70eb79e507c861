"""What an adjoint is: it solves, and returns a state that carries the gradient of the equilibrium."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from monai_deqkan.plugins import Registry
from monai_deqkan.solvers import FixedPointSolver, Solution
from monai_deqkan.solvers.solution import State

__all__ = ["ADJOINTS", "Adjoint"]


class Adjoint(ABC):
    r"""Give the solution of :math:`z = f(z, x)` a gradient with respect to ``x`` and the parameters of :math:`f`."""

    @abstractmethod
    def solve(self, cell: Callable[..., State], z0: State, solver: FixedPointSolver, x: Any) -> Solution:
        """Solve ``z = cell(z, x)`` from ``z0`` and return a differentiable solution.

        Args:
            cell: map ``cell(z, x)`` that treats samples independently; constant during the solve.
            z0: start, a tensor ``(B, *)`` or a tuple of such tensors.
            solver: how to solve.
            x: per-sample data handed on to ``cell``.

        Returns:
            The solution; without gradients enabled, a plain one.
        """


ADJOINTS: Registry[Adjoint] = Registry("monai_deqkan.adjoints", "adjoint", Adjoint)
