"""Conformance check for adjoints, own ones and plug-ins."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from monai_deqkan.adjoints import Adjoint
from monai_deqkan.solvers import AndersonSolver, ConvergenceWarning
from monai_deqkan.solvers.solution import State

__all__ = ["check_adjoint"]

_SOLVER = AndersonSolver(rtol=1e-12, max_iter=200, on_failure="ignore")
_SIZE, _PART = 6, 4


def check_adjoint(adjoint: Adjoint, rtol: float = 1e-5, *, exact: bool = True, double_backward: bool = False) -> None:
    r"""Check an adjoint's gradient against the closed form of a linear cell, at several scales of the loss.

    For :math:`f(z, x) = z W + x` the equilibrium is :math:`x (I - W)^{-1}`; gradients with respect to ``x`` and ``W``
    follow from it by automatic differentiation. States are real, complex, and tuples.

    Args:
        adjoint: the adjoint; its own tolerance must be below ``rtol``.
        rtol: largest relative error of a gradient.
        exact: whether the gradient is meant to be the equilibrium's. One that is not must still scale with the loss and
            point to the same side as the exact one.
        double_backward: whether to check the gradient of a gradient too; wants ``exact``.

    Raises:
        AssertionError: naming the first promise that is broken.
        ValueError: if ``double_backward`` is asked for without ``exact``.
    """
    if double_backward and not exact:
        raise ValueError("`double_backward` is compared with the exact derivative; it wants `exact=True`.")
    for name, problem in _problems().items():
        z = problem.equilibrium(adjoint, *problem.leaves())
        closed_form = problem.equilibrium(None, *problem.leaves())
        _require(_error(z, closed_form) <= 1e-10, f"the value is the solution ({name} state)")
        unscaled = problem.gradients(adjoint, 1.0)
        for scale in (1.0, 1e-4, 1e-8):
            found, right = problem.gradients(adjoint, scale), problem.gradients(None, scale)
            for one, other, first in zip(found, right, unscaled, strict=True):
                where = f"at loss scale {scale:g} ({name} state)"
                _require(_error(one, scale * first) <= rtol, f"the gradient scales with the loss {where}")
                if exact:
                    error = _error(one, other)
                    _require(error <= rtol, f"the gradient {where} is right; it is off by {error:.1e}")
                else:
                    _require(float((one * other.conj()).real.sum()) > 0, f"the gradient {where} points uphill")
        if double_backward:
            for one, other in zip(problem.penalty_gradients(adjoint), problem.penalty_gradients(None), strict=True):
                error = _error(one, other)
                _require(error <= 10 * rtol, f"the second derivative is right ({name} state); it is off by {error:.1e}")
    _check_rows(adjoint, rtol)
    with torch.no_grad():
        plain = _tensor(adjoint.solve(lambda z, x: 0.5 * z + x, torch.zeros(1, 2), _SOLVER, torch.ones(1, 2)).z)
    _require(not plain.requires_grad, "without gradients enabled it makes no graph")


@dataclass(frozen=True)
class _Problem:
    """A linear cell on a state that is one tensor or, ``split``, a tuple of two."""

    matrix: Tensor
    data: Tensor
    split: bool

    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.matrix.clone().requires_grad_(), self.data.clone().requires_grad_()

    def equilibrium(self, adjoint: Adjoint | None, W: Tensor, x: Tensor) -> Tensor:
        """Return the equilibrium by the adjoint, or in closed form."""
        if adjoint is None:
            return x @ torch.linalg.inv(torch.eye(_SIZE, dtype=W.dtype) - W)
        start = torch.zeros_like(self.data)
        if not self.split:
            return _tensor(adjoint.solve(lambda z, x: z @ W + x, start, _SOLVER, x).z)

        def cell(z: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, ...]:
            return (torch.cat(z, dim=1) @ W + x).split((_PART, _SIZE - _PART), dim=1)

        parts = adjoint.solve(cell, start.split((_PART, _SIZE - _PART), dim=1), _SOLVER, x).z
        return torch.cat(tuple(parts), dim=1)

    def gradients(self, adjoint: Adjoint | None, scale: float) -> tuple[Tensor, ...]:
        W, x = self.leaves()
        loss = scale * (self.equilibrium(adjoint, W, x) - 1.0).abs().pow(2).sum()
        return torch.autograd.grad(loss, (W, x))

    def penalty_gradients(self, adjoint: Adjoint | None) -> tuple[Tensor, ...]:
        """Return the gradients of the squared norm of a gradient."""
        W, x = self.leaves()
        loss = (self.equilibrium(adjoint, W, x) - 1.0).abs().pow(2).sum()
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(slope.abs().pow(2).sum(), (W, x))


def _problems() -> dict[str, _Problem]:
    problems = {}
    for name, dtype, split in (
        ("real", torch.float64, False),
        ("complex", torch.complex128, False),
        ("tuple", torch.float64, True),
    ):
        generator = torch.Generator().manual_seed(0)
        matrix = torch.randn(_SIZE, _SIZE, generator=generator, dtype=dtype)
        data = torch.randn(3, _SIZE, generator=generator, dtype=dtype)
        problems[name] = _Problem(0.7 * matrix / torch.linalg.matrix_norm(matrix, 2), data, split)
    return problems


def _check_rows(adjoint: Adjoint, rtol: float) -> None:
    """Check that a NaN in the data or in the loss of one sample leaves the gradients of the others intact."""
    problem = _problems()["real"]
    clean, broken = torch.ones(3, 1, dtype=torch.float64), torch.tensor([[1.0], [float("nan")], [1.0]]).double()

    def slope(data_factor: Tensor, loss_factor: Tensor) -> Tensor:
        x = (data_factor * problem.data).requires_grad_()
        z = _tensor(adjoint.solve(lambda z, x: z @ problem.matrix + x, torch.zeros_like(x), _SOLVER, x).z)
        return torch.autograd.grad((loss_factor * z.pow(2)).sum(), x)[0][[0, 2]]

    right = slope(clean, clean)
    for what, factors in {"the data": (broken, clean), "the loss": (clean, broken)}.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            error = _error(slope(*factors), right)
        _require(error <= rtol, f"a NaN in {what} of one sample leaves the gradients of the others intact")


def _error(found: Tensor, right: Tensor) -> float:
    return float((found - right).detach().norm() / right.detach().norm())


def _tensor(state: State) -> Tensor:
    return state if isinstance(state, Tensor) else state[0]


def _require(condition: bool, promise: str) -> None:
    if not condition:
        raise AssertionError(f"The adjoint breaks a promise: {promise}.")
