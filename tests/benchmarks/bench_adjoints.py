"""Compare gradients through an equilibrium: their error over the scale of the loss, and the memory of a training step.

Run by hand: ``OMP_NUM_THREADS=1 python tests/benchmarks/bench_adjoints.py [--cases gradient memory]``.
``pip install torchdeq`` adds the peer; without it ours are measured alone. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from typing import Any

import torch
from bench_solvers import header, matrix, mri_problem, row, verdicts
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from monai_deqkan.adjoints import Adjoint, ImplicitAdjoint, UnrolledAdjoint
from monai_deqkan.networks.blocks import Measurement, gradient_step
from monai_deqkan.networks.layers import DEQLayer
from monai_deqkan.networks.nets import DnCNN
from monai_deqkan.solvers import AndersonSolver, FixedPointIteration

try:
    from torchdeq import get_deq
except ImportError:
    get_deq = None

Equilibrium = Callable[[Callable[[Tensor, Tensor], Tensor], Tensor], Tensor]  # cell, x -> z that carries a gradient
SCALES = (1.0, 1e-2, 1e-4, 1e-6, 1e-8)


class Cell(nn.Module):
    """A function as a cell."""

    def __init__(self, f: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.f = f

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.f(z, x)


def implicit(rtol: float) -> Equilibrium:
    forward = AndersonSolver(rtol=1e-12, max_iter=300)
    backward = AndersonSolver(rtol=rtol, max_iter=300)
    return lambda f, x: DEQLayer(Cell(f), forward, ImplicitAdjoint(solver=backward))(x)


def from_torchdeq(b_solver: str, **settings: object) -> Equilibrium:
    forward = {"f_solver": "broyden", "f_tol": 1e-10, "f_stop_mode": "rel", "f_max_iter": 100}
    layer = get_deq(core="sliced", ift=True, b_solver=b_solver, **forward, **settings)
    return lambda f, x: layer(lambda z: f(z, x), torch.zeros_like(x))[0][-1]


def bench_gradient() -> None:
    """The gradient to ``x`` against the dense solution, in float64."""
    d, batch, rtol = 64, 4, 1e-4
    generator = torch.Generator().manual_seed(0)
    weight = matrix("symmetric", d, generator).double() / 0.95
    shift, c = (torch.randn(batch, d, generator=generator, dtype=torch.float64) for _ in range(2))
    found = {f"ours, implicit, rtol {rtol:g}": implicit(rtol)}
    if get_deq is not None:
        found["torchdeq, its defaults (plain, absolute 1e-6)"] = from_torchdeq("fixed_point_iter")
        found["torchdeq, Anderson (absolute 1e-6)"] = from_torchdeq("anderson")
        found["torchdeq, Anderson (relative 1e-4)"] = from_torchdeq("anderson", b_stop_mode="rel", b_tol=rtol)
    header(
        "Relative error of the gradient by the scale of the loss; tanh(g z W + x), worst of 4 samples",
        *("norm of J", "3 rtol / (1 - norm)", "method", *(f"x {scale:g}" for scale in SCALES)),
    )
    lines = []
    for gain in (0.6, 0.95):
        x = 0.2 * shift

        def f(z: Tensor, x: Tensor, matrix: Tensor = gain * weight) -> Tensor:
            return torch.tanh(z @ matrix + x)

        z = implicit(1e-12)(f, x)
        slope = 1 - z**2
        jacobian = gain * weight * slope[:, None]  # dF_j / dz_i
        u = torch.linalg.solve(torch.eye(d) - jacobian, c[:, :, None])[:, :, 0]
        exact, norm = u * slope, float(torch.linalg.matrix_norm(jacobian, 2).max())
        bound = 3 * rtol if norm <= 0.6 else 3 * rtol / (1 - norm)
        for name, equilibrium in found.items():
            errors = []
            for scale in SCALES:
                leaf = x.clone().requires_grad_()
                (scale * c * equilibrium(f, leaf)).sum().backward()
                errors.append(float(((leaf.grad / scale - exact).norm(dim=1) / exact.norm(dim=1)).max()))
            row(f"{norm:.2f}", f"{bound:.1e}", name, *(f"{error:.1e}" for error in errors))
            if name.startswith("ours"):
                lines.append((f"largest error of ours over the bound, norm {norm:.2f}", max(errors) / bound, 1))
    verdicts(*lines)


class ProximalCell(nn.Module):
    """The DE-Prox iteration of ``bench_solvers.py`` with a trainable denoiser."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = DnCNN(2, 2, 2, 17, 64, residual=False)

    def forward(self, z: Tensor, x: tuple[Measurement, Tensor]) -> Tensor:
        v = gradient_step(z, x[0], 1.0)
        return 0.9 * v + 0.015 * self.network(v)


def peak_mib(step: Callable[[], None]) -> float:
    """Return the peak of newly allocated memory in one call."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak / 2**20


def _all_steps(count: int) -> dict[str, Any]:
    return {"rtol": 0.0, "max_iter": count, "on_failure": "ignore"}


def bench_memory() -> None:
    """Peak of a training step, forward and backward with as many steps each; the optimizer is left out."""
    problem, steps = mri_problem(96, 2, 2), (10, 30, 50)
    cell, x = ProximalCell(), (problem.x, problem.z0)
    peaks: dict[str, list[float]] = {}

    def train(adjoint: Adjoint, count: int) -> float:
        method = AndersonSolver if isinstance(adjoint, ImplicitAdjoint) else FixedPointIteration
        forward = method(**_all_steps(count))
        layer = DEQLayer(cell, forward, adjoint)
        cell.zero_grad()
        return peak_mib(lambda: layer(x, problem.z0).square().sum().backward())

    def train_torchdeq(count: int) -> float:
        settings = {"f_solver": "anderson", "b_solver": "anderson", "f_max_iter": count, "b_max_iter": count}
        layer = get_deq(core="sliced", ift=True, f_tol=0.0, b_tol=0.0, **settings)
        cell.zero_grad()
        return peak_mib(lambda: layer(lambda z: cell(z, x), problem.z0)[0][-1].square().sum().backward())

    header("Peak memory of a training step, MiB; DE-Prox MRI, 96 x 96, DnCNN 17 x 64", "steps", *map(str, steps))
    runs: dict[str, Callable[[int], float]] = {
        "ours, implicit": lambda count: train(ImplicitAdjoint(solver=AndersonSolver(**_all_steps(count))), count),
        "ours, unrolled": lambda count: train(UnrolledAdjoint(), count),
    }
    if get_deq is not None:
        runs["torchdeq, implicit"] = train_torchdeq
    for name, peak in runs.items():
        peaks[name] = [peak(count) for count in steps]
        row(name, *(f"{value:.0f}" for value in peaks[name]))
    ours, unrolled = peaks["ours, implicit"], peaks["ours, unrolled"]
    verdicts(
        ("implicit, 50 steps over 30", ours[2] / ours[1], 1.2),
        ("implicit over unrolled, 50 steps", ours[2] / unrolled[2], 0.05),
    )


CASES = {"gradient": bench_gradient, "memory": bench_memory}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    cases = parser.parse_args().cases
    torch.set_num_threads(1)
    if get_deq is None:
        print("torchdeq is not installed: its rows are left out.")
    for case in cases:
        CASES[case]()


if __name__ == "__main__":
    main()
