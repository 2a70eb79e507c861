from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline

from monai_deqkan.networks.layers import BSplineBasis

ORDERS = [1, 2, 3, 4, 5]
GRIDS = [(5, (-3.0, 3.0)), (20, (-3.0, 3.0)), (1, (0.0, 0.5)), (12, (-1.0, 2.0))]


def scipy_splines(basis: BSplineBasis, x: np.ndarray, derivative: int = 0) -> np.ndarray:
    order = basis.spline_order
    low = basis.grid_range[0]
    knots = low + basis.step * np.arange(-order, basis.grid_size + order + 1)
    splines = [BSpline.basis_element(knots[k : k + order + 2], extrapolate=False) for k in range(basis.num_basis)]
    return np.nan_to_num(np.stack([spline(x, nu=derivative) for spline in splines]))


def scipy_continued(basis: BSplineBasis, x: np.ndarray, derivative: int = 0) -> np.ndarray:
    low, high = basis.grid_range
    inner = np.clip(x, low, high)
    nudged = np.clip(x, low + 1e-12, high - 1e-12)  # scipy's pieces are open on the right
    if basis.outside == "clamp":
        return scipy_splines(basis, nudged, derivative) * ((x == inner) if derivative else 1.0)
    slopes = scipy_splines(basis, nudged, 1)
    return slopes if derivative else scipy_splines(basis, nudged) + slopes * (x - inner)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("grid", GRIDS)
