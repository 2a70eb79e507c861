"""KAN layers by lookup tables: of the basis, for any device, or of each edge, for hardware without multipliers."""

# No postponed annotations here: torch.jit.script cannot read them.

import copy
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from monai_deqkan._checks import check_finite, check_int
from monai_deqkan.networks.layers.basis import Basis, needs_float32
from monai_deqkan.networks.layers.harmonic_basis import FourierBasis
from monai_deqkan.networks.layers.kan_channels import grid_ends
from monai_deqkan.networks.layers.kan_inputs import kan_layers
from monai_deqkan.networks.layers.kan_layer import KANLayer
from monai_deqkan.networks.layers.plain_weight import make_weight_plain

__all__ = ["EdgeTables", "TabulatedBasis", "edge_tables", "tabulate_kan"]

_MAX_MARGINS = 8  # widths of the range outside of it that a table may cover


@dataclass(frozen=True)
class TabulatedBasis(Basis):
    r"""A basis read from a table by linear interpolation.

    The table covers the range of the basis and, on either side, as many times its width as it takes until all functions
    have faded or go on linearly, as they then do beyond the table; for a Fourier basis it covers one period.

    Args:
        basis: basis to tabulate.
        resolution: number of intervals that the basis's range is cut into, at least 2.

    Raises:
        ValueError: if ``resolution`` is too small, or the functions neither fade nor go on linearly outside.
        TypeError: if ``basis`` is none, or a table already.

    Example:
        >>> from monai_deqkan.networks.layers import BSplineBasis
        >>> x = torch.linspace(-4, 4, 100)
        >>> error = (TabulatedBasis(BSplineBasis()).values(x) - BSplineBasis().values(x)).abs().max()
        >>> bool(error < 1e-4)
        True
    """

    basis: Basis
    resolution: int = 256

    def __post_init__(self) -> None:
        if not isinstance(self.basis, Basis) or isinstance(self.basis, TabulatedBasis):
            raise TypeError(f"`basis` must be a basis other than a table; got {self.basis!r}.")
        check_int("resolution", self.resolution, 2)
        _num_margins(self.basis)

    @property
    def num_basis(self) -> int:
        """Number of functions of the tabulated basis."""
        return self.basis.num_basis

    @property
    def grid_range(self) -> tuple[float, float]:
        """Range of the tabulated basis."""
        return self.basis.grid_range

    @property
    def step(self) -> float:
        """Distance of the table's points."""
        return (self.grid_range[1] - self.grid_range[0]) / self.resolution

    @property
    def first_point(self) -> float:
        """First point of the table."""
        low, high = self.grid_range
        return low - _num_margins(self.basis) * (high - low)

    @property
    def period(self) -> float:
        """Period of the functions, 0 for none."""
        return self.grid_range[1] - self.grid_range[0] if isinstance(self.basis, FourierBasis) else 0.0

    def values(self, x: Tensor, dim: int = 0) -> Tensor:
        """Interpolate all functions."""
        return _interpolate(x, self._table(x), self.first_point, self.step, self.period).movedim(0, dim)

    def derivative(self, x: Tensor, dim: int = 0) -> Tensor:
        """Return the slopes of the table's intervals."""
        table = self._table(x)
        cell, _ = _locate(x, table.shape[1], self.first_point, self.step, self.period)
        return (_take(table.diff(dim=1), cell) / self.step).to(x.dtype).movedim(0, dim)

    def lipschitz_constants(self) -> Tensor:
        """Return the steepest slope of each table, float64."""
        return _make_table(self, torch.float64, torch.device("cpu")).diff(dim=1).abs().amax(dim=1) / self.step

    def module(self) -> nn.Module:
        """Return a scriptable module."""
        return _TableModule(self)

    def _table(self, x: Tensor) -> Tensor:
        return _make_table(self, torch.float64 if x.dtype == torch.float64 else torch.float32, x.device)


class _TableModule(nn.Module):
    table: Tensor

    def __init__(self, basis: TabulatedBasis) -> None:
        super().__init__()
        table = _make_table(basis, torch.float64, torch.device("cpu"))
        self.register_buffer("table", table.to(torch.get_default_dtype()), persistent=False)
        self.first_point = basis.first_point
        self.step = basis.step
        self.period = basis.period

    def forward(self, x: Tensor) -> Tensor:
        return _interpolate(x, self.table.to(x.device), self.first_point, self.step, self.period).movedim(0, 1)


