from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.polynomial import chebyshev

from monai_deqkan.networks.layers import ChebyshevBasis, FourierBasis

X = torch.linspace(-4.0, 5.0, 2001, dtype=torch.float64)


@pytest.mark.parametrize("outside", ["clamp", "linear"])
@pytest.mark.parametrize("degree", [1, 2, 7, 30])
def test_chebyshev_equals_numpy(degree: int, outside: str) -> None:
    basis = ChebyshevBasis(degree, (-1.0, 2.0), outside=outside)
    u = (X.numpy() - 0.5) / 1.5
    inner = u.clip(-1.0, 1.0)
    eye = np.eye(degree + 1)
    values = np.stack([chebyshev.chebval(inner, row) for row in eye])
    slopes = np.stack([chebyshev.chebval(inner, chebyshev.chebder(row)) for row in eye])
    if outside == "linear":
        values = values + slopes * (u - inner)
    else:
        slopes = slopes * (u == inner)
    tolerance = 1e-13 * degree**2 * 4
    np.testing.assert_allclose(basis.values(X).numpy(), values, rtol=0, atol=tolerance)
    np.testing.assert_allclose(basis.derivative(X).numpy(), slopes / 1.5, rtol=0, atol=tolerance * 4)
    on_grid = X[(X >= -1.0) & (X <= 2.0)].float()
    torch.testing.assert_close(
        basis.values(on_grid), basis.values(on_grid.double()).float(), rtol=0, atol=1e-7 * (2 * degree + degree**2)
    )


def test_chebyshev_slopes() -> None:
    basis = ChebyshevBasis(6, (-1.0, 2.0), outside="linear")
    c = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    d = basis.slope_coefficients(c, 1)
    expected = np.stack([chebyshev.chebder(row) for row in c.numpy()]) / 1.5
    np.testing.assert_allclose(d.numpy(), expected, rtol=1e-13, atol=1e-13)
    found = basis.derivative(X).abs().amax(1)
    assert (found <= basis.lipschitz_constants() * (1 + 1e-12)).all()
    torch.testing.assert_close(basis.lipschitz_constants(), found)  # reached at the ends


def test_fourier_equals_numpy() -> None:
    basis = FourierBasis(3, (-1.0, 2.0))
    angle = 2 * np.pi / 3 * (X.numpy() - 0.5)
    waves = [np.cos(j * angle) for j in (1, 2, 3)] + [np.sin(j * angle) for j in (1, 2, 3)]
    np.testing.assert_allclose(basis.values(X).numpy(), np.stack([np.ones_like(angle), *waves]), rtol=0, atol=1e-13)
    torch.testing.assert_close(basis.values(X), basis.values(X + 3.0))  # one period
    c = torch.randn(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    d = basis.slope_coefficients(c, 0)
    rates = 2 * np.pi / 3 * np.array([1, 2, 3])
    np.testing.assert_allclose(d.numpy(), np.concatenate((rates, rates)) * c.numpy()[1:], rtol=1e-13)
    found = basis.derivative(X).abs().amax(1)
    assert (found <= basis.lipschitz_constants() * (1 + 1e-12)).all()
    torch.testing.assert_close(basis.lipschitz_constants(), found, rtol=1e-4, atol=1e-12)


def test_sizes() -> None:
    assert ChebyshevBasis(4).resized(9) == ChebyshevBasis(8)
    assert ChebyshevBasis(4).refined(3) == ChebyshevBasis(12)
    assert FourierBasis(2).resized(9) == FourierBasis(4)
    assert FourierBasis(2).refined() == FourierBasis(4)
    with pytest.raises(ValueError, match="`num_basis` must be odd"):
        FourierBasis(2).resized(8)
    with pytest.raises(ValueError, match="`num_basis` must be at least 2"):
        ChebyshevBasis(2).resized(1)


def test_wrong_settings() -> None:
    with pytest.raises(ValueError, match="`outside` must be one of clamp, linear; got 'zero'"):
        ChebyshevBasis(outside="zero")
    with pytest.raises(ValueError, match="`degree`"):
        ChebyshevBasis(0)
    with pytest.raises(ValueError, match="`num_frequencies`"):
        FourierBasis(0)
    with pytest.raises(TypeError, match="outside"):
        FourierBasis(outside="clamp")  # type: ignore[call-arg]
