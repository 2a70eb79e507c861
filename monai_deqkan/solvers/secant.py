"""What Anderson's and Broyden's methods share: a short history of differences, and a restart from the best iterate."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from monai_deqkan._checks import check_int, check_range
from monai_deqkan.solvers.base import FixedPointSolver, SolverState

__all__ = ["SecantSolver", "SecantState", "inner_products", "with_row"]

_LONG, _CHUNK = 1 << 14, 256  # of sums in float32: see inner_products


@dataclass(frozen=True)
class SecantState(SolverState):
    """What a secant method remembers.

    Attributes:
        step: number of steps done.
        delta_f: differences of successive ``f(z)``, shape ``(B, m, N)``, in a ring; zero where empty.
        delta_g: differences of successive residuals ``g = f(z) - z``, likewise.
        products: the inner products of the history that the method needs, float64 ``(B, m, *)``; zero where empty.
        f: previous ``f(z)``, shape ``(B, N)``.
        g: previous residual, shape ``(B, N)``.
        best_f: ``f`` at the iterate of the smallest residual, shape ``(B, N)``.
        best_g: that residual, shape ``(B, N)``.
        best_norm: its norm, float64 ``(B,)``.
        damping: weight of the old iterate, float64 ``(B,)``.
    """

    step: int
    delta_f: Tensor
    delta_g: Tensor
    products: Tensor
    f: Tensor
    g: Tensor
    best_f: Tensor
    best_g: Tensor
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
    def weights(self, state: SecantState, slot: int, g: Tensor) -> tuple[Tensor, SecantState]:
        r"""Return :math:`\gamma`, float64 ``(B, m)``, and the state with its products brought up to date.

        Args:
            state: with the newest differences in the history's row ``slot``, but without their products.
            slot: row of the newest differences.
            g: residual, shape ``(B, N)``. Empty rows of the history must get the weight zero.
        """

    @abstractmethod
    def no_products(self, z: Tensor) -> Tensor:
        """Return the products of an empty history, zeros ``(B, m, *)`` in float64."""

    def init(self, z: Tensor) -> SecantState:
        """Return a state with an empty history."""
        size, length = z.shape
        history = z.new_zeros(size, self.history_size, length)
        norm = torch.full((size,), float("inf"), dtype=torch.float64, device=z.device)
        damping = torch.full_like(norm, self.damping)
        return SecantState(0, history, torch.zeros_like(history), self.no_products(z), z, z, z, z, norm, damping)

    def step(self, state: SecantState, z: Tensor, fz: Tensor) -> tuple[Tensor, SecantState]:
        """Return the extrapolated iterate."""
        g = fz - z
        norm = torch.linalg.vector_norm(g.detach(), dim=1, dtype=torch.float64)
        state = _with_best(state, fz, g, norm)
        if state.step > 0:
            slot = (state.step - 1) % self.history_size
            delta_f = with_row(state.delta_f, slot, fz, state.f)
            delta_g = with_row(state.delta_g, slot, g, state.g)
            gamma, state = self.weights(replace(state, delta_f=delta_f, delta_g=delta_g), slot, g)
        else:
            gamma = g.new_zeros(len(g), self.history_size)
        gamma = gamma.to(z.dtype)[:, None]  # (B, 1, m)
        z_next = torch.baddbmm(fz[:, None], gamma, state.delta_f, alpha=-1.0)[:, 0]
        damping = state.damping.to(z.dtype)[:, None]
        if bool((damping != 0).any()):
            z_next = z_next - damping * torch.baddbmm(g[:, None], gamma, state.delta_g, alpha=-1.0)[:, 0]
        state = replace(state, step=state.step + 1, f=fz, g=g)
        restart = norm > self.growth_limit(state) * state.best_norm
        return self._restarted(state, z_next, restart) if bool(restart.any()) else (z_next, state)

    def _restarted(self, state: SecantState, z_next: Tensor, restart: Tensor) -> tuple[Tensor, SecantState]:
        """Forget the history of some samples ``(B,)`` and take a plain step from their best iterate."""
        keep, rows = (~restart)[:, None, None], restart[:, None]
        plain = state.best_f - state.damping.to(z_next.dtype)[:, None] * state.best_g
        return torch.where(rows, plain, z_next), replace(
            state,
            # Not by a product with zero: what has grown may be infinite.
            delta_f=state.delta_f.where(keep, 0.0),
            delta_g=state.delta_g.where(keep, 0.0),
            products=state.products.where(keep, 0.0),
            f=torch.where(rows, state.best_f, state.f),
            g=torch.where(rows, state.best_g, state.g),
            damping=self.damping_after_restart(state, restart),
        )

    def growth_limit(self, state: SecantState) -> Tensor | float:
        """Return how many times its best norm a residual may reach before its sample restarts."""
        return self.restart_growth

    def damping_after_restart(self, state: SecantState, restart: Tensor) -> Tensor:
        """Return the damping ``(B,)`` to go on with; by default the same."""
        return state.damping


def _with_best(state: SecantState, fz: Tensor, g: Tensor, norm: Tensor) -> SecantState:
    better = norm < state.best_norm
    if bool(better.all()):
        return replace(state, best_f=fz, best_g=g, best_norm=norm)
    rows = better[:, None]
    return replace(
        state,
        best_f=torch.where(rows, fz, state.best_f),
        best_g=torch.where(rows, g, state.best_g),
        best_norm=torch.where(better, norm, state.best_norm),
    )


def inner_products(rows: Tensor, *vectors: Tensor) -> Tensor:
    """Return the inner products of ``(B, m, N)`` with ``n`` vectors ``(B, N)`` in float64: ``(B, m, n)``.

    Long float32 rows are summed in float32 over chunks of 256 entries and in float64 over the chunks: on a CPU in a
    third of the time, with errors of 5e-10 of the product of the norms (N = 200 000), where plain float32 sums have
    1e-8. Entries so small or large that float32 could not hold their squares are converted first.
    """
    matrix = torch.stack(vectors, dim=1)  # (B, n, N)
    length = rows.shape[2]
    if rows.dtype == torch.float32 and length >= _LONG and _squares_fit(matrix):
        whole = length - length % _CHUNK
        left, right = (part[..., :whole].unflatten(2, (-1, _CHUNK)).transpose(1, 2) for part in (rows, matrix))
        # Sample by sample: (N / chunk, m, chunk) is a view, with the samples in front it would be a copy.
        chunks = torch.stack([torch.bmm(a, b.mT).sum(0, dtype=torch.float64) for a, b in zip(left, right, strict=True)])
        return chunks + rows[..., whole:].double() @ matrix[..., whole:].double().mT
    return rows.double() @ matrix.double().mT


def _squares_fit(vectors: Tensor) -> bool:
    """Tell whether products of such numbers stay well inside float32's range; earlier vectors have been asked too."""
    size = torch.linalg.vector_norm(vectors.detach(), dim=2)
    return bool(((size > 1e-12) & (size < 1e15)).all())


def with_row(history: Tensor, slot: int, new: Tensor, old: Tensor | None = None) -> Tensor:
    """Return ``history`` with ``new`` (less ``old``) in one row: in place if nothing needs the old one's gradient."""
    if torch.is_grad_enabled():
        index = torch.tensor([slot], device=history.device)
        row = new if old is None else new - old
        return history.index_copy(1, index, row[:, None])
    if old is None:
        history[:, slot] = new
    else:
        torch.sub(new, old, out=history[:, slot])
    return history
