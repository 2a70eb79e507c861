"""The centred orthonormal discrete Fourier transform."""

from __future__ import annotations

import torch
from torch import Tensor

from monai_deqkan._checks import check_spatial_dims
from monai_deqkan.operators.base import LinearOperator

__all__ = ["FourierOperator"]


class FourierOperator(LinearOperator):
    r"""Transform images to k-space over the last two or three axes.

    .. math:: y = \mathrm{fftshift}(\mathrm{FFT}(\mathrm{ifftshift}(x)))

    Orthonormal, so the adjoint is the inverse. Zero frequency and image centre lie at index ``n // 2`` of each axis,
    for even and odd ``n`` (the convention of fastMRI).

    Args:
        spatial_dims: number of spatial axes, 2 or 3.

    Example:
        >>> kspace = FourierOperator(spatial_dims=2)(torch.ones(1, 1, 4, 4, dtype=torch.complex64))
        >>> kspace[0, 0, 2, 2].item()
        (4+0j)
    """

    def __init__(self, spatial_dims: int = 2) -> None:
        self.spatial_dims = check_spatial_dims(spatial_dims)
        self._axes = tuple(range(-self.spatial_dims, 0))

    def forward(self, x: Tensor) -> Tensor:
        """Transform an image ``(*, *space)`` to k-space."""
        self._check(x)
        shifted = torch.fft.ifftshift(x, dim=self._axes)
        return torch.fft.fftshift(torch.fft.fftn(shifted, dim=self._axes, norm="ortho"), dim=self._axes)

    def adjoint(self, y: Tensor) -> Tensor:
        """Transform k-space ``(*, *space)`` to an image."""
        self._check(y)
        shifted = torch.fft.ifftshift(y, dim=self._axes)
        return torch.fft.fftshift(torch.fft.ifftn(shifted, dim=self._axes, norm="ortho"), dim=self._axes)

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
