"""The generalized minimal residual method, restarted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from monai_deqkan._checks import check_int
from monai_deqkan.solvers.base import LINEAR_SOLVERS, LinearSolver, SolverState
from monai_deqkan.solvers.products import inner_products

__all__ = ["GMRESSolver"]


@dataclass(frozen=True)
class _GMRESState(SolverState):
    x: Tensor  # (B, N)
    residual: Tensor  # (B, N) b - A x, from the recursion
    start: Tensor  # (B, N) x at the last restart
    start_residual: Tensor  # (B, N) its residual
    norm: Tensor  # (B,) float64 norm of that
    vectors: Tensor  # (B, m + 1, N) orthonormal basis of the Krylov space
    hessenberg: Tensor  # (B, m + 1, m) float64
    step: int  # number of columns in use


@LINEAR_SOLVERS.register("gmres")
@dataclass(frozen=True, kw_only=True)
class GMRESSolver(LinearSolver):
    r"""Solve ``A x = b`` for a general square ``A``, each sample on its own, by minimal residuals over Krylov spaces.

    Args:
        history_size: number of directions kept, one state each; then the method restarts from the current solution.
            On ``n`` dimensions it ends within ``n`` applications of ``A`` if all are kept.
        rtol: see :class:`LinearSolver`; the residual is the one of the recursion.
        atol: see :class:`LinearSolver`.
        max_iter: see :class:`LinearSolver`.
        on_failure: see :class:`LinearSolver`.

    Raises:
        ValueError: if a setting lies outside its range.

    Reference:
        Y. Saad and M. H. Schultz, "GMRES: a generalized minimal residual algorithm for solving nonsymmetric linear
        systems", SIAM J. Sci. Stat. Comput. 7 (1986) 856-869, algorithm 4. Orthogonalization is done twice by classical
        Gram-Schmidt, and the solution is formed at every step, so that each sample can stop on its own.
    """

    history_size: int = 20
    rtol: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("history_size", self.history_size)

    def init(self, x: Tensor, residual: Tensor) -> _GMRESState:
        """Return the state at the start."""
        size, length = x.shape
        vectors = x.new_zeros(size, self.history_size + 1, length)
        hessenberg = x.new_zeros(size, self.history_size + 1, self.history_size, dtype=torch.float64)
        direction, norm = _normalized(residual)
        return _GMRESState(x, residual, x, residual, norm, _with_row(vectors, 0, direction), hessenberg, 0)

    def step(self, A: Callable[[Tensor], Tensor], state: _GMRESState) -> _GMRESState:
        """Extend the Krylov space by one direction and minimize the residual over it."""
        k = state.step
        image = A(state.vectors[:, k])
        basis = state.vectors[:, : k + 1]
        column = state.norm.new_zeros(len(image), k + 1)
        for _ in range(2):  # once is not enough against rounding
            overlap = inner_products(image[:, None], basis)[:, 0]
            image = image - (overlap.to(image.dtype)[:, None] @ basis)[:, 0]
            column = column + overlap
        direction, height = _normalized(image)
        vectors = _with_row(state.vectors, k + 1, direction)
        hessenberg = state.hessenberg.clone()
        hessenberg[:, : k + 1, k] = column
        hessenberg[:, k + 1, k] = height

        used = hessenberg[:, : k + 2, : k + 1]
        y = _least_squares(used, state.norm)
        x = state.start + (y.to(image.dtype)[:, None] @ vectors[:, : k + 1])[:, 0]
        gained = (used @ y[..., None])[..., 0]
        residual = state.start_residual - (gained.to(image.dtype)[:, None] @ vectors[:, : k + 2])[:, 0]
        if k + 1 < self.history_size:
            return _GMRESState(x, residual, state.start, state.start_residual, state.norm, vectors, hessenberg, k + 1)
        return self.init(x, residual)


def _normalized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows of norm one (zeros stay zeros) and the float64 norms."""
    norm = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    unit = rows.double() / torch.where(norm > 0, norm, torch.ones_like(norm))[:, None]
    return unit.to(rows.dtype), norm


def _with_row(vectors: Tensor, row: int, new: Tensor) -> Tensor:
    """Return the vectors with one set: in place if nothing needs the gradient of what they were."""
    if torch.is_grad_enabled():
        return vectors.select_scatter(new, 1, row)
    vectors[:, row] = new
    return vectors


def _least_squares(matrix: Tensor, norm: Tensor) -> Tensor:
    """Minimize ``|norm e_1 - matrix y|``; directions that the matrix maps to nothing get the weight zero."""
    safe = torch.nan_to_num(matrix, nan=0.0, posinf=0.0, neginf=0.0)  # a broken sample must not stop the others
    q, r = torch.linalg.qr(safe)
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    limit = 1e-14 * diagonal.abs().amax(dim=1, keepdim=True)
    empty = diagonal.abs() <= limit
    target = (q[:, 0] * norm[:, None]).where(~empty, 0.0)
    r = r + torch.diag_embed(torch.where(empty, 1.0 - diagonal, 0.0))
    y = torch.linalg.solve_triangular(r, target[..., None], upper=True)[..., 0]
    return torch.where(torch.isfinite(matrix).flatten(1).all(dim=1)[:, None], y, torch.full_like(y, float("nan")))
