"""DEQLayer: a layer whose output is the equilibrium of a cell."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
import torch._functorch.config
from monai.data import MetaTensor
from torch import Tensor, nn

from monai_deqkan.adjoints import ADJOINTS, Adjoint
from monai_deqkan.networks.layers.lipschitz import frozen_weights
from monai_deqkan.solvers import SOLVERS, FixedPointSolver, Solution
from monai_deqkan.solvers.solution import State, at_least_float32, state_parts

__all__ = ["DEQLayer"]


class DEQLayer(nn.Module):
    r"""Return the equilibrium :math:`z^* = f(z^*, x)` of a cell.

    The injection ``x`` is computed once, outside. The solve runs without autocast, in float32 at least (in half
    precision a solver with a useful tolerance does not converge), with the cell's normalized weights computed once.
    Solve statistics go to open :class:`~monai_deqkan.solvers.SolveRecorder` blocks. A MetaTensor is solved as a plain
    tensor, which is faster, and the equilibrium gets its metadata. The cell may be compiled, ``torch.compile(cell)``;
    torch's setting ``torch._functorch.config.donated_buffer`` then becomes False, as its backward pass is repeated.

    Args:
        cell: module ``cell(z, x) -> z'`` that keeps the shape of ``z``, treats samples independently and is constant
            during a solve: no dropout or batch statistics inside. It may have a method ``initial_state(x)``.
        solver: a solver, its registered name, or ``(name, settings)``.
        adjoint: an adjoint, its registered name, or ``(name, settings)``.

    Raises:
        ValueError: for an unknown name or a setting out of range.
        TypeError: for an unknown setting.

    Example:
        >>> import torch
        >>> class Cell(torch.nn.Module):
        ...     def forward(self, z, x):
        ...         return 0.5 * torch.tanh(z) + x
        >>> DEQLayer(Cell())(torch.zeros(1, 2))
        tensor([[0., 0.]])

    Reference:
        S. Bai, J. Z. Kolter and V. Koltun, "Deep equilibrium models", NeurIPS 2019.
    """

    def __init__(
        self,
        cell: nn.Module,
        solver: str | tuple[str, dict[str, Any]] | FixedPointSolver = "anderson",
        adjoint: str | tuple[str, dict[str, Any]] | Adjoint = "implicit",
    ) -> None:
        super().__init__()
        self.cell = cell
        self.solver = SOLVERS.build(solver)
        self.adjoint = ADJOINTS.build(adjoint)

    def forward(self, x: Any, z0: State | None = None) -> State:
        """Return the equilibrium.

        Args:
            x: per-sample data of the cell: a tensor ``(B, *)``, a tuple, or an object with ``take(rows)``.
            z0: start (warm start); by default the cell's ``initial_state(x)``, or zeros like ``x``.

        Returns:
            The equilibrium, of the shape of ``z0``.
        """
        return self.solve(x, z0).z

    def solve(self, x: Any, z0: State | None = None) -> Solution:
        """Return the equilibrium with the statistics of its solve; arguments as in :meth:`forward`.

        Raises:
            TypeError: if there is neither a ``z0`` nor a way to make one, or the cell has half-precision parameters.
        """
        _check_precision(self.cell)
        meta = next((part for part in (x if isinstance(x, tuple) else (x,)) if isinstance(part, MetaTensor)), None)
        x = at_least_float32(x)
        start = self._initial_state(x) if z0 is None else at_least_float32(z0)
        device = state_parts(start)[0].device
        is_compiled = _is_compiled(self.cell)
        if is_compiled:
            _keep_buffers()
        with ExitStack() as stack:
            stack.enter_context(torch.autocast(device.type, enabled=False))
            stack.enter_context(frozen_weights(self.cell))
            solution = self.adjoint.solve(self.cell, start, self.solver, x)
        if is_compiled:
            for part in state_parts(solution.z):
                if part.requires_grad:  # the backward pass may have a thread, and so settings, of its own
                    part.register_hook(_keep_buffers)
        if meta is None or not isinstance(solution.z, Tensor):
            return solution
        return replace(solution, z=MetaTensor(solution.z).copy_meta_from(meta))

    def extra_repr(self) -> str:
        """Name the solver and the adjoint with their settings."""
        return f"solver={self.solver}, adjoint={self.adjoint}"

    def _initial_state(self, x: Any) -> State:
        make = getattr(self.cell, "initial_state", None)
        if callable(make):
            return make(x)
        if isinstance(x, Tensor):
            return torch.zeros_like(x)
        raise TypeError(
            f"No start for the solve: `x` is a {type(x).__name__}, not a tensor. Pass `z0`, or give the cell a method "
            "`initial_state(x)`."
        )


def _is_compiled(cell: nn.Module) -> bool:
    return any(
        isinstance(part, torch._dynamo.OptimizedModule) or part._compiled_call_impl is not None
        for part in cell.modules()
    )


def _keep_buffers(gradient: Tensor | None = None) -> None:
    """Have compiled graphs keep what they saved: a backward solve goes through that of one evaluation many times."""
    torch._functorch.config.donated_buffer = False


def _check_precision(cell: nn.Module) -> None:
    dtype = next((parameter.dtype for parameter in cell.parameters()), torch.float32)
    if dtype in (torch.float16, torch.bfloat16):
        raise TypeError(
            f"An equilibrium is solved in float32 at least; the cell's parameters are {dtype}. Call `.float()` on the "
            "DEQLayer, or keep the whole network in float32 and use autocast, which the solve leaves out."
        )
