"""Other tolerances and limits for the solves inside a ``with`` block, without touching the networks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from monai_deqkan.solvers.base import FixedPointSolver
from monai_deqkan.solvers.fixed_point_iteration import FixedPointIteration

__all__ = ["solve_budget", "with_budget"]

_OPEN: ContextVar[tuple[dict[str, Any], ...]] = ContextVar("monai_deqkan_solve_budgets", default=())


@contextmanager
def solve_budget(
    *,
    rtol: float | None = None,
    atol: float | None = None,
    max_iter: int | None = None,
    on_failure: str | None = None,
) -> Iterator[None]:
    """Let every equilibrium inside the block be solved to another tolerance, with another limit of evaluations.

    The weights stay as they are: an equilibrium does not depend on how it is found, so the same network can be asked
    for a quick or an exact answer. Each sample still stops on its own; a
    :class:`~monai_deqkan.solvers.SolveRecorder` tells what was spent. Gradients' and linear solves keep their own
    settings. Blocks may be nested: the inner one wins where it says something. Holds for the thread (or asynchronous
    task) that entered it, and for eager execution: exported networks have their settings built in.

    Args:
        rtol: relative tolerance, in place of the solver's; None leaves it.
        atol: absolute tolerance, likewise.
        max_iter: most evaluations, likewise.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"``, likewise.

    Yields:
        Nothing.

    Raises:
        ValueError: if a setting lies outside its range (on entry).

    Example:
        >>> import torch
        >>> from monai_deqkan.solvers import FixedPointIteration, SolveRecorder, solve_budget, solve_fixed_point
        >>> with SolveRecorder() as recorder, solve_budget(rtol=1e-2):
        ...     solution = solve_fixed_point(torch.cos, torch.zeros(1, 1), FixedPointIteration(rtol=1e-6))
        >>> int(recorder.evaluations()) < 20
        True
    """
    wanted: dict[str, Any] = {"rtol": rtol, "atol": atol, "max_iter": max_iter, "on_failure": on_failure}
    given = {name: value for name, value in wanted.items() if value is not None}
    FixedPointIteration(**given)  # checks them as every solver does
    _OPEN.set((*_OPEN.get(), given))
    try:
        yield
    finally:
        # By identity, not by token: blocks may be closed in another order than they were opened.
        _OPEN.set(tuple(budget for budget in _OPEN.get() if budget is not given))


def with_budget(solver: FixedPointSolver) -> FixedPointSolver:
    """Return the solver with the settings of the enclosing :func:`solve_budget` blocks; itself outside of any."""
    budget = {name: value for given in _OPEN.get() for name, value in given.items()}
    return replace(solver, **budget) if budget else solver