@lru_cache(maxsize=32)
def _make_table(basis: TabulatedBasis, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the table ``(K, points)``."""
    count = (2 * _num_margins(basis.basis) + 1) * basis.resolution + 1
    points = basis.first_point + basis.step * torch.arange(count, dtype=torch.float64)
    return basis.basis.values(points).to(device=device, dtype=dtype)


@lru_cache(maxsize=256)
def _num_margins(basis: Basis) -> int:
    """Return how many widths of its range a table must go on outside until all slopes are constant."""
    if isinstance(basis, FourierBasis):
        return 0
    low, high = basis.grid_range
    inside = basis.derivative(torch.linspace(low, high, 257, dtype=torch.float64)).abs().max()
    away = (high - low) * torch.tensor([0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    for count in range(1, _MAX_MARGINS + 1):
        reach = count * (high - low)
        for points in (low - reach - away, high + reach + away):
            slopes = basis.derivative(points)
            if bool(((slopes - slopes[:, :1]).abs() > 1e-3 * inside).any()):
                break
        else:
            return count
    raise ValueError(
        f"The functions of {basis!r} neither fade nor go on linearly within {_MAX_MARGINS} widths of their range: a "
        "table cannot hold them. Choose another `outside`, or another basis."
    )


def _locate(x: Tensor, num_points: int, first_point: float, step: float, period: float) -> tuple[Tensor, Tensor]:
    """Return the interval of each element, and its place there: in [0, 1] on the table, beyond these outside of it."""
    wide = x.float() if needs_float32(x) else x
    place = (wide - first_point) / step
    if period > 0.0:
        place = torch.remainder(place, period / step)
    cell = place.detach().nan_to_num(0.0).clamp(0, num_points - 2).floor()
    return cell.to(torch.int64), place - cell


def _take(table: Tensor, index: Tensor) -> Tensor:
    return table.index_select(1, index.reshape(-1)).reshape([table.shape[0]] + list(index.shape))  # noqa: RUF005


def _interpolate(x: Tensor, table: Tensor, first_point: float, step: float, period: float) -> Tensor:
    """Return ``(K, *)`` for ``x`` of shape ``(*)``."""
    cell, place = _locate(x, table.shape[1], first_point, step, period)
    table = table.to(place.dtype)
    left = _take(table, cell)
    return (left + place * (_take(table, cell + 1) - left)).to(x.dtype)


def tabulate_kan(network: nn.Module, resolution: int = 256) -> nn.Module:
    """Return a copy of a network whose KAN layers read their basis functions from tables.

    The weights stay what they are, and the copy can be trained. Meant for bases that are costly to compute, and as the
    first step to :func:`edge_tables`; the closed-form B-splines of this package are faster than their table on a CPU.

    Args:
        network: network or layer; masks and norms on its KAN weights are applied once, here.
        resolution: number of table intervals over the basis's range.

    Returns:
        The copy; its state dict has the entries of a network that was never tabulated. :func:`compare_outputs` measures
        its error.
    """
    network = copy.deepcopy(network)
    for layer in kan_layers(network).values():
        make_weight_plain(layer)
        layer.set_basis(TabulatedBasis(layer.basis, resolution), layer.coefficients.detach().clone())
    return network


@dataclass(frozen=True)
class EdgeTables:
    """Every edge's function of a KAN layer as a column of integers: inference is reading, interpolating and adding.

    Args:
        codes: int8, ``(resolution + 1, out, in / groups, *kernel)``.
        scale: unit of each edge's codes, in the unit of the output, ``(out, in / groups, *kernel)``.
        input_range: inputs of the first and the last entry.
    """

    codes: Tensor
    scale: Tensor
    input_range: tuple[float, float]

    def edge_functions(self, points: Tensor) -> Tensor:
        """Interpolate between the entries around ``points`` ``(P,)``, as ``(P, out, in / groups, *kernel)``."""
        low, high = self.input_range
        last = len(self.codes) - 1
        place = ((points - low) * (last / (high - low))).clamp(0, last)
        cell = place.floor().clamp(max=last - 1).long()
        share = (place - cell).view(-1, *[1] * self.scale.dim())
        return self.scale * ((1 - share) * self.codes[cell] + share * self.codes[cell + 1])


@torch.no_grad()
def edge_tables(
    layer: KANLayer, resolution: int = 127, bits: int = 8, *, input_range: tuple[float, float] | None = None
) -> EdgeTables:
    """Tabulate every edge's function of a KAN layer as integers, for lookup-table hardware.

    The bias is left out. Inputs beyond the range read the last entry there.

    Args:
        layer: KAN layer.
        resolution: number of intervals.
        bits: width of the entries, 2 to 8; they are stored as int8.
        input_range: first and last input; ``None`` for the range of the basis, seen through the input map: the widest
            over the channels.

    Returns:
        The tables.

    Raises:
        ValueError: if a number is out of its range, or a weight is not finite.

    Example:
        >>> from monai_deqkan.networks.layers import KANLinear
        >>> edge_tables(KANLinear(4, 2)).codes.shape
        torch.Size([128, 2, 4])
    """
    check_int("resolution", resolution)
    if check_int("bits", bits, 2) > 8:
        raise ValueError(f"`bits` must be at most 8, as entries are stored as int8; got {bits}.")
    if input_range is None:
        ends = grid_ends(layer)
        input_range = float(ends.min()), float(ends.max())
    low, high = input_range
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"`input_range` must be increasing and finite; got {(low, high)}. Swap or spread its ends.")
    weight = layer.weight
    check_finite("layer.weight", weight, "Integers cannot hold them; reload the layer.")  # as integers, NaN are zeros
    values = layer.edge_functions(torch.linspace(low, high, resolution + 1, dtype=weight.dtype, device=weight.device))
    largest = 2 ** (bits - 1) - 1
    peak = values.abs().amax(dim=0)
    scale = torch.where(peak > 0, peak / largest, torch.ones_like(peak))
    codes = (values / scale).round().clamp(-largest, largest)
    return EdgeTables(codes.to(torch.int8), scale, (low, high))
