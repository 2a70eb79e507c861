"""ImageTable and WorstCases against scikit-learn, SciPy and masks whose distances are known."""

import csv

import matplotlib.image
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from scipy.ndimage import binary_erosion, distance_transform_edt
from sklearn.metrics import f1_score, jaccard_score, precision_score, recall_score

from monai_deqkan.handlers import ImageTable, WorstCases

# MONAI's Hausdorff distance calls its own function so.
pytestmark = pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")
NAMES = ["background", "lung", "heart"]


def sample(path, prediction, reference, affine=None):
    image = torch.rand(1, *np.shape(prediction), generator=torch.Generator().manual_seed(0))
    affine = torch.eye(4).double() if affine is None else torch.as_tensor(affine, dtype=torch.float64)
    meta = {"filename_or_obj": str(path), "original_affine": affine, "PatientName": "secret"}
    one_hot = [torch.nn.functional.one_hot(torch.as_tensor(m), 3).movedim(-1, 0) for m in (prediction, reference)]
    return {"image": MetaTensor(image, affine=affine, meta=meta), "pred": one_hot[0], "label": one_hot[1]}


def scores_of(tmp_path, samples):
    engine = Engine(lambda engine, index: samples[index])
    ImageTable(tmp_path / "out", tmp_path, NAMES).attach(engine)
    state = engine.run(range(len(samples)))
    with (tmp_path / "out" / "images.csv").open(newline="") as file:
        return list(csv.DictReader(file)), state.metrics


def edge_distances(prediction, reference, spacing):
    """Distances from the edge of each mask to the other's, both ways."""
    edges = [mask & ~binary_erosion(mask) for mask in (prediction, reference)]
    ways = [(edges[0], edges[1]), (edges[1], edges[0])]
    return [distance_transform_edt(~there, sampling=spacing)[here] for here, there in ways]


def test_scores_agree_with_scikit_learn_and_scipy(tmp_path):
    rng = np.random.default_rng(0)
    reference = np.zeros((24, 30), dtype=np.int64)
    reference[4:12, 5:20], reference[15:20, 10:25] = 1, 2
    prediction = np.roll(reference, (2, -1), (0, 1))
    prediction[rng.random(prediction.shape) < 0.02] = 1
    affine = np.diag([0.5, 2.0, 1.0, 1.0])
    (row,), metrics = scores_of(tmp_path, [[sample(tmp_path / "a" / "x.nii.gz", prediction, reference, affine)]])
    assert (row["image"], row["distance_unit"]) == ("a/x.nii.gz", "mm")
    for index, name in ((1, "lung"), (2, "heart")):
        truth, guess = reference == index, prediction == index
        there, back = edge_distances(guess, truth, (0.5, 2.0))
        expected = {
            "dice": f1_score(truth.ravel(), guess.ravel()),
            "iou": jaccard_score(truth.ravel(), guess.ravel()),
            "sensitivity": recall_score(truth.ravel(), guess.ravel()),
            "precision": precision_score(truth.ravel(), guess.ravel()),
            "hd95": max(np.percentile(there, 95), np.percentile(back, 95)),
            "surface_distance": np.concatenate([there, back]).mean(),
        }
        for score, value in expected.items():
            assert float(row[f"{score}_{name}"]) == pytest.approx(value, abs=1e-3), (score, name)
            assert metrics[f"val_{score}_{name}"] == pytest.approx(value, abs=1e-3)
    assert metrics["val_hd95"] == pytest.approx((metrics["val_hd95_lung"] + metrics["val_hd95_heart"]) / 2)
    assert "secret" not in (tmp_path / "out" / "images.csv").read_text()


def test_classes_that_a_mask_lacks(tmp_path):
    empty, lung = np.zeros((6, 6), dtype=np.int64), np.zeros((6, 6), dtype=np.int64)
    lung[1:4, 1:4] = 1
    cases = [sample(tmp_path / "missed.png", empty, lung), sample(tmp_path / "invented.png", lung, empty)]
    rows, metrics = scores_of(tmp_path, [cases, [sample(tmp_path / "right.png", lung, lung)]])
    found = [
        {name: row[f"{name}_lung"] for name in ("dice", "iou", "sensitivity", "precision", "hd95")} for row in rows
    ]
    zero, one = "0.0000", "1.0000"
    assert found[0] == {"dice": zero, "iou": zero, "sensitivity": zero, "precision": "", "hd95": ""}
    assert found[1] == {"dice": zero, "iou": zero, "sensitivity": "", "precision": zero, "hd95": ""}
    assert found[2] == {"dice": one, "iou": one, "sensitivity": one, "precision": one, "hd95": zero}
    assert {row["dice_heart"] for row in rows} == {""}
    assert {row["distance_unit"] for row in rows} == {"pixel"}
    assert metrics["val_dice_lung"] == pytest.approx(1 / 3)
    assert metrics["val_sensitivity"] == pytest.approx(1 / 2)
    assert np.isnan(metrics["val_dice_heart"])


def test_worst_cases_come_in_order_of_their_dice(tmp_path, monkeypatch):
    shown = {}

    def keep(*arguments, **settings):
        shown.update(arguments=arguments, settings=settings)
        return original(*arguments, **settings)

    module = __import__("monai_deqkan.handlers.worst_cases", fromlist=["plot_segmentation"])
    original = module.plot_segmentation
    monkeypatch.setattr(module, "plot_segmentation", keep)
    lung, none = np.zeros((5, 8), dtype=np.int64), np.zeros((5, 8), dtype=np.int64)
    lung[1:4, 1:5] = 1
    half = lung.copy()
    half[1:4, 3:5] = 0
    volume = np.stack([none, lung, none], axis=-1)
    samples = [
        [sample(tmp_path / "good.png", lung, lung), sample(tmp_path / "empty.png", none, none)],
        [
            sample(tmp_path / "volume.nii", np.zeros_like(volume), volume, np.diag([1.0, 2.0, 5.0, 1.0])),
            sample(tmp_path / "a" / "b.png", half, lung),
        ],
    ]
    engine = Engine(lambda engine, index: samples[index])
    WorstCases(tmp_path / "out", tmp_path, NAMES, num_cases=2).attach(engine)
    engine.run(range(2))
    _, references, predictions, names, titles = shown["arguments"]
    assert titles == ["Dice 0.000\nvolume.nii", "Dice 0.667\na/b.png"]  # 2 * 6 / (6 + 12)
    assert names == NAMES
    # The slice with most errors, its first row the patient's front; columns of 1 mm beside rows of 2 mm.
    assert np.array_equal(references[0], np.rot90(lung).repeat(2, axis=0))
    assert np.array_equal(predictions[1], half.T)
    assert matplotlib.image.imread(tmp_path / "out" / "worst.png").shape[1] == 900
