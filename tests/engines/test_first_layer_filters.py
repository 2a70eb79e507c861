import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from monai_deqkan.engines import classify_kernels, first_layer_filters
from monai_deqkan.networks.layers import KANConv2d, LowRankKANConv2d

SOBEL = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
DIAGONAL_SOBEL = torch.tensor([[0.0, 1.0, 2.0], [-1.0, 0.0, 1.0], [-2.0, -1.0, 0.0]])
LINE = torch.tensor([[-1.0, 2.0, -1.0]] * 3)
KERNELS = {
    "edge": [SOBEL, -SOBEL, SOBEL.T, DIAGONAL_SOBEL, torch.tensor([[1.0, 1, 1], [0, 0, 0], [-1, -1, -1]])],
    "line": [LINE, -LINE.T, torch.tensor([[2.0, -1, -1], [-1, 2, -1], [-1, -1, 2]])],
    "spot": [
        torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]),
        torch.tensor([[-1.0, -1, -1], [-1, 8, -1], [-1, -1, -1]]),
    ],
    "smoothing": [torch.ones(3, 3), torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])],
    "pass-through": [torch.tensor([[0.0, 0, 0], [0, -5, 0], [0, 0, 0]])],
    "other": [torch.tensor([[0.0, 0, 0], [0, 0, 0], [0, 0, 1]]), torch.tensor([[1.0, -1, 1], [-1, 0, -1], [1, -1, 1]])],
    "zero": [torch.zeros(3, 3)],
}


def linear_kan(kernel, grid_size=8, function=lambda t: t):
    """A KAN convolution whose functions are those of a plain kernel times a given one, on the grid."""
    layer = KANConv2d(kernel.shape[1], kernel.shape[0], kernel.shape[2], base_activation=None, grid_size=grid_size)
    points = torch.linspace(-3, 3, 401, dtype=torch.float64)
    column = layer.basis.fit(points, function(points)).float()
    with torch.no_grad():
        layer.coefficients.copy_(column[None, :, None, None, None] * kernel[:, None])
    return layer


@pytest.mark.parametrize("name", KERNELS)
def test_known_kernels(name):
    kernels = torch.stack(KERNELS[name])
    found = classify_kernels(kernels)
    assert [row.label for row in found] == [name] * len(kernels)
    assert [row.score for row in classify_kernels(0.01 * kernels)] == pytest.approx([row.score for row in found])


def test_direction_is_across_the_edge():
    found = classify_kernels(torch.stack([SOBEL, SOBEL.T, DIAGONAL_SOBEL]))
    assert found[0].direction == (0.0, 1.0)
    assert np.abs(found[1].direction) == pytest.approx([1, 0], abs=1e-3)
    assert np.abs(found[2].direction) == pytest.approx([0.5**0.5] * 2, abs=1e-3)
    assert found[2].direction[0] * found[2].direction[1] < 0  # up and to the right


def test_larger_kernels_and_volumes():
    spike = np.zeros((7, 7))
    spike[3, 3] = 1
    kernels = [ndimage.gaussian_filter(spike, 1.5, order=order) for order in ((0, 1), (2, 0), (0, 0))]
    kernels.append(ndimage.gaussian_laplace(spike, 1.4))
    labels = [row.label for row in classify_kernels(torch.tensor(np.stack(kernels)))]
    assert labels == ["edge", "line", "smoothing", "spot"]
    cube = np.zeros((3, 3, 3))
    cube[1, 1, 1] = 1
    volumes = [ndimage.sobel(cube, axis) for axis in range(3)] + [ndimage.laplace(cube)]
    assert [row.label for row in classify_kernels(torch.tensor(np.stack(volumes)))] == ["edge"] * 3 + ["spot"]


def test_few_random_kernels_get_a_label():
    noise = torch.randn(1000, 3, 3, generator=torch.Generator().manual_seed(0))
    share = np.mean([row.label != "other" for row in classify_kernels(noise)])
    assert 0.05 < share < 0.15  # the page says "about one in ten"


