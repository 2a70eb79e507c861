"""A choice of method per sample, made from the residuals."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from monai_deqkan._checks import check_int, check_range
from monai_deqkan.solvers.anderson import anderson_weights, with_newest_products
from monai_deqkan.solvers.base import SOLVERS, SolverState
from monai_deqkan.solvers.broyden import broyden_weights, halved_step
from monai_deqkan.solvers.products import inner_products
from monai_deqkan.solvers.secant import SecantSolver, SecantState

__all__ = ["AutoSolver"]


_PLAIN, _ANDERSON, _BROYDEN = 0, 1, 2


@dataclass(frozen=True)
class _Secant(SecantState):
    method: Tensor  # (B,) int64: one of the three above


@dataclass(frozen=True)
class _AutoState(SolverState):
    step: int  # number of steps done
    z: Tensor  # (B, N) previous iterate
    norm: Tensor  # (B,) float64 size of the newest residual
    before: Tensor  # (B,) float64 size of the one before
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
    second evaluation on, each sample is looked at every ``check_every`` steps, and accelerated if its residual is above
    ``fast_factor`` times the one before. An
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
        return _AutoState(0, z, norm, norm, torch.zeros_like(norm, dtype=torch.int64), norm)

    def note_residual(self, state: Any, residual: Tensor) -> Any:
        """Keep the residual's size for the choice."""
        return replace(state, norm=residual, before=state.norm)

    def step(self, state: Any, z: Tensor, fz: Tensor) -> tuple[Tensor, Any]:
        """Return each sample's next iterate by its own method."""
        step, secant, previous = state.step + 1, state.secant, state.z
        state = replace(state, step=step, z=z)
        if (step - 2) % self.check_every == 0:
            begins = ~(state.norm <= self.fast_factor * state.before)
            if secant is not None:
                begins = begins & (secant.method == _PLAIN)
            if bool(begins.any()):
                secant = self._with_started(state, previous, begins)
                state = replace(
                    state,
                    looked=torch.where(begins, step, state.looked),
                    reached=torch.where(begins, state.norm, state.reached),
                )
        if secant is None:
            return fz, state
        z_next, stepped = super().step(replace(secant, norm=state.norm), z, fz)
        secant = cast(_Secant, stepped)
        plain = secant.method == _PLAIN
        if bool(plain.any()):
            z_next = torch.where(plain[:, None], fz, z_next)
        return z_next, self._judged(replace(state, secant=secant))

    def _with_started(self, state: _AutoState, previous: Tensor, begins: Tensor) -> _Secant:
        """Return the history, for samples that begin to use it with nothing but the evaluation before the present one.

        So far ``z = f(previous)``. Batch mates may have begun before; a sample's own history does not depend on that.
        """
        empty = super().init(previous)
        newest = (state.step - 2) % (self.history_size + 1)
        fresh = _Secant(
            step=state.step - 1,
            f=torch.zeros_like(empty.f).select_scatter(state.z, 1, newest),
            g=torch.zeros_like(empty.g).select_scatter(state.z - previous, 1, newest),
            products=empty.products,
            norm=state.before,
            best_z=previous,
            best_f=state.z,
            best_norm=state.before,
            damping=empty.damping,
            method=torch.where(begins, _ANDERSON, _PLAIN),
        )
        return fresh if state.secant is None else _merged(begins, fresh, state.secant)

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
        return z.new_zeros(len(z), self.history_size + 1, self.history_size + 1, dtype=torch.float64)

    def weights(self, state: SecantState, newest: int, count: int) -> tuple[Tensor, Tensor]:
        """Return Anderson's weights, or Broyden's where a sample has gone over to them."""
        gram = with_newest_products(state, newest, count)
        gamma = anderson_weights(gram[:, :count, :count], newest, self.regularization)
        broyden = _uses_broyden(state)
        if not bool(broyden.any()):
            return gamma, gram
        rows = broyden.nonzero()[:, 0]
        y = state.g[rows, :count]
        s = state.f[rows, :count] - y
        found = broyden_weights(inner_products(s, s), inner_products(s, y), newest, state.damping[rows])
        return gamma.index_copy(0, rows, found), gram

    def growth_limit(self, state: SecantState) -> Tensor | float:
        """Return how much a residual may grow before a restart."""
        return torch.where(_uses_broyden(state), 100.0 * self.restart_growth, self.restart_growth)

    def damping_after_restart(self, state: SecantState, restart: Tensor) -> Tensor:
        """Halve the step of samples that restart Broyden's method."""
        return torch.where(restart & _uses_broyden(state), halved_step(state.damping), state.damping)


def _merged(chosen: Tensor, new: _Secant, old: _Secant) -> _Secant:
    """Return ``new`` for some samples ``(B,)`` and ``old`` for the others."""
    values: dict[str, Any] = {}
    for name, value in vars(old).items():
        if isinstance(value, Tensor):
            values[name] = torch.where(chosen.view(-1, *[1] * (value.ndim - 1)), getattr(new, name), value)
    return replace(old, **values)


def _uses_broyden(state: SecantState) -> Tensor:
    return cast(_Secant, state).method == _BROYDEN
