"""Plain numbers about an image, and whether it lies where a network's training images lay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from monai_deqkan._checks import check_range, check_tensor
from monai_deqkan.operators import estimate_noise_level, infer_mask

__all__ = ["border_signal", "image_statistics", "kspace_statistics", "outside_training", "training_ranges"]

_TAILS = (0.005, 0.003, 0.002, 0.001, 0.0005, 0.0)
_SLACK = 0.05  # of the width of a range, on both sides
_LEAST_SLACK = 0.02  # all statistics are dimensionless, of order one


def image_statistics(image: Tensor, file_size: Sequence[int] | None = None) -> dict[str, float]:
    """Describe a preprocessed image by a few numbers that do not depend on what it shows.

    Args:
        image: channel-first, 2-D or 3-D, intensities in ``[0, 1]``.
        file_size: the size of the image in its file, in pixels.

    Returns:
        ``lower_quartile``, ``median``, ``upper_quartile``, ``contrast`` (standard deviation), ``dark_share`` and
        ``bright_share`` (of pixels below 0.05 and above 0.95), ``border_brightness`` (mean of the outer tenth on each
        side) and ``detail`` (root mean square difference of neighbors); for several channels also ``color`` (mean
        standard deviation over them); with ``file_size`` also ``aspect_ratio`` (logarithm of the longest over the
        shortest side) and ``resolution`` (shortest side of the file over the longest of the image, at most 1).

    Example:
        >>> image_statistics(torch.zeros(1, 20, 20), file_size=(10, 10))["resolution"]
        0.5
    """
    pixels = torch.as_tensor(image).as_subclass(Tensor).detach().float().cpu()
    grey = pixels.mean(dim=0)
    inside = torch.zeros_like(grey, dtype=torch.bool)
    inside[tuple(slice(max(size // 10, 1), size - max(size // 10, 1)) for size in grey.shape)] = True
    quartiles = torch.quantile(_at_most(grey.flatten(), 1_000_000), torch.tensor([0.25, 0.5, 0.75])).tolist()
    steps = torch.stack([grey.diff(dim=axis).square().mean() for axis in range(grey.ndim)])
    numbers = {
        **dict(zip(("lower_quartile", "median", "upper_quartile"), quartiles, strict=True)),
        "contrast": float(grey.std()),
        "dark_share": float((grey < 0.05).float().mean()),
        "bright_share": float((grey > 0.95).float().mean()),
        "border_brightness": float(grey[~inside].mean()),
        "detail": float(steps.mean().sqrt()),
    }
    if len(pixels) > 1:
        numbers["color"] = float(pixels.std(dim=0).mean())
    if file_size is not None:
        shortest, longest = float(min(file_size)), float(max(file_size))
        numbers["aspect_ratio"] = float(np.log(longest / shortest))
        numbers["resolution"] = min(shortest / max(grey.shape), 1.0)
    return numbers


def border_signal(image: Tensor) -> float:
    """Return the share of the first and last columns that are as bright as the object, from 0 to 1.

    Where it is large, the object reaches the end of the field of view along the last axis, the phase encoding, and may
    fold over there.

    Args:
        image: magnitude, any unit, ``(*space)``.

    Returns:
        Of the mean of the outer fortieth of the columns on the more covered side: the share above 0.3 of the image's
        98th percentile. Zero for an empty image.

    Example:
        >>> image = torch.zeros(10, 80)
        >>> image[:, 30:50] = 1
        >>> border_signal(image), border_signal(torch.ones(10, 80))
        (0.0, 1.0)
    """
    pixels = check_tensor("image", image).detach().abs().double()
    level = 0.3 * float(np.quantile(pixels.cpu().numpy(), 0.98))
    width = max(1, pixels.shape[-1] // 40)
    sides = torch.stack([pixels[..., :width].mean(dim=-1), pixels[..., -width:].mean(dim=-1)])
    return float((sides > level).double().flatten(1).mean(dim=1).max()) if level > 0 else 0.0


def kspace_statistics(kspace: Tensor, mask: Tensor | None = None, *, size: bool = True) -> dict[str, float]:
    """Describe the k-space of one slice by a few numbers that do not depend on what it shows.

    Args:
        kspace: complex ``(K, H, W)``, divided by its scale as :class:`~monai_deqkan.transforms.NormalizeKspace` does.
        mask: where it was measured, ``(1, H or 1, W)``; None infers it.
        size: whether to tell ``rows`` and ``columns``, which are an accident in training on crops.

    Returns:
        ``coils``, ``rows``, ``columns``, ``acceleration`` (samples per measured one) and ``log_noise_level`` (decimal
        logarithm of the root mean square over coils of :func:`~monai_deqkan.operators.estimate_noise_level`, in the
        unit of ``kspace``; at least -12).

    Example:
        >>> kspace_statistics(torch.ones(2, 4, 6, dtype=torch.complex64))["acceleration"]
        1.0
    """
    data = check_tensor("kspace", kspace).as_subclass(Tensor)[None]
    measured = infer_mask(data) if mask is None else torch.as_tensor(mask).as_subclass(Tensor)[None] != 0
    coils, rows, columns = (float(size) for size in data.shape[1:])
    level = float(estimate_noise_level(data, measured).square().mean().sqrt())
    return {
        "coils": coils,
        **({"rows": rows, "columns": columns} if size else {}),
        "acceleration": 1.0 / float(measured.float().mean()),
        "log_noise_level": float(np.log10(max(level, 1e-12))),
    }


def _at_most(values: Tensor, count: int) -> Tensor:
    """Return every n-th value, at most ``count``: ``torch.quantile`` takes no more than 16 million."""
    return values[:: -(-values.numel() // count)]


def training_ranges(
    statistics: Sequence[Mapping[str, float]], max_flagged: float = 0.01, *, shape_slack: float = _LEAST_SLACK
) -> dict[str, tuple[float, float]]:
    """Find the range of each statistic of the training images.

    The same share of images is cut off at both ends of every statistic, as large as leaves at most ``max_flagged`` of
    the training images outside of any range; then ranges are widened by a twentieth.

    Args:
        statistics: those of each training image, from :func:`image_statistics`, all with the same names.
        max_flagged: share of the training images that may lie outside, in ``[0, 1)``.
        shape_slack: by how much the range of ``aspect_ratio``, a logarithm, is widened at least.

    Returns:
        Lower and upper end by name.

    Raises:
        ValueError: if there is no image.
    """
    check_range("max_flagged", max_flagged, 0.0, 1.0, open_high=True)
    if not statistics:
        raise ValueError("`statistics` must hold those of at least one training image; got none.")
    names = list(statistics[0])
    table = np.array([[row[name] for name in names] for row in statistics], dtype=float)
    for tail in _TAILS:
        low, high = np.quantile(table, [tail, 1 - tail], axis=0)
        least = [shape_slack if name == "aspect_ratio" else _LEAST_SLACK for name in names]
        slack = np.maximum(_SLACK * (high - low), least)
        low, high = low - slack, high + slack
        if ((table < low) | (table > high)).any(axis=1).mean() <= max_flagged:
            break
    return {name: (float(low[i]), float(high[i])) for i, name in enumerate(names)}


def outside_training(statistics: Mapping[str, float], ranges: Mapping[str, Sequence[float]]) -> list[str]:
    """Return the names of the statistics that lie outside their ranges; none where an image is like the others.

    An image inside all ranges may still be of another kind: this finds gross differences only.

    Args:
        statistics: those of one image.
        ranges: from :func:`training_ranges`; statistics without a range are passed over.

    Example:
        >>> outside_training({"contrast": 0.1, "detail": 0.1}, {"contrast": (0.2, 0.3), "detail": (0.0, 0.2)})
        ['contrast']
    """
    return [
        name for name, value in statistics.items() if name in ranges and not ranges[name][0] <= value <= ranges[name][1]
    ]
