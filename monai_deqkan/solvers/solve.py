"""The loop around every solver: limits, stopping per sample, the best iterate, statistics, warnings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from monai_deqkan._checks import check_tensor
from monai_deqkan.solvers.base import FixedPointSolver, LinearSolver
from monai_deqkan.solvers.budget import with_budget
from monai_deqkan.solvers.recorder import SolveRecorder, open_recorders
from monai_deqkan.solvers.solution import Solution, SolveStatistics, SolveStatus, State

__all__ = ["solve_fixed_point", "solve_linear", "take"]


def take(x: Any, rows: Tensor) -> Any:
    """Return per-sample data restricted to some samples of the batch.

    Args:
        x: a tensor with the batch first, a tuple of such data, an object with a method ``take(rows)``, or None.
        rows: indices of the samples, int64 of shape ``(b,)``.

    Raises:
        TypeError: if ``x`` is of another kind.
    """
    if x is None:
        return None
    if isinstance(x, Tensor):
        return x[rows]
    if isinstance(x, (tuple, list)):
        return tuple(take(item, rows) for item in x)
    if callable(getattr(x, "take", None)):
        return x.take(rows)
    raise TypeError(
        f"Per-sample data must be tensors, tuples of them, or have a method `take(rows)`; got {type(x).__name__}."
    )


def solve_fixed_point(
    f: Callable[..., State],
    z0: State,
    solver: FixedPointSolver,
    x: Any = None,
    *,
    kind: str = "forward",
    recorders: Sequence[SolveRecorder] | None = None,
) -> Solution:
    r"""Find :math:`z` with :math:`z = f(z)` or, with per-sample data, :math:`z = f(z, x)`.

    Each sample stops on its own when ``rms(f(z) - z) <= atol + rtol * rms(f(z))``; ``f`` then sees the others only,
    together with their rows of ``x``. A sample that becomes NaN or infinite stops too and leaves the others intact.
    Gradients flow through every step where they are enabled.

    Args:
        f: map that treats samples independently and keeps shapes.
        z0: start, a real or complex tensor ``(B, *)`` or a tuple of such tensors; iterates are kept in float32
            at least.
        solver: the method and its settings; an enclosing :func:`solve_budget` changes those of ``"forward"`` solves.
        x: per-sample data handed on to ``f`` (see :func:`take`), or None: then ``f`` is called with ``z`` alone.
        kind: what a :class:`SolveRecorder` files this solve under.
        recorders: recorders that get the statistics; by default those open here.

    Returns:
        The solution, with statistics per sample.

    Raises:
        TypeError: if ``z0`` is no state.
        ValueError: if ``f`` changes the shape of the state.
        ConvergenceError: if a sample does not converge and ``solver.on_failure`` is ``"raise"``.

    Example:
        >>> import torch
        >>> from monai_deqkan.solvers import AndersonSolver, solve_fixed_point
        >>> solve_fixed_point(torch.cos, torch.zeros(1, 1), AndersonSolver(rtol=1e-6)).z
        tensor([[0.7391]])
    """
    solver = with_budget(solver) if kind == "forward" else solver
    layout = _Layout(z0)
    z = layout.pack(z0)
    tracker = _Tracker(z, layout.size, solver.max_iter)
    state = solver.init(z)
    while tracker.running and tracker.evaluations < solver.max_iter:
        image = layout.unpack(z)
        fz = layout.pack(f(image) if x is None else f(image, x), expected=z.shape)
        residual, scale = layout.rms(fz - z), layout.rms(fz)
        keep = tracker.update(z, residual, scale, solver.has_converged(residual, scale))
        if keep is not None:
            z, fz, state, x = z[keep], fz[keep], state.take(keep), take(x, keep)
        if tracker.running and tracker.evaluations < solver.max_iter:
            z, state = solver.step(state, z, fz)
    return _finish(tracker, layout, solver, kind, recorders)


def solve_linear(
    A: Callable[[State], State],
    b: State,
    solver: LinearSolver,
    x0: State | None = None,
    *,
    kind: str = "linear",
    recorders: Sequence[SolveRecorder] | None = None,
) -> Solution:
    r"""Find :math:`x` with :math:`A x = b`, each sample on its own.

    A sample stops when ``rms(b - A x) <= atol + rtol * rms(b)``. ``A`` always sees the whole batch (operators hold
    per-sample data); stopped samples are left as they are.

    Args:
        A: linear map that treats samples independently and keeps shapes.
        b: right-hand side, a real or complex tensor ``(B, *)`` or a tuple of such tensors.
        solver: the method and its settings.
        x0: start; zero by default, which saves one application of ``A``.
        kind: what a :class:`SolveRecorder` files this solve under.
        recorders: recorders that get the statistics; by default those open here.

    Returns:
        The solution ``x`` as ``solution.z``, with statistics per sample.

    Raises:
        TypeError: if ``b`` is no state.
        ValueError: if ``A`` or ``x0`` have another shape than ``b``.
        ConvergenceError: if a sample does not converge and ``solver.on_failure`` is ``"raise"``.

    Example:
        >>> import torch
        >>> from monai_deqkan.solvers import ConjugateGradientSolver, solve_linear
        >>> solve_linear(lambda x: 2 * x, torch.ones(1, 3), ConjugateGradientSolver()).z
        tensor([[0.5000, 0.5000, 0.5000]])
    """
    layout = _Layout(b)
    target = layout.pack(b)
    start = torch.zeros_like(target) if x0 is None else layout.pack(x0, expected=target.shape)
    tracker = _Tracker(start, layout.size, solver.max_iter)
    rows = torch.arange(layout.size, device=target.device)

    def apply(p: Tensor) -> Tensor:
        whole = torch.zeros_like(target).index_copy(0, rows, p)
        return layout.pack(A(layout.unpack(whole)), expected=target.shape)[rows]

    residual = target if x0 is None else target - apply(start)
    tracker.evaluations = 0 if x0 is None else 1
    state, scale = solver.init(start, residual), layout.rms(target)
    while tracker.running:
        norm = layout.rms(state.residual)
        keep = tracker.update(state.x, norm, scale, solver.has_converged(norm, scale), spent=0)
        if keep is not None:
            state, scale, rows = state.take(keep), scale[keep], rows[keep]
        if not tracker.running or tracker.evaluations >= solver.max_iter:
            break
        state = solver.step(apply, state)
        tracker.evaluations += 1
    return _finish(tracker, layout, solver, kind, recorders)


def _finish(
    tracker: _Tracker,
    layout: _Layout,
    solver: FixedPointSolver | LinearSolver,
    kind: str,
    recorders: Sequence[SolveRecorder] | None,
) -> Solution:
    z, stats = tracker.result()
    for recorder in open_recorders() if recorders is None else recorders:
        recorder.add(kind, stats)
    stats.report_failure(solver.on_failure, f"{type(solver).__name__} ({kind} solve)")
    return Solution(layout.unpack(z), stats)


class _Layout:
    """Turns a state (a tensor or a tuple, real or complex) into real rows ``(B, N)`` and back."""

    def __init__(self, state: State) -> None:
        self.single = isinstance(state, Tensor)
        parts = (state,) if isinstance(state, Tensor) else tuple(state)
        if not parts:
            raise TypeError("A state must hold at least one tensor; got an empty tuple.")
        for part in parts:
            check_tensor("z0", part, "A state is a tensor (B, *) or a tuple of such tensors.")
            if part.ndim < 1 or not (part.is_floating_point() or part.is_complex()):
                raise ValueError(
                    f"A state must be floating point or complex with a batch axis; got {part.dtype} of shape "
                    f"{tuple(part.shape)}."
                )
        if len({part.shape[0] for part in parts}) != 1:
            raise ValueError(f"All tensors of a state need one batch size; got {[tuple(p.shape) for p in parts]}.")
        self.size = parts[0].shape[0]
        self.shapes = [part.shape[1:] for part in parts]
        self.dtypes = [part.dtype for part in parts]
        self.lengths = [part[:0].numel() if part.shape[0] == 0 else part[0].numel() for part in parts]
        real = [part.real.dtype if part.is_complex() else part.dtype for part in parts]
        self.dtype = torch.float64 if torch.float64 in real else torch.float32
        self.numel = max(sum(self.lengths), 1)

    def pack(self, state: State, expected: torch.Size | None = None) -> Tensor:
        parts = (state,) if isinstance(state, Tensor) else tuple(state)
        shapes = [part.shape[1:] for part in parts]
        if shapes != self.shapes or [p.is_complex() for p in parts] != [d.is_complex for d in self.dtypes]:
            raise ValueError(
                f"The map must keep the shape (B, {self.shapes}) and dtype {self.dtypes} of its state; "
                f"it returned {shapes} and {[part.dtype for part in parts]}."
            )
        rows = [
            (torch.view_as_real(p.resolve_conj()) if p.is_complex() else p).flatten(1).to(self.dtype) for p in parts
        ]
        flat = rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
        if expected is not None and flat.shape != expected:
            raise ValueError(f"The map must keep the batch size {expected[0]}; it returned {flat.shape[0]} samples.")
        return flat

    def unpack(self, flat: Tensor) -> State:
        parts, start = [], 0
        for shape, dtype, length in zip(self.shapes, self.dtypes, self.lengths, strict=True):
            width = 2 * length if dtype.is_complex else length
            part = flat[:, start : start + width]
            if dtype.is_complex:
                part = torch.view_as_complex(part.reshape(flat.shape[0], *shape, 2))
            parts.append(part.reshape(flat.shape[0], *shape).to(dtype))
            start += width
        return parts[0] if self.single else tuple(parts)

    def rms(self, rows: Tensor) -> Tensor:
        """Root mean square over a state's entries, a complex one counting as one: float64 ``(B,)``."""
        # Squares of float32 numbers leave its range below 1e-19 and above 1e19.
        return torch.linalg.vector_norm(rows.detach(), dim=1, dtype=torch.float64) / self.numel**0.5


