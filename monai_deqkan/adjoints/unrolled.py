"""Gradients back through every step of the solver: the reference for all others, at a memory that grows with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from monai_deqkan.adjoints.base import ADJOINTS, Adjoint
from monai_deqkan.solvers import FixedPointSolver, Solution, solve_fixed_point
from monai_deqkan.solvers.solution import State

__all__ = ["UnrolledAdjoint"]


@ADJOINTS.register("unrolled")
@dataclass(frozen=True, kw_only=True)
class UnrolledAdjoint(Adjoint):
    """Differentiate through the solver itself, every step of it.

    The gradient is exactly that of the iterate that is returned, converged or not. Memory grows with the number of
    evaluations; double backward works.
    """

    def solve(self, cell: Callable[..., State], z0: State, solver: FixedPointSolver, x: Any) -> Solution:
        """Solve with gradients enabled as the caller has them."""
        return solve_fixed_point(cell, z0, solver, x)
