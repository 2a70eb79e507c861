import pytest
import torch

from monai_deqkan.engines import CosineDecay


def optimizer(rate=0.1):
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)


def rates(schedule, steps):
    found = []
    for _ in range(steps):
        found.append(schedule.optimizer.param_groups[0]["lr"])
        schedule.optimizer.step()
        schedule.step()
    return found


def test_falls_like_torch_s_and_stays_at_the_end():
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer(), T_max=8, eta_min=0.1 * 0.02)
    found = rates(CosineDecay(optimizer(), 8), 12)
    assert found[:9] == pytest.approx(rates(theirs, 9))
    assert found[9:] == pytest.approx([0.002] * 3)


def resumed(first, length, rate=0.1):
    other = optimizer(rate)
    schedule = CosineDecay(other, length)
    other.load_state_dict(first.optimizer.state_dict())
    schedule.load_state_dict(first.state_dict())
    return schedule


def test_resumed_training_goes_on_on_the_curve_of_its_new_length():
    first = CosineDecay(optimizer(), 4)
    rates(first, 4)
    assert rates(resumed(first, 8), 4) == pytest.approx(rates(CosineDecay(optimizer(), 8), 8)[4:])
    assert rates(resumed(first, 8, rate=0.5), 4) == pytest.approx(rates(CosineDecay(optimizer(0.5), 8), 8)[4:])


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="num_epochs"):
        CosineDecay(optimizer(), 0)
    with pytest.raises(ValueError, match="final_factor"):
        CosineDecay(optimizer(), 3, final_factor=2)
