"""Metrics of reconstructed images that MONAI lacks, on magnitudes, with the reference's maximum as data range."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from monai.metrics.regression import RegressionMetric
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import visual_information_fidelity

from monai_deqkan._checks import check_int, check_range, check_spatial_dims, check_tensor
from monai_deqkan._complex import channels_to_complex

__all__ = [
    "NMSEMetric",
    "ReferencePSNRMetric",
    "ReferenceSSIMMetric",
    "ReferenceVIFMetric",
    "head_region",
    "magnitude",
    "nmse",
    "psnr",
    "ssim",
    "vif",
    "volume_metrics",
]

Region = Callable[[Tensor], Tensor]


def magnitude(image: Tensor) -> Tensor:
    """Return the magnitude image of a network's output, in the same unit.

    Args:
        image: complex ``(B, *space)``; real with two channels ``(B, 2, *space)``: real and imaginary part; or real with
            one channel ``(B, 1, *space)``, which already is a magnitude and is returned as it is.

    Returns:
        Real, shape ``(B, 1, *space)``.

    Raises:
        ValueError: for another number of channels.

    Example:
        >>> magnitude(torch.tensor([3.0, 4.0]).reshape(1, 2, 1)).tolist()
        [[[5.0]]]
    """
    if check_tensor("image", image).is_complex():
        return image.abs().unsqueeze(1)
    if image.ndim >= 2 and image.shape[1] == 1:
        return image
    return channels_to_complex(image).abs().unsqueeze(1)


def head_region(reference: Tensor, threshold: float = 0.1) -> Tensor:
    """Find the object: where the reference exceeds a share of its maximum, holes filled.

    Args:
        reference: magnitude, such as the root sum of squares, shape ``(B, 1, *space)``, any unit.
        threshold: share of each sample's maximum, dimensionless, in ``[0, 1)``.

    Returns:
        Bool, shape ``(B, 1, *space)``.
    """
    check_range("threshold", threshold, 0.0, 1.0, open_high=True)
    check_tensor("reference", reference)
    bright = reference > threshold * reference.flatten(1).amax(dim=1).reshape(-1, *[1] * (reference.ndim - 1))
    filled = [[ndimage.binary_fill_holes(channel) for channel in sample] for sample in bright.cpu().numpy()]
    return torch.from_numpy(np.array(filled, dtype=bool)).to(reference.device).reshape(reference.shape)


def nmse(prediction: Tensor, reference: Tensor, region: Tensor | None = None) -> Tensor:
    r"""Return the normalized mean squared error per sample, :math:`\sum |\hat y - y|^2 / \sum |y|^2`.

    Args:
        prediction: magnitudes, shape ``(B, 1, *space)``, any unit.
        reference: magnitudes, same shape and unit.
        region: bool, same shape: pixels that count; None counts all.

    Returns:
        Dimensionless, shape ``(B,)``; NaN where the reference is zero.
    """
    weight = _weight(prediction, reference, region)
    error = ((prediction - reference).square() * weight).flatten(1).sum(dim=1)
    return error / (reference.square() * weight).flatten(1).sum(dim=1)


def psnr(
    prediction: Tensor, reference: Tensor, region: Tensor | None = None, *, data_range: Tensor | None = None
) -> Tensor:
    r"""Return the peak signal-to-noise ratio per sample, the peak being the sample's largest reference value.

    .. math:: 10 \log_{10} \frac{\max(y)^2}{\mathrm{mean}\, |\hat y - y|^2}

    Args:
        prediction: magnitudes, shape ``(B, 1, *space)``, any unit.
        reference: magnitudes, same shape and unit.
        region: bool, same shape: pixels whose mean is taken; the peak is that of the whole image. None counts all.
        data_range: another peak, one per sample, shape ``(B,)``, such as the maximum of a slice's volume.

    Returns:
        In dB, shape ``(B,)``; infinite for equal images.
    """
    weight = _weight(prediction, reference, region)
    mean = ((prediction - reference).square() * weight).flatten(1).sum(dim=1) / weight.flatten(1).sum(dim=1)
    return 10 * torch.log10(_peak(reference, data_range).square() / mean)


def ssim(
    prediction: Tensor,
    reference: Tensor,
    region: Tensor | None = None,
    *,
    win_size: int = 7,
    data_range: Tensor | None = None,
) -> Tensor:
    """Return the structural similarity per sample, the data range being the sample's largest reference value.

    The definition of scikit-image's defaults and of fastMRI: uniform window, sample covariance, constants 0.01 and
    0.03, mean over all windows that lie inside the image. (MONAI's has a fixed data range and no sample covariance.)

    Args:
        prediction: magnitudes, shape ``(B, 1, *space)`` with two or three spatial axes, any unit.
        reference: magnitudes, same shape and unit.
        region: bool, same shape: only windows with their centre inside count; None counts all.
        win_size: window width in pixels, odd.
        data_range: another data range, one per sample, shape ``(B,)``.

    Returns:
        Dimensionless, shape ``(B,)``.

    Raises:
        ValueError: if the image is smaller than the window, or shapes differ.

    Reference:
        Z. Wang et al., "Image quality assessment: from error visibility to structural similarity", IEEE Trans. Image
        Process. 13 (2004) 600-612, eq. 13.
    """
    weight = _weight(prediction, reference, region)
    spatial_dims = reference.ndim - 2
    pool = F.avg_pool2d if check_spatial_dims(spatial_dims) == 2 else F.avg_pool3d
    if check_int("win_size", win_size) % 2 == 0 or win_size > min(reference.shape[2:]):
        raise ValueError(
            f"`win_size` must be odd and at most the image's size {tuple(reference.shape[2:])}; got {win_size}."
        )
    x, y = prediction, reference
    mean_x, mean_y = pool(x, win_size, 1), pool(y, win_size, 1)
    unbiased = win_size**spatial_dims / (win_size**spatial_dims - 1)
    var_x = unbiased * (pool(x * x, win_size, 1) - mean_x**2)
    var_y = unbiased * (pool(y * y, win_size, 1) - mean_y**2)
    covariance = unbiased * (pool(x * y, win_size, 1) - mean_x * mean_y)
    peak = _peak(y, data_range).reshape(-1, *[1] * (y.ndim - 1))
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    pad = win_size // 2
    for axis, size in enumerate(y.shape[2:], start=2):
        weight = weight.narrow(axis, pad, size - 2 * pad)
    return (similarity * weight).flatten(1).sum(dim=1) / weight.flatten(1).sum(dim=1)


def vif(
    prediction: Tensor, reference: Tensor, region: Tensor | None = None, *, data_range: Tensor | None = None
) -> Tensor:
    """Return the pixel-domain visual information fidelity per sample, the mean over slices for volumes.

    Images are scaled so that the data range is 255, the scale for which its noise variance of 2 was chosen.

    Args:
        prediction: magnitudes, shape ``(B, 1, *space)`` with two or three spatial axes, the last two at least 41 long,
            any unit.
        reference: magnitudes, same shape and unit.
        region: bool, same shape: both images are set to zero outside; None keeps all.
        data_range: data range, one per sample, shape ``(B,)``; None takes the sample's largest reference value.

    Returns:
        Dimensionless, shape ``(B,)``: 1 for equal images, above 1 where contrast is enhanced; NaN for a zero reference.

    Raises:
        ValueError: if the image is smaller than 41 x 41, or shapes differ.

    Reference:
        H. R. Sheikh and A. C. Bovik, "Image information and visual quality", IEEE Trans. Image Process. 15 (2006)
        430-444; its multi-scale pixel form, as torchmetrics computes it.
    """
    weight = _weight(prediction, reference, region)
    spatial_dims = check_spatial_dims(reference.ndim - 2)
    if min(reference.shape[-2:]) < 41:
        raise ValueError(f"VIF needs images of at least 41 x 41 pixels; got {tuple(reference.shape[-2:])}.")
    scale = (255 / _peak(reference, data_range).double()).reshape(-1, *[1] * (reference.ndim - 1))
    x, y = prediction.double() * weight * scale, reference.double() * weight * scale
    if spatial_dims == 3:
        x, y = x.flatten(0, 2).unsqueeze(1), y.flatten(0, 2).unsqueeze(1)
    values = torch.stack([visual_information_fidelity(a, b) for a, b in zip(x.split(1), y.split(1), strict=True)])
    return values.reshape(reference.shape[0], -1).mean(dim=1).to(reference.dtype)


def volume_metrics(prediction: Tensor, reference: Tensor, region: Tensor | None = None) -> dict[str, float]:
    """Return PSNR (dB), SSIM, NMSE and VIF of one volume of slices, with the volume's maximum as data range.

    PSNR and NMSE take all pixels of the volume together; SSIM and VIF are 2-D and averaged over slices. That is how
    fastMRI's ``evaluate`` scores a file (it has no VIF).

    Args:
        prediction: magnitudes, shape ``(slices, 1, H, W)``, any unit.
        reference: magnitudes, same shape and unit.
        region: bool, same shape: pixels that count; slices without any count nowhere. None counts all.

    Example:
        >>> volume = torch.rand(3, 1, 48, 48)
        >>> volume_metrics(volume, volume)["nmse"]
        0.0
    """
    if check_tensor("reference", reference).ndim != 4:
        raise ValueError(f"`reference` must have shape (slices, 1, H, W); got {tuple(reference.shape)}.")
    _weight(prediction, reference, region)
    if region is not None:
        kept = region.flatten(1).any(dim=1)
        prediction, reference, region = prediction[kept], reference[kept], region[kept]
    if reference.numel() == 0:
        raise ValueError("`region` must hold a pixel of the volume; it is empty. Is the reference zero?")
    peak = reference.max().expand(len(reference))
    # One sample of all slices.
    x, y = prediction.transpose(0, 1), reference.transpose(0, 1)
    inside = None if region is None else region.transpose(0, 1)
    return {
        "psnr": float(psnr(x, y, inside)),
        "ssim": float(ssim(prediction, reference, region, data_range=peak).nanmean()),
        "nmse": float(nmse(x, y, inside)),
        "vif": float(vif(prediction, reference, region, data_range=peak).nanmean()),
    }


def _peak(reference: Tensor, data_range: Tensor | None) -> Tensor:
    if data_range is None:
        return reference.flatten(1).amax(dim=1)
    if check_tensor("data_range", data_range).shape != reference.shape[:1]:
        raise ValueError(
            f"`data_range` must have shape ({reference.shape[0]},), one per sample; got {tuple(data_range.shape)}."
        )
    return data_range


def _weight(prediction: Tensor, reference: Tensor, region: Tensor | None) -> Tensor:
    for name, value in (("prediction", prediction), ("region", region)):
        if value is not None and check_tensor(name, value).shape != check_tensor("reference", reference).shape:
            raise ValueError(
                f"`{name}` must have the shape of the reference, {tuple(reference.shape)}; got {tuple(value.shape)}."
            )
    return torch.ones_like(reference) if region is None else region.to(reference.dtype)


class _MagnitudeMetric(RegressionMetric):
    """A metric per sample, on magnitudes, over a region that is made from the reference."""

    def __init__(self, *, region: Region | None = None, reduction: str = "mean", get_not_nans: bool = False) -> None:
        super().__init__(reduction=reduction, get_not_nans=get_not_nans)
        self.region = region

    def _compute_tensor(self, y_pred: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        # Before MONAI's shape check: a prediction may have two channels and a reference one.
        prediction, reference = magnitude(y_pred).float(), magnitude(y).float()
        region = None if self.region is None else self.region(reference)
        return self._measure(prediction, reference, region).unsqueeze(1)

    def _compute_metric(self, y_pred: Tensor, y: Tensor) -> Tensor:
        return self._compute_tensor(y_pred, y)

    def _measure(self, prediction: Tensor, reference: Tensor, region: Tensor | None) -> Tensor:
        raise NotImplementedError


class NMSEMetric(_MagnitudeMetric):
    """Accumulate :func:`nmse` over samples.

    Images are given as to :func:`magnitude`, so a network's two channels serve as they are.

    Args:
        region: makes the region that counts from reference magnitudes, such as :func:`head_region`; None counts all.
        reduction: MONAI's reduction over samples, ``"mean"`` by default.
        get_not_nans: whether ``aggregate`` also returns the number of samples that counted.
    """

    def _measure(self, prediction: Tensor, reference: Tensor, region: Tensor | None) -> Tensor:
        return nmse(prediction, reference, region)


class ReferencePSNRMetric(_MagnitudeMetric):
    """Accumulate :func:`psnr`, in dB, over samples.

    Unlike MONAI's ``PSNRMetric`` its peak is each sample's reference maximum, and it can be limited to a region.

    Args:
        region: see :class:`NMSEMetric`.
        reduction: see :class:`NMSEMetric`.
        get_not_nans: see :class:`NMSEMetric`.
    """

    def _measure(self, prediction: Tensor, reference: Tensor, region: Tensor | None) -> Tensor:
        return psnr(prediction, reference, region)


class ReferenceSSIMMetric(_MagnitudeMetric):
    """Accumulate :func:`ssim` over samples.

    Args:
        region: see :class:`NMSEMetric`.
        reduction: see :class:`NMSEMetric`.
        get_not_nans: see :class:`NMSEMetric`.
    """

    def _measure(self, prediction: Tensor, reference: Tensor, region: Tensor | None) -> Tensor:
        return ssim(prediction, reference, region)


class ReferenceVIFMetric(_MagnitudeMetric):
    """Accumulate :func:`vif` over samples.

    Args:
        region: see :class:`NMSEMetric`.
        reduction: see :class:`NMSEMetric`.
        get_not_nans: see :class:`NMSEMetric`.
    """

    def _measure(self, prediction: Tensor, reference: Tensor, region: Tensor | None) -> Tensor:
        return vif(prediction, reference, region)
