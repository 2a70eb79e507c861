import json

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events

from monai_deqkan.handlers import BestModelSaver, KANPruner
from monai_deqkan.networks.layers import KANLinear
from monai_deqkan.networks.nets import KANUNet

IMAGES = [{"image": torch.full((4,), index / 8)} for index in range(8)]


def evaluator(network):
    """An engine whose key metric is the share of weights that are not zero."""
    engine = Engine(lambda engine, batch: None)

    @engine.on(Events.COMPLETED)
    def measure(engine):
        engine.state.key_metric_name = "val_kept"
        engine.state.metrics = {"val_kept": float((network.weight != 0).double().mean())}

    run = engine.run
    engine.run = lambda *_: run([0], max_epochs=engine.state.epoch or 1)
    return engine


def fine_tune(folder, network, epochs, resume=False, checkpoint=None):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)

    def step(engine, batch):
        optimizer.zero_grad()
        (network(torch.ones(1, 4)) - 1).square().sum().backward()
        optimizer.step()

    trainer, validator = Engine(step), evaluator(network)
    pruner = KANPruner(network, evaluator(network), IMAGES, folder, amount=0.25, num_images=4, resume=resume)
    pruner.attach(trainer, validator)
    BestModelSaver(folder, network, {}).attach(validator)
    if checkpoint is not None:
        trainer.add_event_handler(Events.STARTED, lambda: network.load_state_dict(checkpoint))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: validator.run())
    trainer.run([0], max_epochs=epochs)
    return json.loads((folder / "pruning.json").read_text())


def test_pruned_edges_stay_zero_and_plain_weights_are_saved(tmp_path):
    torch.manual_seed(0)
    network = KANLinear(4, 4)
    first = network.weight.detach().clone()
    record = fine_tune(tmp_path, network, 1)
    assert (record["metric"], record["before"], record["pruned"], record["fine_tuned"]) == ("val_kept", 1, 0.75, 0.75)
    assert record["layers"] == [{"layer": "", "num_units": 16, "num_left": 12}]
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    plain = KANLinear(4, 4)
    plain.load_state_dict(saved)
    x = torch.randn(5, 4)
    assert torch.equal((saved["weight"] == 0), (network.weight == 0))
    assert not torch.equal(saved["weight"][saved["weight"] != 0], first[saved["weight"] != 0])
    assert torch.allclose(plain(x), network(x), atol=1e-6)

    checkpoint = network.state_dict()
    resumed = KANLinear(4, 4)
    again = fine_tune(tmp_path, resumed, 1, resume=True, checkpoint=checkpoint)
    assert torch.equal(resumed.weight == 0, network.weight == 0)
    assert (again["before"], again["layers"]) == (record["before"], record["layers"])


def test_heads_that_only_training_calls_do_not_stop_it(tmp_path):
    torch.manual_seed(0)
    network = KANUNet(2, 1, 2, features=(2, 4, 4), deep_supervision=True)
    measured = Engine(lambda engine, batch: None)
    measured.state.key_metric_name, measured.state.metrics = "val", {"val": 0.5}
    measured.run = lambda: None
    images = [{"image": torch.rand(1, 16, 16)} for _ in range(2)]
    trainer = Engine(lambda engine, batch: None)
    KANPruner(network, measured, images, tmp_path).attach(trainer, Engine(lambda engine, batch: None))
    trainer.run([0], max_epochs=1)
    layers = json.loads((tmp_path / "pruning.json").read_text())["layers"]
    assert "coarse_heads.0.conv" in {row["layer"] for row in layers}
    units, left = (sum(row[key] for row in layers) for key in ("num_units", "num_left"))
    assert left == units - round(0.5 * units)


def test_all_processes_take_the_masks_of_the_first(tmp_path, monkeypatch):
    first = torch.zeros(4, 4 * KANLinear(4, 4).num_features, dtype=torch.bool)
    monkeypatch.setattr(idist, "get_world_size", lambda: 2)
    monkeypatch.setattr(idist, "get_rank", lambda: 1)
    monkeypatch.setattr(idist, "broadcast", lambda mask, src: first.view_as(mask).to(mask.dtype))
    network = KANLinear(4, 4)
    trainer = Engine(lambda engine, batch: None)
    KANPruner(network, evaluator(network), IMAGES, tmp_path).attach(trainer, Engine(lambda engine, batch: None))
    trainer.run([0], max_epochs=1)
    assert not network.weight.any()
    assert not (tmp_path / "pruning.json").exists()  # the first process writes it
