"""Bumps around equidistant centers: Gaussians and Mexican hats."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from monai_deqkan._checks import check_choice, check_int, check_range
from monai_deqkan.networks.layers.basis import BASES, GridBasis, check_grid_range, distance_from_centers

__all__ = ["GaussianBasis", "MexicanHatBasis"]

RadialT = TypeVar("RadialT", bound="_RadialBasis")


def _distance(u: Tensor, dim: int, count: int, width: float) -> Tensor:
    # From 40 widths on everything here is zero, in float64 too; and no square overflows.
    return (distance_from_centers(u, dim, count) / width).clamp(-40.0, 40.0)


def _gaussians(u: Tensor, dim: int, count: int, width: float) -> Tensor:
    r = _distance(u, dim, count, width)
    return torch.exp(-0.5 * r * r)


def _gaussian_slopes(u: Tensor, dim: int, count: int, width: float) -> Tensor:
    r = _distance(u, dim, count, width)
    return -r * torch.exp(-0.5 * r * r) / width


def _mexican_hats(u: Tensor, dim: int, count: int, width: float) -> Tensor:
    square = _distance(u, dim, count, width).square()
    return (1.0 - square) * torch.exp(-0.5 * square)


def _mexican_hat_slopes(u: Tensor, dim: int, count: int, width: float) -> Tensor:
    r = _distance(u, dim, count, width)
    square = r * r
    return r * (square - 3.0) * torch.exp(-0.5 * square) / width


@dataclass(frozen=True)
class _RadialBasis(GridBasis):
    """What Gaussians and Mexican hats share; u is in steps between centers."""

    grid_size: int = 5
    grid_range: tuple[float, float] = (-3.0, 3.0)
    width: float | None = 1.0
    outside: str = "zero"

    _steepest: ClassVar[float]  # largest slope for unit width
    _curvature: ClassVar[float]  # largest second derivative of the squared slope for unit width

    def __post_init__(self) -> None:
        check_int("grid_size", self.grid_size)
        check_choice("outside", self.outside, ("zero", "clamp", "linear"))
        object.__setattr__(self, "grid_range", check_grid_range(self.grid_range))
        if self.width is not None:
            check_range("width", self.width, low=0.0, high=math.inf, open_low=True, open_high=True)

    @property
    def num_basis(self) -> int:
        """Number of centers, ``grid_size + 1``."""
        return self.grid_size + 1

    @property
    def step(self) -> float:
        """Distance of neighboring centers, in the unit of the input."""
        return (self.grid_range[1] - self.grid_range[0]) / self.grid_size

    def resized(self: RadialT, num_basis: int) -> RadialT:
        """Return the bumps around ``num_basis`` centers, of the same ``width`` setting."""
        return replace(self, grid_size=check_int("num_basis", num_basis, 2) - 1)

    def refined(self: RadialT, factor: int = 2) -> RadialT:
        """Return the bumps on ``factor`` times as many intervals; they span all that these do if ``width`` is set."""
        return replace(self, grid_size=self.grid_size * check_int("factor", factor))

    @property
    def _unit(self) -> float:
        return self.step

    @property
    def _parameter(self) -> float:
        return 1.0 if self.width is None else self.width / self.step

    def lipschitz_constants(self) -> Tensor:
        """Return the largest slope of a bump, for each; in closed form, rounded up."""
        slope = self._steepest / (self._parameter * self.step) * (1 + 1e-12)
        return torch.full((self.num_basis,), slope, dtype=torch.float64)

    def slope_coefficients(self, c: Tensor, dim: int) -> Tensor:
        """Return ``c`` over the width, the coefficients of the bumps' slopes for unit width."""
        return c / (self._parameter * self.step)

    @property
    def slope_gain(self) -> float:
        r"""Bound of the root of the sum of squared slopes for unit width, dimensionless.

        Seen from the nearest center, the others are some of those at :math:`\pm 1, \dots, \pm(K - 1)` steps. The sum
        over all of these is sampled up to 4 widths away, from where on all slopes fall, and between two samples at
        distance :math:`\delta` exceeds the larger one by no more than :math:`\delta^2/8` times its second derivative.
        """
        width = self._parameter
        reach = min(self.num_basis - 1, math.ceil(16.0 * width))
        points = torch.linspace(0.0, 4.0 * width, 2049, dtype=torch.float64)
        count = 2 * reach + 1
        slopes = self._raw_slopes(points, 0, count, width) * width
        between = (4.0 / 2048) ** 2 / 8 * count * self._curvature
        return math.sqrt(float(slopes.square().sum(0).max()) + between)


@BASES.register("gaussian")
@dataclass(frozen=True)
class GaussianBasis(_RadialBasis):
    r"""Gaussians around equidistant centers; by default those of DEQ-KAN: on [-3, 3], of unit width.

    .. math:: B_k(x) = \exp\Big(-\frac{(x - x_k)^2}{2 \sigma^2}\Big), \qquad x_k = \text{low} + k\,h, \; k = 0, \dots, G

    Args:
        grid_size: number :math:`G` of equal intervals that ``grid_range`` is cut into by ``grid_size + 1`` centers.
        grid_range: first and last center, in the unit of the input.
        width: standard deviation :math:`\sigma`, in the unit of the input; ``None`` for the distance of two centers.
        outside: ``"zero"`` lets the bumps fade outside the grid; ``"clamp"`` keeps the value at its nearer end;
            ``"linear"`` goes on along the tangent there.

    Raises:
        ValueError: if a setting is out of its range.

    Example:
        >>> GaussianBasis(grid_size=2, grid_range=(-1.0, 1.0)).values(torch.zeros(1)).flatten()
        tensor([0.6065, 1.0000, 0.6065])
    """

    _raw = staticmethod(_gaussians)
    _raw_slopes = staticmethod(_gaussian_slopes)
    _steepest = math.exp(-0.5)
    _curvature = 2.0


@BASES.register("mexican_hat")
@dataclass(frozen=True)
class MexicanHatBasis(_RadialBasis):
    r"""Mexican-hat wavelets around equidistant centers.

    .. math:: B_k(x) = (1 - r^2)\, e^{-r^2 / 2}, \qquad r = \frac{x - x_k}{\sigma}, \quad x_k = \text{low} + k\,h

    They integrate to zero. Their height is 1; Wav-KAN's wavelets are the same times :math:`2 \pi^{-1/4} / \sqrt 3`,
    with centers and widths that it learns.

    Args:
        grid_size: number of equal intervals that ``grid_range`` is cut into by ``grid_size + 1`` centers.
        grid_range: first and last center, in the unit of the input.
        width: :math:`\sigma`, in the unit of the input; ``None`` for the distance of two centers.
        outside: ``"zero"`` lets the wavelets fade outside the grid; ``"clamp"`` keeps the value at its nearer end;
            ``"linear"`` goes on along the tangent there.

    Raises:
        ValueError: if a setting is out of its range.

    Example:
        >>> MexicanHatBasis(grid_size=2, grid_range=(-2.0, 2.0)).values(torch.zeros(1)).flatten()
        tensor([-0.4060,  1.0000, -0.4060])

    Reference:
        Z. Bozorgasl and H. Chen, "Wav-KAN: Wavelet Kolmogorov-Arnold networks", arXiv:2405.12832.
    """

    _raw = staticmethod(_mexican_hats)
    _raw_slopes = staticmethod(_mexican_hat_slopes)
    _steepest = math.sqrt(3 - math.sqrt(6)) * math.sqrt(6) * math.exp(-0.5 * (3 - math.sqrt(6)))
    _curvature = 18.0
