"""How far `kan_lipschitz_bound` lies above the largest Jacobian that a search finds. Run by hand; it asserts nothing.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_lipschitz_looseness.py [--starts 2] [--steps 12]

Entry i of J(x)^T u depends on x_i only, so that a search need not climb in x: the best x_i are read from a fine grid,
then u moves on by J(x), and the norm rises with each step. The figures are upper bounds of the true looseness.
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from torch import nn

from monai_deqkan.networks.layers import KANConv2d, KANLayer, KANLinear, kan_lipschitz_bound

FAMILIES = ("init", "rough", "smooth", "trained")


def draw(layer: KANLayer, family: str, shape: tuple[int, ...]) -> None:
    """Set the weights: as initialized, independent, samples of lines and sines, or trained on sines for 100 steps."""
    if family == "rough":
        nn.init.normal_(layer.weight)
    elif family == "smooth":
        edges = layer.coefficients.movedim(1, 0).shape
        x = torch.linspace(*layer.basis.grid_range, 101, dtype=torch.float64)
        slope, height, pitch, phase = torch.randn(4, math.prod(edges[1:]), 1, dtype=torch.float64)
        targets = slope * x + height * torch.sin(pitch * x + 3 * phase)
        layer.coefficients.data.copy_(layer.basis.fit(x, targets.T).reshape(edges).movedim(0, 1))
    elif family == "trained":
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
        for _ in range(100):
            x = torch.randn(64, *shape)
            loss = (layer(x) - torch.sin(2 * x.roll(1, dims=1))).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def largest_stretch(layer: KANLayer, shape: tuple[int, ...], starts: int, steps: int) -> float:
    """Search for the largest norm of the Jacobian."""
    low, high = layer.basis.grid_range
    points = torch.linspace(low - 4, high + 4, 401)
    filled = points.view(-1, *[1] * len(shape)).expand(-1, *shape).clone().requires_grad_()
    output = layer(filled)
    found = 0.0
    for _ in range(starts):
        u = torch.randn(output.shape[1:])
        for _ in range(steps):
            u = u / u.norm()
            (slopes,) = torch.autograd.grad(output, filled, u.expand_as(output), retain_graph=True)
            best = slopes.abs().argmax(0, keepdim=True)
            v = slopes.gather(0, best)
            found = max(found, float(v.norm()))
            u = torch.autograd.functional.jvp(layer, points[best], v)[1][0]
    return found


def main() -> None:
    """Print bound / largest norm found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--starts", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    print(f"{'layer':26s}{'grid':>5s}" + "".join(f"{family:>9s}" for family in FAMILIES) + "   ms per bound")
    for name, shape in (("linear", (16,)), ("linear", (64,)), ("linear", (256,)), ("conv", (8, 12, 12))):
        for outside in ("zero", "linear"):
            for grid in (5, 20):
                row = []
                for family in FAMILIES:
                    torch.manual_seed(0)
                    layer: KANLayer = (
                        KANConv2d(8, 8, 3, padding=1, grid_size=grid, outside=outside)
                        if name == "conv"
                        else KANLinear(shape[0], shape[0], grid_size=grid, outside=outside)
                    )
                    draw(layer, family, shape)
                    layer.requires_grad_(False)
                    bound = float(kan_lipschitz_bound(layer))
                    row.append(bound / largest_stretch(layer, shape, options.starts, options.steps))
                start = time.perf_counter()
                kan_lipschitz_bound(layer)
                cost = 1e3 * (time.perf_counter() - start)
                label = f"{name} {shape[0]}, outside={outside}"
                print(f"{label:26s}{grid:5d}" + "".join(f"{ratio:9.2f}" for ratio in row) + f"{cost:12.1f}", flush=True)


if __name__ == "__main__":
    main()
