"""A training step of DEQ-KAN against the same network with explicit steps in place of the equilibrium.

Run by hand: ``OMP_NUM_THREADS=1 python tests/benchmarks/bench_deqkan_training.py [--device cuda] [--on map]``.

The explicit network applies the same cell as often as the equilibrium's solver does in the mean, and differentiates
through every application. Both train for some steps first, on images of random blobs in two classes, so that the number
of evaluations is not that of the first step. Times are medians of interleaved repeats with their spread: on a CPU the
process's own time on one thread, which other work on the machine disturbs less, elsewhere that of the clock.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from monai_deqkan.networks.nets import DEQKANClassifier
from monai_deqkan.solvers import SolveRecorder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--on", choices=("features", "map"), default="features")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--hidden-features", type=int, default=64)
    parser.add_argument("--warm-up", type=int, default=20, help="training steps before anything is measured")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()

    def build(num_steps: int | None) -> DEQKANClassifier:
        torch.manual_seed(0)
        return DEQKANClassifier(
            2, 1, 2, equilibrium_on=options.on, hidden_features=options.hidden_features, num_steps=num_steps
        ).to(options.device)

    torch.set_num_threads(1)
    images, labels = blobs(options.batch_size, options.size, options.device)
    network = build(None)
    step = training_step(network, images, labels)
    for _ in range(options.warm_up):
        step()
    with SolveRecorder() as recorder:
        step()
    counts = {kind: recorder.evaluations(kind).float() for kind in ("forward", "backward")}
    for kind, count in counts.items():
        print(f"evaluations per image, {kind}: mean {count.mean():.1f}, from {count.min():.0f} to {count.max():.0f}")
    mean = round(float(counts["forward"].mean()))
    steps = {"equilibrium": step}
    for num_steps in sorted({1, mean}):
        explicit = build(num_steps)
        explicit.load_state_dict({k.replace("equilibrium.", "steps."): v for k, v in network.state_dict().items()})
        steps[f"{num_steps} explicit steps"] = training_step(explicit, images, labels)
    times = interleaved(steps, options.repeats, options.device)
    reference = statistics.median(times[f"{mean} explicit steps"])
    print("| network | ms per step, median (min-max) | images per s | time ratio | peak MiB |\n|---|---|---|---|---|")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(
            f"| {name} | {1e3 * median:.0f} ({1e3 * min(seconds):.0f}-{1e3 * max(seconds):.0f}) "
            f"| {options.batch_size / median:.0f} | {median / reference:.2f} "
            f"| {peak_mib(steps[name], options.device):.0f} |"
        )


def blobs(count: int, size: int, device: str) -> tuple[Tensor, Tensor]:
    """Return noisy images of a small or a large disc, and which it is."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    centers = size * (0.3 + 0.4 * torch.rand(count, 2, 1, 1, generator=generator))
    axis = torch.arange(size, dtype=torch.float32)
    distance = ((axis[:, None] - centers[:, 0]).square() + (axis - centers[:, 1]).square()).sqrt()
    discs = (distance < size * (0.1 + 0.1 * labels.view(-1, 1, 1))).float()
    images = 0.5 * discs + 0.5 * torch.rand(count, size, size, generator=generator)
    return images[:, None].to(device), labels.to(device)


def training_step(network: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 2.0)
        optimizer.step()

    return step


def interleaved(steps: dict[str, Callable[[], None]], repeats: int, device: str) -> dict[str, list[float]]:
    """Return the seconds of each repeat, after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    clock = time.process_time if device == "cpu" else time.perf_counter
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            synchronize(device)
            started = clock()
            step()
            synchronize(device)
            if repeat:
                times[name].append(clock() - started)
    return times


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def peak_mib(step: Callable[[], None], device: str = "cpu") -> float:
    """Return the peak of newly allocated memory in one call."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak / 2**20


if __name__ == "__main__":
    main()
