"""Conformance check for fixed-point solvers, own ones and plug-ins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from monai_deqkan.solvers import FixedPointSolver, SolveStatus, solve_fixed_point

__all__ = ["check_solver"]


def _problem(batch: int, size: int, dtype: torch.dtype) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor]:
    """Return a contraction ``f(z, x)`` of factor 0.8 in the Euclidean norm, and its per-sample data."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    matrix = (0.8 * matrix / torch.linalg.matrix_norm(matrix, 2)).to(dtype)
    x = torch.randn(batch, size, generator=generator, dtype=torch.float64).to(dtype)
    return lambda z, x: torch.sin(z) @ matrix.to(z.device) + x, x


def check_solver(solver: FixedPointSolver) -> None:
    """Check that a solver keeps the promises that the rest of the package relies on.

    It must solve a contraction (in float32, float64 and complex64, as a tuple too), count and limit evaluations, give
    the same result for a sample alone and in a batch, not depend on the unit of the state, survive a NaN or divergence
    in another sample, report what it did not solve, and refuse settings that it does not know.

    Args:
        solver: the solver, with settings of a user's choice; tolerances and limits are replaced.

    Raises:
        AssertionError: naming the first promise that is broken.
    """
    for dtype, rtol in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        tight = replace(solver, rtol=rtol, atol=0.0, max_iter=200, on_failure="ignore")
        f, x = _problem(4, 12, dtype)
        solution = solve_fixed_point(f, torch.zeros_like(x), tight, x)
        z = _tensor(solution.z)
        residual = (f(z, x) - z).double().pow(2).mean(1).sqrt() / f(z, x).double().pow(2).mean(1).sqrt()
        _require(bool(solution.converged.all()), f"a contraction of factor 0.8 is solved in {dtype}")
        _require(bool((residual <= 1.5 * rtol).all()), f"the residual is what the tolerance says in {dtype}")
        _require(z.dtype == dtype and z.shape == x.shape, "shape and dtype of the state are kept")

        alone = _tensor(solve_fixed_point(f, torch.zeros_like(x[1:2]), tight, x[1:2]).z)
        _require(torch.allclose(alone, z[1:2], rtol=0, atol=100 * rtol), "a sample alone equals itself in a batch")

        poisoned = x.clone()
        poisoned[2] = float("nan")
        mixed = solve_fixed_point(f, torch.zeros_like(x), tight, poisoned)
        others = torch.tensor([0, 1, 3])
        _require(
            torch.allclose(_tensor(mixed.z)[others], z[others], rtol=0, atol=100 * rtol),
            "a NaN in one sample leaves the others intact",
        )
        _require(int(mixed.stats.status[2]) == SolveStatus.NON_FINITE, "a NaN is reported as such")
        _require(bool(torch.isfinite(_tensor(mixed.z)).all()), "the best finite iterate is returned after a NaN")

    made_anew: Any = type(solver)
    try:
        made_anew(max_itr=3)
    except TypeError:
        pass
    else:
        _require(False, "a misspelt setting raises a TypeError")
    _check_hard_maps(replace(solver, rtol=1e-4, atol=0.0, max_iter=100, on_failure="ignore"))

    f, x = _problem(4, 12, torch.float32)
    tight = replace(solver, rtol=1e-4, atol=0.0, max_iter=200, on_failure="ignore")
    counts = []
    for unit in (1e-4, 1.0, 1e3):
        scaled = solve_fixed_point(lambda z, x, s=unit: s * f(z / s, x / s), torch.zeros_like(x), tight, x * unit)
        _require(bool(scaled.converged.all()), f"a state in a unit of {unit:g} is solved too")
        counts.append(scaled.stats.evaluations)
    spread = torch.stack(counts).amax(0) - torch.stack(counts).amin(0)
    _require(bool((spread <= 1).all()), "the number of evaluations does not depend on the unit of the state")
    for limit in (0, 1, 2):
        limited = solve_fixed_point(f, torch.zeros_like(x), replace(tight, max_iter=limit, rtol=0.0), x)
        _require(bool((limited.stats.evaluations == limit).all()), "max_iter counts evaluations and is kept")

    complex_x = torch.complex(x, -x)
    rotated = solve_fixed_point(lambda z, x: 0.5j * z + x, torch.zeros_like(complex_x), tight, complex_x)
    _require(
        torch.allclose(_tensor(rotated.z), complex_x / (1 - 0.5j), rtol=1e-3, atol=1e-3), "a complex state is solved"
    )
    pair = solve_fixed_point(lambda z, x: (0.5 * z[0] + x, 0.5 * z[1] + z[0][:, :2]), (x * 0, x[:, :2] * 0), tight, x).z
    _require(torch.allclose(pair[0], 2 * x, rtol=1e-3, atol=1e-3), "a state that is a tuple is solved")


def _check_hard_maps(solver: FixedPointSolver) -> None:
    """Check a batch with a sample that has no fixed point, and a map that expands around its own."""
    f, x = _problem(3, 12, torch.float32)
    lost = torch.tensor([[0.0], [1.0], [0.0]])

    def with_lost(z: Tensor, data: tuple[Tensor, Tensor]) -> Tensor:
        return f(z, data[0]) + data[1] * (3.0 + 1e3 * z.abs())

    alone = solve_fixed_point(f, torch.zeros_like(x), solver, x)
    mixed = solve_fixed_point(with_lost, torch.zeros_like(x), solver, (x, lost))
    others = torch.tensor([0, 2])
    _require(
        torch.allclose(_tensor(mixed.z)[others], _tensor(alone.z)[others], rtol=0, atol=1e-2)
        and bool(((mixed.stats.evaluations - alone.stats.evaluations)[others].abs() <= 1).all()),
        "a diverging sample leaves the others intact",
    )
    _require(not bool(mixed.converged[1]), "a sample without a fixed point is not reported as solved")
    _require(bool(torch.isfinite(_tensor(mixed.z)).all()), "the best finite iterate is returned after divergence")

    matrix = torch.randn(8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    matrix = (3.0 * matrix / torch.linalg.eigvals(matrix).abs().max()).float()
    x = x[:, :8]
    solution = solve_fixed_point(lambda z, x: z @ matrix.to(z.device) + x, torch.zeros_like(x), solver, x)
    z = _tensor(solution.z)
    image = z @ matrix + x
    solved = torch.linalg.vector_norm(image - z, dim=1) <= 2 * solver.rtol * torch.linalg.vector_norm(image, dim=1)
    _require(bool((solved | ~solution.converged).all()), "a map of spectral radius 3 is solved or reported as unsolved")


def _tensor(state: Tensor | tuple[Tensor, ...]) -> Tensor:
    return state if isinstance(state, Tensor) else state[0]


def _require(kept: bool, promise: str) -> None:
    if not kept:
        raise AssertionError(f"The solver breaks a promise: {promise}.")
