"""Find z with z = f(z), or x with A x = b. Built on torch alone; knows nothing of gradients."""

from monai_deqkan.solvers.anderson import AndersonSolver
from monai_deqkan.solvers.auto import AutoSolver
from monai_deqkan.solvers.base import LINEAR_SOLVERS, SOLVERS, FixedPointSolver, LinearSolver, SolverState
from monai_deqkan.solvers.broyden import BroydenSolver
from monai_deqkan.solvers.budget import solve_budget
from monai_deqkan.solvers.conjugate_gradient import ConjugateGradientSolver
from monai_deqkan.solvers.fixed_point_iteration import FixedPointIteration
from monai_deqkan.solvers.gmres import GMRESSolver
from monai_deqkan.solvers.recorder import SolveRecord, SolveRecorder, open_recorders
from monai_deqkan.solvers.solution import (
    ConvergenceError,
    ConvergenceWarning,
    Solution,
    SolveStatistics,
    SolveStatus,
)
from monai_deqkan.solvers.solve import solve_fixed_point, solve_linear, take
from monai_deqkan.solvers.spectral import jacobian_frobenius_norm, jacobian_norm, spectral_radius

__all__ = [
    "LINEAR_SOLVERS",
    "SOLVERS",
    "AndersonSolver",
    "AutoSolver",
    "BroydenSolver",
    "ConjugateGradientSolver",
    "ConvergenceError",
    "ConvergenceWarning",
    "FixedPointIteration",
    "FixedPointSolver",
    "GMRESSolver",
    "LinearSolver",
    "Solution",
    "SolveRecord",
    "SolveRecorder",
    "SolveStatistics",
    "SolveStatus",
    "SolverState",
    "jacobian_frobenius_norm",
    "jacobian_norm",
    "open_recorders",
    "solve_budget",
    "solve_fixed_point",
    "solve_linear",
    "spectral_radius",
    "take",
]
