"""Gradients back through every step of the solver: the reference for all others, at a memory that grows with it."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

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

    Args:
        checkpoint: keep only the state of each evaluation, not what the cell computes inside, and evaluate the cell
            again in the backward pass: the same gradient for less memory and more time.
    """

    checkpoint: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.checkpoint, bool):
            raise TypeError(f"`checkpoint` must be True or False; got {self.checkpoint!r}.")

    def solve(self, cell: Callable[..., State], z0: State, solver: FixedPointSolver, x: Any) -> Solution:
        """Solve with gradients enabled as the caller has them."""
        if self.checkpoint and torch.is_grad_enabled():
            return solve_fixed_point(_checkpointed(cell), z0, solver, x)
        return solve_fixed_point(cell, z0, solver, x)


def _checkpointed(cell: Callable[..., State]) -> Callable[..., State]:
    # What holds here, such as weights frozen for the solve, must hold when the cell is evaluated again.
    context = copy_context()

    def evaluate(*arguments: Any) -> State:
        return context.copy().run(cell, *arguments)

    def call(*arguments: Any) -> State:
        # A cell is constant during a solve: no random numbers to replay.
        return checkpoint(evaluate, *arguments, use_reentrant=False, preserve_rng_state=False)

    return call
