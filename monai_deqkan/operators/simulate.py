"""Make k-space from images: smooth coil maps, smooth phase, complex noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from monai_deqkan._checks import check_finite, check_int, check_range, check_spatial_dims, check_tensor
from monai_deqkan.operators.coils import CoilOperator
from monai_deqkan.operators.fourier import FourierOperator

__all__ = ["add_complex_noise", "simulate_kspace", "smooth_coil_maps", "smooth_phase"]


def smooth_coil_maps(
    spatial_shape: Sequence[int],
    num_coils: int = 8,
    *,
    distance: float = 2.0,
    loop_radius: float = 0.4,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Simulate the maps of receive coils on a ring around the field of view.

    With :math:`d` the offset of a pixel from the coil, the magnitude falls as on the axis of a current loop of radius
    :math:`a`, and the phase turns as the direction of the field of a dipole:

    .. math:: S \propto (|d|^2 + a^2)^{-3/2}\, e^{-2 i \arg(d_x + i d_y)}

    The maps are divided by their root sum of squares, so :math:`\sum_k |S_k|^2 = 1` everywhere. The ring lies in the
    last two axes and starts at a random angle; in 3-D the coils stand alternately above and below the middle slice.

    Args:
        spatial_shape: number of pixels per axis, two or three axes.
        num_coils: number of coils.
        distance: ring radius in half fields of view, dimensionless, at least 1.5: outside the corners.
        loop_radius: :math:`a` in half fields of view, dimensionless: larger is smoother.
        generator: source of the angle and of every coil's constant phase; None uses torch's global one.

    Returns:
        Complex64, dimensionless, shape ``(K, *space)``.

    Example:
        >>> maps = smooth_coil_maps((32, 24), num_coils=8)
        >>> torch.allclose(maps.abs().square().sum(0), torch.ones(32, 24))
        True
    """
    check_spatial_dims(len(spatial_shape))
    check_int("num_coils", num_coils)
    check_range("distance", distance, 1.5)
    check_range("loop_radius", loop_radius, 0.0, open_low=True)
    grid = _grid(spatial_shape)
    y, x = grid[-2], grid[-1]
    z = grid[0] if len(spatial_shape) == 3 else torch.zeros_like(x)
    start, *phases = (2 * math.pi * torch.rand(num_coils + 1, generator=generator, dtype=torch.float64)).tolist()
    maps = []
    for k in range(num_coils):
        angle = start + 2 * math.pi * k / num_coils
        along_x, along_y, height = math.cos(angle), math.sin(angle), 0.4 * (-1) ** k * (len(spatial_shape) == 3)
        dx, dy, dz = x - distance * along_x, y - distance * along_y, z - height
        magnitude = (dx**2 + dy**2 + dz**2 + loop_radius**2) ** -1.5
        maps.append(torch.polar(magnitude, phases[k] - 2 * torch.atan2(dy, dx)))
    stacked = torch.stack(maps)
    return (stacked / stacked.abs().square().sum(dim=0).sqrt()).to(torch.complex64)


def smooth_phase(
    spatial_shape: Sequence[int], max_phase: float = math.pi / 2, *, generator: torch.Generator | None = None
) -> Tensor:
    """Draw a smooth phase: a random polynomial of second degree in the coordinates.

    Args:
        spatial_shape: number of pixels per axis, two or three axes.
        max_phase: largest absolute phase, in radians.
        generator: source of the coefficients; None uses torch's global one.

    Returns:
        Float32, in radians, shape ``spatial_shape``.
    """
    check_spatial_dims(len(spatial_shape))
    check_range("max_phase", max_phase, 0.0)
    terms = quadratic_terms(_grid(spatial_shape))
    weights = torch.randn(len(terms), generator=generator, dtype=torch.float64).tolist()
    phase = torch.stack([weight * term for weight, term in zip(weights, terms, strict=True)]).sum(dim=0)
    return (phase * (max_phase / phase.abs().max())).to(torch.float32)


def quadratic_terms(coordinates: Sequence[Tensor]) -> list[Tensor]:
    """Return the terms of a polynomial of second degree: 1, each coordinate, and each product of two of them."""
    products = [first * second for i, first in enumerate(coordinates) for second in coordinates[i:]]
    return [torch.ones_like(coordinates[0]), *coordinates, *products]


