"""What Anderson's and Broyden's methods share: a short history of differences, and a restart from the best iterate."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from monai_deqkan._checks import check_int, check_range
from monai_deqkan.solvers.base import FixedPointSolver, SolverState

__all__ = ["SecantSolver", "SecantState"]


@dataclass(frozen=True)
class SecantState(SolverState):
    """What a secant method remembers.

    The newest ``f(z)`` and residual stand in the history themselves, where the next step turns them into differences in
    place: no vector of the state's size is copied or held twice.

    Attributes:
        step: number of steps done; the newest row of the history is ``(step - 1) % (m + 1)``.
        f: the newest ``f(z)`` and the last differences of successive ones, ``(B, m + 1, N)``, in a ring that fills from
            row 0; rows not used yet hold anything.
        g: the newest residual ``f(z) - z`` and the last differences, likewise.
        products: the inner products of the history that the method needs, float64 ``(B, m + 1, *)``.
        norm: norm of the newest residual, float64 ``(B,)``, up to a factor common to all steps.
        best_z: iterate of the smallest residual, shape ``(B, N)``.
        best_f: ``f`` there, shape ``(B, N)``.
        best_norm: the norm there.
        damping: weight of the old iterate, float64 ``(B,)``.
    """

    step: int
    f: Tensor
    g: Tensor
    products: Tensor
    norm: Tensor
    best_z: Tensor
    best_f: Tensor
    best_norm: Tensor
    damping: Tensor


@dataclass(frozen=True, kw_only=True)
class SecantSolver(FixedPointSolver):
    r"""Base of the methods that extrapolate from the differences of the last evaluations.

    .. math:: z_{k+1} = f(z_k) - d\, g_k - (\Delta F - d\, \Delta G)\, \gamma_k

    A method says by :meth:`weights` what :math:`\gamma` is. The first step, and the first after a restart, have no
    history and are plain damped ones.

    Args:
        history_size: number :math:`m` of differences kept, at least 1.
        damping: :math:`d`, dimensionless, in ``[0, 1)``.
        restart_growth: a sample whose residual norm exceeds its best one this many times starts anew from the best.
        rtol: see :class:`FixedPointSolver`.
        atol: see :class:`FixedPointSolver`.
        max_iter: see :class:`FixedPointSolver`.
        on_failure: see :class:`FixedPointSolver`.

    Raises:
        ValueError: if a setting lies outside its range.
    """

    history_size: int = 6
    damping: float = 0.0
    restart_growth: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("history_size", self.history_size)
        check_range("damping", self.damping, 0.0, 1.0, open_high=True)
        check_range("restart_growth", self.restart_growth, 1.0, open_low=True)

    @abstractmethod
    def weights(self, state: SecantState, newest: int, count: int) -> tuple[Tensor, Tensor]:
        r"""Return :math:`\gamma`, float64 ``(B, count)``, and the state's products brought up to date.

        Args:
            state: with the history that includes the newest evaluation, but with the products before it.
            newest: row of the newest values; the row before it holds the newest differences. Its weight must be zero,
                as those of rows that are empty after a restart.
            count: number of rows in use.
        """

    @abstractmethod
    def no_products(self, z: Tensor) -> Tensor:
        """Return the products of an empty history, zeros ``(B, m + 1, *)`` in float64."""

    def init(self, z: Tensor) -> SecantState:
        """Return a state with an empty history."""
        f, g = z.new_empty(2, len(z), self.history_size + 1, z.shape[1])
        norm = torch.full((len(z),), float("inf"), dtype=torch.float64, device=z.device)
        damping = torch.full_like(norm, self.damping)
        return SecantState(0, f, g, self.no_products(z), norm, z, z, norm, damping)

    def note_residual(self, state: SecantState, residual: Tensor) -> SecantState:
        """Keep the residual's size for the next step."""
        return replace(state, norm=residual)

    def step(self, state: SecantState, z: Tensor, fz: Tensor) -> tuple[Tensor, SecantState]:
        """Return the extrapolated iterate."""
        rows = self.history_size + 1
        newest, count = state.step % rows, min(state.step + 1, rows)
        state = _with_newest(_with_best(state, z, fz), newest, z, fz)
        coefficients = z.new_zeros(len(z), count)
        if count > 1:
            gamma, products = self.weights(state, newest, count)
            coefficients = -gamma.to(z.dtype)
            state = replace(state, products=products)
        coefficients[:, newest] = 1.0
        z_next = _combined(coefficients, state.f)
        if bool(state.damping.any()):
            z_next = z_next - state.damping.to(z.dtype)[:, None] * _combined(coefficients, state.g)
        if state.norm is state.best_norm:
            return z_next, state
        restart = state.norm > self.growth_limit(state) * state.best_norm
        return self._restarted(state, z_next, restart, newest) if bool(restart.any()) else (z_next, state)

    def _restarted(
        self, state: SecantState, z_next: Tensor, restart: Tensor, newest: int
    ) -> tuple[Tensor, SecantState]:
        """Forget the history of some samples ``(B,)`` and take a plain step from their best iterate."""
        keep, rows = (~restart)[:, None, None], restart[:, None]
        best_g = state.best_f - state.best_z
        plain = state.best_f - state.damping.to(z_next.dtype)[:, None] * best_g
        # Not by a product with zero: what has grown may be infinite.
        f, g = state.f.where(keep, 0.0), state.g.where(keep, 0.0)
        f = f.select_scatter(torch.where(rows, state.best_f, f[:, newest]), 1, newest)
        g = g.select_scatter(torch.where(rows, best_g, g[:, newest]), 1, newest)
        products, damping = state.products.where(keep, 0.0), self.damping_after_restart(state, restart)
        return torch.where(rows, plain, z_next), replace(state, f=f, g=g, products=products, damping=damping)

    def growth_limit(self, state: SecantState) -> Tensor | float:
        """Return how many times its best norm a residual may reach before its sample restarts."""
        return self.restart_growth

    def damping_after_restart(self, state: SecantState, restart: Tensor) -> Tensor:
        """Return the damping ``(B,)`` to go on with; by default the same."""
        return state.damping


