import math

import numpy as np
import pytest
import torch

from monai_deqkan.losses import DenoisingLoss


@pytest.mark.parametrize(("error", "power"), [("l1", 1), ("mse", 2)])
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_each_sample_weighs_by_its_noise_level(error, power, exponent):
    rng = np.random.default_rng(0)
    prediction, clean, level = rng.normal(size=(3, 2, 4, 5)), rng.normal(size=(3, 2, 4, 5)), np.array([0.01, 0.1, 0.4])
    errors = [np.mean(np.abs(p - c) ** power) for p, c in zip(prediction, clean, strict=True)]
    expected = np.mean([(0.2 / sigma) ** (power * exponent) * e for sigma, e in zip(level, errors, strict=True)])
    loss = DenoisingLoss(error, exponent=exponent, unit_level=0.2)
    found = loss(torch.tensor(prediction), (torch.tensor(clean), torch.tensor(level)))
    assert float(found) == pytest.approx(expected)


def test_errors_that_grow_as_the_exponent_says_count_alike():
    level = torch.tensor([0.01, 0.04, 0.16])
    clean = torch.zeros(3, 2, 4, 4)
    prediction = level.sqrt().view(3, 1, 1, 1).expand(3, 2, 4, 4).clone().requires_grad_()
    DenoisingLoss("mse")(prediction, (clean, level)).backward()
    products = (prediction.grad * prediction).flatten(1).sum(1)
    torch.testing.assert_close(products, products[:1].expand(3))


def test_log_mse_is_how_much_of_the_noise_is_left():
    level, clean = torch.tensor([0.01, 0.2]), torch.zeros(2, 2, 4, 4)
    prediction = clean + level.view(2, 1, 1, 1) * torch.tensor([0.5, 3.0]).view(2, 1, 1, 1)
    found = DenoisingLoss("log_mse", exponent=3.0)(prediction, (clean, level))
    assert float(found) == pytest.approx(0.5 * (math.log(0.25 + 1e-4) + math.log(9 + 1e-4)), rel=1e-5)
    assert math.isfinite(float(DenoisingLoss("log_mse")(clean, (clean, level))))


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="error"):
        DenoisingLoss("huber")
    with pytest.raises(ValueError, match="exponent"):
        DenoisingLoss(exponent=-1.0)
    clean = torch.zeros(2, 2, 4, 4)
    with pytest.raises(ValueError, match="prediction"):
        DenoisingLoss()(clean[:1], (clean, torch.ones(2)))
    with pytest.raises(ValueError, match="target"):
        DenoisingLoss()(clean, (clean, torch.ones(3)))
