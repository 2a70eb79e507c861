import ast
import logging
import os
import subprocess
import sys
import warnings

import pytest
import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser

from monai_deqkan.adjoints import ImplicitAdjoint
from monai_deqkan.handlers import ConvergenceGuard, SolveStatsHandler
from monai_deqkan.networks.layers import DEQLayer
from monai_deqkan.solvers import (
    AndersonSolver,
    ConvergenceError,
    ConvergenceWarning,
    FixedPointIteration,
    open_recorders,
)


class Halving(torch.nn.Module):
    """``z = z / 2 + x``: with three evaluations a zero is found and a one is not."""

    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, z, x):
        return self.slope * z + x


GOOD, HALF, BAD = torch.zeros(2, 3), torch.tensor([[0.0], [1.0]]), torch.ones(2, 3)


def engine_of(**settings):
    layer = DEQLayer(Halving(), FixedPointIteration(rtol=1e-3, max_iter=3, on_failure="ignore"))
    engine = Engine(lambda engine, batch: layer(batch).detach())
    ConvergenceGuard(**settings).attach(engine)
    return engine


def iterations_until_stop(batches, **settings):
    engine = engine_of(action="stop", **settings)
    engine.run(batches, max_epochs=1)
    return engine.state.iteration


@pytest.mark.parametrize(
    ("batches", "settings", "expected"),
    [
        ([GOOD, GOOD, GOOD], {}, 3),
        ([GOOD, HALF, GOOD], {}, 2),
        ([HALF, HALF, BAD, GOOD], {"max_share": 0.5}, 3),
        ([BAD, GOOD, BAD, BAD, GOOD], {"patience": 2}, 4),
        ([BAD, BAD, GOOD, BAD, BAD, GOOD], {"patience": 3}, 6),
        ([BAD, BAD, BAD], {"max_share": 1.0}, 3),
    ],
)
def test_stops_after_patience_failing_iterations(batches, settings, expected):
    assert iterations_until_stop(batches, **settings) == expected


def test_raises_one_clear_error_and_leaves_no_recorder_open():
    engine = engine_of(action="raise", patience=2, max_share=0.25)
    message = (
        r"3 of 4 equilibria of the last 2 iterations were not found \(more than 25 % of each; epoch 1, iteration 3\)"
    )
    with pytest.raises(ConvergenceError, match=message):
        engine.run([GOOD, HALF, BAD, GOOD], max_epochs=1)
    assert open_recorders() == ()


def test_warns_once_per_streak():
    engine = engine_of(action="warn")
    with pytest.warns(ConvergenceWarning, match="of this iteration were not found") as caught:
        engine.run([BAD, BAD, GOOD, HALF, GOOD], max_epochs=1)
    assert [str(w.message).split(" equilibria")[0] for w in caught] == ["2 of 2", "1 of 2"]


def test_counts_and_logs_each_epoch(caplog):
    engine = engine_of(max_share=1.0)
    counts = []
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: counts.append(e.state.metrics["solve_unconverged"]))
    with caplog.at_level(logging.WARNING):
        engine.run(iter([BAD, HALF, GOOD, GOOD]), max_epochs=2, epoch_length=2)
    assert counts == [3, 0]
    assert [record.getMessage() for record in caplog.records] == ["Epoch 1: 3 of 4 equilibria not found."]


def test_rounds_can_be_epochs():
    engine = engine_of(every="epoch", action="stop", patience=2, max_share=0.4)
    # Shares 3/4, 2/4, then never reached.
    engine.run(iter([BAD, HALF, BAD, GOOD, GOOD, GOOD]), max_epochs=3, epoch_length=2)
    assert engine.state.epoch == 2
    engine = engine_of(every="epoch", action="stop", max_share=0.5)
    engine.run(iter([BAD, GOOD, GOOD, BAD]), max_epochs=2, epoch_length=2)
    assert engine.state.epoch == 2