def _with_best(state: SecantState, z: Tensor, fz: Tensor) -> SecantState:
    better = state.norm < state.best_norm
    if bool(better.all()):
        return replace(state, best_z=z, best_f=fz, best_norm=state.norm)
    if not bool(better.any()):
        return state
    rows = better[:, None]
    return replace(
        state,
        best_z=torch.where(rows, z, state.best_z),
        best_f=torch.where(rows, fz, state.best_f),
        best_norm=torch.where(better, state.norm, state.best_norm),
    )


def _with_newest(state: SecantState, newest: int, z: Tensor, fz: Tensor) -> SecantState:
    """Return the state with a new evaluation in its history: in place if nothing needs the old one's gradient."""
    rows, first = state.f.shape[1], state.step == 0
    older = (newest - 1) % rows
    if torch.is_grad_enabled():
        f, g = (_pushed(*pair, newest, older, first) for pair in ((state.f, fz), (state.g, fz - z)))
        return replace(state, step=state.step + 1, f=f, g=g)
    state.f[:, newest] = fz
    torch.sub(fz, z, out=state.g[:, newest])
    if not first:
        for history in (state.f, state.g):
            torch.sub(history[:, newest], history[:, older], out=history[:, older])
    return replace(state, step=state.step + 1)


def _pushed(history: Tensor, value: Tensor, newest: int, older: int, first: bool) -> Tensor:
    history = history.select_scatter(value, 1, newest)
    return history if first else history.select_scatter(value - history[:, older], 1, older)


def _combined(coefficients: Tensor, history: Tensor) -> Tensor:
    """Return a weighted sum of the rows in use, ``(B, N)``."""
    return torch.bmm(coefficients[:, None], history[:, : coefficients.shape[1]])[:, 0]
