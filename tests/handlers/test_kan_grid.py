import ast
import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser
from monai.handlers import CheckpointLoader, CheckpointSaver
from torch import nn

from monai_deqkan.handlers import KANGridHandler
from monai_deqkan.networks.layers import KANLinear


def network_of():
    torch.manual_seed(0)
    return nn.Sequential(KANLinear(2, 3), nn.Tanh(), KANLinear(3, 1))


def trainer_of(network, optimizer):
    def step(engine, batch):
        optimizer.zero_grad()
        loss = (network(batch) - batch.prod(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return Engine(step)


def adam(network):
    return torch.optim.Adam(network.parameters(), lr=1e-3)


BATCHES = [2 * torch.rand(50, 2, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]


def test_refits_at_the_stated_epochs_to_the_last_batches(caplog):
    network = network_of()
    engine = trainer_of(network, optimizer := adam(network))
    handler = KANGridHandler(network, optimizer, refit_every=2, refit_epochs=[3], stop_epoch=4, num_batches=2)
    handler.attach(engine)
    scales = []
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: scales.append(network[0].input_scale))
    with caplog.at_level(logging.INFO):
        engine.run(BATCHES, max_epochs=6)
    assert scales[0] is None
    assert scales[1] is not None
    expected = np.quantile(torch.cat(BATCHES[-2:]).double().numpy(), [0.001, 0.999], axis=0)
    assert np.allclose((6 / scales[1]).numpy(), expected[1] - expected[0], rtol=1e-4)
    lines = [record.getMessage() for record in caplog.records if "refitted" in record.getMessage()]
    assert [line[:8] for line in lines] == ["Epoch 2:", "Epoch 3:", "Epoch 4:"]
    assert "grids of 2 KAN layers refitted, 0 of 5 channels kept theirs; inputs outside 0.00 % ->" in lines[0]
    assert "0 of 5" not in lines[1]  # nothing moved on the first layer: the dead band
    assert not network[0]._forward_pre_hooks


def test_validation_within_the_training_is_not_recorded():
    network = network_of()
    engine = trainer_of(network, adam(network))
    KANGridHandler(network, refit_every=1).attach(engine)
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: network(torch.full((1, 2), 1e4)))
    engine.run(BATCHES, max_epochs=1)
    assert float((6 / network[0].input_scale).max()) < 2.01


def test_extends_and_drops_the_state_of_what_changed_shape(caplog):
    network = network_of()
    engine = trainer_of(network, optimizer := adam(network))
    KANGridHandler(network, optimizer, refit_epochs=[2], extend_at={"2": 10, 3: 20}).attach(engine)
    sizes, states, losses = [], [], []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: losses.append(engine.state.output))

    @engine.on(Events.EPOCH_COMPLETED)
    def remember():
        sizes.append(network[0].basis.grid_size)
        states.append(network[0].weight in optimizer.state)

    with caplog.at_level(logging.INFO):
        engine.run(BATCHES, max_epochs=4)
    assert sizes == [5, 10, 20, 20]
    assert states == [True, False, False, True]
    assert losses[12] < 1.1 * losses[6]
    lines = [record.getMessage() for record in caplog.records if "extended" in record.getMessage()]
    assert len(lines) == 2
    assert "2 KAN layers extended to 10 intervals" in lines[0]


def test_resumed_training_ends_as_the_uninterrupted_one(tmp_path):
    def run(epochs, load=None):
        network = network_of()
        engine = trainer_of(network, optimizer := adam(network))
        objects = {"network": network, "optimizer": optimizer, "trainer": engine}
        if load is not None:
            CheckpointLoader(str(load), objects).attach(engine)
        KANGridHandler(network, optimizer, refit_epochs=[1], extend_at={2: 10, 4: 20}).attach(engine)
        CheckpointSaver(str(tmp_path), objects, save_interval=1).attach(engine)
        engine.run(BATCHES, max_epochs=epochs)
        return network

    whole = run(5)
    for path in tmp_path.glob("*.pt"):
        path.unlink()
    run(3)
    resumed = run(5, load=tmp_path / "checkpoint_epoch=3.pt")
    assert resumed[0].basis.grid_size == whole[0].basis.grid_size == 20
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_from_a_bundle_config():
    config = {
        "net": {"_target_": "monai_deqkan.networks.layers.KANLinear", "in_features": 2, "out_features": 1},
        "opt": {"_target_": "torch.optim.Adam", "params": "$@net.parameters()"},
        "grids": {
            "_target_": "monai_deqkan.handlers.KANGridHandler",
            "network": "@net",
            "optimizer": "@opt",
            "refit_every": 5,
            "extend_at": {"10": 12},
        },
    }
    handler = ConfigParser(config).get_parsed_content("grids")
    assert handler.extend_at == {10: 12}
    assert [epoch for epoch in range(12) if epoch and handler.is_refit_epoch(epoch)] == [5, 10]


def test_errors_say_what_to_do():
    network = network_of()
    optimizer = adam(network)
    with pytest.raises(ValueError, match="Nothing is scheduled"):
        KANGridHandler(network)
    with pytest.raises(ValueError, match="`optimizer` is needed"):
        KANGridHandler(network, extend_at={1: 10})
    with pytest.raises(ValueError, match="has none"):
        KANGridHandler(nn.Linear(1, 1), refit_every=1)
    with pytest.raises(TypeError, match="extend_at"):
        KANGridHandler(network, optimizer, extend_at={"first": 10})
    with pytest.raises(ValueError, match="refit_every"):
        KANGridHandler(network, refit_every=0)


PROCESS = """
import sys
import torch
import torch.distributed as dist
from ignite.engine import Engine
from torch.nn.parallel import DistributedDataParallel
from monai_deqkan.handlers import KANGridHandler
from monai_deqkan.networks.layers import KANLinear

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=sys.argv[2], rank=rank, world_size=2)
torch.manual_seed(0)
layer = KANLinear(2, 1)
network = DistributedDataParallel(layer)
optimizer = torch.optim.SGD(network.parameters(), lr=0.01)

def step(engine, batch):
    optimizer.zero_grad()
    network(batch).square().mean().backward()
    optimizer.step()

engine = Engine(step)
KANGridHandler(network, optimizer, refit_epochs=[1]).attach(engine)
torch.manual_seed(rank)
engine.run([(1 + rank) * torch.rand(200, 2) for _ in range(3)], max_epochs=2)
print(layer.input_scale.tolist(), ",", layer.weight.flatten().tolist())
try:
    KANGridHandler(network, optimizer, extend_at={1: 10})
except ValueError as error:
    print("Train in stages" in str(error))
dist.destroy_process_group()
"""


def test_two_processes_get_the_grids_of_the_first(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", PROCESS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [*command, str(rank), (tmp_path / "init").as_uri()], env=environment, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    printed = [process.communicate(timeout=180)[0].splitlines() for process in processes]
    scale, _ = ast.literal_eval(printed[0][0])
    assert scale == pytest.approx([6.0, 6.0], rel=0.03)  # process 0 sees numbers from 0 to 1
    assert printed[0] == printed[1]
    assert printed[0][1] == "True"
