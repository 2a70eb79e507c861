"""Compare the fixed-point solvers with those of torchdeq and deepinv, side by side, in one thread.

Run by hand: ``OMP_NUM_THREADS=1 python tests/benchmarks/bench_solvers.py [--cases tanh mixed mri bookkeeping auto scale
broken]``. ``pip install torchdeq deepinv`` adds the peers; without them the script says so and measures ours alone.
``bench_adjoints.py`` measures gradients and memory.

Every solver gets the same map, start and relative tolerance on the residual, and calls of the map are counted by the
map itself; what comes back is checked by one more evaluation. "-" means that the tolerance was not reached within the
allowed evaluations. Settings are each library's defaults, except: torchdeq stops on its relative criterion (its default
is absolute), deepinv's Anderson takes torchdeq's settings (history 6, no damping, regularization 1e-4: its own are a
tenth and 0.9) and stops on the same residual. Times are
processor times, medians of interleaved repeats. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache, partial
from io import StringIO
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monai_deqkan._complex import complex_to_channels
from monai_deqkan.networks.blocks import Measurement, gradient_step
from monai_deqkan.networks.nets import DnCNN
from monai_deqkan.operators import MRIOperator, random_mask, simulate_kspace, smooth_coil_maps, smooth_phase
from monai_deqkan.solvers import SOLVERS, jacobian_norm, solve_fixed_point

try:
    from torchdeq.solver import get_solver
except ImportError:
    get_solver = None
try:
    # It greets on stdout when imported.
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        from deepinv.optim import AndersonAccelerationConfig
        from deepinv.optim.fixed_point import FixedPoint
except ImportError:
    FixedPoint = None


@dataclass(frozen=True)
class Cost:
    """What one method spends on one problem; the times in ms, one of each turn."""

    evaluations: int
    rows: int
    times: list[float]

    @property
    def ms(self) -> float:
        return median(self.times)


Map = Callable[[Tensor, Any], Tensor]
Method = Callable[["Problem", float, int], Tensor]  # problem, relative tolerance, most evaluations -> solution
PLAIN, ANDERSON, BROYDEN, AUTO = "ours, plain", "ours, Anderson", "ours, Broyden", "ours, auto"
TD_PLAIN, TD_ANDERSON, TD_BROYDEN = "torchdeq, plain", "torchdeq, Anderson", "torchdeq, Broyden"
DI_ANDERSON = "deepinv, Anderson"
TOLERANCES = (1e-3, 1e-4, 1e-6)
REPEATS = 7


class Problem:
    """A map ``f(z, x)`` with its data and start; counts evaluations and the rows (samples) in them."""

    def __init__(self, f: Map, x: Any, z0: Tensor, trace: bool = False) -> None:
        self.f, self.x, self.z0, self.trace = f, x, z0, trace
        self.reset()

    def reset(self) -> None:
        self.calls = self.rows = 0
        self.residuals: list[float] = []  # of each evaluation, relative, the largest of the batch; if traced
        self.seconds: list[float] = []
        self.start = time.process_time()

    def __call__(self, z: Tensor, x: Any) -> Tensor:
        self.calls, self.rows = self.calls + 1, self.rows + len(z)
        fz = self.f(z, x)
        if self.trace:
            self.residuals.append(float(relative_residual(z, fz).max()))
            self.seconds.append(time.process_time() - self.start)
        return fz

    def reached(self, z: Tensor, rtol: float) -> bool:
        """Tell whether a solution meets the tolerance, up to 5 %, in every sample."""
        return bool((relative_residual(z, self.f(z, self.x)) <= 1.05 * rtol).all())


def relative_residual(z: Tensor, fz: Tensor) -> Tensor:
    return (fz - z).flatten(1).norm(dim=1) / fz.flatten(1).norm(dim=1)


def ours(name: str) -> Method:
    def solve(problem: Problem, rtol: float, max_iter: int) -> Tensor:
        solver = SOLVERS.build((name, {"rtol": rtol, "max_iter": max_iter, "on_failure": "ignore"}))
        return solve_fixed_point(problem, problem.z0, solver, problem.x).z

    return solve


def from_torchdeq(name: str) -> Method:
    def solve(problem: Problem, rtol: float, max_iter: int) -> Tensor:
        f = partial(problem, x=problem.x)
        return get_solver(name)(f, problem.z0, max_iter=max_iter, tol=rtol, stop_mode="rel")[0]

    return solve


def deepinv_anderson(problem: Problem, rtol: float, max_iter: int) -> Tensor:
    newest: list[Tensor] = []

    class Iterator:
        cost_fn = None

        def __call__(self, state: dict[str, Any], *_: Any) -> dict[str, Any]:
            z = state["est"][0]
            newest[:] = z, problem(z, problem.x)
            return {"est": (newest[1],), "cost": None}

    loop = FixedPoint(
        Iterator(),
        init_iterate_fn=lambda init, cost_fn: {"est": (init,), "cost": None},
        check_conv_fn=lambda *_: bool(relative_residual(*newest).max() < rtol),
        max_iter=max_iter,
        anderson_acceleration_config=AndersonAccelerationConfig(history_size=6, beta=1.0, eps=1e-4),
    )
    loop(init=problem.z0)
    return newest[0]


def methods() -> dict[str, Method]:
    """Return what is installed, by name."""
    names = {PLAIN: "fixed_point_iteration", ANDERSON: "anderson", BROYDEN: "broyden", AUTO: "auto"}
    found = {label: ours(name) for label, name in names.items()}
    if get_solver is not None:
        peers = {TD_PLAIN: "fixed_point_iter", TD_ANDERSON: "anderson", TD_BROYDEN: "broyden"}
        found |= {label: from_torchdeq(name) for label, name in peers.items()}
    if FixedPoint is not None:
        found[DI_ANDERSON] = deepinv_anderson
    return found


def run(problem: Problem, solve: Method, rtol: float, max_iter: int) -> tuple[Tensor, float]:
    """Return a solution and the seconds that it took."""
    problem.reset()
    start = time.process_time()
    with torch.no_grad():
        z = solve(problem, rtol, max_iter)
    return z, time.process_time() - start


def compare(
    problem: Problem, rtol: float, max_iter: int = 100, names: Sequence[str] | None = None, repeats: int = REPEATS
) -> dict[str, Cost]:
    """Return what the methods spend that reach the tolerance."""
    counts: dict[str, tuple[int, int]] = {}
    chosen = {name: solve for name, solve in methods().items() if names is None or name in names}
    for name, solve in chosen.items():
        z, _ = run(problem, solve, rtol, max_iter)
        if problem.reached(z, rtol):
            counts[name] = problem.calls, problem.rows
    times: dict[str, list[float]] = {name: [] for name in counts}
    for _ in range(repeats):
        for name in counts:
            times[name].append(1e3 * run(problem, chosen[name], rtol, max_iter)[1])
    return {name: Cost(*counts[name], times[name]) for name in counts}


def header(title: str, *columns: str) -> None:
    print(f"\n### {title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)


def row(*cells: Any) -> None:
    print(f"| {' | '.join(str(cell) for cell in cells)} |", flush=True)


def verdicts(*lines: tuple[str, float | None, float]) -> None:
    """Print ratios beside their limits; None where a method was not there or did not arrive."""
    header("", "ratio", "measured", "limit", "met")
    for what, value, limit in lines:
        row(what, *(("-", limit, "-") if value is None else (f"{value:.2f}", limit, "yes" if value <= limit else "NO")))


def ratio(found: dict[str, Any], ours: str, theirs: str) -> float | None:
    return found[ours] / found[theirs] if ours in found and theirs in found else None


def rows_ratio(found: dict[str, Cost], ours: str, theirs: str) -> float | None:
    return ratio({name: cost.rows for name, cost in found.items()}, ours, theirs)


def time_ratio(found: dict[str, Cost], ours: str, theirs: str) -> float | None:
    """Return the median over the turns of the ratio within a turn: what else the machine does falls out."""
    if ours not in found or theirs not in found:
        return None
    return median(a / b for a, b in zip(found[ours].times, found[theirs].times, strict=True))


def matrix(family: str, d: int, generator: torch.Generator) -> Tensor:
    """Return a random matrix of one of three families, of spectral norm 0.9 to 0.95."""
    if family == "rotation":  # orthogonal: eigenvalues all around a circle
        signs = torch.randint(0, 2, (d,), generator=generator) * 2.0 - 1.0
        return 0.95 * torch.eye(d)[torch.randperm(d, generator=generator)] * signs
    gaussian = torch.randn(d, d, generator=generator) / d**0.5  # norm 2, spectral radius 1
    if family == "gaussian":
        return 0.45 * gaussian
    return 0.95 * (gaussian + gaussian.T) / 8**0.5  # symmetric: norm and spectral radius 0.95


def tanh_problem(family: str, d: int, batch: int = 8) -> Problem:
    generator = torch.Generator().manual_seed(d)
    weight, x = matrix(family, d, generator), 0.1 * torch.randn(batch, d, generator=generator)
    return Problem(lambda z, x: torch.tanh(z @ weight + x), x, torch.zeros(batch, d))


def bench_tanh() -> None:
    sizes = [(family, d) for family in ("gaussian", "rotation", "symmetric") for d in (128, 1024)]
    header("tanh(z W + x), batch of 8: evaluations (ms)", "W", "d", "rtol", *methods())
    for family, d in [*sizes, ("symmetric", 4096)]:
        for rtol in TOLERANCES:
            problem = tanh_problem(family, d)
            found = compare(problem, rtol)
            cells = (
                f"{found[name].evaluations} ({found[name].ms:.1f})" if name in found else "-" for name in methods()
            )
            row(family, d, f"{rtol:.0e}", *cells)


def bench_mixed() -> None:
    generator = torch.Generator().manual_seed(0)
    batch, d, rtol = 64, 1024, 1e-6
    weight = matrix("symmetric", d, generator) / 0.95
    shift = 0.1 * torch.randn(batch, d, generator=generator)
    spreads = {
        "evenly from 0.05 to 0.99": torch.linspace(0.05, 0.99, batch),
        "one in eight 0.99, else 0.5": torch.where(torch.arange(batch) % 8 == 0, 0.99, 0.5),
        "crowded towards 0.99": 1 - torch.logspace(0, -2, batch),
    }
    header(f"Batch of mixed difficulty, {batch} x {d}, to {rtol:.0e}", "gains", "method", "evaluated rows", "ms")
    lines = []
    for spread, gain in spreads.items():
        x = (shift, gain[:, None])
        problem = Problem(lambda z, x: torch.tanh(x[1] * (z @ weight) + x[0]), x, torch.zeros(batch, d))
        found = compare(problem, rtol)
        for name in methods():
            row(spread, name, *((found[name].rows, f"{found[name].ms:.1f}") if name in found else ("-", "-")))
        for name in (ANDERSON, AUTO):
            over = f"{name}, over torchdeq's Broyden"
            lines.append((f"{over}, rows, gains {spread}", rows_ratio(found, name, TD_BROYDEN), 0.33))
            lines.append((f"{over}, time, gains {spread}", time_ratio(found, name, TD_BROYDEN), 0.15))
    verdicts(*lines)


@cache
def brain_slice(size: int) -> Tensor:
    """Return an axial slice of the MNI152 template that nilearn ships, ``(1, size, size)`` in ``[0, 1]``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from nilearn.datasets import load_mni152_template  # noqa: PLC0415 (it warns when imported)

        volume = load_mni152_template(resolution=1).get_fdata()
    image = torch.from_numpy(np.ascontiguousarray(volume[:, :, 90])).float()
    square = torch.nn.functional.pad(image, (0, 0, 18, 18))  # (233, 233)
    small = torch.nn.functional.interpolate(square[None, None], size=(size, size), mode="area")[0]
    return small / small.max()


