"""Functions that extend over the whole range: Chebyshev polynomials and a Fourier series."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from monai_deqkan._checks import check_choice, check_int
from monai_deqkan.networks.layers.basis import BASES, GridBasis, check_grid_range

__all__ = ["ChebyshevBasis", "FourierBasis"]


def _chebyshev(u: Tensor, dim: int, count: int, parameter: float) -> Tensor:
    """Return T_0 ... T_{count - 1} by their recurrence."""
    values = [torch.ones_like(u), u]
    for k in range(2, count):
        values.append(2.0 * u * values[k - 1] - values[k - 2])
    return torch.stack(values, dim)


def _chebyshev_slopes(u: Tensor, dim: int, count: int, parameter: float) -> Tensor:
    """Return T_k' = k U_{k - 1} by the recurrence of the polynomials of the second kind."""
    second = [torch.zeros_like(u), torch.ones_like(u)]  # U_{k - 1}
    slopes = [second[0], second[1]]
    for k in range(2, count):
        second.append(2.0 * u * second[k - 1] - second[k - 2])
        slopes.append(k * second[k])
    return torch.stack(slopes, dim)


def _angles(u: Tensor, dim: int, count: int) -> Tensor:
    frequencies = torch.arange(1, count // 2 + 1, device=u.device, dtype=u.dtype)
    shape = [1] * (u.dim() + 1)
    shape[dim] = count // 2
    return u.unsqueeze(dim) * frequencies.reshape(shape)


def _fourier(u: Tensor, dim: int, count: int, parameter: float) -> Tensor:
    angles = _angles(u, dim, count)
    return torch.cat((torch.ones_like(u).unsqueeze(dim), torch.cos(angles), torch.sin(angles)), dim)


def _fourier_slopes(u: Tensor, dim: int, count: int, parameter: float) -> Tensor:
    angles = _angles(u, dim, count)
    frequencies = _angles(torch.ones_like(u), dim, count)
    zero = torch.zeros_like(u).unsqueeze(dim)
    return torch.cat((zero, -frequencies * torch.sin(angles), frequencies * torch.cos(angles)), dim)


@BASES.register("chebyshev")
@dataclass(frozen=True)
class ChebyshevBasis(GridBasis):
    r"""Chebyshev polynomials of the first kind, on any interval.

    .. math:: B_k(x) = T_k\Big(\frac{2x - \text{low} - \text{high}}{\text{high} - \text{low}}\Big),
              \qquad T_k(\cos\theta) = \cos(k\theta), \quad k = 0, \dots, \text{degree}

    The recurrence :math:`T_{k+1} = 2 u T_k - T_{k-1}` is stable on the interval; outside of it polynomials grow
    without bound, so that only continuations are offered.

    Args:
        degree: highest degree, at least 1.
        grid_range: interval of the polynomials, in the unit of the input.
        outside: ``"clamp"`` keeps the value at the nearer end; ``"linear"`` goes on along the tangent there.

    Raises:
        ValueError: if a setting is out of its range.

    Example:
        >>> ChebyshevBasis(degree=2).values(torch.tensor([0.0, 3.0]))
        tensor([[ 1.,  1.],
                [ 0.,  1.],
                [-1.,  1.]])
    """

    degree: int = 7
    grid_range: tuple[float, float] = (-3.0, 3.0)
    outside: str = "clamp"

    _raw = staticmethod(_chebyshev)
    _raw_slopes = staticmethod(_chebyshev_slopes)

    def __post_init__(self) -> None:
        check_int("degree", self.degree)
        check_choice("outside", self.outside, ("clamp", "linear"))
        object.__setattr__(self, "grid_range", check_grid_range(self.grid_range))

    @property
    def num_basis(self) -> int:
        """Number of polynomials, ``degree + 1``."""
        return self.degree + 1

    @property
    def _unit(self) -> float:
        return 0.5 * (self.grid_range[1] - self.grid_range[0])

    def lipschitz_constants(self) -> Tensor:
        """Return the slopes at the ends, :math:`k^2` over half the interval: none is larger."""
        return torch.arange(self.num_basis, dtype=torch.float64).square() / self._unit

    def slope_coefficients(self, c: Tensor, dim: int) -> Tensor:
        r"""Return the Chebyshev coefficients of the derivative, ``degree`` of them.

        :math:`T_k' = 2k\,(T_{k-1} + T_{k-3} + \dots)`, with half of that for :math:`T_0`.
        """
        k = torch.arange(self.num_basis, device=c.device, dtype=c.dtype)
        m = k[:-1, None]
        matrix = torch.where((m < k) & ((k - m) % 2 == 1), 2 * k, 0 * k) / self._unit  # (degree, K)
        matrix[0] /= 2
        return torch.tensordot(c.movedim(dim, -1), matrix.T, 1).movedim(-1, dim)

    @property
    def slope_gain(self) -> float:
        """Root of ``degree``: no polynomial exceeds 1."""
        return math.sqrt(self.degree)

    def resized(self, num_basis: int) -> ChebyshevBasis:
        """Return the polynomials up to degree ``num_basis - 1``."""
        return replace(self, degree=check_int("num_basis", num_basis, 2) - 1)

    def refined(self, factor: int = 2) -> ChebyshevBasis:
        """Return the polynomials up to ``factor`` times the degree; they hold these ones."""
        return replace(self, degree=self.degree * check_int("factor", factor))


@BASES.register("fourier")
@dataclass(frozen=True)
class FourierBasis(GridBasis):
    r"""Constant, cosines and sines: a Fourier series of one period.

    .. math:: 1, \quad \cos(j\omega(x - m)), \quad \sin(j\omega(x - m)), \qquad \omega = \frac{2\pi}{\text{high} -
              \text{low}}, \quad m = \frac{\text{low} + \text{high}}{2}, \quad j = 1, \dots, J

    Outside of the period the functions repeat.

    Args:
        num_frequencies: number :math:`J` of frequencies; there are :math:`2J + 1` functions.
        grid_range: one period, in the unit of the input.

    Raises:
        ValueError: if a setting is out of its range.

    Example:
        >>> FourierBasis(num_frequencies=1, grid_range=(-2.0, 2.0)).values(torch.tensor([1.0])).flatten().round()
        tensor([1., -0., 1.])
    """

    num_frequencies: int = 4
    grid_range: tuple[float, float] = (-3.0, 3.0)

    outside: ClassVar[str] = "periodic"  # type: ignore[misc]  # fixed here, a setting elsewhere
    _raw = staticmethod(_fourier)
    _raw_slopes = staticmethod(_fourier_slopes)

    def __post_init__(self) -> None:
        check_int("num_frequencies", self.num_frequencies)
        object.__setattr__(self, "grid_range", check_grid_range(self.grid_range))

    @property
    def num_basis(self) -> int:
        """Number of functions, ``2 * num_frequencies + 1``."""
        return 2 * self.num_frequencies + 1

    @property
    def _unit(self) -> float:
        return (self.grid_range[1] - self.grid_range[0]) / (2 * math.pi)

    def _slopes(self) -> Tensor:
        j = torch.arange(1, self.num_frequencies + 1, dtype=torch.float64) / self._unit
        return torch.cat((j, j))

    def lipschitz_constants(self) -> Tensor:
        """Return the angular frequencies."""
        return torch.cat((torch.zeros(1, dtype=torch.float64), self._slopes()))

    def slope_coefficients(self, c: Tensor, dim: int) -> Tensor:
        """Return the coefficients times the angular frequencies, without that of the constant."""
        slopes = self._slopes().to(c)
        return (c.narrow(dim, 1, self.num_basis - 1).movedim(dim, -1) * slopes).movedim(-1, dim)

    @property
    def slope_gain(self) -> float:
        """Root of ``num_frequencies``: the squares of sine and cosine sum to 1."""
        return math.sqrt(self.num_frequencies)

    def resized(self, num_basis: int) -> FourierBasis:
        """Return the series of ``num_basis`` terms, an odd number."""
        if check_int("num_basis", num_basis, 3) % 2 == 0:
            raise ValueError(
                f"`num_basis` must be odd: a constant, and a cosine and a sine per frequency; got {num_basis}."
            )
        return replace(self, num_frequencies=num_basis // 2)

    def refined(self, factor: int = 2) -> FourierBasis:
        """Return the series up to ``factor`` times the frequency; it holds this one."""
        return replace(self, num_frequencies=self.num_frequencies * check_int("factor", factor))
