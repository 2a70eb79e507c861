"""The centred orthonormal discrete Fourier transform."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from monai_deqkan._checks import check_spatial_dims
from monai_deqkan.operators.base import LinearOperator

__all__ = ["FourierOperator", "centering_weights"]


def centering_weights(space: Sequence[int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    r"""Return the weights that make a plain FFT centred and orthonormal, one for the image, one for k-space.

    With centre :math:`c = \lfloor n / 2 \rfloor` of each axis of size :math:`n`,

    .. math:: n^{-1/2}\, \mathrm{fftshift}(\mathrm{FFT}(\mathrm{ifftshift}(x))) = q \cdot \mathrm{FFT}(p\, x),\qquad
        p_r = e^{2 \pi i c r / n},\quad q_k = n^{-1/2}\, e^{2 \pi i c (k - c) / n}

    The inverse is :math:`\bar p` times the unscaled inverse FFT of :math:`\bar q y`. Multiplying costs less than moving
    samples and than a scaling of its own. Along even axes the phases are signs.

    Args:
        space: sizes of the spatial axes.
        dtype: complex dtype of the data.
        device: their device.

    Returns:
        Complex :math:`p` and :math:`q`, shape ``space``.
    """
    image = kspace = torch.ones((), dtype=torch.complex128, device=device)
    for axis, n in enumerate(space):
        index, center = torch.arange(n, device=device), n // 2
        angles = (2 * math.pi / n * (center * (index - start) % n).double() for start in (0, center))
        lengths = (1.0, n**-0.5)
        p, q = (
            torch.polar(torch.full_like(angle, length), angle) for angle, length in zip(angles, lengths, strict=True)
        )
        shape = [n if other == axis else 1 for other in range(len(space))]
        image, kspace = image * p.view(shape), kspace * q.view(shape)
    return image.to(dtype), kspace.to(dtype)


class FourierOperator(LinearOperator):
    r"""Transform images to k-space over the last two or three axes.

    .. math:: y = \mathrm{fftshift}(\mathrm{FFT}(\mathrm{ifftshift}(x)))

    Orthonormal, so the adjoint is the inverse. Zero frequency and image centre lie at index ``n // 2`` of each axis,
    for even and odd ``n`` (the convention of fastMRI). Nothing is moved for it, see :func:`centering_weights`.

    Args:
        spatial_dims: number of spatial axes, 2 or 3.

    Example:
        >>> kspace = FourierOperator(spatial_dims=2)(torch.ones(1, 1, 4, 4, dtype=torch.complex64))
        >>> kspace[0, 0, 2, 2].abs().item()
        4.0
    """

    def __init__(self, spatial_dims: int = 2) -> None:
        self.spatial_dims = check_spatial_dims(spatial_dims)
        self._axes = tuple(range(-self.spatial_dims, 0))

    def forward(self, x: Tensor) -> Tensor:
        """Transform an image ``(*, *space)`` to k-space."""
        self._check(x)
        image, kspace = centering_weights(x.shape[-self.spatial_dims :], x.dtype, x.device)
        return torch.fft.fftn(x * image, dim=self._axes).mul_(kspace)

    def adjoint(self, y: Tensor) -> Tensor:
        """Transform k-space ``(*, *space)`` to an image."""
        self._check(y)
        image, kspace = centering_weights(y.shape[-self.spatial_dims :], y.dtype, y.device)
        return torch.fft.ifftn(y * kspace.conj(), dim=self._axes, norm="forward").mul_(image.conj())

    def take(self, rows: Tensor) -> FourierOperator:
        """Return the operator itself: it holds no per-sample data."""
        return self

    def _check(self, data: Tensor) -> None:
        if not data.is_complex():
            raise TypeError(f"FourierOperator needs a complex tensor; got {data.dtype}. Use `torch.complex`.")
        if data.ndim < self.spatial_dims:
            raise ValueError(
                f"FourierOperator needs at least {self.spatial_dims} axes, the last ones in space; got shape "
                f"{tuple(data.shape)}."
            )
