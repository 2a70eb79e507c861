"""The implicit gradient: one linear solve in place of a way back through every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from monai_deqkan._checks import did_you_mean
from monai_deqkan.adjoints.base import ADJOINTS, Adjoint
from monai_deqkan.adjoints.outer_tensors import Edges, outer_gradients, outer_tensors, watched
from monai_deqkan.solvers import (
    LINEAR_SOLVERS,
    SOLVERS,
    AndersonSolver,
    FixedPointSolver,
    LinearSolver,
    Solution,
    SolveRecorder,
    SolveStatus,
    open_recorders,
    solve_fixed_point,
    solve_linear,
)
from monai_deqkan.solvers.solution import State, state_parts

__all__ = ["ImplicitAdjoint"]

_Parts = tuple[Tensor, ...]
_Solver = FixedPointSolver | LinearSolver


@ADJOINTS.register("implicit")
@dataclass(frozen=True, kw_only=True)
class ImplicitAdjoint(Adjoint):
    r"""Differentiate the equilibrium by the implicit function theorem.

    At :math:`z^* = f(z^*, x)` with Jacobian :math:`J = \partial f / \partial z`, the gradient of a loss :math:`\ell` is

    .. math::
        \frac{\partial \ell}{\partial x} = u^H \frac{\partial f}{\partial x}, \qquad
        u = J^H u + \frac{\partial \ell}{\partial z^*},

    and the same for the parameters. The system for :math:`u` is solved by a solver of its own, with its own tolerance,
    relative to :math:`u`: the gradient's relative error does not depend on the scale of the loss. Memory is that of one
    evaluation of :math:`f` and of the solver's own state, whatever the number of steps. The gradient is right where the
    forward solve converged.

    It can be differentiated again, any number of times: with ``create_graph=True`` the backward pass evaluates the cell
    twice more, and :math:`u` is treated as the equilibrium of its own equation, by the same rule.

    Args:
        solver: how to solve for :math:`u`: a fixed-point solver, or a linear one for
            :math:`(I - J^H)\, u = \partial \ell / \partial z^*`; itself, its registered name, or ``(name, settings)``.

    Raises:
        ValueError: for an unknown name or a setting out of range.
        TypeError: for an unknown setting.

    Reference:
        S. Bai, J. Z. Kolter and V. Koltun, "Deep equilibrium models", NeurIPS 2019, theorem 1. There the system is
        solved by Broyden's method to an absolute tolerance, and once.
    """

    solver: str | tuple[str, dict[str, Any]] | FixedPointSolver | LinearSolver = field(
        default_factory=lambda: AndersonSolver(rtol=1e-4)
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "solver", _built(self.solver))

    def solve(self, cell: Callable[..., State], z0: State, solver: FixedPointSolver, x: Any) -> Solution:
        """Solve without a graph, then attach the gradient by one evaluation at the solution."""
        if not torch.is_grad_enabled():
            return solve_fixed_point(cell, z0, solver, x)
        edges: Edges = {}
        with torch.no_grad():
            solution = solve_fixed_point(watched(cell, edges), z0, solver, x)
        single = isinstance(solution.z, Tensor)
        value = state_parts(solution.z)
        device = value[0].device.type
        # A second derivative evaluates the cell later, maybe in another thread, but in the same circumstances.
        context, amp = copy_context(), (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))

        def f(z: _Parts, extras: _Parts) -> _Parts:
            state = z[0] if single else z
            with torch.autocast(device, enabled=amp[0], dtype=amp[1]):
                return state_parts(context.copy().run(cell, *((state,) if x is None else (state, x))))

        equilibrium = _Equilibrium(f, value, (), cast(_Solver, self.solver), open_recorders())
        equilibrium.outer = outer_tensors(equilibrium.images, equilibrium.leaves, edges)
        if not equilibrium.outer:
            return solution
        z = equilibrium.attached()
        return replace(solution, z=z[0] if single else z)


class _Equilibrium:
    """A solved equation ``z = f(z, extras)`` and the linear equation behind its gradient.

    Args:
        f: map of states; may use other tensors too, listed in the attribute ``outer``.
        value: the solution.
        extras: what else ``f`` is given.
        solver: how to solve the linear equation.
        recorders: who gets the statistics.
    """

    def __init__(
        self,
        f: Callable[[_Parts, _Parts], _Parts],
        value: _Parts,
        extras: _Parts,
        solver: _Solver,
        recorders: Sequence[SolveRecorder],
        outer: _Parts = (),
    ) -> None:
        self.f, self.extras, self.outer, self.solver, self.recorders = f, extras, outer, solver, recorders
        self.leaves = tuple(part.detach().requires_grad_() for part in value)
        self.images = f(self.leaves, extras)

    def attached(self) -> _Parts:
        """Return the solution with its gradient."""
        values = (leaf.detach() for leaf in self.leaves)
        z = _AttachGradient.apply(self, *self.images, *values, *self.extras, *self.outer)
        return tuple(part.view_as(part) for part in z)  # so that hooks of z see the gradient of the loss alone

    def solve_backward(self, gradient: _Parts) -> _Parts:
        """Return the solution of ``u = J^H u + gradient``, without a graph, on the graph of one evaluation."""

        def jacobian(u: Any) -> _Parts:
            return _products(self.images, self.leaves, u, retain_graph=True)

        options: dict[str, Any] = {"kind": "backward", "recorders": self.recorders}
        with torch.no_grad(), torch.autocast(gradient[0].device.type, enabled=False):
            if isinstance(self.solver, LinearSolver):

                def difference(u: Any) -> _Parts:
                    return tuple(part - product for part, product in zip(u, jacobian(u), strict=True))

                solution = solve_linear(difference, gradient, self.solver, **options)
                # A start at zero must not make a gradient of NaN a gradient of zero.
                broken = solution.stats.status == SolveStatus.NON_FINITE
                return tuple(
                    torch.where(broken.view(-1, *[1] * (part.ndim - 1)), g, part)
                    for g, part in zip(gradient, state_parts(solution.z), strict=True)
                )

            # Stopped samples stay in the batch of the graph; their rows are zero and their results unused.
            def adjoint_map(u: _Parts, data: _Parts) -> _Parts:
                rows, own_gradient = data[0], data[1:]
                whole = [torch.zeros_like(g).index_copy(0, rows, part) for g, part in zip(gradient, u, strict=True)]
                return tuple(p[rows] + g for p, g in zip(jacobian(whole), own_gradient, strict=True))

            rows = torch.arange(gradient[0].shape[0], device=gradient[0].device)
            return state_parts(solve_fixed_point(adjoint_map, gradient, self.solver, (rows, *gradient), **options).z)

    def gradients(self, z: _Parts, gradient: _Parts) -> list[Tensor | None]:
        """Return the gradients of ``extras`` and ``outer`` as differentiable functions of all of them.

        Args:
            z: the solution with its gradient, as :meth:`attached` returned it.
            gradient: gradient of the loss with respect to ``z``.
        """
        count = len(z)
        u = _Equilibrium(
            self._adjoint_equation(count),
            self.solve_backward(tuple(part.detach() for part in gradient)),
            (*gradient, *z, *self.extras),
            self.solver,
            self.recorders,
            self.outer,
        ).attached()
        gate = _Gate()
        inside = _Passage.apply(gate, *z, *self.extras)
        images = self.f(inside[:count], inside[count:])
        pairs = [(image, part) for image, part in zip(images, u, strict=True) if image.requires_grad]
        with gate.closed():  # the way through z is what u stands for
            return outer_gradients([p[0] for p in pairs], (*inside[count:], *self.outer), [p[1] for p in pairs])

    def _adjoint_equation(self, count: int) -> Callable[[_Parts, _Parts], _Parts]:
        """Return the map ``u -> J^H u + gradient`` as a differentiable function of ``(*gradient, *z, *extras)``."""
        f = self.f

        def adjoint_map(u: _Parts, given: _Parts) -> _Parts:
            gradient, z, extras = given[:count], given[count : 2 * count], given[2 * count :]
            gate = _Gate()
            z = _Passage.apply(gate, *z)
            images = f(z, extras)
            with gate.closed():  # hooks of z, and what a cell differentiates inside, must not reach behind z
                products = _products(images, z, u, create_graph=True)
            return tuple(product + part for product, part in zip(products, gradient, strict=True))

        return adjoint_map


class _AttachGradient(torch.autograd.Function):
    """Returns the solution; on the way back hands ``u`` to the graph of one evaluation, or all gradients themselves."""

    @staticmethod
    def forward(ctx: Any, equilibrium: _Equilibrium, *tensors: Tensor) -> _Parts:
        ctx.set_materialize_grads(False)
        ctx.equilibrium = equilibrium
        count = len(equilibrium.leaves)
        z = tuple(tensor.clone() for tensor in tensors[count : 2 * count])
        ctx.save_for_backward(*z)
        return z

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        equilibrium, count = ctx.equilibrium, len(gradient)
        others = len(equilibrium.extras) + len(equilibrium.outer)
        if all(part is None for part in gradient):
            return (None,) * (1 + 2 * count + others)
        filled = tuple(
            torch.zeros_like(leaf) if part is None else part
            for part, leaf in zip(gradient, equilibrium.leaves, strict=True)
        )
        if torch.is_grad_enabled():
            found = equilibrium.gradients(ctx.saved_tensors, filled)
            return (None, *((None,) * (2 * count)), *found)
        return (None, *equilibrium.solve_backward(filled), *((None,) * (count + others)))


class _Gate:
    """Whether gradients may pass."""

    is_open = True

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Let none pass within the ``with`` block."""
        self.is_open = False
        try:
            yield
        finally:
            self.is_open = True


