"""Compare KAN layers with plain ones, with their floor and with other KAN libraries. Run by hand; it asserts nothing.

The floor is the plain layer that does the same contraction: as many inputs as the KAN layer has features. All layers
have a cubic spline on 5 intervals and a base term. The layers of one case take turns of at least 20 ms, so that what
else the machine does hits all alike; times are medians over the turns, of the process's CPU time where it has one CPU
thread, else of the time on the clock. Other libraries are compared where they are installed (pykan, inkan, flashkan,
convkan); "Cox-de Boor, 2 matmuls", "unfused" and "double loop" are plain implementations below of efficient-kan's form,
of the usual B-spline convolution, and of the loop over edges that published DEQ-KAN code has.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_kan_layers.py [--repeats 9] [--compile] [--device cuda]
    python tests/benchmarks/bench_kan_layers.py --volume
"""

from __future__ import annotations

import argparse
import gc
import importlib
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from monai_deqkan.networks.layers import KANConv2d, KANConv3d, KANLinear
from monai_deqkan.networks.nets import KANUNet

Case = tuple[nn.Module, Tensor]
Step = Callable[[nn.Module, Tensor], None]


def cox_de_boor(x: Tensor, knots: Tensor, order: int) -> Tensor:
    """Return the B-splines of ``x`` on a new last axis, by de Boor's recursion."""
    x = x.unsqueeze(-1)
    values = ((x >= knots[:-1]) & (x < knots[1:])).to(x.dtype)
    for n in range(1, order + 1):
        rising = (x - knots[: -n - 1]) / (knots[n:-1] - knots[: -n - 1])
        falling = (knots[n + 1 :] - x) / (knots[n + 1 :] - knots[1:-n])
        values = rising * values[..., :-1] + falling * values[..., 1:]
    return values


def uniform_knots() -> Tensor:
    return torch.arange(-3, 9) * 1.2 - 3.0


class RecursiveLinear(nn.Module):
    """efficient-kan's form: recursion, one matmul for the base term, one for the splines with a scale per edge."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer("knots", uniform_knots())
        self.base = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)
        self.spline = nn.Parameter(torch.randn(outputs, inputs, 8) / (8 * inputs) ** 0.5)
        self.scale = nn.Parameter(torch.ones(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        splines = cox_de_boor(x, self.knots, 3).flatten(1)
        weight = (self.spline * self.scale.unsqueeze(-1)).flatten(1)
        return F.linear(F.silu(x), self.base) + F.linear(splines, weight)


class UnfusedConv(nn.Module):
    """The usual B-spline convolution: recursion, then one convolution of the base term and one of the splines."""

    def __init__(self, inputs: int, outputs: int, dims: int) -> None:
        super().__init__()
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.register_buffer("knots", uniform_knots())
        self.base = conv(inputs, outputs, 3, padding=1, bias=False)
        self.spline = conv(8 * inputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        splines = cox_de_boor(x, self.knots, 3).movedim(-1, 2).flatten(1, 2)
        return self.base(F.silu(x)) + self.spline(splines)


class _Edge(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centers", torch.linspace(-3.0, 3.0, 8))
        self.weight = nn.Parameter(0.1 * torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(-0.5 * (x.unsqueeze(-1) - self.centers) ** 2) @ self.weight


class LoopLinear(nn.Module):
    """One module of Gaussians per edge, in a double loop."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.edges = nn.ModuleList(nn.ModuleList(_Edge() for _ in range(inputs)) for _ in range(outputs))

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for row in self.edges:
            total = torch.zeros_like(x[:, 0])
            for i, edge in enumerate(row):
                total = total + edge(x[:, i])
            outputs.append(total)
        return torch.stack(outputs, dim=1)


class _FirstOutput(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]  # pykan's layer also returns what its plots need


