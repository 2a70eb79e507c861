import numpy as np
import pytest
import torch
from scipy.special import expit, softmax
from scipy.stats import binom, mannwhitneyu, norm
from sklearn import metrics

from monai_deqkan.metrics import (
    bootstrap_intervals,
    classification_scores,
    decide,
    expected_calibration_error,
    stratified_resamples,
)


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5, 1.0])
def test_two_classes_compare_the_second_with_the_threshold(threshold):
    for chance in np.linspace(0, 1, 21):
        chosen = decide(torch.tensor([1 - chance, chance]), threshold)
        assert chosen.tolist() == ([0, 1] if chance >= threshold else [1, 0])


def test_more_classes_take_the_likeliest_whatever_the_threshold():
    rows = torch.rand(50, 4, generator=torch.Generator().manual_seed(0)).softmax(1)
    for row in rows:
        assert torch.equal(decide(row, 0.99), torch.eye(4)[row.argmax()])


def test_dtype_is_kept():
    assert decide(torch.tensor([0.4, 0.6], dtype=torch.float64)).dtype == torch.float64


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"`threshold` must lie in \[0, 1\]; got 1.5"):
        decide(torch.tensor([0.4, 0.6]), 1.5)
    for wrong in (torch.rand(3, 2), torch.rand(1)):
        with pytest.raises(ValueError, match=r"shape \(C,\) with C >= 2"):
            decide(wrong)


def sample(count, classes, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    return labels, softmax(np.eye(classes)[labels] + rng.normal(0, 1, (count, classes)), axis=1)


@pytest.mark.parametrize("threshold", [0.3, 0.5])
def test_scores_of_two_classes_are_those_of_scikit_learn(threshold):
    labels, table = sample(80, 2)
    table = table.round(1)  # ties
    guess = table[:, 1] >= threshold
    scores = classification_scores(torch.tensor(labels), torch.tensor(table), threshold)
    assert scores == pytest.approx(
        {
            "accuracy": metrics.accuracy_score(labels, guess),
            "balanced_accuracy": metrics.balanced_accuracy_score(labels, guess),
            "auc": metrics.roc_auc_score(labels, table[:, 1]),
            "average_precision": metrics.average_precision_score(labels, table[:, 1]),
            "sensitivity": metrics.recall_score(labels, guess),
            "specificity": metrics.recall_score(labels, guess, pos_label=0),
            "f1": metrics.f1_score(labels, guess),
            "ece": expected_calibration_error(labels, table),
        },
        abs=1e-6,
    )


def test_scores_of_more_classes_are_means_of_one_against_the_rest():
    labels, table = sample(90, 4)
    guess = table.argmax(axis=1)
    scores = classification_scores(labels, table)
    specificity = [metrics.recall_score(labels != c, guess != c) for c in range(4)]
    assert scores["auc"] == pytest.approx(metrics.roc_auc_score(labels, table, multi_class="ovr"))
    assert scores["f1"] == pytest.approx(metrics.f1_score(labels, guess, average="macro"))
    assert scores["sensitivity"] == pytest.approx(metrics.balanced_accuracy_score(labels, guess))
    assert scores["specificity"] == pytest.approx(np.mean(specificity))


def test_what_one_class_alone_leaves_undefined():
    scores = classification_scores([1, 1, 1], [[0.2, 0.8], [0.4, 0.6], [0.9, 0.1]])
    assert scores["sensitivity"] == scores["accuracy"] == scores["balanced_accuracy"] == pytest.approx(2 / 3)
    assert all(np.isnan(scores[name]) for name in ("auc", "average_precision", "specificity"))


def test_interval_of_the_accuracy_is_the_binomial_one():
    # All images of one class and one probability: the resampled count of right ones is binomial.
    labels, chance = np.zeros(100, int), np.array([0.2] * 80 + [0.7] * 20)
    found = bootstrap_intervals(classification_scores, labels, np.stack((1 - chance, chance), axis=1))
    low, high = binom(100, 0.8).ppf([0.025, 0.975]) / 100
    assert found["accuracy"].value == 0.8
    assert found["accuracy"].low == pytest.approx(low, abs=0.015)
    assert found["accuracy"].high == pytest.approx(high, abs=0.015)
    assert np.isnan(found["auc"].low)


def test_intervals_cover_the_truth_and_repeat():
    # AUC of unit normals d apart: Phi(d / sqrt(2)).
    truth, inside = norm.cdf(1 / np.sqrt(2)), 0
    for seed in range(15):
        rng = np.random.default_rng(seed)
        labels = np.repeat([0, 1], 40)
        chance = expit(rng.normal(labels, 1))
        rows = np.stack((1 - chance, chance), axis=1)

        def auc(y, p):
            return {"auc": mannwhitneyu(p[y == 1, 1], p[y == 0, 1]).statistic / 1600}

        found = bootstrap_intervals(auc, labels, rows, num_resamples=80, seed=seed)["auc"]
        inside += found.low <= truth <= found.high
        if seed == 0:
            assert found == bootstrap_intervals(auc, labels, rows, num_resamples=80)["auc"]
            wide = bootstrap_intervals(auc, labels, rows, num_resamples=80, level=0.5)["auc"]
            assert found.low < wide.low < wide.high < found.high
    assert inside >= 12


def test_resamples_keep_the_number_of_each_class():
    labels = np.array([0, 2, 2, 1, 2, 0])
    for rows in stratified_resamples(labels, 20):
        assert sorted(labels[rows]) == [0, 0, 1, 2, 2, 2]
