import csv
import json

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, roc_auc_score
from torch import nn

from monai_deqkan.engines import CORRUPTIONS, attack_scores, corrupt, pgd_attack, robustness_score
from monai_deqkan.engines.robustness import balanced_rows, write_robustness_report


class Linear(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, 144, generator=torch.Generator().manual_seed(1)))

    def forward(self, images):
        return (images.flatten(1) - 0.5) @ self.weight.T


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(40, 1, 12, 12, generator=generator)
    with torch.no_grad():
        labels = Linear()(images + 0.2 * torch.randn(images.shape, generator=generator)).argmax(1)
    return images, labels


def expected(network, images, labels):
    with torch.no_grad():
        probabilities = network(images).double().softmax(1).numpy()
    return (
        accuracy_score(labels, probabilities.argmax(1)),
        roc_auc_score(labels, probabilities, multi_class="ovr", average="macro"),
    )


def test_table_is_what_scikit_learn_says_cell_by_cell(data):
    images, labels = data
    network = Linear()
    result = robustness_score(network, images, labels, seed=5, batch_size=16)
    assert (result.clean.accuracy, result.clean.auc) == pytest.approx(expected(network, images, labels))
    assert [(cell.name, cell.severity) for cell in result.cells] == [(n, s) for n in CORRUPTIONS for s in range(1, 6)]
    for cell in result.cells:
        changed = corrupt(images, cell.name, cell.severity, seed=5)
        assert (cell.accuracy, cell.auc) == pytest.approx(expected(network, changed, labels), abs=1e-6)
        assert cell.setting == CORRUPTIONS[cell.name].settings[cell.severity - 1]
    assert result.score == pytest.approx(np.mean([cell.auc for cell in result.cells]))
    assert result.accuracy == pytest.approx(np.mean([cell.accuracy for cell in result.cells]))
    curve = result.curves("accuracy")["blur"]
    assert curve == [result.clean.accuracy, *(cell.accuracy for cell in result.cells if cell.name == "blur")]
    assert json.loads(json.dumps(result.to_dict()))["score"] == result.score


def test_attacked_images_are_scored(data):
    images, labels = data
    network = Linear()
    cells = attack_scores(network, images, labels, seed=2, batch_size=16)
    names = [("clean", 0), *((name, level) for name in ("fgsm", "pgd") for level in (1, 2, 4))]
    assert [(cell.name, cell.severity) for cell in cells] == names
    attacked = pgd_attack(network, images, labels, 4 / 255, seed=2)
    assert (cells[-1].accuracy, cells[-1].auc) == pytest.approx(expected(network, attacked, labels))
    assert cells[-1].auc < cells[4].auc < cells[0].auc
    with pytest.raises(ValueError, match="attacks"):
        attack_scores(network, images, labels, attacks=["pdg"])


def test_labels_and_outputs_that_cannot_be_scored(data):
    images, labels = data
    with pytest.raises(ValueError, match="each of the network's 4 classes"):
        robustness_score(Linear(4), images, labels)
    broken = Linear()
    nn.init.constant_(broken.weight, torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        robustness_score(broken, images, labels)


def test_balanced_rows():
    labels = torch.tensor([0] * 50 + [1] * 20 + [2] * 3)
    rows = balanced_rows(labels, 30, seed=1)
    assert labels[rows].bincount().tolist() == [10, 10, 3]
    assert len(rows.unique()) == len(rows)
    assert torch.equal(rows, balanced_rows(labels, 30, seed=1))
    assert not torch.equal(rows, balanced_rows(labels, 30, seed=2))
    with pytest.raises(ValueError, match="count"):
        balanced_rows(labels, 2)


def test_report(data, tmp_path):
    images, labels = data
    batches = [{"image": images[:25], "label": labels[:25]}, {"image": images[25:], "label": labels[25:]}]
    network = Linear()
    result = write_robustness_report(network, batches, tmp_path / "out", num_attacked=12)
    assert result == robustness_score(network, images, labels, batch_size=32)
    with (tmp_path / "out/robustness.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1 + 30 + 6
    assert float(rows[1]["auc"]) == result.cells[0].auc
    report = json.loads((tmp_path / "out/robustness.json").read_text())
    assert report["score"] == result.score
    assert report["attacked_images"] == 12
    assert "not for clinical use" in report["intended_use"]
    assert (tmp_path / "out/robustness.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(FileExistsError, match="nothing was written"):
        write_robustness_report(network, batches, tmp_path / "out")
