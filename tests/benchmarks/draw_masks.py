"""Draw every Cartesian mask and trajectory, for docs/concepts/mri-physics.md. Run by hand.

python tests/benchmarks/draw_masks.py docs/assets/masks.png
"""

from __future__ import annotations

import sys

import torch
from matplotlib.figure import Figure

from monai_deqkan.operators import (
    MASKS,
    golden_angle_trajectory,
    net_acceleration,
    radial_trajectory,
    spiral_trajectory,
)

SIZE = (128, 128)


def main(path: str) -> None:
    figure = Figure(figsize=(9, 9.6), layout="constrained")
    axes = figure.subplots(3, 3)
    for axis, (name, draw) in zip(axes.flat, MASKS.items(), strict=False):
        mask = draw(SIZE, 4.0, 0.08, generator=torch.Generator().manual_seed(0))
        axis.imshow(mask.expand(SIZE), cmap="gray", interpolation="nearest")
        axis.set_title(f'"{name}", net {net_acceleration(mask):.2f}')
        axis.set_axis_off()
    trajectories = {
        "radial_trajectory, 16 spokes": radial_trajectory(SIZE, 16),
        "golden_angle_trajectory, 16": golden_angle_trajectory(SIZE, 16),
        "spiral_trajectory, 4 interleaves": spiral_trajectory(SIZE, 4, 1000, num_turns=6),
    }
    for axis, (name, trajectory) in zip(axes[2], trajectories.items(), strict=True):
        for shot in trajectory:
            axis.plot(shot[:, 1], shot[:, 0], linewidth=0.8)
        axis.set_title(name)
        axis.set_aspect("equal")
        axis.set_axis_off()
    figure.savefig(path, dpi=80, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main(sys.argv[1])
