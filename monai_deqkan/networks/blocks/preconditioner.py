"""Variables in which a system of image and k-space terms is solved in fewer steps."""

from __future__ import annotations

import torch
from torch import Tensor

from monai_deqkan._complex import channels_to_complex, complex_to_channels

__all__ = ["Preconditioner"]

_LEAST = 1e-3  # of the diagonals, relative to their mean: nothing is divided by zero


class Preconditioner:
    r"""A change of variables :math:`x = S y` that brings a self-adjoint matrix :math:`M` of images near the identity.

    .. math:: S = D^{-1/2} F^H P^{-1/2}, \qquad S^H M S\, y = S^H b

    with the diagonals of :math:`M` among pixels, over their mean, :math:`D`, and among frequencies, :math:`P`. The
    diagonal among pixels follows weights that differ from place to place, the one among frequencies a sampling mask.

    Args:
        pixels: diagonal among pixels, ``(B, *axes)``, or rough values of it; at least zero.
        frequencies: diagonal among frequencies, in the order of ``torch.fft``; as ``pixels``.
        spatial_dims: number of last axes that are space.

    Reference:
        T. F. Chan, "An optimal circulant preconditioner for Toeplitz systems", SIAM J. Sci. Stat. Comput. 9 (1988)
        766-771, for :math:`P`; for MRI, K. Koolstra et al., "Accelerating compressed sensing in parallel imaging
        reconstructions using an efficient circulant preconditioner for Cartesian trajectories", Magn. Reson. Med. 81
        (2019) 670-685. Difference: the diagonal scaling around it.
    """

    def __init__(self, pixels: Tensor, frequencies: Tensor, spatial_dims: int) -> None:
        self._axes = tuple(range(-spatial_dims, 0))
        self._image, self._spectrum = (_root(pixels, self._axes, True), _root(frequencies, self._axes, False))

    def to_image(self, variables: Tensor) -> Tensor:
        """Return :math:`S y`, for two channels ``(B, 2, *axes)``."""
        y = channels_to_complex(variables) * self._spectrum
        return complex_to_channels(torch.fft.ifftn(y, dim=self._axes, norm="ortho") * self._image)

    def adjoint(self, image: Tensor) -> Tensor:
        """Return :math:`S^H b`, for two channels ``(B, 2, *axes)``."""
        b = channels_to_complex(image) * self._image
        return complex_to_channels(torch.fft.fftn(b, dim=self._axes, norm="ortho") * self._spectrum)


def _root(diagonal: Tensor, axes: tuple[int, ...], relative: bool) -> Tensor:
    """Return the reciprocal square root of a diagonal, or of it over its mean."""
    mean = diagonal.mean(dim=axes, keepdim=True)
    mean = torch.where(mean > 0, mean, 1.0)
    root = (diagonal / mean).clamp_min(_LEAST).rsqrt()
    return root if relative else root * mean.rsqrt()
