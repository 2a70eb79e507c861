"""How far sensitivity maps are from what the centre of k-space shows."""

from __future__ import annotations

import torch
from torch import Tensor

from monai_deqkan._checks import check_shape, check_tensor
from monai_deqkan.operators.sensitivity import low_frequency_images

__all__ = ["map_misfit"]


def map_misfit(
    kspace: Tensor,
    sensitivity_maps: Tensor,
    mask: Tensor | None = None,
    *,
    max_center_lines: int = 24,
    spatial_dims: int = 2,
    windowed: bool = True,
) -> Tensor:
    r"""Return the share of the low-frequency coil images' power that the maps do not explain.

    .. math:: m = \frac{\sum_r \|x(r) - P(r)\, x(r)\|^2}{\sum_r \|x(r)\|^2}

    with the coil images :math:`x` of the centre of k-space and the projection :math:`P` on the maps at a pixel. It
    grows where maps are wrong (few central lines, an image that folds over) and with noise; a single coil with a map
    that is nowhere zero has none. With a window, nor have the maps of :func:`estimate_sensitivity_maps`, which are
    these very images, scaled: their faults show without one.

    Args:
        kspace: complex, ``(B, K, *space)``.
        sensitivity_maps: complex, ``(B or 1, K, *space)``, or ``(B or 1, M, K, *space)`` for ``M`` map sets, which are
            orthogonal at each pixel, as those of :func:`espirit_maps`.
        mask: see :func:`estimate_sensitivity_maps`.
        max_center_lines: see :func:`estimate_sensitivity_maps`.
        spatial_dims: number of spatial axes, 2 or 3.
        windowed: whether a cosine window lessens the outer lines of the centre.

    Returns:
        Dimensionless, in ``[0, 1]``, ``(B,)``; zero for samples of zeros.

    Raises:
        ValueError: if zero frequency is not measured, k-space is not finite, or shapes disagree.

    Example:
        >>> from monai_deqkan.operators import espirit_maps, simulate_kspace, smooth_coil_maps
        >>> kspace = simulate_kspace(torch.rand(1, 32, 32), smooth_coil_maps((32, 32), 4))
        >>> bool(map_misfit(kspace, espirit_maps(kspace)) < 0.01)
        True
    """
    images = low_frequency_images(
        kspace, mask, max_center_lines=max_center_lines, spatial_dims=spatial_dims, windowed=windowed
    )
    maps = check_tensor("sensitivity_maps", sensitivity_maps)
    sets = maps if maps.ndim == kspace.ndim + 1 else maps.unsqueeze(1)
    check_shape("sensitivity_maps", sets, ("B or 1", "M", *kspace.shape[1:]))
    left = images
    for index in range(sets.shape[1]):
        one = sets[:, index]
        power = one.abs().square().sum(dim=1, keepdim=True)
        share = (one.conj() * images).sum(dim=1, keepdim=True) / power.clamp_min(torch.finfo(power.dtype).tiny)
        left = left - torch.where(power > 0, share, torch.zeros_like(share)) * one
    total = images.abs().square().flatten(1).sum(dim=1)
    misfit = left.abs().square().flatten(1).sum(dim=1) / total.clamp_min(torch.finfo(total.dtype).tiny)
    return misfit.clamp(0.0, 1.0)