def add_complex_noise(kspace: Tensor, snr_db: float | Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    r"""Add white complex Gaussian noise of a given signal-to-noise ratio to fully sampled k-space.

    .. math:: \mathrm{SNR} = 10 \log_{10} \frac{\sum |y|^2}{\mathrm{E} \sum |n|^2}\ \mathrm{dB},

    with sums over all axes but the batch. Half of the noise power is in the real, half in the imaginary part.

    Args:
        kspace: complex, shape ``(B, K, *space)``.
        snr_db: signal-to-noise ratio, in dB: one for all, or one per sample, shape ``(B,)``.
        generator: source of the noise; None uses torch's global one.

    Returns:
        Noisy k-space, in the unit, shape and dtype of ``kspace``. Samples of zeros stay zero.

    Raises:
        TypeError: if ``kspace`` is not complex.
        ValueError: if ``snr_db`` is not finite, or its shape does not fit.
    """
    if not check_tensor("kspace", kspace).is_complex():
        raise TypeError(f"`kspace` must be complex; got {kspace.dtype}.")
    if not isinstance(snr_db, Tensor):
        snr_db = torch.full(kspace.shape[:1], check_range("snr_db", snr_db))
    elif snr_db.shape != kspace.shape[:1]:
        raise ValueError(f"`snr_db` must have shape ({kspace.shape[0]},), one per sample; got {tuple(snr_db.shape)}.")
    check_finite("snr_db", snr_db)
    share = (10 ** (-snr_db.to(kspace.real) / 10)).view(-1, *[1] * (kspace.ndim - 1))
    axes = tuple(range(1, kspace.ndim))
    power = kspace.abs().square().mean(dim=axes, keepdim=True)
    # torch.randn gives a complex normal with E|n|^2 = 1.
    source = "cpu" if generator is None else generator.device
    noise = torch.randn(kspace.shape, generator=generator, dtype=kspace.dtype, device=source)
    return kspace + (power * share).sqrt() * noise.to(kspace.device)


def simulate_kspace(
    image: Tensor,
    sensitivity_maps: Tensor,
    *,
    phase: Tensor | None = None,
    snr_db: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Simulate the fully sampled k-space of an image, :math:`y_k = F (S_k\, x\, e^{i \varphi}) + n_k`.

    Args:
        image: real or complex, shape ``(B, *space)`` with two or three spatial axes, any unit.
        sensitivity_maps: complex, shape ``(K, *space)``, or ``(B, K, *space)`` for maps per sample.
        phase: :math:`\varphi` in radians, shape ``(*space)`` or ``(B, *space)``; None is zero.
        snr_db: signal-to-noise ratio in dB, see :func:`add_complex_noise`; None adds no noise.
        generator: source of the noise; None uses torch's global one.

    Returns:
        Complex, in the unit of ``image``, shape ``(B, K, *space)``.

    Example:
        >>> maps = smooth_coil_maps((16, 16), num_coils=4)
        >>> simulate_kspace(torch.ones(2, 16, 16), maps, phase=smooth_phase((16, 16)), snr_db=30).shape
        torch.Size([2, 4, 16, 16])
    """
    spatial_dims = check_spatial_dims(check_tensor("image", image).ndim - 1)
    if check_tensor("sensitivity_maps", sensitivity_maps).ndim == spatial_dims + 1:
        sensitivity_maps = sensitivity_maps.unsqueeze(0)
    x = image if image.is_complex() else torch.complex(image, torch.zeros_like(image))
    if phase is not None:
        x = x * torch.polar(torch.ones_like(phase), phase).to(x.dtype)
    kspace = (FourierOperator(spatial_dims) @ CoilOperator(sensitivity_maps))(x)
    return kspace if snr_db is None else add_complex_noise(kspace, snr_db, generator=generator)


def _grid(spatial_shape: Sequence[int]) -> list[Tensor]:
    """Return coordinates in half fields of view, zero at index ``n // 2``: one tensor per axis."""
    axes = [
        (torch.arange(check_int("spatial_shape", n), dtype=torch.float64) - n // 2) * (2 / n) for n in spatial_shape
    ]
    return list(torch.meshgrid(*axes, indexing="ij"))
