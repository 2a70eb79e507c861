"""Dart throwing on a grid: points that keep a distance which depends on the place."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["draw_poisson_disc"]

_HALVINGS = 7


def draw_poisson_disc(free: Tensor, spacing: Tensor, num_points: int, order: Tensor) -> Tensor:
    r"""Draw exactly ``num_points`` free cells such that each keeps off the ones before by a distance.

    A cell is taken unless a cell :math:`q` taken before it is nearer than :math:`s \cdot \mathrm{spacing}(q)`. The
    scale :math:`s` is the largest, within 2 %, that leaves room for all points, found by halving an interval.

    Args:
        free: bool, shape ``(H, W)``: cells that may be taken.
        spacing: relative distance to keep, positive, shape ``(H, W)``.
        num_points: how many to draw.
        order: permutation of all cells ``(H * W,)``, in which they are tried.

    Returns:
        Bool, shape ``(H, W)``.

    Raises:
        ValueError: if there are fewer free cells.
    """
    num_free = int(free.sum())
    if num_points > num_free:
        raise ValueError(f"`num_points` must be at most the {num_free} free cells; got {num_points}.")
    cells = order[free.flatten()[order]].tolist()
    square = spacing.double().square().flatten().tolist()
    # Discs that fill the plane: a maximal drawing has about 0.7 points per square of the distance.
    estimate = math.sqrt(0.7 * float(spacing.double().square().reciprocal()[free].sum()) / max(num_points, 1))
    low, high, best = 0.0, 2 * estimate, cells[:num_points]
    for _ in range(_HALVINGS):
        scale = (low + high) / 2
        taken = _throw(cells, square, scale**2, free.shape[1], free.shape[0], num_points)
        if len(taken) == num_points:
            low, best = scale, taken
        else:
            high = scale
    mask = torch.zeros(free.numel(), dtype=torch.bool)
    mask[torch.tensor(best, dtype=torch.long)] = True
    return mask.reshape(free.shape)


def _throw(cells: list[int], square: list[float], scale: float, width: int, height: int, num_points: int) -> list[int]:
    """Take cells in order, each blocking the disc around it, until there are ``num_points`` or no place is left."""
    blocked = bytearray(width * height)
    ones = bytes(b"\x01" * width)
    reaches: dict[int, list[tuple[int, int]]] = {}
    taken: list[int] = []
    for cell in cells:
        if blocked[cell]:
            continue
        if len(taken) == num_points:
            break
        taken.append(cell)
        # Integers as near as the real distance: dx^2 + dy^2 < d^2 is dx^2 + dy^2 <= ceil(d^2) - 1.
        limit = math.ceil(scale * square[cell]) - 1
        reach = reaches.get(limit)
        if reach is None:
            rows = math.isqrt(limit) if limit > 0 else 0
            reach = reaches[limit] = [(dy, math.isqrt(limit - dy * dy)) for dy in range(-rows, rows + 1) if limit > 0]
        y, x = divmod(cell, width)
        for dy, half in reach:
            row = y + dy
            if 0 <= row < height:
                first = max(x - half, 0)
                count = min(x + half + 1, width) - first
                begin = row * width + first
                blocked[begin : begin + count] = ones[:count]
    return taken
