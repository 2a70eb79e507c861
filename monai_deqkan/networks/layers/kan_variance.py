"""Initial weights of KAN layers that keep the mean squares of outputs and gradients."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_deqkan.networks.layers.basis import Basis

__all__ = ["VarianceDraw", "variance_draw"]


@dataclass(frozen=True)
class VarianceDraw:
    """What the weights of one input are drawn from.

    Args:
        base: standard deviation of the base weight.
        base_alone: the same where there is only a base term.
        coefficients: symmetric matrix ``(K, K)`` that independent normal numbers are multiplied by.
    """

    base: float
    base_alone: float
    coefficients: Tensor


@functools.lru_cache(maxsize=64)
def variance_draw(basis: Basis, has_base: bool) -> VarianceDraw:
    """Choose shares and covariance that keep both mean squares; see `KANLayer.reset_parameters`."""
    x = torch.linspace(-6.0, 6.0, 1201, dtype=torch.float64, device="cpu")
    density = torch.exp(-0.5 * x**2)
    density /= density.sum()
    sigmoid = torch.sigmoid(x)
    base = float((F.silu(x) ** 2 * density).sum())
    steepness = float(((sigmoid * (1 + x * (1 - sigmoid))) ** 2 * density).sum()) / base
    gram, slopes = _second_moments(basis, x, density)
    roughness = float(slopes.trace() / gram.trace())
    share, target = 1.0, 1.0
    if has_base and roughness < 1.0:
        share = (steepness - 1.0) / (steepness - roughness)
    elif has_base:
        share, target = 0.5, 2.0 - steepness
    root = torch.eye(basis.num_basis, dtype=torch.float64, device="cpu")
    if roughness > target:
        root = _damped(slopes, gram, slopes, target)
    elif not has_base:
        root = _damped(gram, gram, slopes, target)
    power = float((root @ gram @ root).trace())
    return VarianceDraw(math.sqrt((1.0 - share) / base), math.sqrt(1.0 / base), root * math.sqrt(share / power))


def _second_moments(basis: Basis, x: Tensor, density: Tensor) -> tuple[Tensor, Tensor]:
    """Return E[B_k B_l] and E[B_k' B_l'] for N(0, 1) or, where these are too small, uniformly on the grid."""
    grid = torch.linspace(*basis.grid_range, 1201, dtype=torch.float64, device="cpu")
    on_grid = basis.values(grid)
    values = basis.values(x)
    if float((values**2 * density).sum()) <= 0.05 * float((on_grid**2).sum(0).mean()):
        x, values, density = grid, on_grid, torch.full_like(grid, 1.0 / len(grid))
    slopes = basis.derivative(x)
    return (values * density) @ values.t(), (slopes * density) @ slopes.t()


def _damped(matrix: Tensor, gram: Tensor, slopes: Tensor, target: float) -> Tensor:
    """Return (1 + lambda A)^(-1/2) whose functions have the target ratio of E[f'^2] to E[f^2], or the nearest.

    The matrix A is E[B_k' B_l'] where that ratio has to fall, E[B_k B_l] where it has to rise.
    """
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp(min=0.0)
    upper, lower = ((vectors.t() @ moments @ vectors).diagonal() for moments in (slopes, gram))
    wanted = float(upper.sum() / lower.sum()) > target
    low, high = -40.0, 40.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        shrink = 1.0 / (1.0 + math.exp(middle) * values)
        go_on = (float((upper * shrink).sum() / (lower * shrink).sum()) > target) == wanted
        low, high = (middle, high) if go_on else (low, middle)
    return (vectors * (1.0 / (1.0 + math.exp(high) * values)).sqrt()) @ vectors.t()