def mri_problem(
    size: int = 128, num_layers: int = 17, features: int = 64, unit: float = 1.0, trace: bool = False
) -> Problem:
    r"""Return a DE-Prox iteration, :math:`z \mapsto D(z - A^H (A z - y))`, on k-space of 8 coils, 4 times undersampled.

    The denoiser is a relaxed DnCNN, :math:`D(v) = 0.9 v + 0.09 N(v) / \|N'\|`, with He's random weights and the norm of
    the Jacobian estimated at the start: an iteration that contracts slowly in the directions that were not measured.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (size, size)
    maps = smooth_coil_maps(shape, 8, generator=generator)
    phase = smooth_phase(shape, generator=generator)
    kspace = simulate_kspace(brain_slice(size), maps, phase=phase, snr_db=30.0, generator=generator)
    mask = random_mask(size, 4.0, 0.08, generator=generator)[None, None, None]
    measurement = Measurement.of(MRIOperator(mask, maps[None]), unit * kspace * mask)
    torch.manual_seed(0)
    network = DnCNN(2, 2, 2, num_layers, features, residual=False).requires_grad_(False)
    z0 = complex_to_channels(measurement.back_projection)
    norm = float(jacobian_norm(network, z0, num_iter=3))

    def f(z: Tensor, x: Measurement) -> Tensor:
        v = gradient_step(z, x, 1.0)
        return 0.9 * v + 0.09 / norm * network(v)

    return Problem(f, measurement, z0, trace)


def bench_mri() -> None:
    problem = mri_problem(trace=True)
    columns = (f"to {rtol:.0e}" for rtol in TOLERANCES)
    header("DE-Prox MRI, 128 x 128, 8 coils, 4x, DnCNN 17 x 64: evaluations (s, one run)", "method", *columns)
    found: dict[float, dict[str, int]] = {rtol: {} for rtol in TOLERANCES}
    for name, solve in methods().items():
        run(problem, solve, TOLERANCES[-1], 50)
        cells = []
        for rtol in TOLERANCES:
            first = next((k for k, r in enumerate(problem.residuals) if r <= rtol), None)
            cells.append("-" if first is None else f"{first + 1} ({problem.seconds[first]:.1f})")
            if first is not None:
                found[rtol][name] = first + 1
        row(name, *cells)
    lines = [
        (f"{name}, over torchdeq's {theirs}, evaluations to {rtol:.0e}", ratio(found[rtol], name, peer), limit)
        for name in (ANDERSON, AUTO)
        for theirs, peer, rtol, limit in (("Anderson", TD_ANDERSON, 1e-4, 0.4), ("Broyden", TD_BROYDEN, 1e-6, 0.8))
    ]
    verdicts(*lines)


def bench_bookkeeping() -> None:
    generator = torch.Generator().manual_seed(0)
    z0, steps = torch.zeros(1, 2, 320, 320), 30
    slope = 0.98 * torch.rand(z0.shape, generator=generator)
    problem = Problem(lambda z, x: torch.addcmul(x, z, slope), torch.ones_like(z0), z0)
    # Freeing one large block lets the C library keep what is freed later; else a third of the time may be page faults,
    # for one method or another, depending on who ran before.
    torch.ones(7_000_000)
    times: dict[str, list[float]] = {name: [] for name in ("map", *methods())}
    for _ in range(2 * REPEATS + 1):
        start = time.process_time()
        for _ in range(steps):
            problem.f(z0, problem.x)
        times["map"].append(1e3 * (time.process_time() - start) / steps)
        for name, solve in methods().items():
            times[name].append(1e3 * run(problem, solve, 0.0, steps)[1] / problem.calls)
    alone = median(times.pop("map")[1:])
    found = {name: Cost(steps, steps, [value - alone for value in values[1:]]) for name, values in times.items()}
    header(
        f"Bookkeeping per step, state 2 x 320 x 320, {steps} steps; the map's {alone:.2f} ms taken off",
        "method",
        "ms",
        "over torchdeq's Anderson",
    )
    for name, cost in found.items():
        over = time_ratio(found, name, TD_ANDERSON)
        row(name, f"{cost.ms:.2f}", "-" if over is None else f"{over:.2f}")
    verdicts((f"{ANDERSON}, over torchdeq's Anderson", time_ratio(found, ANDERSON, TD_ANDERSON), 0.65))


def bench_auto() -> None:
    header(
        "0.3 tanh(z) + x: a cheap map that contracts fast; ms", "state", "rtol", PLAIN, AUTO, ANDERSON, "auto / plain"
    )
    lines = []
    for shape in ((8, 128), (64, 1024), (1, 2, 320, 320)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        problem = Problem(lambda z, x: 0.3 * torch.tanh(z) + x, x, torch.zeros(shape))
        for rtol in TOLERANCES:
            found = compare(problem, rtol, names=(PLAIN, AUTO, ANDERSON), repeats=5 * REPEATS)
            name, value = " x ".join(map(str, shape)), time_ratio(found, AUTO, PLAIN)
            row(name, f"{rtol:.0e}", *(f"{found[label].ms:.2f}" for label in (PLAIN, AUTO, ANDERSON)), f"{value:.2f}")
            lines.append((f"auto over plain, {name}, {rtol:.0e}", value, 1.15))
    verdicts(*lines)


def bench_scale() -> None:
    units = (1e-4, 1e-2, 1.0, 1e3)
    header(
        "Unit of the state: evaluations to 1e-4; DE-Prox MRI, 64 x 64, DnCNN 5 x 16",
        "method",
        *(f"x {unit:g}" for unit in units),
    )
    problems = [mri_problem(64, 5, 16, unit) for unit in units]
    spread: dict[str, float] = {}
    for name, solve in methods().items():
        solutions = [run(problem, solve, 1e-4, 150)[0] for problem in problems]
        counts = [problem.calls for problem in problems]
        solved = [problem.reached(z, 1e-4) for problem, z in zip(problems, solutions, strict=True)]
        row(name, *(count if ok else "-" for count, ok in zip(counts, solved, strict=True)))
        if name.startswith("ours"):
            spread[name] = max(counts) - min(counts) if all(solved) else float("inf")
    verdicts(*((f"{name}, most less fewest evaluations", value, 1) for name, value in spread.items()))


def bench_broken() -> None:
    """One bad sample of four: what becomes of the other three."""
    d, batch, bad, rtol = 64, 4, 2, 1e-5
    generator = torch.Generator().manual_seed(0)
    weight, shift = matrix("symmetric", d, generator), 0.1 * torch.randn(batch, d, generator=generator)
    good = torch.tensor([row for row in range(batch) if row != bad])

    def f(z: Tensor, x: tuple[Tensor, Tensor]) -> Tensor:
        return torch.tanh(z @ weight) + x[0] + x[1] * z**3

    header(
        f"One bad sample in a batch of {batch}, to {rtol:.0e}",
        "method",
        "bad sample",
        "difference of the others",
        "evaluations (without it)",
        "bad sample returned",
    )
    for kind in ("NaN in its data", "diverges to infinity"):
        x = (shift.clone(), torch.zeros(batch, 1))
        if kind.startswith("NaN"):
            x[0][bad, 0] = float("nan")
        else:
            x[1][bad] = 100.0
        for name, solve in methods().items():
            mixed = Problem(f, x, torch.zeros(batch, d))
            alone = Problem(f, tuple(part[good] for part in x), torch.zeros(batch - 1, d))
            z_alone, _ = run(alone, solve, rtol, 100)
            try:
                z, _ = run(mixed, solve, rtol, 100)
            except RuntimeError as error:
                row(name, kind, f"raises {type(error).__name__}", f"({alone.calls})", "-")
                continue
            difference = float((z[good] - z_alone).norm() / z_alone.norm())
            finite = "finite" if bool(z[bad].isfinite().all()) else "not finite"
            row(name, kind, f"{difference:.0e}", f"{mixed.calls} ({alone.calls})", finite)


CASES: dict[str, Callable[[], None]] = {
    "tanh": bench_tanh,
    "mixed": bench_mixed,
    "mri": bench_mri,
    "bookkeeping": bench_bookkeeping,
    "auto": bench_auto,
    "scale": bench_scale,
    "broken": bench_broken,
}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    cases = parser.parse_args().cases
    torch.set_num_threads(1)
    for name, module in (("torchdeq", get_solver), ("deepinv", FixedPoint)):
        if module is None:
            print(f"{name} is not installed: its rows are left out.")
    for case in cases:
        CASES[case]()


if __name__ == "__main__":
    main()
