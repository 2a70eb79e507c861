"""The implicit gradient: one linear solve in place of a way back through every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from monai_deqkan.adjoints.base import ADJOINTS, Adjoint
from monai_deqkan.solvers import (
    AndersonSolver,
    FixedPointSolver,
    Solution,
    SolveRecorder,
    open_recorders,
    solve_fixed_point,
)
from monai_deqkan.solvers.solution import State

__all__ = ["ImplicitAdjoint"]


@ADJOINTS.register("implicit")
@dataclass(frozen=True, kw_only=True)
class ImplicitAdjoint(Adjoint):
    r"""Differentiate the equilibrium by the implicit function theorem.

    At :math:`z^* = f(z^*, x)` with Jacobian :math:`J = \partial f / \partial z`, the gradient of a loss :math:`\ell` is

    .. math::
        \frac{\partial \ell}{\partial x} = u^H \frac{\partial f}{\partial x}, \qquad
        u = J^H u + \frac{\partial \ell}{\partial z^*},

    and the same for the parameters. The system for :math:`u` is solved by a fixed-point solver of its own, with its own
    tolerance, relative to :math:`u`: the gradient's relative error does not depend on the scale of the loss. Memory is
    that of one evaluation of :math:`f` and of the solver's own state, whatever the number of steps. The gradient is
    right where the forward solve converged. It can be taken once: differentiating it again raises an error.

    Args:
        solver: how to solve for :math:`u`.

    Reference:
        S. Bai, J. Z. Kolter and V. Koltun, "Deep equilibrium models", NeurIPS 2019, theorem 1. There the system is
        solved by Broyden's method to an absolute tolerance.
    """

    solver: FixedPointSolver = field(default_factory=lambda: AndersonSolver(rtol=1e-4))

    def solve(self, cell: Callable[..., State], z0: State, solver: FixedPointSolver, x: Any) -> Solution:
        """Solve without a graph, then attach the gradient by one evaluation at the solution."""
        with torch.no_grad():
            solution = solve_fixed_point(cell, z0, solver, x)
        if not torch.is_grad_enabled():
            return solution
        leaves = tuple(part.detach().requires_grad_() for part in _parts(solution.z))
        z = leaves[0] if isinstance(solution.z, Tensor) else leaves
        images = _parts(cell(z) if x is None else cell(z, x))
        if not _reaches_other_leaves(images, leaves):
            return solution
        backward = _BackwardSolve(images, leaves, self.solver, open_recorders())
        outputs = _AttachGradient.apply(backward, len(leaves), *images, *(leaf.detach() for leaf in leaves))
        return replace(solution, z=outputs[0] if isinstance(solution.z, Tensor) else tuple(outputs))


class _BackwardSolve:
    """Solves ``u = J^H u + gradient`` on the graph of one evaluation."""

    def __init__(
        self,
        images: tuple[Tensor, ...],
        leaves: tuple[Tensor, ...],
        solver: FixedPointSolver,
        recorders: tuple[SolveRecorder, ...],
    ) -> None:
        self.images, self.leaves, self.solver, self.recorders = images, leaves, solver, recorders

    def __call__(self, gradient: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # Stopped samples stay in the batch of the graph; their rows are zero and their results unused.
        size = gradient[0].shape[0]
        rows = torch.arange(size, device=gradient[0].device)

        def adjoint_map(u: tuple[Tensor, ...], data: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            index, own_gradient = data[0], data[1:]
            whole = [torch.zeros_like(g).index_copy(0, index, part) for g, part in zip(gradient, u, strict=True)]
            products = torch.autograd.grad(
                self.images, self.leaves, whole, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            return tuple(p[index] + g for p, g in zip(products, own_gradient, strict=True))

        solution = solve_fixed_point(
            adjoint_map, gradient, self.solver, (rows, *gradient), kind="backward", recorders=self.recorders
        )
        return _parts(solution.z)


class _AttachGradient(torch.autograd.Function):
    """Returns the solution; on the way back hands ``u`` in place of the gradient to the graph of one evaluation."""

    @staticmethod
    def forward(ctx: Any, backward: _BackwardSolve, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.backward_solve = backward
        ctx.count = count
        return tuple(tensor.clone() for tensor in tensors[count:])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            # The graph of the evaluation exists already; only products with its Jacobian are formed here.
            u = ctx.backward_solve(tuple(g.detach() for g in gradient))
        return (None, None, *(part.detach() for part in u), *([None] * ctx.count))


def _parts(state: State) -> tuple[Tensor, ...]:
    return (state,) if isinstance(state, Tensor) else tuple(state)


def _reaches_other_leaves(images: tuple[Tensor, ...], leaves: tuple[Tensor, ...]) -> bool:
    """Tell whether anything but the state itself wants a gradient: a parameter, or what ``x`` was made from."""
    own = {id(leaf) for leaf in leaves}
    stack = [image.grad_fn for image in images]
    seen = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in own:
            return True
        stack.extend(parent for parent, _ in node.next_functions)
    return False
