"""Cartesian sampling masks: lines along one phase encoding, points in the plane of two."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from monai_deqkan._checks import check_int, check_range
from monai_deqkan.operators.poisson_disc import draw_poisson_disc

__all__ = [
    "MASKS",
    "equispaced_mask",
    "gaussian_mask",
    "gaussian_plane_mask",
    "poisson_disc_mask",
    "pseudo_radial_mask",
    "random_mask",
]


def random_mask(
    shape: int | Sequence[int],
    acceleration: float = 4.0,
    center_fraction: float = 0.08,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a Cartesian mask of a full centre and uniformly random outer lines.

    The number of lines is ``round(num_lines / acceleration)`` in every draw, so the net acceleration is the nominal one
    (fastMRI's random mask meets it only on average).

    Args:
        shape: number of phase-encoding lines, or the spatial shape of k-space, whose last axis they count.
        acceleration: lines per measured line, at least 1, dimensionless; the centre counts as measured.
        center_fraction: share of all lines that form the fully sampled centre, in ``(0, 1]``.
        generator: source of randomness; None uses torch's global one.

    Returns:
        Bool, shape ``(num_lines,)``, or as many axes as ``shape`` has, of which all but the last have size one.

    Raises:
        ValueError: if the centre alone has more lines than the acceleration allows.

    Example:
        >>> int(random_mask(160, acceleration=4, center_fraction=0.08).sum())
        40
        >>> random_mask((320, 160)).shape
        torch.Size([1, 160])
    """
    mask, num_outer = _center_lines(shape, acceleration, center_fraction)
    outer = (~mask).nonzero().flatten()
    mask[outer[torch.randperm(len(outer), generator=generator)[:num_outer]]] = True
    return _as_lines(mask, shape)


