"""Broyden's method with limited memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from monai_deqkan.solvers.anderson import finite_or_zero
from monai_deqkan.solvers.base import SOLVERS
from monai_deqkan.solvers.products import inner_products
from monai_deqkan.solvers.secant import SecantSolver, SecantState

__all__ = ["BroydenSolver", "broyden_weights", "halved_step"]


@SOLVERS.register("broyden")
@dataclass(frozen=True, kw_only=True)
class BroydenSolver(SecantSolver):
    r"""Solve :math:`g(z) = f(z) - z = 0` by Broyden's ("good") quasi-Newton method, each sample on its own.

    The inverse Jacobian starts as :math:`H_0 = -\beta I` with :math:`\beta = 1 - d` and takes up the last
    ``history_size`` pairs :math:`s = \Delta z,\ y = \Delta g`. With these as columns of :math:`S, Y`, and
    :math:`M` the strictly lower triangle (in time) of :math:`S^T S`,

    .. math::
        z_{k+1} = z_k - H g_k = z_k + \beta g_k + (S + \beta Y)\, \beta\, W^{-1} S^T g_k,
        \qquad W = -M - \beta\, S^T Y .

    It needs no contraction: the method of choice where :math:`f` has a fixed point but expands around it. Its residual
    may grow for some steps; it then restarts from the best iterate by a plain step, after which the sample's
    :math:`\beta` is halved, so that the same way is not taken twice. All quantities scale with the state.

    Args:
        history_size: number of pairs kept, two states each; memory is touched as it fills. On a linear map of ``n``
            dimensions the method ends within ``2 n`` steps if all are kept.
        damping: :math:`d`, dimensionless, in ``[0, 1)``.
        restart_growth: a sample whose residual norm exceeds its best one this many times starts anew from the best.
        rtol: see :class:`FixedPointSolver`.
        atol: see :class:`FixedPointSolver`.
        max_iter: see :class:`FixedPointSolver`.
        on_failure: see :class:`FixedPointSolver`.

    Raises:
        ValueError: if a setting lies outside its range.

    Reference:
        C. G. Broyden, "A class of methods for solving nonlinear simultaneous equations", Math. Comp. 19 (1965) 577-593;
        R. H. Byrd, J. Nocedal and R. B. Schnabel, "Representations of quasi-Newton matrices and their use in limited
        memory methods", Math. Program. 63 (1994) 129-156, section 6, for the compact form of the inverse (derived from
        theirs of the matrix by the Sherman-Morrison-Woodbury formula). No line search; the restart is added.
    """

    history_size: int = 40
    restart_growth: float = 1e3

    def no_products(self, z: Tensor) -> Tensor:
        """Return the products of an empty history: those of ``S`` with itself, then those with ``Y``."""
        rows = self.history_size + 1
        return z.new_zeros(len(z), rows, 2 * rows, dtype=torch.float64)

    def weights(self, state: SecantState, newest: int, count: int) -> tuple[Tensor, Tensor]:
        """Return the weights of the quasi-Newton step."""
        rows = self.history_size + 1
        older = (newest - 1) % rows
        s, y, g = state.f[:, older] - state.g[:, older], state.g[:, older], state.g[:, newest]
        # S = delta_f - delta_g is not stored.
        vectors = torch.stack((s, y, g), dim=1)
        with_f, with_g = (inner_products(vectors, history[:, :count]) for history in (state.f, state.g))
        with_s = with_f - with_g
        products = state.products.clone()
        products[:, older, :count] = with_s[:, 0]
        products[:, :count, older] = with_s[:, 0]
        products[:, older, rows : rows + count] = with_g[:, 0]
        products[:, :count, rows + older] = with_s[:, 1]
        products[:, :count, rows + newest] = with_s[:, 2]
        overlaps, curvatures = (part[:, :count, :count] for part in products.split(rows, dim=2))
        return broyden_weights(overlaps, curvatures, newest, state.damping), products

    def damping_after_restart(self, state: SecantState, restart: Tensor) -> Tensor:
        """Halve the step of the samples that restart."""
        return torch.where(restart, halved_step(state.damping), state.damping)


def halved_step(damping: Tensor) -> Tensor:
    """Return the damping ``d`` that makes ``1 - d`` half as large."""
    return 0.5 * (1.0 + damping)


def broyden_weights(overlaps: Tensor, curvatures: Tensor, newest: int, damping: Tensor) -> Tensor:
    r"""Return :math:`\gamma = -\beta W^{-1} S^T g`, float64 ``(B, m)``.

    Args:
        overlaps: :math:`S^T S`, float64 ``(B, m, m)``; zero where empty.
        curvatures: :math:`S^T Y`, likewise, with :math:`S^T g` in the column ``newest``.
        newest: row of the newest residual, which is no pair; the pairs follow backwards in time, around the ring.
        damping: :math:`1 - \beta`, float64 ``(B,)``.
    """
    count = overlaps.shape[1]
    age = (newest - torch.arange(count, device=overlaps.device)) % count
    beta = 1.0 - damping[:, None, None]
    diagonal = overlaps.diagonal(dim1=-2, dim2=-1)
    used = (diagonal > 0) & (age > 0)
    # Rows without a pair become those of the identity, and get the weight zero.
    scale = diagonal.where(used, 1.0).rsqrt().where(used, 0.0)
    later = age[:, None] < age[None, :]  # the row's pair is later than the column's
    matrix = (-overlaps.where(later, 0.0) - beta * curvatures) * scale[:, :, None] * scale[:, None, :]
    matrix = matrix + torch.diag_embed((~used).to(matrix.dtype))
    solution, _ = torch.linalg.solve_ex(matrix, (curvatures[:, :, newest] * scale)[:, :, None])
    return finite_or_zero(-beta[..., 0] * solution[:, :, 0] * scale)
