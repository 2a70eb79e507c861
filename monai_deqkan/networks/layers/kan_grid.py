"""Move the grids of KAN layers to their data and keep the functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from monai_deqkan._checks import check_finite, check_int, check_range
from monai_deqkan.networks.layers.basis import Basis
from monai_deqkan.networks.layers.kan_channels import (
    channel_edges,
    grid_coordinates,
    grid_ends,
    input_map,
    input_rows,
    layer_edges,
)
from monai_deqkan.networks.layers.kan_extension import check_plain_layer
from monai_deqkan.networks.layers.kan_inputs import InputStatistics, column_quantiles, kan_layers, record_inputs
from monai_deqkan.networks.layers.kan_layer import KANLayer
from monai_deqkan.networks.layers.plain_weight import is_plain

__all__ = ["GridRefit", "refit_grid", "refit_grids"]

_QUANTILES = (0.001, 0.999)
_NUM_DATA, _NUM_UNIFORM = 512, 128  # points of a fit; the former reach from the 0.1 to the 99.9 % quantile
_UNIFORM_SHARE = 0.1  # of the weight: keeps the function where there are no data, hardly costs accuracy where they are
_MAX_ROWS = 1 << 16  # a single refit looks at no more rows


@dataclass(frozen=True)
class GridRefit:
    """What `refit_grid` did to one layer.

    Attributes:
        layer: name of the layer in the network.
        old_range: ends of each channel's grid before, in the unit of the layer's input, shape ``(in, 2)``.
        new_range: ends after.
        kept: for each channel whose grid did not go to the quantiles of its inputs, why.
        old_num_basis: number of basis functions before.
        num_basis: number after; larger where the function could not be kept otherwise.
        channel_change: root mean square change of each channel's edge functions, base term included, relative to
            theirs, over the inputs within ``new_range``, or over all where a channel kept its grid; shape ``(in,)``.
        relative_change: the same of all channels together.
        outside_before: share of the finite inputs outside the old grid.
        outside_after: share outside the new one.
        non_finite: number of NaN and infinite inputs that were left out.
    """

    layer: str
    old_range: Tensor
    new_range: Tensor
    kept: dict[int, str]
    old_num_basis: int
    num_basis: int
    channel_change: Tensor
    relative_change: float
    outside_before: float
    outside_after: float
    non_finite: int

    def __str__(self) -> str:
        channels = len(self.channel_change)
        text = (
            f"{self.layer or 'layer'}: {channels - len(self.kept)} of {channels} grids refitted, outside "
            f"{self.outside_before:.2%} -> {self.outside_after:.2%}, change {self.relative_change:.2%}"
        )
        return text + (f", {self.old_num_basis} -> {self.num_basis} functions" * (self.num_basis != self.old_num_basis))


def refit_grid(
    layer: KANLayer,
    inputs: Tensor,
    *,
    ridge: float = 1e-8,
    margin: float = 0.0,
    dead_band: float = 0.0,
    max_change: float = 0.01,
    max_growth: int = 4,
    name: str = "",
) -> GridRefit:
    r"""Move the grid of each input channel to the range of its inputs, and keep the functions.

    The range goes from the 0.1 % to the 99.9 % quantile of the channel's finite inputs. An affine map
    :math:`t = s_i x + b_i` in front of the basis takes it to the basis's own range, so that knots stay uniform, and
    the coefficients :math:`c_i` of all edges from channel :math:`i` become :math:`T_i c_i` with

    .. math:: T_i = (\Phi'^T W \Phi' + \rho I)^{-1} \Phi'^T W \Phi

    where :math:`\Phi` and :math:`\Phi'` hold the old and the new basis functions at points of which nine tenths of the
    weight are quantiles of the data and one tenth is uniform on the new range. It works in place, in float64; base
    weights, bias and the parameter object stay. Inputs that are NaN or infinite are left out.

    **How much the function changes** is decided on the data, channel by channel: where it would be more than
    ``max_change``, the basis is refined by a factor of 2, 3, ... up to ``max_growth``, and where that does not help,
    the channel keeps its grid. Where a finer basis would change a channel that keeps its grid by more than
    ``max_change`` over all its inputs, also those outside of the grid, the basis keeps its size. Channels without
    finite inputs keep their grids, too, and so do constant ones (all inputs equal up to 16 roundings of the weight's
    dtype); a constant outside the grid moves the grid, unscaled, around it.

    Args:
        layer: layer whose weight is a plain parameter; changed in place.
        inputs: what the layer takes: ``(*, in)`` or ``(B, in, *space)``. Of more than 65536 rows some are used.
        ridge: :math:`\rho`, relative to the mean diagonal of :math:`\Phi'^T W \Phi'`.
        margin: share of the range added at each end.
        dead_band: a channel keeps its grid if both ends would move by less than this share of its width.
        max_change: largest relative change of a channel's functions, root mean square over the inputs.
        max_growth: largest factor that the basis may be refined by to achieve that; 1 keeps its size.
        name: what to call the layer in the record.

    Returns:
        What was done.

    Raises:
        ValueError: if ``inputs`` is empty or does not fit, the weight is parametrized or not finite, or a number is
            out of its range.
        TypeError: if ``layer`` is no KAN layer.

    Example:
        >>> from monai_deqkan.networks.layers import KANLinear
        >>> layer = KANLinear(2, 3)
        >>> record = refit_grid(layer, torch.linspace(0, 1000, 1001)[:, None] * torch.tensor([1.0, 2.0]))
        >>> record.new_range.round(decimals=2)
        tensor([[1.0000e+00, 9.9900e+02],
                [2.0000e+00, 1.9980e+03]], dtype=torch.float64)
    """
    check_plain_layer(layer)
    rows = input_rows(layer, inputs)
    if not len(rows):
        raise ValueError(f"`inputs` must hold a sample at least; got shape {tuple(inputs.shape)}.")
    if len(rows) > _MAX_ROWS:
        index = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:_MAX_ROWS]
        rows = rows[index.to(rows.device)]
    settings = _RefitSettings(ridge, margin, dead_band, max_change, max_growth)
    return _refit(layer, rows.to(layer.weight.device), settings, name)


@dataclass(frozen=True)
class _RefitSettings:
    ridge: float
    margin: float
    dead_band: float
    max_change: float
    max_growth: int

    def __post_init__(self) -> None:
        check_range("ridge", self.ridge, 0.0, 1.0, open_low=True)
        check_range("margin", self.margin, 0.0, 10.0)
        check_range("dead_band", self.dead_band, 0.0, 1.0)
        check_range("max_change", self.max_change, 0.0)
        check_int("max_growth", self.max_growth)


@torch.no_grad()
def _refit(layer: KANLayer, rows: Tensor, settings: _RefitSettings, name: str) -> GridRefit:
    check_finite("layer.weight", layer.weight, "Reload the layer; a refit cannot repair it.")
    old_basis = layer.basis
    edges = channel_edges(layer, layer.coefficients.detach().double())  # (C, K, E)
    old_map = input_map(layer)
    target, kept = _target_ranges(layer, rows, settings)
    new_map = _map_to(target, old_basis.grid_range, layer.weight.dtype)
    stay = target.isnan().any(1)
    new_map = torch.where(stay, old_map, new_map)  # (2, C)
    fit = _Fit(layer, rows, edges, old_map, settings)

    best, failed = fit.settle(new_map, stay)
    kept |= failed
    stay[list(failed)] = True
    new_map = torch.where(stay, old_map, new_map)

    before = grid_ends(layer)
    outside_before = _outside(layer, rows)
    layer.set_basis(best.basis, layer_edges(layer, best.edges).to(layer.weight.dtype))
    if not bool(stay.all()):
        layer.set_input_map(new_map[0], new_map[1])
    return GridRefit(
        layer=name,
        old_range=before.cpu(),
        new_range=grid_ends(layer).cpu(),
        kept=dict(sorted(kept.items())),
        old_num_basis=old_basis.num_basis,
        num_basis=best.basis.num_basis,
        channel_change=best.change.cpu(),
        relative_change=best.total_change,
        outside_before=outside_before,
        outside_after=_outside(layer, rows),
        non_finite=int((~rows.isfinite()).sum()),
    )


def _refined(basis: Basis, factor: int) -> Basis | None:
    try:
        return basis.refined(factor)
    except TypeError:  # its number of functions is fixed
        return None


@dataclass(frozen=True)
class _Solved:
    basis: Basis
    edges: Tensor  # (C, K', E)
    change: Tensor  # (C,)
    total_change: float
    fails: Tensor  # (C,), where the grid moves and the change is too large
    spoils: Tensor  # (C,), where the grid stays and the change is too large


class _Fit:
    """Fits of one layer's functions in other bases and under other maps."""

    def __init__(self, layer: KANLayer, rows: Tensor, edges: Tensor, old_map: Tensor, settings: _RefitSettings) -> None:
        self.layer = layer
        self.edges = edges
        self.old_map = old_map
        self.settings = settings
        probabilities = (torch.arange(_NUM_DATA, dtype=torch.float64, device=rows.device) + 0.5) / _NUM_DATA
        self.data = column_quantiles(rows, probabilities).t()  # (C, P)
        base = layer.base_weight
        self.base = None if base is None else channel_edges(layer, base.detach().double().unsqueeze(1))  # (C, 1, E)

    def settle(self, new_map: Tensor, stay: Tensor) -> tuple[_Solved, dict[int, str]]:
        """Fit and let the channels that fail stay, too; return the fit and why each of them failed."""
        best, least_change = self.search(new_map, stay)
        fails, reason = best.fails, "at least"
        if bool(fails.any()):
            best = self._solve_without(best.basis, new_map, stay | fails)
        if bool(best.spoils.any()):  # the finer functions fade sooner outside of the grid
            first = self.solve(self.layer.basis, new_map, stay)
            fails, least_change = first.fails, first.change
            reason = "on a grid of this size, and a finer one would change channels that keep theirs"
            best = self._solve_without(self.layer.basis, new_map, stay | fails)
        indices = fails.nonzero().flatten().tolist()
        return best, {i: f"the functions would change by {float(least_change[i]):.1%} {reason}" for i in indices}

    def _solve_without(self, basis: Basis, new_map: Tensor, stay: Tensor) -> _Solved:
        basis = self.layer.basis if bool(stay.all()) else basis
        return self.solve(basis, torch.where(stay, self.old_map, new_map), stay)

    def search(self, new_map: Tensor, stay: Tensor) -> tuple[_Solved, Tensor]:
        """Fit in the old basis and, while channels fail, in finer ones; also return each channel's least change."""
        best = self.solve(self.layer.basis, new_map, stay)
        least_change = best.change
        for factor in range(2, self.settings.max_growth + 1):
            finer = _refined(self.layer.basis, factor) if bool(best.fails.any()) else None
            if finer is None:
                break
            trial = self.solve(finer, new_map, stay)
            least_change = torch.minimum(least_change, trial.change)
            if int(trial.fails.sum()) < int(best.fails.sum()):
                best = trial
        return best, least_change

    def solve(self, basis: Basis, new_map: Tensor, stay: Tensor) -> _Solved:
        """Fit all channels; those that stay keep their map, and their coefficients too in the old basis."""
        edges = self.edges.new_empty(len(stay), basis.num_basis, self.edges.shape[2])
        squares = self.edges.new_empty(2, len(stay))
        size = max(1, (1 << 21) // ((_NUM_DATA + _NUM_UNIFORM) * basis.num_basis))
        for part in torch.arange(len(stay), device=stay.device).split(size):
            edges[part], squares[:, part] = self._solve(basis, new_map, stay, part)
        change = _ratio(squares[0], squares[1])
        fails = ~stay & ~(change <= self.settings.max_change)
        fails |= ~stay & ~edges.to(self.layer.weight.dtype).isfinite().flatten(1).all(1)
        total = _ratio(squares[0].sum(), squares[1].sum())
        spoils = stay & ~(change <= self.settings.max_change)
        return _Solved(basis, edges, change, float(total), fails, spoils)

    def _solve(self, basis: Basis, new_map: Tensor, stay: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        """Return the channels' new coefficients, and the sums of squares of their change and of their functions."""
        (scale, shift), (old_scale, old_shift) = new_map[:, part, None], self.old_map[:, part, None]
        grid = torch.linspace(*basis.grid_range, _NUM_UNIFORM, dtype=torch.float64, device=stay.device)
        uniform = (grid - shift) / scale
        first, last = uniform.amin(1, keepdim=True), uniform.amax(1, keepdim=True)
        reach = 0.5 * (last - first)
        data = self.data[part]
        near = (data >= first - reach) & (data <= last + reach)
        judged = torch.where(stay[part, None], data.isfinite(), near & (data >= first) & (data <= last))
        data = torch.where(near | judged, data, 0.5 * (first + last))
        points = torch.cat((data, uniform), dim=1)
        weights = torch.cat((near * ((1 - _UNIFORM_SHARE) / _NUM_DATA), _full_like(uniform, _UNIFORM_SHARE)), dim=1)
        old = self.layer.basis.values(old_scale * points + old_shift, dim=1)  # (C, K, P)
        new = basis.values(scale * points + shift, dim=1)  # (C, K', P)
        matrix = _ridge_fit(new, old, weights, self.settings.ridge)
        if basis == self.layer.basis:
            matrix[stay[part]] = torch.eye(basis.num_basis, dtype=matrix.dtype, device=matrix.device)

        old = old[..., :_NUM_DATA] * judged[:, None]
        difference = matrix.mT @ (new[..., :_NUM_DATA] * judged[:, None]) - old  # (C, K, P)
        edges = self.edges[part]
        functions, combined = old, edges
        if self.base is not None:
            functions = torch.cat((old, nn.functional.silu(data)[:, None] * judged[:, None]), dim=1)
            combined = torch.cat((edges, self.base[part]), dim=1)
        squares = torch.stack((_sum_of_squares(difference, edges), _sum_of_squares(functions, combined)))
        return matrix @ edges, squares


def _sum_of_squares(values: Tensor, edges: Tensor) -> Tensor:
    """Return the squares of ``edges^T values``, summed, for values ``(C, K, P)`` and coefficients ``(C, K, E)``."""
    return (((values @ values.mT) @ edges) * edges).sum((1, 2)).clamp(min=0.0)


def _full_like(points: Tensor, share: float) -> Tensor:
    return torch.full_like(points, share / points.shape[1])


def _ratio(change: Tensor, size: Tensor) -> Tensor:
    """Return the root of the ratio of two sums of squares, 0 where nothing changed."""
    return torch.where(change == 0, 0.0, (change / size).sqrt())


def _ridge_fit(new: Tensor, old: Tensor, weights: Tensor, ridge: float) -> Tensor:
    """Return the matrices ``(C, K', K)`` that take coefficients in ``old`` ``(C, K, P)`` to those in ``new``."""
    weighted = new * weights[:, None]
    gram = weighted @ new.mT
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal += ridge * diagonal.mean(1, keepdim=True).clamp(min=torch.finfo(gram.dtype).tiny)
    return torch.linalg.solve_ex(gram, weighted @ old.mT)[0]


def _target_ranges(layer: KANLayer, rows: Tensor, settings: _RefitSettings) -> tuple[Tensor, dict[int, str]]:
    """Return where the grid of each channel is to go, ``(C, 2)``, NaN where it is to stay, and why."""
    low, high = column_quantiles(rows, _QUANTILES)
    old = grid_ends(layer)
    old_low, old_high = old.amin(1), old.amax(1)
    old_width = old_high - old_low
    info = torch.finfo(layer.weight.dtype)
    grid_low, grid_high = layer.basis.grid_range
    # Below this width the map's scale or shift would lose the values in the weight's dtype.
    smallest = 16 * info.eps * torch.maximum(low.abs(), high.abs())
    smallest = smallest.clamp(min=100.0 * (grid_high - grid_low) / info.max)
    constant = high - low <= smallest
    middle, width = 0.5 * (low + high), torch.maximum(old_width, smallest)
    widened = torch.stack((low - settings.margin * (high - low), high + settings.margin * (high - low)), dim=1)
    around = torch.stack((middle - 0.5 * width, middle + 0.5 * width), dim=1)
    target = torch.where(constant[:, None], around, widened)
    moved = torch.maximum((target[:, 0] - old_low).abs(), (target[:, 1] - old_high).abs())
    on_grid = (middle >= old_low) & (middle <= old_high)
    kept: dict[int, str] = {}
    for reason, where in (
        ("no finite inputs", low.isnan()),
        ("constant inputs on the grid", constant & on_grid),
        ("within the dead band", ~constant & (moved < settings.dead_band * old_width)),
    ):
        for channel in where.nonzero().flatten().tolist():
            kept[channel] = reason
    target[list(kept)] = torch.nan
    for channel in (constant & ~on_grid & ~low.isnan()).nonzero().flatten().tolist():
        kept[channel] = "constant inputs outside the grid, which moved around them"
    return target, kept


def _map_to(target: Tensor, grid_range: tuple[float, float], dtype: torch.dtype) -> Tensor:
    """Return scale and shift, ``(2, C)``, that take ``target`` ``(C, 2)`` to the grid, as rounded to ``dtype``."""
    low, high = target.unbind(1)
    scale = ((grid_range[1] - grid_range[0]) / (high - low)).to(dtype).double()
    # Around the middle, so that the rounding of the scale moves both ends alike.
    shift = (0.5 * (grid_range[0] + grid_range[1]) - scale * 0.5 * (low + high)).to(dtype).double()
    return torch.stack((scale, shift))


def _outside(layer: KANLayer, rows: Tensor) -> float:
    t = grid_coordinates(layer, rows.double())
    low, high = layer.basis.grid_range
    outside = rows.isfinite() & ((t < low) | (t > high))
    return float(outside.sum() / rows.isfinite().sum().clamp(min=1))


def refit_grids(
    network: nn.Module,
    data: Iterable[Any] | InputStatistics,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    ridge: float = 1e-8,
    margin: float = 0.0,
    dead_band: float = 0.0,
    max_change: float = 0.01,
    max_growth: int = 4,
) -> list[GridRefit]:
    """Refit all KAN layers of a network to what they receive, after one pass over data; see `refit_grid`.

    The pass runs without gradients and in evaluation mode, which is undone afterwards. Layers that received nothing
    and layers whose weight is parametrized, such as certified ones, are left alone.

    Args:
        network: the network, changed in place.
        data: batches, or statistics of the same network that were recorded before.
        forward: called as ``forward(network, batch)``; ``network(batch)`` by default.
        ridge: see `refit_grid`, as the next four.
        margin: share of the range added at each end.
        dead_band: relative shift below which a grid stays.
        max_change: largest relative change of a channel's functions.
        max_growth: largest factor of refinement; 1 keeps the size of the weights.

    Returns:
        A record for each refitted layer, in the network's order.

    Raises:
        ValueError: if the network has no KAN layer, or none of them received anything.
        TypeError: if ``network`` is no module.
    """
    settings = _RefitSettings(ridge, margin, dead_band, max_change, max_growth)
    layers = kan_layers(network)
    statistics = data if isinstance(data, InputStatistics) else record_inputs(network, data, forward)
    if not any(name in statistics.layers for name in layers):
        raise ValueError("No KAN layer of `network` received an input; give at least one batch that reaches one.")
    return [
        _refit(layer, statistics.layers[name].samples.to(layer.weight.device), settings, name)
        for name, layer in layers.items()
        if name in statistics.layers and is_plain(layer)
    ]
