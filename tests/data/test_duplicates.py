from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage import data, transform
from torch import Tensor

from monai_deqkan.data.duplicates import NearPair, fingerprint, near_pairs


def smooth_images(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [255 * ndimage.gaussian_filter(rng.random((96, 80)), 6, mode="wrap") for _ in range(count)]


def fingerprints(images: list[np.ndarray]) -> Tensor:
    return torch.stack([fingerprint(torch.as_tensor(np.asarray(image), dtype=torch.float32)[None]) for image in images])


def reference_pairs(prints: Tensor, min_correlation: float) -> list[tuple[int, int]]:
    table = np.corrcoef(prints.flatten(1).double().numpy())
    return [tuple(pair) for pair in np.argwhere(np.triu(table >= min_correlation, 1)).tolist()]


def test_fingerprint_is_the_mean_of_blocks_and_luminance() -> None:
    image = torch.as_tensor(data.astronaut()).float().permute(2, 0, 1)  # (3, 512, 512)
    expected = (image * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0).reshape(32, 16, 32, 16).mean((1, 3))
    torch.testing.assert_close(fingerprint(image), expected)
    volume = torch.rand(1, 64, 64, 5)
    torch.testing.assert_close(fingerprint(volume), fingerprint(volume[..., 2]))


def test_copies_of_every_kind_are_found_among_different_images() -> None:
    photo = data.camera().astype(float)
    copies = [
        photo,
        transform.resize(photo, (200, 230)),
        0.6 * photo + 40,
        255 * (photo / 255) ** 0.8,
        ndimage.gaussian_filter(photo, 3),
        photo + np.random.default_rng(0).normal(0, 10, photo.shape),
    ]
    others = smooth_images(30)
    found = near_pairs(fingerprints([*copies, *others]))
    assert [(pair.first, pair.second) for pair in found] == [(a, b) for a in range(6) for b in range(a + 1, 6)]
    table = np.corrcoef(fingerprints(copies).flatten(1).numpy())
    for pair in found:
        assert pair.correlation == pytest.approx(table[pair.first, pair.second], abs=1e-5)


def test_all_pairs_above_the_threshold_are_found_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the full table of correlations, with mixtures whose correlations lie on both sides of the threshold."""
    monkeypatch.setattr("monai_deqkan.data.duplicates._BLOCK", 7)
    base = smooth_images(12)
    rng = np.random.default_rng(1)
    mixed = [base[index % 12] + rng.uniform(0, 0.3) * base[(index + 1) % 12] for index in range(40)]
    prints = fingerprints([*base, *mixed])
    expected = reference_pairs(prints, 0.97)
    assert [(pair.first, pair.second) for pair in near_pairs(prints)] == expected
    assert 10 < len(expected) < len(reference_pairs(prints, 0.9))


def test_mirrored_copies_only_on_demand() -> None:
    """The first axis is x, as in MONAI's readers, so left and right are exchanged there."""
    image = smooth_images(1)[0]
    prints = fingerprints([image, image[::-1].copy(), image[:, ::-1].copy(), *smooth_images(3, seed=1)])
    assert near_pairs(prints) == []
    (pair,) = near_pairs(prints, mirrored=True)
    assert (pair.first, pair.second, pair.mirrored) == (0, 1, True)
    assert pair.correlation == pytest.approx(1, abs=1e-5)


def test_constant_images_match_nothing() -> None:
    prints = torch.stack([torch.zeros(32, 32), torch.full((32, 32), 7.1), torch.full((32, 32), 7.1)])
    assert near_pairs(prints, mirrored=True) == []


def test_pairs_are_bounded() -> None:
    prints = fingerprints(smooth_images(1) * 30)
    assert len(near_pairs(prints)) == 30 * 29 // 2
    found = near_pairs(prints, max_pairs=10)
    assert len(found) == 10
    assert isinstance(found[0], NearPair)


def test_a_threshold_that_is_none() -> None:
    with pytest.raises(ValueError, match="min_correlation"):
        near_pairs(torch.rand(2, 32, 32), min_correlation=0)
