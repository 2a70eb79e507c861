"""Borders of images shaded by chance, so that a network cannot lean on a collimator's edge."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform
from torch import Tensor

from monai_deqkan._checks import check_range

__all__ = ["RandBorderShade", "RandBorderShaded"]


class RandBorderShade(RandomizableTransform):
    r"""Darken or replace strips of random width along each side of an image.

    Each side gets, on its own and with probability one half, a strip of a width drawn from ``(0, max_width)`` of that
    axis, in which the image becomes :math:`(1 - s)\, x + s\, v`: shade :math:`s` drawn from ``(0, 1)``, or 1 for a
    strip that hides all, and gray value :math:`v` from ``value_range``, one for the image.

    Args:
        prob: probability that an image is changed, in ``[0, 1]``.
        max_width: widest strip as a share of the axis, in ``(0, 0.5)``.
        hide: probability that a strip hides all, in ``[0, 1]``.
        value_range: lowest and highest value of the strips, in the image's unit.

    Raises:
        ValueError: if a setting lies outside its range.
    """

    def __init__(
        self,
        prob: float = 0.3,
        max_width: float = 0.12,
        hide: float = 0.5,
        value_range: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        RandomizableTransform.__init__(self, check_range("prob", prob, 0.0, 1.0))
        self.max_width = check_range("max_width", max_width, 0.0, 0.5, open_low=True, open_high=True)
        self.hide = check_range("hide", hide, 0.0, 1.0)
        low, high = value_range
        if not low <= high:
            raise ValueError(f"`value_range` must be (lowest, highest); got {tuple(value_range)}. Swap them.")
        self.value_range = (float(low), float(high))
        self.strips: list[tuple[int, bool, float, float]] = []  # axis, whether at its end, width, shade
        self.value = 0.0

    def randomize(self, data: Any) -> None:
        """Draw strips for an image of ``data`` spatial axes."""
        super().randomize(None)
        if not self._do_transform:
            return
        self.value = float(self.R.uniform(*self.value_range))
        self.strips = []
        for axis in range(int(data)):
            for at_end in (False, True):
                chosen, width, hidden, shade = self.R.random_sample(4)
                if chosen < 0.5:
                    strip = (axis, at_end, self.max_width * width, 1.0 if hidden < self.hide else shade)
                    self.strips.append(strip)

    def __call__(self, image: Tensor, randomize: bool = True) -> Tensor:
        """Return an image ``(C, *space)`` with shaded borders."""
        if randomize:
            self.randomize(image.ndim - 1)
        if not self._do_transform:
            return image
        image = image.clone()
        for axis, at_end, width, shade in self.strips:
            length = image.shape[axis + 1]
            count = round(width * length)
            strip = image.narrow(axis + 1, length - count if at_end else 0, count)
            strip.copy_(torch.lerp(strip, torch.full_like(strip, self.value), shade))
        return image


class RandBorderShaded(RandomizableTransform, MapTransform):
    """Dictionary form of :class:`RandBorderShade`: all keys get the same strips.

    Args:
        keys: keys of the images.
        prob: see there, like the others.
        max_width: see there.
        hide: see there.
        value_range: see there.
        allow_missing_keys: whether a key may be absent.
    """

    def __init__(
        self,
        keys: KeysCollection,
        prob: float = 0.3,
        max_width: float = 0.12,
        hide: float = 0.5,
        value_range: tuple[float, float] = (0.0, 1.0),
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob)
        self.shade = RandBorderShade(prob, max_width, hide, value_range)

    def set_random_state(self, seed: int | None = None, state: Any = None) -> RandBorderShaded:
        """Set the source of chance."""
        super().set_random_state(seed, state)
        self.shade.set_random_state(seed, state)
        return self

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Shade the borders of each image."""
        changed = dict(data)
        for position, key in enumerate(self.key_iterator(changed)):
            changed[key] = self.shade(changed[key], randomize=position == 0)
        return changed
