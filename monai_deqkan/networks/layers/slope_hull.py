"""Which slopes the functions of a basis can have at one point: the ground of the Lipschitz bounds of KAN layers."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from monai_deqkan.networks.layers.basis import Basis
from monai_deqkan.networks.layers.bspline import BSplineBasis
from monai_deqkan.networks.layers.harmonic_basis import ChebyshevBasis, FourierBasis
from monai_deqkan.networks.layers.radial_basis import GaussianBasis, MexicanHatBasis

__all__ = ["SlopeFrame", "slope_frame", "slope_hull"]

_PIECES = 8  # per knot interval, for splines whose slopes are not linear: hulls that exceed the curve by 1 % or less
_SAMPLES = 16  # per half wave of Chebyshev polynomials and Fourier series: 0.5 %
_BUMP_SAMPLES, _BUMP_MARGIN = 200, 0.01  # per width; see `_bump_hull`
_MAX_POINTS = 50_000
# Largest third derivative for unit width, rounded up: Hermite functions of orders 3 and 5.
_THIRD_DERIVATIVE = {GaussianBasis: 1.3802, MexicanHatBasis: 5.7832}


@functools.singledispatch
def slope_hull(basis: Basis) -> Tensor | None:
    r"""Return points that enclose the curve :math:`t \mapsto (B_1'(t), \dots, B_K'(t))` on the real line.

    Returns:
        Shape ``(P, K)``, float64: each point of the curve is a convex combination of them and their negatives.
        ``None`` for a kind without such points; register a function for it with ``slope_hull.register``.
    """
    return None


@slope_hull.register(BSplineBasis)
def _bspline_hull(basis: BSplineBasis) -> Tensor:
    """Return the Bézier points of all pieces: slopes are polynomials of degree ``spline_order - 1`` between knots."""
    count = basis.spline_order
    rim = count if basis.outside == "zero" else 0  # a continuation has slope 0 or that of the grid's end
    pieces = 1 if count <= 2 else _PIECES
    inner = (torch.arange(count, dtype=torch.float64) + 0.5) / count  # no knots among them
    powers = torch.arange(count, dtype=torch.float64)
    binomials = torch.tensor([math.comb(count - 1, k) for k in range(count)], dtype=torch.float64)
    bernstein = binomials * inner[:, None] ** powers * (1 - inner[:, None]) ** (count - 1 - powers)
    width = basis.step / pieces
    starts = basis.grid_range[0] + width * torch.arange(-rim * pieces, (basis.grid_size + rim) * pieces)
    slopes = basis.derivative(starts.double()[:, None] + width * inner, dim=2)  # (pieces, count, K)
    return torch.linalg.solve(bernstein, slopes).flatten(0, 1)


@slope_hull.register(ChebyshevBasis)
def _chebyshev_hull(basis: ChebyshevBasis) -> Tensor:
    """Return the slopes at Chebyshev points over a cosine, after H. Ehlich and K. Zeller (Math. Z. 86, 1964)."""
    count = _SAMPLES * basis.degree
    low, high = basis.grid_range
    angles = torch.arange(count + 1, dtype=torch.float64) * (math.pi / count)
    slopes = replace(basis, outside="linear").derivative(0.5 * (low + high) + 0.5 * (high - low) * angles.cos(), dim=1)
    return slopes / math.cos(math.pi * (basis.degree - 1) / (2 * count))


@slope_hull.register(FourierBasis)
def _fourier_hull(basis: FourierBasis) -> Tensor:
    """Return the slopes at equidistant points of a period over a cosine, as for Chebyshev polynomials."""
    count = 2 * _SAMPLES * basis.num_frequencies
    low, high = basis.grid_range
    points = low + (high - low) / count * torch.arange(count, dtype=torch.float64)
    return basis.derivative(points, dim=1) / math.cos(math.pi * basis.num_frequencies / count)


@slope_hull.register(GaussianBasis)
@slope_hull.register(MexicanHatBasis)
def _bump_hull(basis: GaussianBasis | MexicanHatBasis) -> Tensor | None:
    r"""Return slopes at close points, enlarged for what lies between.

    Between points at distance :math:`\delta` each slope differs from its linear interpolation by no more than
    :math:`\epsilon = \max|B'''| \delta^2 / 8`; beyond nine widths each is below 1e-14. With :math:`\eta` the margin,
    :math:`v + e = (1 - \eta) \frac{v}{1 - \eta} + \eta \frac{e}{\eta}`, and the cube of :math:`e` lies in the hull of
    :math:`\pm K \epsilon` on the axes.
    """
    width = basis.step if basis.width is None else basis.width
    rim = 9.0 * width if basis.outside == "zero" else 0.0
    low, high = basis.grid_range[0] - rim, basis.grid_range[1] + rim
    intervals = math.ceil((high - low) / width * _BUMP_SAMPLES)
    if intervals > _MAX_POINTS:
        return None
    points = torch.linspace(low, high, intervals + 1, dtype=torch.float64)
    slopes = (basis if rim else replace(basis, outside="linear")).derivative(points, dim=1)
    error = _THIRD_DERIVATIVE[type(basis)] * ((high - low) / intervals / width) ** 2 / (8 * width) + 1e-12 / width
    axes = torch.eye(basis.num_basis, dtype=torch.float64) * (basis.num_basis * error / _BUMP_MARGIN)
    return torch.cat((slopes / (1 - _BUMP_MARGIN), axes))


class SlopeFrame(NamedTuple):
    r"""Coordinates in which the slopes of a basis spread about evenly.

    With coefficients ``c`` in row form, ``c B'(t) = (c @ mixing) z(t)``, and the points enclose the curve ``z``.
    """

    mixing: Tensor  # (K, K), symmetric, positive definite
    points: Tensor  # (P, K)


@functools.lru_cache(maxsize=64)
@torch.no_grad()
def slope_frame(basis: Basis) -> SlopeFrame | None:
    """Return the frame of a basis, or ``None`` where `slope_hull` knows no points.

    Every frame gives sound bounds. This one makes them tight: the squared ``mixing`` is the second moment of the
    slopes, half for points of equal weight, half for the weights that minimize the bound of white coefficients, found
    by the multiplicative algorithm of optimal designs (S. D. Silvey et al., Commun. Statist. A7 (1978) 1379-1389).
    """
    points = slope_hull(basis)
    if points is None:
        return None
    points = points * (1 + 1e-9)  # covers rounding
    even = torch.full((len(points),), 1 / len(points), dtype=points.dtype)
    weights = even
    for _ in range(60):
        _, inverse = _roots_of_moment(points, weights)
        gains = ((points @ inverse) * points).sum(1)
        weights = weights * gains / (weights @ gains)
    mixing, inverse = _roots_of_moment(points, 0.5 * (even + weights))
    return SlopeFrame(mixing, points @ inverse)


def _roots_of_moment(points: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh((points.mT * weights) @ points)
    roots = (values.clamp_min(0) + 1e-9 * values.mean()).sqrt()
    return (vectors * roots) @ vectors.mT, (vectors / roots) @ vectors.mT
