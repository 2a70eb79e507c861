"""Damped fixed-point (Picard) iteration."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from monai_deqkan._checks import check_range
from monai_deqkan.solvers.base import SOLVERS, FixedPointSolver, SolverState

__all__ = ["FixedPointIteration"]


@SOLVERS.register("fixed_point_iteration")
@dataclass(frozen=True, kw_only=True)
class FixedPointIteration(FixedPointSolver):
    r"""Iterate the map itself, with damping.

    .. math:: z_{k+1} = (1 - d)\, f(z_k) + d\, z_k

    Converges where ``f`` contracts, at the rate of its contraction factor (undamped). The cheapest step there is: the
    method of choice where ``f`` is cheap or contracts fast.

    Args:
        damping: weight :math:`d` of the old iterate, dimensionless, in ``[0, 1)``.
        rtol: see :class:`FixedPointSolver`.
        atol: see :class:`FixedPointSolver`.
        max_iter: see :class:`FixedPointSolver`.
        on_failure: see :class:`FixedPointSolver`.

    Raises:
        ValueError: if a setting lies outside its range.

    Reference:
        W. R. Mann, "Mean value methods in iteration", Proc. AMS 4 (1953) 506-510; our :math:`d` is one minus the
        averaging weight used there.
    """

    damping: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("damping", self.damping, 0.0, 1.0, open_high=True)

    def init(self, z: Tensor) -> SolverState:
        """Return an empty state."""
        return SolverState()

    def step(self, state: SolverState, z: Tensor, fz: Tensor) -> tuple[Tensor, SolverState]:
        """Return the damped image of ``z``."""
        return (fz if self.damping == 0.0 else fz.lerp(z, self.damping)), state
