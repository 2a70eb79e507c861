"""Whether a per-pixel spread says how large the error is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from monai_deqkan._checks import check_finite, check_range, check_same_shape, check_tensor

__all__ = ["SpreadCalibration", "fit_spread_factor", "spread_calibration"]

_FACTORS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0)
_ONE_SPREAD = math.erf(1 / math.sqrt(2))  # 68.3 %


@dataclass(frozen=True)
class SpreadCalibration:
    """How often the error stays within some spreads.

    Attributes:
        factors: numbers of spreads.
        shares: share of pixels whose error is at most so many spreads.
        normal_shares: what a normal law with this spread would have, ``erf(k / sqrt(2))``.
        num_pixels: pixels counted.
    """

    factors: tuple[float, ...]
    shares: tuple[float, ...]
    normal_shares: tuple[float, ...]
    num_pixels: int

    @property
    def largest_gap(self) -> float:
        """Largest absolute difference between the shares and the normal law's."""
        return max(abs(a - b) for a, b in zip(self.shares, self.normal_shares, strict=True))


def spread_calibration(
    error: Tensor, spread: Tensor, factors: Sequence[float] = _FACTORS, *, region: Tensor | None = None
) -> SpreadCalibration:
    r"""Count the pixels whose true error lies within :math:`k` spreads.

    .. math:: \mathrm{share}(k) = \frac{1}{N} \sum_i [\, |e_i| \le k\, s_i \,]

    Below the normal law's share the spread is too small (overconfident), above it too large.

    Args:
        error: reconstruction minus reference, any shape and unit.
        spread: standard deviation predicted for each pixel, same shape and unit, not negative.
        factors: values of :math:`k`, positive.
        region: bool, same shape: pixels that count, such as :func:`head_region`; None counts all.

    Returns:
        The calibration.

    Raises:
        ValueError: if shapes differ, a value is not finite, a spread or factor negative, or no pixel counts.

    Example:
        >>> calibration = spread_calibration(torch.tensor([0.5, -1.5, 2.5, 0.0]), torch.ones(4), factors=(1, 2))
        >>> calibration.shares
        (0.5, 0.75)
    """
    if not factors:
        raise ValueError("`factors` must hold at least one number of spreads; got none.")
    chosen = tuple(check_range("factors", factor, 0.0, open_low=True) for factor in factors)
    size, width = _counted(error, spread, region)
    shares = tuple(float((size <= factor * width).double().mean()) for factor in chosen)
    normal = tuple(math.erf(factor / math.sqrt(2)) for factor in chosen)
    return SpreadCalibration(chosen, shares, normal, size.numel())


def fit_spread_factor(
    error: Tensor, spread: Tensor, *, region: Tensor | None = None, share: float = _ONE_SPREAD
) -> float:
    """Find the number that spreads are multiplied by so that a share of the errors lies within one spread.

    Fit it on validation images, and look at :func:`spread_calibration` of others. Only one point of the curve is made
    right; how far the others are off says how good the spread is.

    Args:
        error: see :func:`spread_calibration`, as are the others.
        spread: same.
        region: same.
        share: share of pixels, in ``(0, 1)``; by default the normal law's, 68.3 %.

    Returns:
        The factor, dimensionless: the smallest that gives the share.

    Raises:
        ValueError: as :func:`spread_calibration`; or if so many spreads are zero where the error is not that no factor
            gives the share.

    Example:
        >>> fit_spread_factor(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.ones(4), share=0.5)
        2.0
    """
    check_range("share", share, 0.0, 1.0, open_low=True, open_high=True)
    size, width = _counted(error, spread, region)
    ratio = torch.where(size == 0, torch.zeros_like(size), size / width).sort().values
    factor = float(ratio[max(math.ceil(share * len(ratio)) - 1, 0)])
    if not math.isfinite(factor):
        raise ValueError(
            f"The spread is zero at more than {1 - share:.0%} of the pixels though the error is not, so no factor "
            "calibrates it. Check the noise level, or use another method."
        )
    return factor


def _counted(error: Tensor, spread: Tensor, region: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return sizes of errors and spreads of the pixels that count, float64, one axis."""
    check_same_shape("error", error, "spread", spread)
    if region is not None:
        if check_tensor("region", region).shape != error.shape:
            raise ValueError(f"`region` must have the shape {tuple(error.shape)}; got {tuple(region.shape)}.")
        error, spread = error[region != 0], spread[region != 0]
    check_finite("error", error)
    check_finite("spread", spread)
    if not error.numel():
        raise ValueError("No pixel counts: `region` is empty. Check the reference it was made from.")
    if bool((spread < 0).any()):
        raise ValueError(f"`spread` must not be negative; got {float(spread.min()):.3g}.")
    return error.detach().double().abs().flatten(), spread.detach().double().flatten()