def peer(module: str, make: Callable[..., nn.Module]) -> nn.Module | None:
    """Build the layer of another library, if it is installed."""
    try:
        return make(importlib.import_module(module))
    except ImportError as error:
        print(f"{module} is left out: {error}", file=sys.stderr)
        return None


def linear_case(width: int, with_compiled: bool) -> dict[str, Case]:
    layers: dict[str, nn.Module | None] = {
        "nn.Linear": nn.Linear(width, width),
        "floor": nn.Linear(9 * width, width),
        "KANLinear": KANLinear(width, width),
    }
    if with_compiled:
        layers["KANLinear compiled"] = torch.compile(KANLinear(width, width))
    layers["Cox-de Boor, 2 matmuls"] = RecursiveLinear(width, width)
    if width <= 128:  # pykan keeps an array of rows x inputs x outputs
        layers["pykan"] = peer("kan.KANLayer", lambda m: _FirstOutput(m.KANLayer(width, width, num=5, k=3)))
    layers["inkan eager"] = peer("inkan", lambda m: m.KANLayer(width, width, compile_basis=False))
    if with_compiled:  # these compile their basis by themselves
        layers["inkan compiled"] = peer("inkan", lambda m: m.KANLayer(width, width))
        layers["flashkan compiled"] = peer("flashkan", lambda m: m.KANLayer(width, width))
    return {
        name: (layer, torch.randn(1024, (9 if name == "floor" else 1) * width))
        for name, layer in layers.items()
        if layer is not None
    }


def conv_case(dims: int, with_compiled: bool) -> dict[str, Case]:
    kan, plain = (KANConv2d, nn.Conv2d) if dims == 2 else (KANConv3d, nn.Conv3d)
    size = (64, 64) if dims == 2 else (16, 16, 16)
    layers: dict[str, nn.Module | None] = {
        plain.__name__: plain(16, 32, 3, padding=1),
        "floor": plain(9 * 16, 32, 3, padding=1),
        kan.__name__: kan(16, 32, 3, padding=1),
    }
    if with_compiled:
        layers[f"{kan.__name__} compiled"] = torch.compile(kan(16, 32, 3, padding=1))
    layers["unfused"] = UnfusedConv(16, 32, dims)
    if dims == 2:
        layers["convkan"] = peer("convkan", lambda m: m.ConvKAN(16, 32, 3, padding=1))
    return {
        name: (layer, torch.randn(2, (9 if name == "floor" else 1) * 16, *size))
        for name, layer in layers.items()
        if layer is not None
    }


def loop_case() -> dict[str, Case]:
    layers = {"KANLinear": KANLinear(128, 128), "double loop": LoopLinear(128, 128)}
    return {name: (layer, torch.randn(64, 128)) for name, layer in layers.items()}


def inference(layer: nn.Module, x: Tensor) -> None:
    """Run the layer without a record for gradients."""
    with torch.no_grad():
        layer(x)


def forward(layer: nn.Module, x: Tensor) -> None:
    """Run the first half of a training step."""
    layer(x)


def forward_backward(layer: nn.Module, x: Tensor) -> None:
    """Run one training step without the optimizer."""
    layer.zero_grad()
    x.grad = None
    layer(x).sum().backward()


def milliseconds(step: Step, case: Case) -> float:
    """Time one turn: the mean of its calls but the first, which finds caches and heap as others left them."""
    on_gpu = case[1].is_cuda
    clock = time.perf_counter if on_gpu or torch.get_num_threads() > 1 else time.process_time
    step(*case)
    if on_gpu:
        torch.cuda.synchronize()
    start, calls = clock(), 0
    while calls == 0 or clock() - start < 0.02:
        step(*case)
        calls += 1
        if on_gpu:
            torch.cuda.synchronize()
    return 1e3 * (clock() - start) / calls


def peak_mib(step: Step, case: Case) -> float:
    """Return the peak of newly allocated memory in one call."""
    case[0].zero_grad()
    case[1].grad = None
    gc.collect()
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