def test_equals_scipy(order: int, grid: tuple[int, tuple[float, float]]) -> None:
    basis = BSplineBasis(grid[0], order, grid[1])
    x = np.random.default_rng(0).uniform(grid[1][0] - 5, grid[1][1] + 5, 4000)
    exact = scipy_splines(basis, x)
    np.testing.assert_allclose(basis.values(torch.from_numpy(x)).numpy(), exact, rtol=0, atol=1e-13)
    slopes = basis.derivative(torch.from_numpy(x)).numpy() * basis.step
    np.testing.assert_allclose(slopes, scipy_splines(basis, x, 1) * basis.step, rtol=0, atol=1e-13)
    rounded = torch.from_numpy(x).float()
    exact = scipy_splines(basis, rounded.double().numpy())
    np.testing.assert_allclose(basis.values(rounded).numpy(), exact, rtol=0, atol=1e-6)
    filled = torch.empty(1, basis.num_basis, len(x))
    basis.fill(rounded[None], filled)
    np.testing.assert_allclose(filled[0].numpy(), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("order", ORDERS)
def test_equals_scipy_at_the_knots(order: int) -> None:
    basis = BSplineBasis(6, order, (-3.0, 3.0))
    knots = torch.arange(-3.0 - order, 4.0 + order, dtype=torch.float64)
    # one float later: scipy leaves out the right end of its last piece
    exact = scipy_splines(basis, np.nextafter(knots.numpy(), np.inf))
    np.testing.assert_allclose(basis.values(knots).numpy(), exact, rtol=0, atol=1e-13)
    if order > 1:  # hats have kinks there
        slopes = scipy_splines(basis, np.nextafter(knots.numpy(), np.inf), 1)
        np.testing.assert_allclose(basis.derivative(knots).numpy(), slopes, rtol=0, atol=1e-13)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("outside", ["clamp", "linear"])
def test_continuation_equals_scipy_on_every_path(order: int, outside: str) -> None:
    basis = BSplineBasis(4, order, (-1.0, 2.0), outside=outside)
    x = np.random.default_rng(0).uniform(-4, 5, (2, 1500))
    points = torch.from_numpy(x)
    values, slopes = scipy_continued(basis, x), scipy_continued(basis, x, 1)
    np.testing.assert_allclose(basis.values(points).numpy(), values, rtol=0, atol=1e-10)
    np.testing.assert_allclose(basis.derivative(points).numpy(), slopes, rtol=0, atol=1e-10)
    filled = torch.empty(2, basis.num_basis, 1500, dtype=torch.float64)
    basis.fill(points, filled)
    np.testing.assert_allclose(filled.numpy(), values.transpose(1, 0, 2), rtol=0, atol=1e-10)
    grad = torch.randn(filled.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = (slopes.transpose(1, 0, 2) * grad.numpy()).sum(1)
    np.testing.assert_allclose(basis.pull_back(points, grad).numpy(), expected, rtol=0, atol=1e-10)
    x32, half = points.float(), points.half()
    torch.testing.assert_close(basis.values(x32), basis.values(x32.double()).float(), rtol=0, atol=5e-6)
    for x16 in (half, torch.tensor([[1e4, -1e4, 6e4]], dtype=torch.float16)):
        out = torch.empty(x16.shape[0], basis.num_basis, x16.shape[1], dtype=torch.float16)
        basis.fill(x16, out)
        torch.testing.assert_close(out, basis.values(x16, 1), rtol=2e-3, atol=2e-3)
        assert out.isfinite().all()


@pytest.mark.parametrize("order", ORDERS)
def test_sums_to_one_on_the_grid_and_vanishes_far_outside(order: int) -> None:
    basis = BSplineBasis(grid_size=4, spline_order=order, grid_range=(-2.0, 2.0))
    inside = torch.linspace(-2.0, 2.0, 101, dtype=torch.float64)
    torch.testing.assert_close(basis.values(inside).sum(0), torch.ones_like(inside))
    outside = torch.tensor([-2.0 - order, 2.0 + order, 1e30, float("inf"), float("-inf")])
    assert basis.values(outside).abs().max() < 1e-6
    assert basis.values(torch.tensor([float("nan")])).isnan().all()


@pytest.mark.parametrize("order", [2, 3, 4, 5])
def test_second_derivative_is_right_in_the_centers(order: int) -> None:
    # x = 0, as after a ReLU or zero padding, is a center for an odd number of splines
    basis = BSplineBasis(6 if order % 2 else 5, order, (-3.0, 3.0))
    x = (torch.arange(-2.0, 3.0, dtype=torch.float64) * basis.step).requires_grad_()
    exact = scipy_splines(basis, x.detach().numpy() + 1e-9, 2)
    for k in range(basis.num_basis):
        (slope,) = torch.autograd.grad(basis.values(x)[k].sum(), x, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), x)
        np.testing.assert_allclose(curvature.numpy(), exact[k], rtol=0, atol=1e-7)


@pytest.mark.parametrize("order", ORDERS)
def test_slope_bounds_are_those_of_a_dense_search(order: int) -> None:
    basis = BSplineBasis(2 * order, order, (0.0, 1.0))
    x = torch.linspace(-1.0, 2.0, 60_001, dtype=torch.float64)
    largest = basis.derivative(x).abs().amax(1)
    constants = basis.lipschitz_constants()
    assert (largest <= constants).all()
    torch.testing.assert_close(constants, largest, rtol=1e-5, atol=0)
    if order > 1:
        lower = BSplineBasis(2 * order, order - 1, (0.0, 1.0))
        root = lower.values(x).square().sum(0).max().sqrt().item()
        assert root <= basis.slope_gain <= root * (1 + 1e-6)


@pytest.mark.parametrize("order", [2, 3, 4, 5])
@pytest.mark.parametrize("outside", ["zero", "clamp", "linear"])
def test_slope_coefficients_belong_to_the_splines_of_one_order_less(order: int, outside: str) -> None:
    basis = BSplineBasis(4, order, (-2.0, 2.0), outside=outside)
    c = torch.randn(3, basis.num_basis, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    d = basis.slope_coefficients(c, 1)
    # on the grid for continuations, everywhere for splines that fade
    lower = BSplineBasis(4, order - 1, (-2.0, 2.0))
    x = torch.linspace(-2.0, 2.0, 301, dtype=torch.float64)
    if outside == "zero":
        lower = BSplineBasis(6, order - 1, (-3.0, 3.0))
        x = torch.linspace(-3.0 - order, 3.0 + order, 301, dtype=torch.float64)
    torch.testing.assert_close(d @ lower.values(x), c @ basis.derivative(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_refined_spans_the_same_and_resized_has_the_size(order: int) -> None:
    for outside in ("zero", "clamp", "linear"):
        basis = BSplineBasis(3, order, (-1.0, 1.0), outside=outside)
        fine = basis.refined(3)
        assert fine == BSplineBasis(9, order, (-1.0, 1.0), outside=outside)
        reach = 1.0 if outside == "zero" else 2.0
        x = torch.linspace(-reach, reach, 400, dtype=torch.float64)
        coefficients = fine.fit(x, basis.values(x, dim=1), ridge=0.0)
        torch.testing.assert_close(coefficients.T @ fine.values(x), basis.values(x), rtol=0, atol=1e-11)
        assert basis.resized(order + 7) == BSplineBasis(7, order, (-1.0, 1.0), outside=outside)
    with pytest.raises(ValueError, match="`num_basis` must be at least"):
        BSplineBasis(3, order).resized(order)
    with pytest.raises(ValueError, match="`factor`"):
        BSplineBasis(3, order).refined(0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"spline_order": 6}, "`spline_order` must be one of 1, 2, 3, 4, 5; got 6"),
        ({"spline_order": 0}, "`spline_order`"),
        ({"grid_size": 0}, "`grid_size` must be at least 1"),
        ({"grid_range": (1.0, -1.0)}, "increasing"),
        ({"grid_range": (0.0, float("inf"))}, "`grid_range`"),
        ({"grid_range": (0.0,)}, "pair"),
        ({"outside": "clmp"}, "`outside` must be one of zero, clamp, linear; got 'clmp'. Did you mean 'clamp'"),
    ],
)
def test_wrong_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BSplineBasis(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("order", [3.0, True, None])
def test_an_order_of_another_kind_is_refused(order: object) -> None:
    with pytest.raises(TypeError, match="`spline_order` must be an integer; got"):
        BSplineBasis(spline_order=order)  # type: ignore[arg-type]
