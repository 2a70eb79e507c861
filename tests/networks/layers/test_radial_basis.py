from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from monai_deqkan.networks.layers import GaussianBasis, MexicanHatBasis

X = torch.linspace(-9.0, 9.0, 4001, dtype=torch.float64)


def formula(basis: GaussianBasis | MexicanHatBasis, x: np.ndarray) -> np.ndarray:
    low, high = basis.grid_range
    centers = np.linspace(low, high, basis.grid_size + 1)
    width = basis.width or (high - low) / basis.grid_size
    r = (x - centers[:, None]) / width
    bump = np.exp(-(r**2) / 2)
    return bump if isinstance(basis, GaussianBasis) else (1 - r**2) * bump


SETTINGS = [{}, {"grid_size": 8, "grid_range": (-1.0, 2.0), "width": None}, {"grid_size": 1, "width": 0.3}]


@pytest.mark.parametrize("kind", [GaussianBasis, MexicanHatBasis])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("outside", ["zero", "clamp", "linear"])
def test_equals_the_formula(
    kind: type[GaussianBasis | MexicanHatBasis], settings: dict[str, object], outside: str
) -> None:
    basis = kind(**settings, outside=outside)  # type: ignore[arg-type]
    low, high = basis.grid_range
    inner = X if outside == "zero" else X.clamp(low, high)
    exact = formula(basis, inner.numpy())
    if outside == "linear":
        delta = 1e-5
        slopes = (formula(basis, inner.numpy() + delta) - formula(basis, inner.numpy() - delta)) / (2 * delta)
        exact = exact + slopes * (X - inner).numpy()
    np.testing.assert_allclose(basis.values(X).numpy(), exact, rtol=0, atol=1e-13 if outside != "linear" else 1e-7)
    np.testing.assert_allclose(basis.values(X.float()).numpy(), exact, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("kind", [GaussianBasis, MexicanHatBasis])
@pytest.mark.parametrize("settings", SETTINGS)
def test_slope_bounds_are_those_of_a_dense_search(
    kind: type[GaussianBasis | MexicanHatBasis], settings: dict[str, object]
) -> None:
    basis = kind(**settings)  # type: ignore[arg-type]
    width = basis.width or basis.step
    x = torch.linspace(-9.0, 9.0, 100_001, dtype=torch.float64)
    slopes = basis.derivative(x)
    torch.testing.assert_close(basis.lipschitz_constants(), slopes.abs().amax(1), rtol=1e-5, atol=0)
    assert (slopes.abs().amax(1) <= basis.lipschitz_constants()).all()
    root = width * slopes.square().sum(0).max().sqrt().item()
    assert root <= basis.slope_gain <= 1.02 * root  # the bound sees every center as one in the middle


@pytest.mark.parametrize(("kind", "curvature"), [(GaussianBasis, 2.0), (MexicanHatBasis, 18.0)])
def test_curvature_of_the_squared_slope(kind: type[GaussianBasis | MexicanHatBasis], curvature: float) -> None:
    # one bump at 0, its squared slope differentiated twice by autograd
    basis = kind(2, (-100.0, 100.0))
    x = torch.linspace(-6.0, 6.0, 6001, dtype=torch.float64, requires_grad=True)
    square = basis.derivative(x)[1].square()
    (first,) = torch.autograd.grad(square.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert second.abs().max().item() == pytest.approx(curvature, abs=1e-9)
    assert basis._curvature == curvature


def test_defaults_are_those_of_deq_kan() -> None:
    basis = GaussianBasis()
    assert basis.grid_range == (-3.0, 3.0)
    assert basis.width == 1.0
    # at distance 1 from a center
    assert basis.values(torch.tensor([-2.0]))[0].item() == pytest.approx(math.exp(-0.5))


def test_refined_spans_the_same_with_a_fixed_width() -> None:
    for basis in (GaussianBasis(4), MexicanHatBasis(4)):
        fine = basis.refined(2)
        assert fine.grid_size == 8
        torch.testing.assert_close(fine.values(X)[::2], basis.values(X))
        assert basis.resized(8).grid_size == 7


@pytest.mark.parametrize("kind", [GaussianBasis, MexicanHatBasis])
def test_wrong_settings(kind: type[GaussianBasis | MexicanHatBasis]) -> None:
    with pytest.raises(ValueError, match="`width`"):
        kind(width=0.0)
    with pytest.raises(ValueError, match="`outside` must be one of zero, clamp, linear"):
        kind(outside="none")
    with pytest.raises(ValueError, match="`grid_size`"):
        kind(0)
    with pytest.raises(ValueError, match="`num_basis` must be at least 2"):
        kind().resized(1)
