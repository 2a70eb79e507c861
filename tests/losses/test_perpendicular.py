import math

import pytest
import torch

from monai_deqkan.losses import PerpendicularLoss, perpendicular_distance


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(seed))


def test_distance_follows_the_angle():
    angle = torch.linspace(-math.pi, math.pi, 181, dtype=torch.float64)
    target = 1.7 * torch.exp(1j * angle) * complex(math.cos(0.4), math.sin(0.4))
    prediction = torch.full_like(target, 0.3 * complex(math.cos(0.4), math.sin(0.4)))
    expected = 1.7 * torch.where(angle.abs() <= math.pi / 2, angle.sin().abs(), 2 - angle.sin().abs())
    torch.testing.assert_close(perpendicular_distance(prediction, target, eps=0.0), expected, atol=1e-12, rtol=0)
    # The error grows with the angle all the way to 180 degrees.
    assert bool((expected[90:].diff() > 0).all())


@pytest.mark.parametrize("eps", [1e-2, 1.0])
def test_distance_is_continuous_at_a_right_angle_and_at_zero(eps):
    # Predictions far below and above the softening, a hair to either side of the right angle.
    size = torch.tensor([1e-6, 1e-2, 1.0, 30.0], dtype=torch.float64)
    target = torch.full_like(size, 0.7).to(torch.complex128)
    below, above = (size * complex(sign * 1e-9, 1.0) for sign in (1, -1))
    expected = 0.7 * size / (size.square() + eps**2).sqrt()
    torch.testing.assert_close(perpendicular_distance(below, target, eps), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(perpendicular_distance(above, target, eps), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(perpendicular_distance(-size * (1 + 0j), target, eps), 2 * expected)
    assert torch.equal(perpendicular_distance(0 * target, target, eps), torch.zeros_like(size))


def test_loss_is_the_sum_of_both_terms_in_every_reduction():
    prediction, target = randn(2, 3, 4), randn(2, 3, 4, seed=1)
    phase = perpendicular_distance(prediction, target, 0.1)
    for name, power in (("l1", 1), ("l2", 2)):
        expected = phase + 0.7 * (prediction.abs() - target.abs()).abs() ** power
        none, mean, total = (
            PerpendicularLoss(name, magnitude_weight=0.7, eps=0.1, reduction=reduction)(prediction, target)
            for reduction in ("none", "mean", "sum")
        )
        torch.testing.assert_close(none, expected)
        torch.testing.assert_close(mean, expected.mean())
        torch.testing.assert_close(total, expected.sum())


def test_two_channels_equal_complex():
    prediction, target = randn(2, 3, 4), randn(2, 3, 4, seed=1)
    channels = [torch.stack((x.real, x.imag), dim=1) for x in (prediction, target)]
    torch.testing.assert_close(PerpendicularLoss()(*channels), PerpendicularLoss()(prediction, target))


def test_loss_is_blind_to_a_common_phase_and_zero_only_at_the_target():
    prediction, target = randn(2, 5, 5), randn(2, 5, 5, seed=1)
    loss = PerpendicularLoss(eps=1e-3)
    turn = complex(math.cos(2.0), math.sin(2.0))
    torch.testing.assert_close(loss(turn * prediction, turn * target), loss(prediction, target))
    assert float(loss(target, target)) < 1e-12
    assert float(loss(-target, target)) > float(loss(1j * target, target)) > 0.5


def test_gradient_is_right_and_bounded_at_zero():
    loss = PerpendicularLoss("l2", eps=0.1)
    target = randn(1, 2, 3)
    prediction = torch.view_as_real(randn(1, 2, 3, seed=1)).movedim(-1, 1).contiguous().requires_grad_()
    target_channels = torch.view_as_real(target).movedim(-1, 1)
    assert torch.autograd.gradcheck(lambda x: loss(x, target_channels), (prediction,))
    zero = torch.zeros(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(PerpendicularLoss(reduction="sum")(zero, target_channels), zero)
    assert bool(torch.isfinite(gradient).all())
    both = torch.zeros(1, 2, 2, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(PerpendicularLoss()(both, torch.zeros(1, 2, 2, 2)), both)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_descent_reaches_a_target_of_opposite_phase():
    target = torch.stack((torch.ones(1, 4), torch.zeros(1, 4)), dim=1)
    x = torch.stack((-torch.ones(1, 4), 0.1 * torch.ones(1, 4)), dim=1).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss = PerpendicularLoss()(x, target)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_bfloat16_channels_are_taken_as_float32():
    torch.manual_seed(0)
    x, y = torch.randn(2, 1, 2, 5).bfloat16()
    torch.testing.assert_close(PerpendicularLoss()(x, y), PerpendicularLoss()(x.float(), y.float()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PerpendicularLoss(reduction="avg"), "reduction"),
        (lambda: PerpendicularLoss("L1"), "magnitude_loss"),
        (lambda: PerpendicularLoss(eps=-1.0), "eps"),
        (lambda: PerpendicularLoss()(torch.ones(1, 2, 3), torch.ones(1, 2, 4)), "one shape"),
        (lambda: PerpendicularLoss()(torch.ones(1, 3, 3), torch.ones(1, 3, 3)), "channels"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
