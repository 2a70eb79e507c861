"""A fixed table of image corruptions in five severities, the same for every network that is tried."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from monai.networks.layers import gaussian_1d, separable_filtering
from torch import Tensor

from monai_deqkan._checks import check_choice, check_finite, check_int, check_tensor

__all__ = ["CORRUPTIONS", "Corruption", "check_unit_images", "corrupt", "image_generators"]

_Apply = Callable[[Tensor, float, Sequence[torch.Generator]], Tensor]


@dataclass(frozen=True)
class Corruption:
    """One way to spoil images, with a setting for each severity.

    Attributes:
        settings: one number for each of the severities 1 to 5, mildest first.
        meaning: what the number is, with its unit.
        apply: function of images in [0, 1] ``(B, C, *space)``, a setting, and one random generator per image.
    """

    settings: tuple[float, float, float, float, float]
    meaning: str
    apply: _Apply


def _gaussian_noise(images: Tensor, setting: float, generators: Sequence[torch.Generator]) -> Tensor:
    noise = torch.stack([torch.randn(images.shape[1:], generator=generator) for generator in generators])
    return images + setting * noise.to(images)


def _contrast(images: Tensor, setting: float, generators: Sequence[torch.Generator]) -> Tensor:
    mean = images.flatten(1).mean(1).view(-1, *[1] * (images.ndim - 1))
    return mean + setting * (images - mean)


def _blur(images: Tensor, setting: float, generators: Sequence[torch.Generator]) -> Tensor:
    sigma = torch.tensor(setting * min(images.shape[2:]))
    kernel = gaussian_1d(sigma, truncated=4.0, approx="sampled", normalize=True).to(images)
    return separable_filtering(images, [kernel] * (images.ndim - 2), mode="replicate")


def _gamma(images: Tensor, setting: float, generators: Sequence[torch.Generator]) -> Tensor:
    exponents = [setting if _coin(generator) else 1 / setting for generator in generators]
    return images.pow(torch.tensor(exponents).to(images).view(-1, *[1] * (images.ndim - 1)))


def _rotation(images: Tensor, setting: float, generators: Sequence[torch.Generator]) -> Tensor:
    sizes = images.shape[:1:-1]  # x, y and z, as affine_grid counts them
    planes = [(0, 1)] if len(sizes) == 2 else [(0, 1), (0, 2), (1, 2)]
    theta = torch.eye(len(sizes), len(sizes) + 1, dtype=torch.float64).repeat(len(images), 1, 1)
    for matrix, generator in zip(theta, generators, strict=True):
        angle = math.radians(setting if _coin(generator) else -setting)
        a, b = planes[int(torch.randint(len(planes), (), generator=generator))]
        matrix[a, a] = matrix[b, b] = math.cos(angle)
        # Coordinates run from -1 to 1 along each axis, so an angle between unequal axes needs their sizes.
        matrix[a, b] = -math.sin(angle) * sizes[b] / sizes[a]
        matrix[b, a] = math.sin(angle) * sizes[a] / sizes[b]
    grid = F.affine_grid(theta.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _occlusion(images: Tensor, setting: float, generators: Sequence[torch.Generator]) -> Tensor:
    result = images.clone()
    for image, generator in zip(result, generators, strict=True):
        box: list[slice] = [slice(None)]
        for size in image.shape[1:]:
            side = max(1, round(setting * size))
            start = int(torch.rand((), generator=generator) * (size - side + 1))
            box.append(slice(start, start + side))
        image[tuple(box)] = 0
    return result


def _coin(generator: torch.Generator) -> bool:
    return bool(torch.rand((), generator=generator) < 0.5)


# Chosen before any network was tried on them: from hardly visible to a picture that a reader would send back.
CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption(
        (0.02, 0.05, 0.10, 0.15, 0.20), "standard deviation, in units of the intensity range", _gaussian_noise
    ),
    "contrast": Corruption((0.75, 0.6, 0.45, 0.3, 0.15), "factor on the distance from the image's mean", _contrast),
    "blur": Corruption(
        (0.004, 0.008, 0.012, 0.016, 0.024), "sigma of a Gaussian, as a share of the shortest side", _blur
    ),
    "gamma": Corruption((1.25, 1.5, 2.0, 2.5, 3.0), "exponent, or one over it, by chance", _gamma),
    "rotation": Corruption((4.0, 8.0, 12.0, 16.0, 20.0), "angle in degrees, either way by chance", _rotation),
    "occlusion": Corruption(
        (0.1, 0.2, 0.3, 0.4, 0.5), "side of a black box at a random place, as a share of the image's", _occlusion
    ),
}


def corrupt(images: Tensor, name: str, severity: int, *, seed: int = 0, first_index: int = 0) -> Tensor:
    """Corrupt images by one entry of :data:`CORRUPTIONS`; the result is clipped to [0, 1].

    What is random is drawn for each image from the seed, the name and the image's number: not from the batch it is in,
    the device, or the severity (the noise of severity 2 is that of severity 1, only more of it).

    Args:
        images: intensities in [0, 1], shape ``(B, C, *space)`` with two or three spatial axes.
        name: key of :data:`CORRUPTIONS`.
        severity: from 1 (mild) to 5.
        seed: another seed draws other noise, signs and places.
        first_index: number of the first image in its data set, where that comes in batches.

    Returns:
        New images of the same shape, dtype and device.

    Raises:
        TypeError: if ``images`` is no tensor of real floating-point numbers, or a number is no integer.
        ValueError: if they have another rank or lie outside [0, 1], or for an unknown name or severity.

    Example:
        >>> image = torch.full((1, 1, 4, 4), 0.5)
        >>> bool(torch.equal(corrupt(image, "contrast", 5), image)), corrupt(image, "occlusion", 5).mean()
        (True, tensor(0.3750))

    Reference:
        D. Hendrycks and T. Dietterich, "Benchmarking neural network robustness to common corruptions and
        perturbations", ICLR 2019, have the idea of fixed corruptions in five severities; kinds and settings are ours.
    """
    corruption = CORRUPTIONS[check_choice("name", name, CORRUPTIONS)]
    check_choice("severity", check_int("severity", severity), range(1, 6))
    images = check_unit_images(images)
    generators = image_generators(name, seed, first_index, len(images))
    return corruption.apply(images, corruption.settings[severity - 1], generators).clamp(0, 1)


def check_unit_images(images: Tensor) -> Tensor:
    """Return ``images`` without metadata and gradient if they are a batch ``(B, C, *space)`` of values in [0, 1].

    Raises:
        TypeError: if they are no tensor of real floating-point numbers.
        ValueError: if their rank or range is another.
    """
    if not check_tensor("images", images).is_floating_point():
        raise TypeError(f"`images` must be real floating-point numbers in [0, 1]; got {images.dtype}. Scale them.")
    if images.ndim not in (4, 5) or images.numel() == 0:
        raise ValueError(f"`images` must have shape (B, C, H, W) or (B, C, D, H, W); got {tuple(images.shape)}.")
    images = images.detach().as_subclass(Tensor)
    check_finite("images", images)
    low, high = float(images.min()), float(images.max())
    if low < -1e-5 or high > 1 + 1e-5:
        raise ValueError(f"`images` must lie in [0, 1]; got values from {low:.4g} to {high:.4g}. Scale them first.")
    return images.clamp(0, 1)


def image_generators(name: str, seed: int, first_index: int, count: int) -> list[torch.Generator]:
    """Return one random generator for each image, set by ``name``, ``seed`` and the image's number alone."""
    check_int("seed", seed, minimum=0)
    check_int("first_index", first_index, minimum=0)
    key = zlib.crc32(name.encode())
    states = [np.random.SeedSequence([seed, key, first_index + row]).generate_state(1) for row in range(count)]
    return [torch.Generator().manual_seed(int(state[0])) for state in states]
