"""Refine the grids of KAN layers without changing their functions."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from monai_deqkan._checks import check_finite, check_int
from monai_deqkan.networks.layers.basis import Basis
from monai_deqkan.networks.layers.kan_channels import channel_edges, layer_edges
from monai_deqkan.networks.layers.kan_inputs import kan_layers
from monai_deqkan.networks.layers.kan_layer import KANLayer
from monai_deqkan.networks.layers.plain_weight import is_plain

__all__ = [
    "GridExtension",
    "check_plain_layer",
    "extend_grid",
    "extend_grids",
    "reset_optimizer_state",
]


@dataclass(frozen=True)
class GridExtension:
    """What `extend_grid` did to one layer.

    Attributes:
        layer: name of the layer in the network.
        old_num_basis: number of basis functions before.
        num_basis: number after.
        relative_change: root mean square change of the spline parts over the grid, relative to theirs; zero but for
            rounding where the finer basis holds the old functions.
        outside_change: the same over a quarter of the grid's width beyond each end, relative to the root mean square
            on the grid. Functions that fade to zero there fade sooner on a finer grid.
    """

    layer: str
    old_num_basis: int
    num_basis: int
    relative_change: float
    outside_change: float

    def __str__(self) -> str:
        return (
            f"{self.layer or 'layer'}: {self.old_num_basis} -> {self.num_basis} functions, change "
            f"{self.relative_change:.1e} on the grid, {self.outside_change:.1e} outside"
        )


def extend_grid(
    layer: KANLayer, factor: int | None = None, *, grid_size: int | None = None, name: str = ""
) -> GridExtension:
    """Give a layer a finer grid on the same range, and keep its functions.

    The change is zero but for rounding where the finer basis holds the old functions on the grid: knots that nest,
    which a ``factor`` always gives. Otherwise the closest functions are taken, and the record tells their distance.
    The coefficients are fitted in float64 and the weight stays the same parameter object: an optimizer keeps it, but
    needs `reset_optimizer_state`.

    Args:
        layer: layer whose weight is a plain parameter; changed in place.
        factor: how many times finer; 2 if nothing is given.
        grid_size: new number of intervals, for a basis with that setting; in place of ``factor``.
        name: what to call the layer in the record.

    Returns:
        What was done.

    Raises:
        ValueError: if both or a wrong number is given, the weight is parametrized or not finite, or the basis has no
            such setting.
        TypeError: if ``layer`` is no KAN layer, or its basis has a fixed number of functions.

    Example:
        >>> from monai_deqkan.networks.layers import KANLinear
        >>> layer = KANLinear(2, 3)
        >>> extend_grid(layer).num_basis, layer.basis.grid_size
        (13, 10)
    """
    check_plain_layer(layer)
    check_finite("layer.weight", layer.weight, "Reload the layer; an extension cannot repair it.")
    old = layer.basis
    new = _extended(old, factor, grid_size)
    low, high = old.grid_range
    width = high - low
    # In each interval of the finer basis several points: the fit on the grid is then well posed.
    grid = torch.linspace(low, high, 16 * new.num_basis + 1, dtype=torch.float64)
    matrix = _exact_fit(new.values(grid, dim=1), old.values(grid, dim=1))  # (K', K)
    rim = torch.linspace(0.0, 0.25 * width, 65, dtype=torch.float64)[1:]
    rim = torch.cat((low - rim, high + rim))
    edges = channel_edges(layer, layer.coefficients.detach().double().cpu())
    layer.set_basis(new, layer_edges(layer, matrix @ edges).to(layer.weight))
    size = _rms(old.values(grid, dim=1), edges)
    change, outside = (
        _rms(new.values(points, dim=1) @ matrix - old.values(points, dim=1), edges) for points in (grid, rim)
    )
    share = [0.0 if value == 0.0 else value / size for value in (change, outside)]
    return GridExtension(name, old.num_basis, new.num_basis, share[0], share[1])


def _extended(basis: Basis, factor: int | None, grid_size: int | None) -> Basis:
    if grid_size is None:
        return basis.refined(check_int("factor", 2 if factor is None else factor))
    if factor is not None:
        raise ValueError(f"Give `factor` or `grid_size`, not both; got {factor} and {grid_size}.")
    check_int("grid_size", grid_size)
    old_size = getattr(basis, "grid_size", None)
    if old_size is None:
        raise ValueError(f"`grid_size` needs a basis with that setting; got {basis!r}. Give `factor`.")
    if grid_size < old_size:
        raise ValueError(f"`grid_size` must be at least the old one, {old_size}; got {grid_size}.")
    return replace(basis, grid_size=grid_size)  # type: ignore[type-var]


def _exact_fit(new: Tensor, old: Tensor) -> Tensor:
    """Solve ``new @ T = old`` by QR with a ridge of rounding size, so that any basis has an answer."""
    ridge = 1e-13 * float(new.norm()) / math.sqrt(new.shape[1])
    stacked = torch.cat((new, ridge * torch.eye(new.shape[1], dtype=new.dtype)))
    q, r = torch.linalg.qr(stacked)
    return torch.linalg.solve_triangular(r, q[: len(new)].mT @ old, upper=True)


def _rms(values: Tensor, edges: Tensor) -> float:
    """Return the root mean square of ``values @ edges`` for values ``(P, K)`` and coefficients ``(C, K, E)``."""
    mean = (((values.mT @ values) @ edges) * edges).sum() / (len(values) * len(edges) * edges.shape[2])
    return math.sqrt(max(float(mean), 0.0))


def extend_grids(network: nn.Module, factor: int | None = None, *, grid_size: int | None = None) -> list[GridExtension]:
    """Extend all KAN layers of a network; see `extend_grid`.

    Layers whose weight is parametrized, such as certified ones, are left alone, and so are those that already have
    ``grid_size`` intervals or more.

    Args:
        network: the network, changed in place.
        factor: how many times finer; 2 if nothing is given.
        grid_size: new number of intervals, in place of ``factor``.

    Returns:
        A record for each extended layer, in the network's order.

    Raises:
        ValueError: if the network has no KAN layer, or an argument is wrong.
        TypeError: if ``network`` is no module, or a basis has a fixed number of functions.
    """
    return [
        extend_grid(layer, factor, grid_size=grid_size, name=name)
        for name, layer in kan_layers(network).items()
        if is_plain(layer) and (grid_size is None or getattr(layer.basis, "grid_size", 0) < grid_size)
    ]


def reset_optimizer_state(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor] | None = None) -> int:
    """Drop an optimizer's running averages for parameters whose shape has changed; it starts them anew.

    Args:
        optimizer: the optimizer.
        parameters: whose state to drop, whatever its shape; by default those for which the optimizer holds a tensor
            with as many axes but of another shape.

    Returns:
        Number of parameters whose state was dropped.
    """
    if parameters is None:
        parameters = [parameter for parameter, state in optimizer.state.items() if _has_other_shape(state, parameter)]
    return sum(optimizer.state.pop(parameter, None) is not None for parameter in list(parameters))


def _has_other_shape(state: dict[str, Any], parameter: Tensor) -> bool:
    values = [value for value in state.values() if isinstance(value, Tensor)]
    return any(value.dim() == parameter.dim() and value.shape != parameter.shape for value in values)


def check_plain_layer(layer: Any) -> None:
    """Raise an error unless ``layer`` is a KAN layer whose weight is a parameter."""
    if not isinstance(layer, KANLayer):
        raise TypeError(
            f"`layer` must be a KANLinear or KANConv1d/2d/3d; got {type(layer).__name__}. The one of a KANActivation "
            "is its `functions`; for a network there are refit_grids and extend_grids."
        )
    if not is_plain(layer):
        raise ValueError(
            "The grid of a layer whose weight is parametrized cannot be changed: the parametrization, such as a "
            "certificate, was computed for it. Remove it, change the grid, and put it on again."
        )
