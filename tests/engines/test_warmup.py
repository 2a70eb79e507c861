import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, ReduceLROnPlateau, StepLR

from monai_deqkan.engines import CosineDecay, GradualWarmup


def optimizer(rate=0.1):
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)


def rates(schedule, steps):
    found = []
    for _ in range(steps):
        found.append(schedule.optimizer.param_groups[0]["lr"])
        schedule.optimizer.step()
        schedule.step()
    return found


AFTER = {
    "step": lambda o: StepLR(o, 3, gamma=0.1),
    "exponential": lambda o: ExponentialLR(o, 0.5),
    "cosine": lambda o: CosineAnnealingLR(o, 6),
    "ours": lambda o: CosineDecay(o, 6),
    "none": lambda o: None,
}


def alone(name, steps):
    schedule = AFTER[name](optimizer())
    return [0.1] * steps if schedule is None else rates(schedule, steps)


def make(name, length=4, rate=0.1):
    other = optimizer(rate)
    return GradualWarmup(other, length, AFTER[name](other))


@pytest.mark.parametrize("name", AFTER)
@pytest.mark.parametrize("length", [0, 1, 4])
def test_rises_linearly_and_then_is_the_other_schedule(name, length):
    expected = [0.1 * (t + 1) / (length + 1) for t in range(length)] + alone(name, 9)
    assert rates(make(name, length), length + 9) == pytest.approx(expected)


@pytest.mark.parametrize("name", AFTER)
@pytest.mark.parametrize("stop", [0, 2, 3, 4, 5, 9])
def test_resumes_exactly(name, stop, tmp_path):
    whole = rates(make(name), 14)
    first = make(name)
    rates(first, stop)
    torch.save({"s": first.state_dict(), "o": first.optimizer.state_dict()}, tmp_path / "c.pt")
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    second = make(name)
    second.optimizer.load_state_dict(saved["o"])
    second.load_state_dict(saved["s"])
    assert second.get_last_lr() == pytest.approx([whole[stop]])
    assert rates(second, 14 - stop) == pytest.approx(whole[stop:])


@pytest.mark.parametrize("name", AFTER)
@pytest.mark.parametrize(("length", "stop", "other", "passed"), [(2, 5, 7, 3), (7, 3, 2, 0), (3, 2, 5, 0)])
def test_resumed_with_another_length_the_other_schedule_goes_on_where_it_stood(name, length, stop, other, passed):
    first, second = make(name, length), make(name, other)
    rates(first, stop)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    rise = [0.1 * (t + 1) / (other + 1) for t in range(stop, other)]
    assert rates(second, len(rise) + 4) == pytest.approx(rise + alone(name, 9)[passed : passed + 4])


def test_each_parameter_group_has_its_own_rate():
    other = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": rate} for rate in (0.1, 1.0)])
    schedule = GradualWarmup(other, 1, StepLR(other, 1, gamma=0.5))
    assert schedule.get_last_lr() == pytest.approx([0.05, 0.5])
    rates(schedule, 2)
    assert schedule.get_last_lr() == pytest.approx([0.05, 0.5])  # after 0.1 and 1 halved


def test_bad_settings_are_refused():
    first = optimizer()
    with pytest.raises(ValueError, match="num_epochs"):
        GradualWarmup(first, -1)
    with pytest.raises(ValueError, match="same optimizer"):
        GradualWarmup(first, 1, StepLR(optimizer(), 1))
    with pytest.raises(TypeError, match="without a metric; got ReduceLROnPlateau"):
        GradualWarmup(first, 1, ReduceLROnPlateau(first))
    with pytest.raises(ValueError, match="takes no epoch"):
        GradualWarmup(first, 1).step(3)
