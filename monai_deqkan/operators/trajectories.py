"""Non-Cartesian sampling trajectories: where in k-space each readout runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from monai_deqkan._checks import check_int, check_range, check_spatial_dims

__all__ = ["golden_angle_trajectory", "radial_trajectory", "spiral_trajectory"]


def radial_trajectory(image_size: Sequence[int], num_spokes: int, num_samples: int | None = None) -> Tensor:
    r"""Return spokes through the centre of k-space at equal angles :math:`\pi j / n` over half a turn.

    Args:
        image_size: pixels per axis, two axes.
        num_spokes: :math:`n`, number of readouts.
        num_samples: samples per spoke; None takes twice the longer axis, the usual oversampling of a readout.

    Returns:
        Float64, in cycles per field of view, shape ``(num_spokes, num_samples, 2)``, axes as those of the image.

    Example:
        >>> radial_trajectory((8, 8), num_spokes=2, num_samples=4)[0, :, 0]
        tensor([-4., -2.,  0.,  2.], dtype=torch.float64)
    """
    sizes = _sizes(image_size, (2,))
    angles = math.pi / check_int("num_spokes", num_spokes) * torch.arange(num_spokes, dtype=torch.float64)
    return _spokes(torch.stack([angles.cos(), angles.sin()], dim=1), sizes, num_samples)


def golden_angle_trajectory(image_size: Sequence[int], num_spokes: int, num_samples: int | None = None) -> Tensor:
    r"""Return spokes through the centre of k-space at multiples of the golden angle, so that any run of them is even.

    In 2-D the angle grows by :math:`\pi (\sqrt 5 - 1) / 2`. In 3-D the height and the turn of spoke :math:`j` are the
    fractions of :math:`0.4656\, j` and of :math:`0.6823\, j`, the two-dimensional golden means.

    Args:
        image_size: pixels per axis, two or three axes.
        num_spokes: number of readouts.
        num_samples: see :func:`radial_trajectory`.

    Returns:
        Float64, in cycles per field of view, shape ``(num_spokes, num_samples, D)``, axes as those of the image.

    Reference:
        S. Winkelmann et al., IEEE Trans. Med. Imaging 26 (2007) 68-76 (2-D); R. W. Chan et al., Magn. Reson. Med. 61
        (2009) 354-363 (3-D).
    """
    sizes = _sizes(image_size, (2, 3))
    spoke = torch.arange(check_int("num_spokes", num_spokes), dtype=torch.float64)
    if len(sizes) == 2:
        angles = math.pi * (math.sqrt(5) - 1) / 2 * spoke
        return _spokes(torch.stack([angles.cos(), angles.sin()], dim=1), sizes, num_samples)
    mean = 1.4655712318767680  # the root of t^3 = t^2 + 1
    height, turn = ((mean - 1) * spoke) % 1, 2 * math.pi * ((spoke / mean) % 1)
    radius = (1 - height.square()).sqrt()
    return _spokes(torch.stack([height, radius * turn.cos(), radius * turn.sin()], dim=1), sizes, num_samples)


def spiral_trajectory(
    image_size: Sequence[int], num_interleaves: int, num_samples: int, *, num_turns: float | None = None
) -> Tensor:
    r"""Return Archimedean spirals from the centre outwards, turned against each other by equal angles.

    Args:
        image_size: pixels per axis, two axes.
        num_interleaves: number of spirals.
        num_samples: samples per spiral.
        num_turns: turns of each; None takes as many as bring neighbouring arms one cycle per field of view apart.

    Returns:
        Float64, in cycles per field of view, shape ``(num_interleaves, num_samples, 2)``, axes as those of the image.
        Samples have equal distances along the arm but near its start.

    Example:
        >>> spiral_trajectory((8, 8), num_interleaves=3, num_samples=50).norm(dim=-1).max().item()
        4.0
    """
    sizes = _sizes(image_size, (2,))
    check_int("num_interleaves", num_interleaves)
    if num_turns is None:
        num_turns = max(sizes) / 2 / num_interleaves
    check_range("num_turns", num_turns, 0.0, open_low=True)
    # The arm's length grows with the square of its radius.
    share = torch.linspace(0, 1, check_int("num_samples", num_samples), dtype=torch.float64).sqrt()
    start = 2 * math.pi / num_interleaves * torch.arange(num_interleaves, dtype=torch.float64).unsqueeze(1)
    angles = start + 2 * math.pi * num_turns * share
    unit = torch.stack([share * angles.cos(), share * angles.sin()], dim=-1)
    return unit * torch.tensor([n / 2 for n in sizes], dtype=torch.float64)


def _spokes(directions: Tensor, sizes: tuple[int, ...], num_samples: int | None) -> Tensor:
    """Return samples from one edge of k-space to just before the other, along unit vectors ``(S, D)``."""
    count = 2 * max(sizes) if num_samples is None else check_int("num_samples", num_samples)
    position = (torch.arange(count, dtype=torch.float64) - count // 2) / count  # zero is among them
    half = torch.tensor(sizes, dtype=torch.float64)
    return position[None, :, None] * directions[:, None] * half


def _sizes(image_size: Sequence[int], allowed: tuple[int, ...]) -> tuple[int, ...]:
    check_spatial_dims(len(image_size), allowed)
    return tuple(check_int("image_size", n) for n in image_size)