def test_kernels_without_a_pattern():
    with pytest.raises(ValueError, match="no pattern"):
        classify_kernels(torch.ones(4, 1, 1))
    with pytest.raises(ValueError, match="threshold"):
        classify_kernels(torch.ones(4, 3, 3), threshold=0.0)


def test_kan_layer_with_the_functions_of_a_sobel_kernel():
    images = [torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(0))]
    kernel = torch.stack([SOBEL, 0.5 * LINE])[:, None]
    network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.InstanceNorm2d(1), linear_kan(kernel))
    found = first_layer_filters(network, images)
    assert (found.layer, found.is_kan) == ("2", True)
    assert [row.label for row in found.labels] == ["edge", "line"]
    torch.testing.assert_close(found.kernels.float(), kernel, atol=1e-3, rtol=0)
    torch.testing.assert_close(found.patterns, found.kernels[:, 0])
    torch.testing.assert_close(found.linear_share.float(), torch.ones(2), atol=1e-3, rtol=0)


def test_chance_is_that_of_the_kernels_size():
    small, large = (first_layer_filters(nn.Conv2d(1, 1, size), [torch.rand(1, 1, 8, 8)]) for size in (3, 5))
    assert 0.05 < small.chance < 0.13  # 0.089 of 4000 random kernels, of which this is a sample of 1000
    assert large.chance < 0.01


def test_slopes_are_those_of_a_line_fit():
    torch.manual_seed(0)
    layer = KANConv2d(2, 2, 3)
    images = torch.randn(1, 2, 9, 9)
    found = first_layer_filters(layer, [images])
    for channel in range(2):
        x = images[0, channel].flatten().double()
        values = layer.double().edge_functions(x)[:, :, channel].detach().flatten(1).numpy()  # (P, 2 * 9)
        slopes = np.polyfit(x.numpy(), values, 1)[0]
        np.testing.assert_allclose(found.kernels[:, channel].flatten().numpy(), slopes, atol=1e-5)
    energy = [np.linalg.svd(kernel.flatten(1).numpy())[1][0] for kernel in found.kernels]
    np.testing.assert_allclose(found.patterns.flatten(1).norm(dim=1).numpy(), energy, rtol=1e-9)


def test_even_functions_have_no_linear_part():
    x = torch.randn(2, 1, 10, 10, generator=torch.Generator().manual_seed(0))
    layer = linear_kan(SOBEL[None, None], function=torch.square)
    found = first_layer_filters(layer, [torch.cat((x, -x))])
    assert float(found.linear_share) < 1e-6
    assert float(found.kernels.abs().max()) < 1e-3


def test_low_rank_layer_has_the_kernels_of_the_dense_one():
    layer = linear_kan(torch.stack([SOBEL, SOBEL.T])[:, None])
    low, error = LowRankKANConv2d.from_conv(layer, 4)
    images = [torch.rand(1, 1, 12, 12)]
    assert error < 1e-6
    found, dense = first_layer_filters(nn.Sequential(low), images), first_layer_filters(layer, images)
    assert (found.layer, found.linear_share) == ("0", None)
    torch.testing.assert_close(found.kernels, dense.kernels, atol=1e-4, rtol=0)


def test_plain_first_convolution_and_none():
    plain = nn.Conv2d(1, 2, 3)
    network = nn.Sequential(plain, KANConv2d(2, 2, 3))
    found = first_layer_filters(network, [torch.rand(1, 1, 8, 8)])
    assert (found.layer, found.is_kan, found.linear_share) == ("0", False, None)
    torch.testing.assert_close(found.kernels.float(), plain.weight.detach())
    assert first_layer_filters(nn.Sequential(KANConv2d(1, 2, 1)), [torch.rand(1, 1, 8, 8)]) is None
