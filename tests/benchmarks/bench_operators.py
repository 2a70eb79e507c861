"""Processor time and memory of the MRI operator beside its Fourier transforms alone. Run by hand, one core.

OMP_NUM_THREADS=1 python tests/benchmarks/bench_operators.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from monai_deqkan.operators import MRIOperator, poisson_disc_mask, random_mask, smooth_coil_maps

REPEATS = 31


def seconds(function: Callable[[], Tensor]) -> float:
    """Return processor time, which waiting for other processes does not add to."""
    start = time.process_time()
    function()
    return time.process_time() - start


def peak_bytes(function: Callable[[], Tensor]) -> int:
    """Return the most memory that tensors made inside hold at a time, from the profiler's record of allocations."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = function()
    held = peak = 0
    for event in sorted(record.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    del result
    return peak


def compare(name: str, function: Callable[[], Tensor], transforms: Callable[[], Tensor], stack: Tensor) -> None:
    """Print the time of a function over that of its transforms, in turns, and its peak memory in coil stacks."""
    function(), transforms()
    pairs = [(seconds(function), seconds(transforms)) for _ in range(REPEATS)]
    ratios = sorted(a / b for a, b in pairs)
    best, plain = (1e3 * min(times) for times in zip(*pairs, strict=True))
    print(
        f"  {name:26s} median ratio {statistics.median(ratios):.2f} ({ratios[REPEATS // 4]:.2f}-"
        f"{ratios[-1 - REPEATS // 4]:.2f}), fastest {best:.1f} over {plain:.1f} ms = {best / plain:.2f}, peak "
        f"{peak_bytes(function) / (stack.numel() * stack.element_size()):.2f} coil stacks"
    )


def problem(num_coils: int, space: tuple[int, ...]) -> None:
    print(f"{num_coils} coils, {' x '.join(map(str, space))}")
    generator = torch.Generator().manual_seed(0)
    maps = smooth_coil_maps(space, num_coils, generator=generator).unsqueeze(0)
    mask = random_mask((1, 1, *space)[-3:], 4, 0.08, generator=generator)
    mask = mask.reshape(*[1] * (len(space) + 1), -1)
    x = torch.randn(1, *space, dtype=torch.complex64, generator=generator)
    y = torch.randn(1, num_coils, *space, dtype=torch.complex64, generator=generator)
    operator = MRIOperator(mask, maps, spatial_dims=len(space))
    soft = MRIOperator(mask, torch.stack([maps, maps.flip(-1)], dim=1) / 2**0.5, spatial_dims=len(space))
    pair = torch.stack([x, x], dim=1)
    axes = tuple(range(-len(space), 0))

    def there() -> Tensor:
        return torch.fft.fftn(y, dim=axes, norm="ortho")

    def and_back() -> Tensor:
        return torch.fft.ifftn(there(), dim=axes, norm="ortho")

    with torch.no_grad():
        compare("forward", lambda: operator(x), there, y)
        compare("adjoint", lambda: operator.adjoint(y), there, y)
        compare("normal", lambda: operator.normal(x), and_back, y)
        compare("normal, two map sets", lambda: soft.normal(pair), and_back, y)
    leaf = x.clone().requires_grad_()
    compare("forward and its gradient", lambda: torch.autograd.grad(operator(leaf), leaf, y)[0], and_back, y)


def main() -> None:
    for num_coils, space in ((8, (320, 320)), (8, (319, 321)), (16, (64, 64)), (8, (32, 64, 64))):
        problem(num_coils, space)
    time_of_mask = seconds(lambda: poisson_disc_mask((320, 320), generator=torch.Generator().manual_seed(0)))
    print(f"Poisson-disc mask, 320 x 320, 4x: {time_of_mask:.1f} s")


if __name__ == "__main__":
    main()
