import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import Dataset
from monai.transforms import Compose, RandScaleIntensity

from monai_deqkan.handlers import EpochSeeder


def numbers_seen(first, last, seed=3):
    """What chance gives in the epochs ``first`` to ``last``, each of two steps."""
    data = Dataset([torch.ones(1, 2)] * 2, Compose([RandScaleIntensity(factors=0.9, prob=1.0)]))
    seen = []

    def step(engine, index):
        seen.append((engine.state.epoch, float(data[index][0, 0]), float(torch.rand(()))))

    torch.manual_seed(first)  # whatever went before
    engine = Engine(step)
    EpochSeeder(data, seed).attach(engine)
    engine.load_state_dict({"epoch": first - 1, "max_epochs": last, "epoch_length": 2})
    engine.run(range(2), max_epochs=last)
    return seen


def test_resumed_epochs_see_what_uninterrupted_ones_do():
    whole = numbers_seen(1, 3)
    assert numbers_seen(3, 3) == whole[4:]
    assert len(set(np.round(np.array(whole)[:, 1:], 6).ravel())) == 12  # no epoch repeats another
    assert numbers_seen(3, 3, seed=4) != whole[4:]


def test_seed_is_checked():
    with pytest.raises(ValueError, match="seed"):
        EpochSeeder([], -1)
