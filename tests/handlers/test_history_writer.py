import csv

from ignite.engine import Engine, Events

from monai_deqkan.handlers import HistoryWriter


def run(folder, losses, epochs, start=0):
    evaluator = Engine(lambda engine, batch: None)
    trainer = Engine(lambda engine, batch: [{"loss": losses[batch]}])
    trainer.state.epoch = start

    @trainer.on(Events.EPOCH_COMPLETED)
    def validate(engine):
        evaluator.run([0])
        evaluator.state.metrics = {"val_auc": 0.1 * engine.state.epoch, "solve_evaluations": 7.0}
        engine.state.metrics["train_accuracy"] = 0.5

    HistoryWriter(folder, evaluator).attach(trainer)
    if start:
        trainer.load_state_dict({"epoch": start, "max_epochs": epochs, "epoch_length": 2})
    trainer.run([0, 1], max_epochs=epochs)
    with (folder / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_one_line_per_epoch(tmp_path):
    rows = run(tmp_path / "new", [1.0, 3.0], epochs=2)
    assert [float(row["epoch"]) for row in rows] == [1, 2]
    assert [float(row["train_loss"]) for row in rows] == [2.0, 2.0]
    assert [round(float(row["val_auc"]), 6) for row in rows] == [0.1, 0.2]
    assert {"train_accuracy", "val_solve_evaluations"} <= set(rows[0])


def test_resumed_training_goes_on_with_the_earlier_lines(tmp_path):
    run(tmp_path, [1.0, 3.0], epochs=2)
    rows = run(tmp_path, [5.0, 5.0], epochs=4, start=2)
    assert [float(row["epoch"]) for row in rows] == [1, 2, 3, 4]
    assert [float(row["train_loss"]) for row in rows] == [2.0, 2.0, 5.0, 5.0]