class _Passage(torch.autograd.Function):
    """Returns its arguments; gradients pass while the gate is open."""

    @staticmethod
    def forward(ctx: Any, gate: _Gate, *tensors: Tensor) -> _Parts:
        ctx.set_materialize_grads(False)
        ctx.gate = gate
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *(gradient if ctx.gate.is_open else (None,) * len(gradient)))


def _products(images: _Parts, z: _Parts, u: Sequence[Tensor], **options: bool) -> _Parts:
    """Return the products ``J^H u``, zeros where an image depends on nothing."""
    pairs = [(image, part) for image, part in zip(images, u, strict=True) if image.requires_grad]
    outputs, gradients = [image for image, _ in pairs], [part for _, part in pairs]
    return torch.autograd.grad(outputs, z, gradients, allow_unused=True, materialize_grads=True, **options)


def _built(spec: Any) -> _Solver:
    if isinstance(spec, (FixedPointSolver, LinearSolver)):
        return spec
    name = spec[0] if isinstance(spec, (tuple, list)) and spec else spec
    if not isinstance(name, str):
        return SOLVERS.build(spec)  # says what a solver is given by
    linear, fixed_point = LINEAR_SOLVERS.names(), SOLVERS.names()
    if name in linear:
        return LINEAR_SOLVERS.build(spec)
    if name not in fixed_point:
        known = [*fixed_point, *linear]
        raise ValueError(f"Unknown solver '{name}'; known ones are {', '.join(known)}.{did_you_mean(name, known)}")
    return SOLVERS.build(spec)
