"""A choice of method per sample, made from the residuals."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from torch import Tensor

from monai_deqkan._checks import check_int, check_range
from monai_deqkan.solvers.anderson import anderson_weights
from monai_deqkan.solvers.base import SOLVERS, SolverState
from monai_deqkan.solvers.broyden import broyden_weights, halved_step
from monai_deqkan.solvers.secant import SecantSolver, SecantState, inner_products

__all__ = ["AutoSolver"]


_PLAIN, _ANDERSON, _BROYDEN = 0, 1, 2


@dataclass(frozen=True)
class _Secant(SecantState):
    method: Tensor  # (B,) int64: one of the three above


@dataclass(frozen=True)
class _AutoState(SolverState):
    step: int  # number of steps done
    z: Tensor  # (B, N) previous iterate
    norm: Tensor  # (B,) float64 residual norm when it was last taken
    looked: Tensor  # (B,) int64 step at which an accelerated sample's progress was last judged
    reached: Tensor  # (B,) float64 best norm then
    secant: _Secant | None = None  # made when the first sample needs more than plain iteration

    def take(self, rows: Tensor) -> _AutoState:
        state = super().take(rows)
        return state if self.secant is None else replace(state, secant=self.secant.take(rows))


@SOLVERS.register("auto")
@dataclass(frozen=True, kw_only=True)
class AutoSolver(SecantSolver):
    r"""Iterate plainly while that goes fast, accelerate by Anderson's method where it does not, fall back to Broyden's.

    Each sample has its own method. It starts with plain iteration, which costs nothing but the evaluations. From its
    second evaluation on, a sample whose residual shrinks by less than ``fast_factor`` a step is accelerated. An
    accelerated sample whose best residual has not halved within ``2 * history_size`` evaluations goes over to
    Broyden's method, which needs no contraction. All three share one history, so nothing is lost at a change.

    Args:
        history_size: number of differences kept, as in :class:`AndersonSolver`.
        damping: weight of the old iterate in accelerated steps, in ``[0, 1)``.
        restart_growth: see :class:`AndersonSolver`; a hundred times as much is allowed with Broyden's method.
        regularization: see :class:`AndersonSolver`.
        fast_factor: largest residual ratio of successive steps that counts as fast, dimensionless, in ``[0, 1)``.
        check_every: number of steps between two looks at samples that are iterated plainly.
        rtol: see :class:`FixedPointSolver`.
        atol: see :class:`FixedPointSolver`.
        max_iter: see :class:`FixedPointSolver`.
        on_failure: see :class:`FixedPointSolver`.

    Raises:
        ValueError: if a setting lies outside its range.

    Reference:
        The methods' own; the rule for the choice is ours. ``tests/benchmarks/bench_solvers.py`` compares.
    """

    history_size: int = 8
    regularization: float = 1e-10
    fast_factor: float = 0.4
    check_every: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("regularization", self.regularization, 0.0, open_low=True)
        check_range("fast_factor", self.fast_factor, 0.0, 1.0, open_high=True)
        check_int("check_every", self.check_every)

    def init(self, z: Tensor) -> Any:
        """Return a state without history."""
        norm = torch.full((len(z),), float("inf"), dtype=torch.float64, device=z.device)
        return _AutoState(0, z, norm, torch.zeros_like(norm, dtype=torch.int64), norm)

    def step(self, state: Any, z: Tensor, fz: Tensor) -> tuple[Tensor, Any]:
        """Return each sample's next iterate by its own method."""
        step, secant, slow, previous = state.step + 1, state.secant, None, state.z
        look = (step - 2) % self.check_every == 0
        if look or (step - 1) % self.check_every == 0:
            norm = torch.linalg.vector_norm((fz - z).detach(), dim=1, dtype=torch.float64)
            slow = ~(norm <= self.fast_factor * state.norm) if look else None
            state = replace(state, norm=norm)
        state = replace(state, step=step, z=z)
        if slow is not None and bool(slow.any()):
            secant = self._started(previous, z) if secant is None else secant
            begins = slow & (secant.method == _PLAIN)
            secant = replace(secant, method=torch.where(begins, _ANDERSON, secant.method))
            state = replace(
                state,
                looked=torch.where(begins, step, state.looked),
                reached=torch.where(begins, state.norm, state.reached),
            )
        if secant is None:
            return fz, state
        z_next, secant = super().step(secant, z, fz)
        z_next = torch.where((secant.method == _PLAIN)[:, None], fz, z_next)
        return z_next, self._judged(replace(state, secant=secant))

    def _started(self, previous: Tensor, z: Tensor) -> _Secant:
        """Return a history that holds the evaluation before the present one: so far ``z = f(previous)``."""
        g = z - previous
        norm = torch.linalg.vector_norm(g.detach(), dim=1, dtype=torch.float64)
        empty = super().init(z)
        values = {field.name: getattr(empty, field.name) for field in fields(empty)}
        values.update(step=1, f=z, g=g, best_f=z, best_g=g, best_norm=norm)
        return _Secant(**values, method=torch.full_like(norm, _PLAIN, dtype=torch.int64))

    def _judged(self, state: _AutoState) -> _AutoState:
        """Hand samples over to Broyden's method whose best residual has not halved for long."""
        secant = state.secant
        if secant is None:
            return state
        due = (secant.method == _ANDERSON) & (state.step - state.looked >= 2 * self.history_size)
        stalled = due & ~(secant.best_norm <= 0.5 * state.reached)
        return replace(
            state,
            secant=replace(secant, method=torch.where(stalled, _BROYDEN, secant.method)),
            looked=torch.where(due, state.step, state.looked),
            reached=torch.where(due, secant.best_norm, state.reached),
        )

    def no_products(self, z: Tensor) -> Tensor:
        """Return the Gram matrix of an empty history."""
        return z.new_zeros(len(z), self.history_size, self.history_size, dtype=torch.float64)

    def weights(self, state: SecantState, slot: int, g: Tensor) -> tuple[Tensor, SecantState]:
        """Return Anderson's weights, or Broyden's where a sample has gone over to them."""
        gamma, state = anderson_weights(state, slot, g, self.regularization)
        broyden = _uses_broyden(state)
        if not bool(broyden.any()):
            return gamma, state
        rows = broyden.nonzero()[:, 0]
        part, residual = state.take(rows), g[rows]
        delta_z = part.delta_f - part.delta_g
        found = inner_products(delta_z, *delta_z.unbind(1), *part.delta_g.unbind(1), residual)
        weights = broyden_weights(found[..., :-1], found[..., -1], slot, part.damping)
        return gamma.index_copy(0, rows, weights), state

    def growth_limit(self, state: SecantState) -> Tensor | float:
        """Return how much a residual may grow before a restart."""
        return torch.where(_uses_broyden(state), 100.0 * self.restart_growth, self.restart_growth)

    def damping_after_restart(self, state: SecantState, restart: Tensor) -> Tensor:
        """Halve the step of samples that restart Broyden's method."""
        return torch.where(restart & _uses_broyden(state), halved_step(state.damping), state.damping)


def _uses_broyden(state: SecantState) -> Tensor:
    return cast(_Secant, state).method == _BROYDEN
