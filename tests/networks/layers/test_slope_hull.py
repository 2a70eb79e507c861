from __future__ import annotations

import pytest
import torch
from torch import Tensor

from monai_deqkan.networks.layers import Basis, BSplineBasis, ChebyshevBasis, FourierBasis, GaussianBasis
from monai_deqkan.networks.layers import MexicanHatBasis as Hats
from monai_deqkan.networks.layers.slope_hull import slope_frame, slope_hull

BASES = [
    *(BSplineBasis(spline_order=order, outside=word) for order in range(1, 6) for word in ("zero", "clamp", "linear")),
    BSplineBasis(grid_size=20, grid_range=(-0.2, 1.0)),
    *(GaussianBasis(outside=word) for word in ("zero", "clamp", "linear")),
    GaussianBasis(grid_size=12, width=None),
    Hats(),
    Hats(width=0.4, outside="clamp"),
    ChebyshevBasis(),
    ChebyshevBasis(degree=1, outside="linear", grid_range=(0.0, 5.0)),
    FourierBasis(),
]


def directions(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(40, count, dtype=torch.float64, generator=generator)
    signs = (-1.0) ** torch.arange(count, dtype=torch.float64)
    return torch.cat((noise, noise.cumsum(1), torch.eye(count, dtype=torch.float64), signs[None]))


@pytest.mark.parametrize("basis", BASES, ids=repr)
def test_hull_holds_the_slopes_and_little_more(basis: Basis) -> None:
    hull = slope_hull(basis)
    assert hull is not None
    low, high = basis.grid_range
    points = torch.linspace(low - 2 * (high - low), high + 2 * (high - low), 20011, dtype=torch.float64)
    along = directions(basis.num_basis)
    found = (along @ basis.derivative(points)).abs().amax(1)
    bound = (along @ hull.T).abs().amax(1)
    assert (found <= bound * (1 + 1e-12) + 1e-12).all()
    assert (bound <= 1.03 * found + 0.03 * along.norm(dim=1)).all()


@pytest.mark.parametrize("basis", BASES[::3], ids=repr)
def test_frame_is_a_change_of_coordinates(basis: Basis) -> None:
    frame = slope_frame(basis)
    assert frame is not None
    assert torch.allclose(frame.points @ frame.mixing, slope_hull(basis), atol=1e-6)
    # On average over the points and over the directions the slopes are about one long.
    assert 0.2 < float(frame.points.square().mean()) < 5


def test_unknown_kinds_and_needles_have_no_hull() -> None:
    class Own(BSplineBasis):
        pass

    assert slope_hull(GaussianBasis(width=1e-5)) is None
    assert slope_hull(Own()) is not None  # a subclass of a known kind must keep to its functions
