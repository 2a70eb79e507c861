"""Print how much refits change random KAN layers: ``python tests/benchmarks/table_grid_refits.py`` (seconds)."""

from __future__ import annotations

import torch

from monai_deqkan.networks.layers import KANLinear, refit_grid

DATA = {
    "normal, deviation 0.5": lambda: 0.5 * torch.randn(4000, 16),
    "normal, deviation 1": lambda: torch.randn(4000, 16),
    "normal, deviation 2": lambda: 2.0 * torch.randn(4000, 16),
    "uniform on [-1, 1]": lambda: 2.0 * torch.rand(4000, 16) - 1.0,
    "log-normal": lambda: torch.randn(4000, 16).exp(),
}


def main() -> None:
    for name, make in DATA.items():
        torch.manual_seed(0)
        layer, same = KANLinear(16, 32), KANLinear(16, 32)
        same.load_state_dict(layer.state_dict())
        x = make()
        fixed = refit_grid(same, x, max_growth=1, max_change=float("inf"))
        grown = refit_grid(layer, x)
        print(f"{name:22} same size {fixed.relative_change:6.2%} | {grown}")


if __name__ == "__main__":
    main()
