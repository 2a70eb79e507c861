import numpy as np
import pytest
import torch
from scipy.stats import norm

from monai_deqkan.metrics import fit_spread_factor, spread_calibration


def normal_errors(scale, seed=0, size=200_000):
    rng = np.random.default_rng(seed)
    spread = rng.uniform(0.5, 2.0, size)
    return torch.from_numpy(rng.normal(0, scale * spread)), torch.from_numpy(spread)


def test_a_right_spread_has_the_normal_law_s_shares():
    calibration = spread_calibration(*normal_errors(1.0))
    expected = [norm.cdf(k) - norm.cdf(-k) for k in calibration.factors]
    assert calibration.normal_shares == pytest.approx(expected)
    assert calibration.shares == pytest.approx(expected, abs=0.004)
    assert calibration.largest_gap < 0.004
    assert calibration.num_pixels == 200_000


def test_a_spread_too_small_by_two_is_found_and_mended():
    error, spread = normal_errors(2.0)
    shares = spread_calibration(error, spread, (1.0, 2.0)).shares
    assert shares == pytest.approx([norm.cdf(k / 2) - norm.cdf(-k / 2) for k in (1, 2)], abs=0.004)
    factor = fit_spread_factor(error, spread)
    assert factor == pytest.approx(2.0, rel=0.01)
    other_error, other_spread = normal_errors(2.0, seed=1)
    assert spread_calibration(other_error, factor * other_spread).largest_gap < 0.005


def test_shares_by_counting_within_a_region():
    error = torch.tensor([[0.1, -0.9], [3.0, 100.0]])
    spread = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    region = torch.tensor([[True, True], [True, False]])
    calibration = spread_calibration(error, spread, (0.5, 1.0, 3.0), region=region)
    assert calibration.shares == pytest.approx((1 / 3, 2 / 3, 1.0))
    assert calibration.num_pixels == 3


def test_the_factor_is_the_quantile_of_the_ratios():
    error, spread = torch.tensor([1.0, -4.0, 0.0, 9.0]), torch.tensor([1.0, 2.0, 0.0, 3.0])
    # Ratios 0, 1, 2, 3.
    assert [fit_spread_factor(error, spread, share=share) for share in (0.2, 0.5, 0.75, 0.9)] == [0, 1, 2, 3]


def test_no_factor_mends_spreads_of_zero():
    with pytest.raises(ValueError, match="The spread is zero at more than"):
        fit_spread_factor(torch.ones(4), torch.zeros(4))


@pytest.mark.parametrize(
    ("error", "spread", "settings", "match"),
    [
        (torch.ones(3), torch.ones(4), {}, "one shape"),
        (torch.ones(3), -torch.ones(3), {}, "must not be negative"),
        (torch.tensor([float("nan")]), torch.ones(1), {}, "must be finite"),
        (torch.ones(3), torch.ones(3), {"region": torch.zeros(3)}, "No pixel counts"),
        (torch.ones(3), torch.ones(3), {"region": torch.ones(2)}, "`region` must have the shape"),
        (torch.ones(3), torch.ones(3), {"factors": ()}, "at least one number of spreads"),
        (torch.ones(3), torch.ones(3), {"factors": (0.0,)}, "factors"),
    ],
)
def test_values_that_make_no_sense_are_refused(error, spread, settings, match):
    with pytest.raises(ValueError, match=match):
        spread_calibration(error, spread, **settings)