def compare(title: str, kinds: dict[str, Case], device: str, repeats: int) -> None:
    """Print the table of one case."""
    kinds = {name: (layer.to(device), x.to(device).requires_grad_()) for name, (layer, x) in kinds.items()}
    ours = next(name for name in kinds if name.startswith("KAN"))
    middle: dict[str, list[float]] = {name: [] for name in kinds}
    cells: dict[str, list[str]] = {name: [] for name in kinds}
    for step in (inference, forward, forward_backward):
        times: dict[str, list[float]] = {name: [] for name in kinds}
        for case in kinds.values():
            step(*case)
            step(*case)
        gc.collect()
        gc.disable()
        for _ in range(repeats):
            for name, case in kinds.items():
                times[name].append(milliseconds(step, case))
        gc.enable()
        for name, values in times.items():
            middle[name].append(statistics.median(values))
            cells[name].append(f"{middle[name][-1]:.2f} ({min(values):.2f}-{max(values):.2f})")
    print(f"\n### {title}\n")
    print(f"| layer | inference, ms | forward, ms | both, ms | x floor | x {ours} | peak MiB, both |")
    print("|---|---|---|---|---|---|---|")
    for name, case in kinds.items():
        ratios = [
            " / ".join(f"{mine / other:.2f}" for mine, other in zip(middle[name], middle[rival], strict=True))
            if rival in middle
            else "-"
            for rival in ("floor", ours)
        ]
        peak = peak_mib(forward_backward, case)
        print(f"| {name} | {' | '.join(cells[name])} | {' | '.join(ratios)} | {peak:.1f} |", flush=True)


def volume_step() -> None:
    """Train KANUNet for one step on a volume; print seconds, the process's peak and what it had before, in GiB."""
    net = KANUNet(3, 1, 2, features=(8, 16, 32, 64))
    optimizer = torch.optim.Adam(net.parameters())
    x = torch.randn(1, 1, 96, 96, 96)
    target = (x[:, 0] > 1.0).long()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    start = time.perf_counter()
    F.cross_entropy(net(x), target).backward()
    optimizer.step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{time.perf_counter() - start:.1f} s, peak of the process {peak:.2f} GiB, before the step {before:.2f} GiB")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="also time compiled layers, with torch.compile")
    parser.add_argument("--cases", nargs="*", default=["linear128", "linear512", "conv2d", "conv3d", "loop"])
    parser.add_argument("--volume", action="store_true", help="only measure the memory of a 3-D training step")
    parser.add_argument("--volume-here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.volume_here:
        volume_step()
        return
    if arguments.volume:  # in a process of its own, since the peak is the process's
        command = [sys.executable, __file__, "--volume-here", "--threads", str(arguments.threads)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        print("KANUNet(3, 1, 2, features=(8, 16, 32, 64)), 1 x 1 x 96^3, one training step: " + done.stdout.strip())
        return
    torch.set_float32_matmul_precision("highest")
    where = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else platform.processor() or "CPU"
    print(f"torch {torch.__version__}, {where}, {arguments.threads} thread(s), medians of {arguments.repeats}")
    cases: dict[str, tuple[str, Callable[[], dict[str, Case]]]] = {
        "linear128": ("linear, 1024 x 128 -> 128", lambda: linear_case(128, arguments.compile)),
        "linear512": ("linear, 1024 x 512 -> 512", lambda: linear_case(512, arguments.compile)),
        "conv2d": ("2-D convolution, 2 x 16 -> 32 x 64 x 64, kernel 3", lambda: conv_case(2, arguments.compile)),
        "conv3d": ("3-D convolution, 2 x 16 -> 32 x 16^3, kernel 3", lambda: conv_case(3, arguments.compile)),
        "loop": ("linear, 64 x 128 -> 128", loop_case),
    }
    for name in arguments.cases:
        title, make = cases[name]
        compare(title, make(), arguments.device, arguments.repeats)


if __name__ == "__main__":
    main()
