from __future__ import annotations

import pytest
import torch

from monai_deqkan.networks.blocks.preconditioner import Preconditioner


@pytest.mark.parametrize("shape", [(6, 7), (2, 6, 7), (4, 3, 5)])
def test_adjoint_and_inverse_square_root_of_a_convolution(shape):
    dims = 3 if shape[0] == 4 else 2
    torch.manual_seed(0)
    pixels, frequencies = torch.rand(2, *shape).double(), 0.1 + torch.rand(2, *shape).double()
    variables = Preconditioner(pixels, frequencies, dims)
    y, b = torch.randn(2, 2, 2, *shape, dtype=torch.float64)
    torch.testing.assert_close((variables.to_image(y) * b).sum(), (y * variables.adjoint(b)).sum())

    axes = tuple(range(-dims, 0))
    variables = Preconditioner(torch.full_like(pixels, 3.0), frequencies, dims)  # the scale is that of the frequencies
    z = variables.to_image(y)
    z = torch.fft.ifftn(frequencies * torch.fft.fftn(torch.complex(z[:, 0], z[:, 1]), dim=axes), dim=axes)
    torch.testing.assert_close(variables.adjoint(torch.stack((z.real, z.imag), dim=1)), y)


def test_zeros_on_a_diagonal_divide_nothing():
    empty = torch.zeros(1, 4, 4)
    half = torch.ones(1, 4, 4).triu()
    for pixels, frequencies in ((empty, empty), (half, half)):
        variables = Preconditioner(pixels, frequencies, 2)
        image = torch.ones(1, 2, 4, 4)
        assert bool(variables.to_image(image).isfinite().all())
        assert bool(variables.adjoint(image).isfinite().all())
