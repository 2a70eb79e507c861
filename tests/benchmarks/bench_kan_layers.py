"""Compare KAN layers with plain ones and with their floor, side by side. Run by hand; it asserts nothing.

The floor is the plain layer that does the same contraction: as many inputs as the KAN layer has features.

    python tests/benchmarks/bench_kan_layers.py [--repeats 15] [--threads 1] [--device cpu]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from monai_deqkan.networks.layers import KANConv2d, KANConv3d, KANLinear

Case = tuple[nn.Module, Tensor]


def cases(device: str) -> dict[str, dict[str, Case]]:
    """Return name -> (kind -> (layer, input))."""
    found: dict[str, dict[str, Case]] = {}
    for width in (128, 512):
        found[f"linear 1024 x {width}->{width}"] = {
            "plain": (nn.Linear(width, width), torch.randn(1024, width)),
            "floor": (nn.Linear(9 * width, width), torch.randn(1024, 9 * width)),
            "kan": (KANLinear(width, width), torch.randn(1024, width)),
        }
    plain: type[nn.Module]
    for kan, plain, size in ((KANConv2d, nn.Conv2d, (64, 64)), (KANConv3d, nn.Conv3d, (16, 16, 16))):
        found[f"{plain.__name__.lower()} 2 x 16->32 x {size} k3"] = {
            "plain": (plain(16, 32, 3, padding=1), torch.randn(2, 16, *size)),
            "floor": (plain(9 * 16, 32, 3, padding=1), torch.randn(2, 9 * 16, *size)),
            "kan": (kan(16, 32, 3, padding=1), torch.randn(2, 16, *size)),
        }
    return {
        name: {kind: (layer.to(device), x.to(device).requires_grad_()) for kind, (layer, x) in kinds.items()}
        for name, kinds in found.items()
    }


def forward(layer: nn.Module, x: Tensor) -> None:
    """Run inference."""
    with torch.no_grad():
        layer(x)


def forward_backward(layer: nn.Module, x: Tensor) -> None:
    """Run one training step without the optimizer."""
    layer.zero_grad()
    x.grad = None
    layer(x).sum().backward()


def milliseconds(step: Callable[[nn.Module, Tensor], None], case: Case) -> float:
    """Time one call."""
    if case[1].is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    step(*case)
    if case[1].is_cuda:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def peak_mib(step: Callable[[nn.Module, Tensor], None], case: Case) -> float:
    """Return the peak of newly allocated memory in one call."""
    if case[1].is_cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(*case)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(*case)
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak / 2**20


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"{'case':34} {'pass':8} {'kind':6} {'ms':>8} {'spread':>13} {'x plain':>8} {'x floor':>8} {'MiB':>7}")
    for name, kinds in cases(arguments.device).items():
        for label, step in (("forward", forward), ("both", forward_backward)):
            for case in kinds.values():
                step(*case)
            times: dict[str, list[float]] = {kind: [] for kind in kinds}
            for _ in range(arguments.repeats):
                for kind, case in kinds.items():
                    times[kind].append(milliseconds(step, case))
            middle = {kind: statistics.median(values) for kind, values in times.items()}
            for kind, case in kinds.items():
                spread = f"{min(times[kind]):.2f}-{max(times[kind]):.2f}"
                print(
                    f"{name:34} {label:8} {kind:6} {middle[kind]:8.2f} {spread:>13} "
                    f"{middle[kind] / middle['plain']:8.2f} {middle[kind] / middle['floor']:8.2f} "
                    f"{peak_mib(step, case):7.1f}"
                )


if __name__ == "__main__":
    main()