def test_backward_solves_count_on_request():
    adjoint = ImplicitAdjoint(solver=AndersonSolver(rtol=1e-6, max_iter=1, on_failure="ignore"))
    layer = DEQLayer(Halving(), FixedPointIteration(max_iter=100), adjoint)
    for backward, expected in ((False, 0), (True, 2)):
        engine = Engine(lambda engine, batch: layer(batch).sum().backward())
        ConvergenceGuard(1.0, backward=backward, prefix="train_").attach(engine)
        engine.run([BAD], max_epochs=1)
        assert engine.state.metrics == {"train_solve_unconverged": expected}


def test_each_run_starts_anew_and_iterations_without_solves_do_not_count():
    layer = DEQLayer(Halving(), FixedPointIteration(max_iter=3, on_failure="ignore"))
    engine = Engine(lambda engine, batch: None if batch is None else layer(batch).detach())
    ConvergenceGuard(patience=2, action="raise").attach(engine)
    engine.run([BAD, GOOD, BAD], max_epochs=1)
    engine.run([BAD, GOOD], max_epochs=1)
    with pytest.raises(ConvergenceError):
        engine.run([BAD, None, BAD], max_epochs=1)


def test_works_beside_the_statistics_and_from_a_configuration():
    layer = DEQLayer(Halving(), FixedPointIteration(rtol=1e-3, max_iter=3, on_failure="ignore"))
    engine = Engine(lambda engine, batch: layer(batch).detach())
    config = {"guard": {"_target_": "monai_deqkan.handlers.ConvergenceGuard", "max_share": 0.6, "action": "stop"}}
    guard = ConfigParser(config).get_parsed_content("guard")
    for handler in (SolveStatsHandler(), guard):
        handler.attach(engine)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.run([HALF, HALF], max_epochs=1)
    assert engine.state.metrics["solve_unconverged"] == 2
    assert engine.state.metrics["solve_converged"] == 0.5


@pytest.mark.parametrize("settings", [{"max_share": 1.5}, {"patience": 0}, {"action": "pause"}, {"every": "batch"}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        ConvergenceGuard(**settings)


PROCESS = """
import sys
import torch
import torch.distributed as dist
from ignite.engine import Engine
from monai_deqkan.handlers import ConvergenceGuard
from monai_deqkan.networks.layers import DEQLayer
from monai_deqkan.solvers import FixedPointIteration

class Halving(torch.nn.Module):
    def forward(self, z, x):
        return 0.5 * z + x

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=sys.argv[2], rank=rank, world_size=2)
layer = DEQLayer(Halving(), FixedPointIteration(rtol=1e-3, max_iter=3, on_failure="ignore"))
good, bad = torch.zeros(3, 2), torch.ones(1, 2)
for every, max_share in (("iteration", 0.2), ("epoch", 0.05)):
    engine = Engine(lambda engine, batch: layer(batch))
    ConvergenceGuard(max_share, 2, "stop", every=every).attach(engine)
    batches = [good] * 6 if rank == 0 else [good, bad, good, bad, bad, good]  # of 6 and 4 samples together
    engine.run(iter(batches), max_epochs=3, epoch_length=2)
    print([engine.state.epoch, engine.state.iteration, engine.state.metrics["solve_unconverged"]])
dist.destroy_process_group()
"""


def test_two_processes_stop_together(tmp_path):
    # One process finds everything, yet stops with the other: after the fifth iteration, a quarter of four samples.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROCESS]
    processes = [
        subprocess.Popen(
            [*command, str(rank), (tmp_path / "init").as_uri()], env=environment, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    printed = [process.communicate(timeout=300)[0].splitlines() for process in processes]
    assert printed[0] == printed[1]
    assert ast.literal_eval(printed[0][0]) == [3, 5, 1]
    # One sample of each epoch's ten fails.
    assert ast.literal_eval(printed[0][1]) == [2, 4, 1]
