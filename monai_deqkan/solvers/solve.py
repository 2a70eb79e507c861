"""The loop around every solver: limits, stopping per sample, the best iterate, statistics, warnings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from monai_deqkan._checks import check_tensor
from monai_deqkan.solvers.base import FixedPointSolver, LinearSolver
from monai_deqkan.solvers.budget import with_budget
from monai_deqkan.solvers.products import row_norms
from monai_deqkan.solvers.recorder import SolveRecorder, open_recorders
from monai_deqkan.solvers.solution import Solution, SolveStatistics, SolveStatus, State, state_parts

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


def _check_per_sample(x: Any, size: int) -> None:
    """Refuse data that are not per sample before the first evaluation: a shared tensor would lose rows on the way."""
    if x is None or (not isinstance(x, (Tensor, tuple, list)) and callable(getattr(x, "take", None))):
        return
    if isinstance(x, (tuple, list)):
        for item in x:
            _check_per_sample(item, size)
    elif not isinstance(x, Tensor):
        take(x, torch.arange(0))  # raises
    elif x.ndim == 0 or x.shape[0] != size:
        raise ValueError(
            f"Tensors of `x` must have the batch of the state, {size}, first; got shape {tuple(x.shape)}. Expand data "
            "that all samples share, or keep them on the cell."
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
        TypeError: if ``z0`` or what ``f`` returns is no state, or ``x`` no per-sample data.
        ValueError: if ``f`` changes the shape of the state, or writes into its argument.
        ConvergenceError: if a sample does not converge and ``solver.on_failure`` is ``"raise"``.

    Example:
        >>> import torch
        >>> from monai_deqkan.solvers import AndersonSolver, solve_fixed_point
        >>> solve_fixed_point(torch.cos, torch.zeros(1, 1), AndersonSolver(rtol=1e-6)).z
        tensor([[0.7391]])
    """
    solver = with_budget(solver) if kind == "forward" else solver
    layout = _Layout(z0)
    _check_per_sample(x, layout.size)
    z = layout.pack(z0)
    tracker = _Tracker(z)
    state = solver.init(z)
    while tracker.running and tracker.evaluations < solver.max_iter:
        image, guard = layout.unpack(z), _Unchanged(z, tracker.evaluations < 3)
        fz = layout.pack(f(image) if x is None else f(image, x), expected=z.shape)
        guard.check(z)
        measured = layout.rms(tracker.residual(z, fz), fz)
        state = solver.note_residual(state, measured[0])
        keep = tracker.update(z, measured, solver.has_converged(*measured))
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
    tracker = _Tracker(start)
    rows = torch.arange(layout.size, device=target.device)

    def apply(p: Tensor) -> Tensor:
        whole = torch.zeros_like(target).index_copy(0, rows, p)
        return layout.pack(A(layout.unpack(whole)), expected=target.shape)[rows]

    residual = target if x0 is None else target - apply(start)
    tracker.evaluations = 0 if x0 is None else 1
    state, scale = solver.init(start, residual), layout.rms(target)
    while tracker.running:
        measured = torch.cat((layout.rms(state.residual), scale))
        keep = tracker.update(state.x, measured, solver.has_converged(*measured), spent=0)
        if keep is not None:
            state, scale, rows = state.take(keep), scale[:, keep], rows[keep]
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
        parts = state_parts(state)
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
        parts = (state,) if isinstance(state, Tensor) else state
        if not isinstance(parts, (tuple, list)) or not all(isinstance(part, Tensor) for part in parts):
            raise TypeError(
                f"The map must return a tensor or a tuple of tensors, like its state; it returned {_kind(state)}."
            )
        shapes = [part.shape[1:] for part in parts]
        if shapes != self.shapes or [p.is_complex() for p in parts] != [d.is_complex for d in self.dtypes]:
            raise ValueError(
                f"The map must keep the shape (B, {self.shapes}) and dtype {self.dtypes} of its state; "
                f"it returned {shapes} and {[part.dtype for part in parts]}."
            )
        rows = [
            (torch.view_as_real(p.resolve_conj()) if p.is_complex() else p[:, None] if p.ndim == 1 else p)
            .flatten(1)
            .to(self.dtype)
            for p in parts
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

    def rms(self, *matrices: Tensor) -> Tensor:
        """Root mean squares over a state's entries, a complex one counting as one: float64 ``(n, B)``."""
        return row_norms(*matrices) / self.numel**0.5


def _kind(state: Any) -> str:
    name = type(state).__name__
    return f"{name} of {', '.join(type(part).__name__ for part in state)}" if isinstance(state, (tuple, list)) else name


class _Unchanged:
    """Notices a map that writes into its argument: ``f(z) - z`` would be that of another ``z``, or zero.

    So it notices one that returns the same memory each time, which the next iterate would share.
    """

    def __init__(self, z: Tensor, early: bool) -> None:
        # Tensors made in inference mode count no changes. A copy at each evaluation would cost too much; one at the
        # first alone would miss a ReLU that starts from zero.
        counted = not z.is_inference()
        self.version = z._version if counted else None
        self.copy = z.clone() if early and not counted else None

    def check(self, z: Tensor) -> None:
        changed = self.version is not None and z._version != self.version
        if self.copy is not None:  # NaN stays
            changed = not bool(((z == self.copy) | (self.copy != self.copy)).all())
        if changed:
            raise ValueError(
                "The map must not write into its argument `z`, nor return the same memory each time: the residual "
                "f(z) - z would be wrong. Replace in-place operations on `z`, such as ReLU(inplace=True), by others; "
                "return a new tensor."
            )


class _Tracker:
    """Knows which samples run, keeps each one's best iterate, and writes the statistics."""

    def __init__(self, z: Tensor) -> None:
        size, device = z.shape[0], z.device
        self.evaluations = 0
        self.rows = torch.arange(size, device=device)  # which samples still run
        self.best_z = z
        self.best = torch.full((2, size), float("inf"), dtype=torch.float64, device=device)  # residual, scale
        self.log: list[tuple[Tensor, Tensor]] = []  # of each update: rows and what was measured, (2, b)
        self.buffer = z.new_empty(0)
        self.finished: list[tuple[Tensor, Tensor]] = []  # rows and their iterates
        self.status = torch.full((size,), int(SolveStatus.MAX_ITER), dtype=torch.int64, device=device)
        self.spent = torch.zeros(size, dtype=torch.int64, device=device)
        self.measured = torch.full((2, size), float("nan"), dtype=torch.float64, device=device)

    @property
    def running(self) -> bool:
        return self.rows.numel() > 0

    def residual(self, z: Tensor, fz: Tensor) -> Tensor:
        """Return ``fz - z``, without a gradient, in the same memory each time."""
        if self.buffer.shape != z.shape:
            self.buffer = torch.empty_like(z)
        return torch.sub(fz.detach(), z.detach(), out=self.buffer)

    def update(self, z: Tensor, measured: Tensor, converged: Tensor, spent: int = 1) -> Tensor | None:
        """Note one evaluation; return the positions of the samples to go on with, or None if all go on.

        Args:
            z: iterates, ``(b, N)``.
            measured: size of their residual and the scale it is judged by, ``(2, b)``.
            converged: whether they meet the tolerance, ``(b,)``.
            spent: number of evaluations since the last update.
        """
        self.evaluations += spent
        self.log.append((self.rows, measured))
        finite = measured[0].isfinite()
        converged = converged & finite
        better = (measured[0] < self.best[0]) | converged
        if bool(better.all()):
            self.best_z, self.best = z, measured
        elif bool(better.any()):
            self.best_z = torch.where(better[:, None], z, self.best_z)
            self.best = torch.where(better, measured, self.best)
        done = converged | ~finite
        if not bool(done.any()):
            return None
        self.status[self.rows[converged]] = int(SolveStatus.CONVERGED)
        self.status[self.rows[~finite]] = int(SolveStatus.NON_FINITE)
        self._finish(done)
        keep = (~done).nonzero()[:, 0]
        self.rows, self.best_z, self.best = self.rows[keep], self.best_z[keep], self.best[:, keep]
        return keep

    def _finish(self, done: Tensor | slice) -> None:
        rows = self.rows[done]
        self.finished.append((rows, self.best_z[done]))
        self.spent[rows] = self.evaluations
        if self.log:
            self.measured[:, rows] = self.best[:, done]

    def result(self) -> tuple[Tensor, SolveStatistics]:
        self._finish(slice(None))
        rows, pieces = zip(*self.finished, strict=True)
        z = pieces[0] if len(pieces) == 1 else torch.cat(pieces)[torch.cat(rows).argsort()]
        residual, scale = self.measured
        return z, SolveStatistics(self.status, self.spent, residual, _relative(residual, scale), self._history())

    def _history(self) -> Tensor:
        """Return the relative residuals of all evaluations ``(evaluations, B)``."""
        history = self.measured.new_full((len(self.log), self.status.shape[0]), float("nan"))
        start = 0
        for _, run in groupby(self.log, key=lambda entry: id(entry[0])):
            rows, measured = zip(*run, strict=True)
            stop = start + len(rows)
            history[start:stop, rows[0]] = _relative(*torch.stack(measured, dim=1))
            start = stop
        return history


def _relative(residual: Tensor, scale: Tensor) -> Tensor:
    return (residual / scale.clamp_min(torch.finfo(torch.float64).tiny)).where(residual != 0, 0.0)
