"""Cost of the certified norm per call and its slack, beside torch's power iteration. Run by hand, one core.

OMP_NUM_THREADS=1 python tests/benchmarks/bench_spectral_norm.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from monai_deqkan.networks.layers import KANLinear, certified_spectral_norm, conv_norm_bound, kan_lipschitz_bound
from monai_deqkan.networks.nets import DnCNN

KERNELS: dict[str, Tensor] = {
    "2-D 32 x 32 x 3 x 3": torch.randn(32, 32, 3, 3),
    "2-D 64 x 64 x 3 x 3": torch.randn(64, 64, 3, 3),
    "2-D 64 x 64 x 3 x 3, delta": nn.init.dirac_(torch.empty(64, 64, 3, 3)),
    "2-D 64 x 2 x 3 x 3": torch.randn(64, 2, 3, 3),
    "2-D 32 x 32 x 5 x 5": torch.randn(32, 32, 5, 5),
    "3-D 16 x 16 x 3 x 3 x 3": torch.randn(16, 16, 3, 3, 3),
    "3-D 32 x 32 x 3 x 3 x 3": torch.randn(32, 32, 3, 3, 3),
}


def milliseconds(function: Callable[[], object], repeats: int = 7) -> str:
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return f"{statistics.median(times):8.1f} ({min(times):.1f}-{max(times):.1f})"


def exact_norm(weight: Tensor) -> float:
    axes = weight.ndim - 2
    size = 96 if axes == 2 else 24
    transfer = torch.fft.fftn(weight, s=(size,) * axes).reshape(*weight.shape[:2], -1).permute(2, 0, 1)
    half = transfer[: (size // 2 + 1) * size ** (axes - 1)]
    return max(float(torch.linalg.matrix_norm(block, ord=2).max()) for block in half.split(512))


def main() -> None:
    torch.manual_seed(0)
    print("kernel                          forward ms (range)     and backward ms        bound / norm   torch's / norm")
    for name, weight in KERNELS.items():
        exact = exact_norm(weight)
        slack = float(conv_norm_bound(weight)) / exact
        forward = milliseconds(lambda weight=weight: conv_norm_bound(weight))
        trained = weight.clone().requires_grad_()
        both = milliseconds(lambda weight=trained: conv_norm_bound(weight).backward())
        conv = nn.Conv2d(1, 1, 1) if weight.ndim == 4 else nn.Conv3d(1, 1, 1)
        conv.weight = nn.Parameter(weight)
        scaled = spectral_norm(conv, n_power_iterations=50).weight.detach()
        print(f"{name:30s} {forward:22s} {both:22s} {slack:10.4f} {exact_norm(scaled):14.2f}")

    for width in (16, 64, 256):
        layer = KANLinear(width, width)
        print(
            f"KAN linear {width:4d}: bound, forward ms {milliseconds(lambda layer=layer: kan_lipschitz_bound(layer))}"
        )

    net, x = DnCNN(2, 2, 2, spectral_norm="certified"), torch.randn(1, 2, 64, 64)
    plain = DnCNN(2, 2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)

    def train() -> None:
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()

    with torch.no_grad():
        print("DnCNN 17 x 64, 64 x 64 pixels: without gradients ms", milliseconds(lambda: net(x)))
        print("   the same without certified norm             ms", milliseconds(lambda: plain(x)))
    print("   one training step, certified                ms", milliseconds(train))
    print("   one layer, weight read again                ms", end=" ")
    layer = certified_spectral_norm(nn.Conv2d(64, 64, 3))
    with torch.no_grad():
        print(milliseconds(lambda: layer.weight))


if __name__ == "__main__":
    main()
