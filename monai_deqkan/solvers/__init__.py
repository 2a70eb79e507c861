"""Find z with z = f(z), or x with A x = b. Built on torch alone; knows nothing of gradients."""

from monai_deqkan.solvers.anderson import AndersonSolver
from monai_deqkan.solvers.base import LINEAR_SOLVERS, SOLVERS, FixedPointSolver, LinearSolver, SolverState
from monai_deqkan.solvers.conjugate_gradient import ConjugateGradientSolver
from monai_deqkan.solvers.fixed_point_iteration import FixedPointIteration
from monai_deqkan.solvers.recorder import SolveRecord, SolveRecorder, open_recorders
from monai_deqkan.solvers.solution import (
    ConvergenceError,
    ConvergenceWarning,
    Solution,
    SolveStatistics,
    SolveStatus,
)
from monai_deqkan.solvers.solve import solve_fixed_point, solve_linear, take

__all__ = [
    "LINEAR_SOLVERS",
    "SOLVERS",
    "AndersonSolver",
    "ConjugateGradientSolver",
    "ConvergenceError",
    "ConvergenceWarning",
    "FixedPointIteration",
    "FixedPointSolver",
    "LinearSolver",
    "Solution",
    "SolveRecord",
    "SolveRecorder",
    "SolveStatistics",
    "SolveStatus",
    "SolverState",
    "open_recorders",
    "solve_fixed_point",
    "solve_linear",
    "take",
]