def equispaced_mask(
    shape: int | Sequence[int],
    acceleration: float = 4.0,
    center_fraction: float = 0.08,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a Cartesian mask of a full centre and evenly spaced outer lines with a random offset.

    The number of lines is ``round(num_lines / acceleration)``, centre included: the spacing outside is widened to pay
    for the centre, and rounded to whole lines. (fastMRI's mask keeps the nominal spacing: its nominal 4 is a net 3.3.)

    Args:
        shape: see :func:`random_mask`.
        acceleration: see :func:`random_mask`.
        center_fraction: see :func:`random_mask`.
        generator: source of the offset; None uses torch's global one.

    Returns:
        As for :func:`random_mask`.

    Raises:
        ValueError: if the centre alone has more lines than the acceleration allows.

    Example:
        >>> from monai_deqkan.operators import net_acceleration
        >>> net_acceleration(equispaced_mask(320, acceleration=8, center_fraction=0.04))
        8.0
    """
    mask, num_outer = _center_lines(shape, acceleration, center_fraction)
    outer = (~mask).nonzero().flatten()
    if num_outer > 0:
        offset = torch.rand(1, generator=generator, dtype=torch.float64)
        positions = (torch.arange(num_outer, dtype=torch.float64) + offset) * (len(outer) / num_outer)
        mask[outer[positions.long()]] = True
    return _as_lines(mask, shape)


def gaussian_mask(
    shape: int | Sequence[int],
    acceleration: float = 4.0,
    center_fraction: float = 0.08,
    *,
    width: float = 0.2,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Draw a Cartesian mask of a full centre and outer lines that are denser near it.

    A line at distance :math:`k` from the centre is drawn, without replacement, with weight
    :math:`\exp(-k^2 / 2\sigma^2)`. The number of lines is ``round(num_lines / acceleration)``.

    Args:
        shape: see :func:`random_mask`.
        acceleration: see :func:`random_mask`.
        center_fraction: see :func:`random_mask`.
        width: :math:`\sigma` as a share of the axis, positive, dimensionless.
        generator: source of randomness; None uses torch's global one.

    Returns:
        As for :func:`random_mask`.

    Raises:
        ValueError: if the centre alone has more lines than the acceleration allows.
    """
    mask, num_outer = _center_lines(shape, acceleration, center_fraction)
    return _as_lines(_draw_gaussian(mask, num_outer, width, generator), shape)


def gaussian_plane_mask(
    shape: Sequence[int],
    acceleration: float = 4.0,
    center_fraction: float = 0.08,
    *,
    width: float = 0.2,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Draw points in the plane of two phase encodings that are denser near its full centre.

    As :func:`gaussian_mask`, with :math:`k^2 / \sigma^2` summed over both axes. The number of points is
    ``round(H * W / acceleration)``.

    Args:
        shape: spatial shape of k-space; the last two axes are phase encodings.
        acceleration: points per measured point, at least 1, dimensionless; the centre counts as measured.
        center_fraction: share of each axis that the fully sampled central block spans, in ``(0, 1]``.
        width: :math:`\sigma` as a share of each axis, positive, dimensionless.
        generator: source of randomness; None uses torch's global one.

    Returns:
        Bool, shape ``(H, W)``, or ``(1, H, W)`` where ``shape`` has a readout axis before them.

    Raises:
        ValueError: if the centre alone has more points than the acceleration allows, or ``shape`` is no plane.

    Example:
        >>> int(gaussian_plane_mask((40, 30), acceleration=4).sum())
        300
    """
    mask, num_outer = _center_block(shape, acceleration, center_fraction)
    return _as_plane(_draw_gaussian(mask, num_outer, width, generator), shape)


def poisson_disc_mask(
    shape: Sequence[int],
    acceleration: float = 4.0,
    center_fraction: float = 0.08,
    *,
    slope: float = 2.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Draw points in the plane of two phase encodings that keep a distance which grows from the centre outwards.

    A point blocks others within :math:`s\,(1 + a \rho)\,u`, with :math:`\rho` its distance from the centre as a share
    of the half axes, and :math:`u` uniform in 0.8 to 1.2: without it the grid's few distances show as rings. Points are
    drawn one by one; the largest :math:`s` is found that leaves room for ``round(H * W / acceleration)`` of them. This
    search takes time: 2.5 s for 320 x 320 on one core, so draw once and keep the mask.

    Args:
        shape: see :func:`gaussian_plane_mask`.
        acceleration: see :func:`gaussian_plane_mask`.
        center_fraction: see :func:`gaussian_plane_mask`.
        slope: :math:`a`, dimensionless; 0 makes the density uniform.
        generator: source of randomness; None uses torch's global one.

    Returns:
        As for :func:`gaussian_plane_mask`.

    Raises:
        ValueError: if the centre alone has more points than the acceleration allows, or ``shape`` is no plane.

    Example:
        >>> int(poisson_disc_mask((40, 30), acceleration=4).sum())
        300

    Reference:
        R. L. Cook, "Stochastic sampling in computer graphics", ACM Trans. Graph. 5 (1986) 51-72 (dart throwing), here
        on the grid and with a variable distance.
    """
    check_range("slope", slope, 0.0)
    mask, num_outer = _center_block(shape, acceleration, center_fraction)
    order = torch.randperm(mask.numel(), generator=generator)
    jitter = 0.8 + 0.4 * torch.rand(mask.shape, generator=generator, dtype=torch.float64)
    spacing = (1 + slope * _squared_radius(mask.shape).sqrt()) * jitter
    mask |= draw_poisson_disc(~mask, spacing, num_outer, order)
    return _as_plane(mask, shape)


def pseudo_radial_mask(
    shape: Sequence[int],
    acceleration: float = 4.0,
    center_fraction: float = 0.08,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Draw spokes through the centre on the Cartesian grid of two phase encodings.

    Spokes follow at the golden angle :math:`\pi\,(\sqrt 5 - 1) / 2` from a random start until ``round(H * W /
    acceleration)`` points are measured; the last spoke is cut at its outer ends to hit that number.

    Args:
        shape: see :func:`gaussian_plane_mask`.
        acceleration: see :func:`gaussian_plane_mask`.
        center_fraction: see :func:`gaussian_plane_mask`.
        generator: source of the first angle; None uses torch's global one.

    Returns:
        As for :func:`gaussian_plane_mask`.

    Raises:
        ValueError: if the centre alone has more points than the acceleration allows, or ``shape`` is no plane.

    Example:
        >>> int(pseudo_radial_mask((40, 30), acceleration=4).sum())
        300
    """
    mask, num_outer = _center_block(shape, acceleration, center_fraction)
    height, width = mask.shape
    distance = _squared_radius(mask.shape).flatten()
    start = math.pi * float(torch.rand((), generator=generator, dtype=torch.float64))
    # Half a sample per step, so that no cell on the way is jumped over.
    steps = torch.linspace(-math.sqrt(2), math.sqrt(2), 4 * max(height, width) + 1, dtype=torch.float64)
    spoke = 0
    while num_outer > 0:
        # Near acceleration 1 the gaps between spokes close too slowly: the rest is filled from the centre outwards.
        points = torch.arange(mask.numel())
        if spoke < 4 * max(height, width):
            angle = start + spoke * math.pi * (math.sqrt(5) - 1) / 2
            rows = (steps * math.sin(angle) * height / 2).round().long() + height // 2
            columns = (steps * math.cos(angle) * width / 2).round().long() + width // 2
            inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
            points = (rows * width + columns)[inside].unique()
        new = points[~mask.view(-1)[points]]
        new = new[distance[new].argsort(stable=True)][:num_outer]
        mask.view(-1)[new] = True
        num_outer -= len(new)
        spoke += 1
    return _as_plane(mask, shape)


MASKS: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {
        "random": random_mask,
        "equispaced": equispaced_mask,
        "gaussian": gaussian_mask,
        "gaussian_plane": gaussian_plane_mask,
        "poisson_disc": poisson_disc_mask,
        "pseudo_radial": pseudo_radial_mask,
    }
)
"""Mask functions by name: ``MASKS[name](spatial_shape, acceleration, center_fraction, generator=generator)``."""


def _center_lines(shape: int | Sequence[int], acceleration: float, center_fraction: float) -> tuple[Tensor, int]:
    """Return a mask of the centre lines, and how many more the acceleration allows."""
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    if len(sizes) not in (1, 2, 3):
        raise ValueError(f"`shape` must be a number of lines or a spatial shape of 2 or 3 axes; got {shape!r}.")
    return _center(sizes[-1:], acceleration, center_fraction, "lines")


def _center_block(shape: Sequence[int], acceleration: float, center_fraction: float) -> tuple[Tensor, int]:
    """Return a mask of the central block of a plane, and how many more points the acceleration allows."""
    if isinstance(shape, int) or len(shape) not in (2, 3):
        raise ValueError(f"`shape` must be a spatial shape whose last two axes are phase encodings; got {shape!r}.")
    return _center(tuple(shape)[-2:], acceleration, center_fraction, "points")


def _center(sizes: tuple[int, ...], acceleration: float, center_fraction: float, unit: str) -> tuple[Tensor, int]:
    check_range("acceleration", acceleration, 1.0)
    check_range("center_fraction", center_fraction, 0.0, 1.0, open_low=True)
    widths = [max(round(check_int("shape", size) * center_fraction), 1) for size in sizes]
    total, num_center = math.prod(sizes), math.prod(widths)
    num_outer = round(total / acceleration) - num_center
    if num_outer < 0:
        raise ValueError(
            f"`center_fraction` {center_fraction:g} of {'x'.join(map(str, sizes))} {unit} is {num_center} {unit}, more "
            f"than the {total / acceleration:.1f} that `acceleration` {acceleration:g} allows. Lower one of the two."
        )
    mask = torch.zeros(sizes, dtype=torch.bool)
    mask[tuple(slice(n // 2 - w // 2, n // 2 - w // 2 + w) for n, w in zip(sizes, widths, strict=True))] = True
    return mask, num_outer


def _as_lines(mask: Tensor, shape: int | Sequence[int]) -> Tensor:
    return mask if isinstance(shape, int) else mask.reshape(*[1] * (len(shape) - 1), -1)


def _as_plane(mask: Tensor, shape: Sequence[int]) -> Tensor:
    return mask.reshape(*[1] * (len(shape) - 2), *mask.shape)


def _squared_radius(sizes: Sequence[int]) -> Tensor:
    """Return the squared distance of each point from the centre, each axis as a share of its half: shape ``sizes``."""
    axes = [(torch.arange(n, dtype=torch.float64) - n // 2) / (n / 2) for n in sizes]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).square().sum(dim=0)


def _draw_gaussian(mask: Tensor, num_outer: int, width: float, generator: torch.Generator | None) -> Tensor:
    check_range("width", width, 0.0, open_low=True)
    log_weight = -_squared_radius(mask.shape) / (8 * width**2)
    # Largest of weight and Gumbel noise in the logarithm: draws without replacement that never run out of weight.
    uniform = torch.rand(mask.shape, generator=generator, dtype=torch.float64).clamp_min(1e-300)
    keys = torch.where(mask, -math.inf, log_weight - (-uniform.log()).log())
    mask.view(-1)[keys.flatten().topk(num_outer).indices] = True
    return mask
