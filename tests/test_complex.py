from __future__ import annotations

import numpy as np
import pytest
import torch

from monai_deqkan._complex import as_complex, channels_to_complex, complex_to_channels


def random_image(dtype: type[np.complexfloating]) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.normal(size=(2, 5, 4)) + 1j * rng.normal(size=(2, 5, 4))).astype(dtype)


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
def test_channels_are_real_part_then_imaginary_part(dtype: type[np.complexfloating]) -> None:
    image = random_image(dtype)
    channels = complex_to_channels(torch.from_numpy(image))
    np.testing.assert_array_equal(channels.numpy(), np.stack((image.real, image.imag), axis=1))
    np.testing.assert_array_equal(channels_to_complex(channels).numpy(), image)


def test_gradients_are_those_of_the_parts() -> None:
    channels = torch.randn(1, 2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda c: channels_to_complex(c).abs(), channels.requires_grad_())


def test_channels_need_two() -> None:
    with pytest.raises(ValueError, match=r"must have shape \(B, 2, \*space\); got \(1, 3, 4\)"):
        channels_to_complex(torch.zeros(1, 3, 4))
    with pytest.raises(ValueError, match=r"got \(2,\)"):
        channels_to_complex(torch.zeros(2))


def test_as_complex_reads_pairs_on_the_last_axis() -> None:
    image = random_image(np.complex64)
    pairs = torch.from_numpy(np.stack((image.real, image.imag), axis=-1))
    np.testing.assert_array_equal(as_complex(pairs).numpy(), image)
    np.testing.assert_array_equal(as_complex(pairs.transpose(0, 1)).numpy(), image.swapaxes(0, 1))
    whole = torch.from_numpy(image)
    assert as_complex(whole) is whole


def test_as_complex_names_what_it_cannot_read() -> None:
    with pytest.raises(ValueError, match=r"`maps` must be complex, or real with a last axis of 2.*\(3, 4\)"):
        as_complex(torch.zeros(3, 4), "maps")
