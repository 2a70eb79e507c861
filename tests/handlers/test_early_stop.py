import io

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events

from monai_deqkan.handlers import ResumableEarlyStop

# MONAI's handler calls Ignite's by old names.
pytestmark = pytest.mark.filterwarnings("ignore:'(min_delta|cumulative_delta)' is deprecated:DeprecationWarning")

SCORES = [0.5, 0.7, 0.6, 0.65, 0.6, 0.9]


def run(epochs, start=0, state=None):
    """Train until ``epochs`` with the scores above; return the epochs reached and the state, through a file."""
    trainer = Engine(lambda engine, batch: None)
    evaluator = Engine(lambda engine, batch: None)
    score = {}
    stop = ResumableEarlyStop(patience=3, score_function=lambda engine: score["now"])
    stop.set_trainer(trainer)
    stop.attach(evaluator)
    if state is not None:
        stop.load_state_dict(state)
        trainer.load_state_dict({"epoch": start, "max_epochs": epochs, "epoch_length": 1})

    @trainer.on(Events.EPOCH_COMPLETED)
    def validate(engine):
        score["now"] = np.float64(SCORES[engine.state.epoch - 1])
        evaluator.run([0])

    trainer.run([0], max_epochs=epochs)
    file = io.BytesIO()
    torch.save(stop.state_dict(), file)
    file.seek(0)
    return trainer.state.epoch, torch.load(file, weights_only=True)


def test_resumed_training_stops_where_an_uninterrupted_one_does():
    whole, _ = run(6)
    reached, state = run(4)
    assert (whole, reached) == (5, 4)
    assert (state["best_score"], state["counter"]) == (0.7, 2)
    assert run(6, start=4, state=state)[0] == whole


def test_state_without_a_trainer_says_what_to_do():
    with pytest.raises(RuntimeError, match="set_trainer"):
        ResumableEarlyStop(patience=1, score_function=lambda engine: 0).state_dict()
