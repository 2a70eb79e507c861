import pytest
import torch

from monai_deqkan.networks.layers.positive import positive, raw_of_positive


@pytest.mark.parametrize("value", [1e-6, 0.3, 1.0, 250.0])
def test_a_positive_number_comes_back(value):
    assert positive(raw_of_positive(value)).item() == pytest.approx(value, rel=1e-5)


def test_a_small_step_changes_it_by_a_factor_and_a_wild_one_leaves_it_finite():
    assert positive(raw_of_positive(2.0) + 0.01).item() == pytest.approx(2 * 1.10517, rel=1e-4)
    found = positive(torch.tensor([-1e9, 1e9]))
    assert bool(found.isfinite().all() & (found > 0).all())