class _Tracker:
    """Knows which samples run, keeps each one's best iterate, and writes the statistics."""

    def __init__(self, z: Tensor, size: int, max_iter: int) -> None:
        device = z.device
        self.evaluations = 0
        self.rows = torch.arange(size, device=device)  # which samples still run
        self.best_z = z
        self.best = torch.full((size, 2), float("inf"), device=device, dtype=torch.float64)  # residual, scale
        self.finished: list[tuple[Tensor, Tensor]] = []  # rows and their iterates
        self.status = torch.full((size,), int(SolveStatus.MAX_ITER), dtype=torch.int64, device=device)
        self.spent = torch.zeros(size, dtype=torch.int64, device=device)
        self.measured = torch.full((size, 2), float("nan"), dtype=torch.float64, device=device)
        self.history: list[Tensor] = []

    @property
    def running(self) -> bool:
        return self.rows.numel() > 0

    def update(self, z: Tensor, residual: Tensor, scale: Tensor, converged: Tensor, spent: int = 1) -> Tensor | None:
        """Note one evaluation; return the positions of the samples to go on with, or None if all go on."""
        self.evaluations += spent
        finite = torch.isfinite(residual)
        converged = converged & finite
        line = self.measured.new_full((self.status.shape[0],), float("nan"))
        line[self.rows] = residual / scale.clamp_min(torch.finfo(torch.float64).tiny)
        line[self.rows[residual == 0]] = 0.0
        self.history.append(line)

        better = (finite & (residual < self.best[:, 0])) | converged
        self.best_z = z if bool(better.all()) else torch.where(better[:, None], z, self.best_z)
        self.best = torch.where(better[:, None], torch.stack((residual, scale), dim=1), self.best)
        self.spent[self.rows] = self.evaluations
        self.measured[self.rows] = self.best
        done = converged | ~finite
        if not bool(done.any()):
            return None
        self.status[self.rows[converged]] = int(SolveStatus.CONVERGED)
        self.status[self.rows[~finite]] = int(SolveStatus.NON_FINITE)
        self.finished.append((self.rows[done], self.best_z[done]))
        keep = (~done).nonzero()[:, 0]
        self.rows, self.best_z, self.best = self.rows[keep], self.best_z[keep], self.best[keep]
        return keep

    def result(self) -> tuple[Tensor, SolveStatistics]:
        pieces = [*self.finished, (self.rows, self.best_z)]
        order = torch.cat([rows for rows, _ in pieces]).argsort()
        z = pieces[0][1] if len(pieces) == 1 else torch.cat([piece for _, piece in pieces])[order]
        residual, scale = self.measured.unbind(1)
        relative = residual / scale.clamp_min(torch.finfo(torch.float64).tiny)
        relative = torch.where(residual == 0, torch.zeros_like(relative), relative)
        history = torch.stack(self.history) if self.history else self.measured.new_empty(0, self.status.shape[0])
        return z, SolveStatistics(self.status, self.spent, residual, relative, history)
