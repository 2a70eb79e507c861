import ast
import math
import os
import subprocess
import sys

import pytest
import torch
from ignite.engine import Engine, Events

from monai_deqkan.adjoints import ImplicitAdjoint
from monai_deqkan.handlers import SolveStatsHandler
from monai_deqkan.networks.layers import DEQLayer
from monai_deqkan.solvers import AndersonSolver, FixedPointIteration, SolveRecorder, open_recorders


class Halving(torch.nn.Module):
    """``z = s z + x``: fixed-point iteration from zero leaves a relative residual near ``s ** k`` after ``k`` steps."""

    def __init__(self, slope=0.5):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(slope))

    def forward(self, z, x):
        return self.slope * z + x


def engine_of(layer, backward=False):
    def step(engine, batch):
        with torch.set_grad_enabled(backward):
            z = layer(batch)
            if backward:
                z.sum().backward()

    return Engine(step)


def iteration(max_iter=100, rtol=1e-3):
    return FixedPointIteration(rtol=rtol, max_iter=max_iter, on_failure="ignore")


def test_numbers_are_those_of_the_recorded_solves():
    layer = DEQLayer(Halving(), iteration())
    batches = [torch.ones(2, 3), torch.tensor([[1.0, 2, 3]])]
    engine = engine_of(layer)
    SolveStatsHandler().attach(engine)
    engine.run(batches, max_epochs=1)
    with torch.no_grad(), SolveRecorder() as recorder:
        for batch in batches:
            layer(batch)
    metrics = engine.state.metrics
    assert metrics["solve_evaluations"] == pytest.approx(recorder.evaluations().double().mean().item())
    # 2 ** -(k - 1) / (2 - 2 ** -(k - 1)) <= 1e-3 first at k = 10.
    assert metrics["solve_evaluations"] == 10
    assert metrics["solve_converged"] == 1.0
    assert metrics["solve_residual"] == pytest.approx(recorder.relative_residual().max().item())
    assert "backward_converged" not in metrics


def test_share_that_converged_counts_samples():
    layer = DEQLayer(Halving(), iteration(max_iter=3))
    engine = engine_of(layer)
    SolveStatsHandler(prefix="x_").attach(engine)
    engine.run([torch.zeros(3, 2), torch.ones(1, 2)], max_epochs=1)  # zero is its own equilibrium
    assert engine.state.metrics["x_solve_converged"] == pytest.approx(3 / 4)
    assert engine.state.metrics["x_solve_evaluations"] == pytest.approx((3 * 1 + 3) / 4)


def test_backward_solves_are_counted_in_training():
    adjoint = ImplicitAdjoint(solver=AndersonSolver(rtol=1e-6, max_iter=1, on_failure="ignore"))
    engine = engine_of(DEQLayer(Halving(), iteration(), adjoint), backward=True)
    SolveStatsHandler(backward=True).attach(engine)
    engine.run([torch.ones(2, 3)], max_epochs=1)
    assert engine.state.metrics["solve_converged"] == 1.0
    assert engine.state.metrics["backward_converged"] == 0.0


def test_each_epoch_counts_anew():
    layer = DEQLayer(Halving(), iteration(max_iter=3))
    engine = engine_of(layer)
    SolveStatsHandler().attach(engine)
    shares = []
    batches = iter([torch.ones(2, 2), torch.zeros(2, 2)])
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: shares.append(e.state.metrics["solve_converged"]))
    engine.run(batches, max_epochs=2, epoch_length=1)
    assert shares == [0.0, 1.0]


def test_spoiled_sample_counts_as_not_converged():
    engine = engine_of(DEQLayer(Halving(), iteration()))
    SolveStatsHandler().attach(engine)
    engine.run([torch.tensor([[1.0, 1.0], [1.0, float("nan")]])], max_epochs=1)
    assert engine.state.metrics["solve_converged"] == 0.5
    assert engine.state.metrics["solve_residual"] == math.inf


def test_network_without_a_solve_gives_no_numbers():
    engine = Engine(lambda engine, batch: None)
    SolveStatsHandler(backward=True).attach(engine)
    engine.run([0], max_epochs=1)
    assert engine.state.metrics == {}


def test_an_exception_leaves_no_recorder_open_and_is_passed_on():
    def step(engine, batch):
        assert len(open_recorders()) == 1
        raise RuntimeError("broken batch")

    engine = Engine(step)
    for _ in range(2):
        SolveStatsHandler().attach(engine)
    with pytest.raises(RuntimeError, match="broken batch"):
        engine.run([0], max_epochs=1)
    assert open_recorders() == ()


def test_two_handlers_on_one_engine_see_the_same_and_leave_no_recorder_open():
    engine = engine_of(DEQLayer(Halving(), iteration()))
    SolveStatsHandler(prefix="a_").attach(engine)
    SolveStatsHandler(prefix="b_").attach(engine)
    engine.run([torch.ones(1, 2)] * 3, max_epochs=1)
    assert engine.state.metrics["a_solve_evaluations"] == engine.state.metrics["b_solve_evaluations"] == 10
    assert open_recorders() == ()


PROCESS = """
import sys
import torch
import torch.distributed as dist
from ignite.engine import Engine
from monai_deqkan.handlers import SolveStatsHandler
from monai_deqkan.networks.layers import DEQLayer
from monai_deqkan.solvers import FixedPointIteration

class Halving(torch.nn.Module):
    def forward(self, z, x):
        return 0.5 * z + x

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=sys.argv[2], rank=rank, world_size=2)
layer = DEQLayer(Halving(), FixedPointIteration(rtol=1e-3, max_iter=3, on_failure="ignore"))
engine = Engine(lambda engine, batch: layer(batch))
SolveStatsHandler().attach(engine)
engine.run([torch.zeros(3, 2)] if rank == 0 else [torch.ones(1, 2)])
print([engine.state.metrics[name] for name in ("solve_evaluations", "solve_converged", "solve_residual")])
SolveStatsHandler(prefix="none_").attach(silent := Engine(lambda engine, batch: None))
silent.run([0])
print(silent.state.metrics)
dist.destroy_process_group()
"""


def test_numbers_of_two_processes_are_those_of_all_samples(tmp_path):
    # Three samples that stop after one evaluation, and one that fails after three.
    command = [sys.executable, "-c", PROCESS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [*command, str(rank), (tmp_path / "init").as_uri()], env=environment, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    printed = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    engine = engine_of(DEQLayer(Halving(), iteration(max_iter=3)))
    SolveStatsHandler().attach(engine)
    engine.run([torch.zeros(3, 2), torch.ones(1, 2)], max_epochs=1)
    metrics = engine.state.metrics
    expected = [metrics[name] for name in ("solve_evaluations", "solve_converged", "solve_residual")]
    assert expected[:2] == [6 / 4, 3 / 4]
    for lines in printed:
        assert ast.literal_eval(lines[0]) == pytest.approx(expected)
        assert lines[1] == "{}"


def test_validation_within_a_training_keeps_its_own_numbers():
    inner = engine_of(DEQLayer(Halving(), iteration(max_iter=2)))
    outer = engine_of(DEQLayer(Halving(), iteration()))
    SolveStatsHandler().attach(inner)
    SolveStatsHandler().attach(outer)
    outer.add_event_handler(Events.EPOCH_COMPLETED, lambda e: inner.run([torch.ones(1, 2)], max_epochs=1))
    outer.run([torch.ones(1, 2)], max_epochs=1)
    assert (inner.state.metrics["solve_evaluations"], outer.state.metrics["solve_evaluations"]) == (2, 10)
    assert open_recorders() == ()
