"""Features of an image: their filter, what they do not react to, and the sizes they take."""

import numpy as np
import pytest
import torch
from scipy.ndimage import convolve1d

from monai_deqkan.networks.blocks import ImageFeatures
from monai_deqkan.networks.blocks.image_features import _smoothed


@pytest.mark.parametrize("shape", [(2, 3, 9, 6), (1, 2, 5, 4, 7)])
def test_the_image_is_smoothed_by_the_binomial_filter_with_repeated_edges(shape):
    image = torch.rand(shape, dtype=torch.float64)
    expected = image.numpy()
    for axis in range(2, len(shape)):
        expected = convolve1d(expected, np.array([0.25, 0.5, 0.25]), axis=axis, mode="nearest")
    torch.testing.assert_close(_smoothed(image, len(shape) - 2), torch.from_numpy(expected))


def test_contrast_and_brightness_change_next_to_nothing_and_noise_little():
    torch.manual_seed(0)
    network = ImageFeatures(2, 1).eval()
    # A smooth picture: noise is told from anatomy by its frequency only.
    picture = torch.nn.functional.interpolate(torch.rand(4, 1, 6, 6), size=(64, 64), mode="bicubic").clamp(0, 1)
    with torch.no_grad():
        features = network(picture)

    @torch.no_grad()
    def change(other: torch.Tensor) -> float:
        return float((network(other) - features).norm() / features.norm())

    assert change(0.4 * picture + 0.3) < 0.01
    noisy = picture + 0.1 * torch.randn(picture.shape)
    plain = (noisy - picture).norm() / (picture - picture.mean()).norm()
    assert change(noisy) < 0.5 * plain


@pytest.mark.parametrize(("spatial_dims", "size"), [(2, (3, 1)), (2, (33, 64)), (3, (5, 18, 7))])
def test_any_size_goes_through_and_every_parameter_learns(spatial_dims, size):
    torch.manual_seed(0)
    network = ImageFeatures(spatial_dims, 2, features=(4, 6, 8), blocks=(1, 2, 1))
    maps = network(torch.rand(5, 2, *size))
    assert maps.shape[:2] == (5, network.out_channels)
    maps.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in network.parameters())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_scripted_network_is_the_same():
    network = ImageFeatures(2, 1, features=(4, 8)).eval()
    image = torch.rand(2, 1, 21, 16)
    scripted = torch.jit.script(network)
    torch.testing.assert_close(scripted(image), network(image))


def test_stages_must_be_told_alike():
    with pytest.raises(ValueError, match="one entry for each stage"):
        ImageFeatures(2, 1, features=(8, 16), blocks=(1,))
