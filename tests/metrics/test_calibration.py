import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from sklearn.metrics import balanced_accuracy_score
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from monai_deqkan.metrics import choose_threshold, expected_calibration_error, fit_temperature, reliability_bins


def sample(count, classes, seed=0, sharpness=1.0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    return labels, sharpness * (1.5 * np.eye(classes)[labels] + rng.normal(0, 1, (count, classes)))


@pytest.mark.parametrize("classes", [2, 4])
def test_calibration_error_is_that_of_torchmetrics(classes):
    labels, logits = sample(300, classes, sharpness=2.0)
    table = softmax(logits, axis=1)
    truth, rows = torch.tensor(labels), torch.tensor(table)
    if classes == 2:
        expected = binary_calibration_error(rows[:, 1].contiguous(), truth, n_bins=15)
    else:
        expected = multiclass_calibration_error(rows, truth, num_classes=classes, n_bins=15)
    assert expected_calibration_error(truth, rows.double()) == pytest.approx(float(expected), abs=1e-6)


def test_bins_by_hand():
    bins = reliability_bins([1, 0, 1, 1], [[1, 0], [0.75, 0.25], [0.7, 0.3], [0, 1]], num_bins=4)
    assert bins.num_cases.tolist() == [1, 2, 0, 1]
    assert bins.frequency[[0, 1, 3]].tolist() == [1.0, 0.5, 1.0]
    np.testing.assert_allclose(bins.confidence, [0, 0.275, np.nan, 1])


def test_temperature_is_the_likeliest_one_where_there_are_many_images():
    labels, logits = sample(1000, 3, sharpness=2.5)

    def loss(t):
        return -log_softmax(logits / t[0], axis=1)[np.arange(1000), labels].mean()

    expected = minimize(loss, [1.0], method="Nelder-Mead").x[0]
    assert fit_temperature(torch.tensor(logits), labels) == pytest.approx(expected, rel=0.01)
    assert expected > 1.3


def test_few_images_hardly_move_the_temperature_and_separable_ones_stop_at_the_bound():
    labels, logits = np.array([0, 1]), np.array([[3.0, 0.0], [0.0, 3.0]])
    assert 0.8 < fit_temperature(logits, labels) < 1.0
    many = fit_temperature(np.tile(logits, (5000, 1)), np.tile(labels, 5000), bounds=(0.5, 2.0))
    assert many == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("seed", range(2))
def test_threshold_is_the_best_of_all(seed):
    labels, logits = sample(60, 2, seed)
    table = softmax(logits - [0.0, 1.0], axis=1)
    chosen = choose_threshold(labels, table, num_standard_errors=0)
    scores = [balanced_accuracy_score(labels, table[:, 1] >= t) for t in np.linspace(0.001, 0.999, 80)]
    assert balanced_accuracy_score(labels, table[:, 1] >= chosen) >= max(scores) - 1e-12


def test_threshold_stays_at_a_half_where_that_is_as_good():
    table = np.array([[0.7, 0.3], [0.45, 0.55]])
    assert choose_threshold([0, 1], table) == 0.5
    assert choose_threshold([1, 1], table) == 0.5
    shifted = np.array([[0.3, 0.7], [0.1, 0.9]])
    assert 0.7 < choose_threshold([0, 1] * 50, np.tile(shifted, (50, 1))) < 0.9


def test_a_threshold_that_the_images_cannot_tell_from_a_half_is_a_half():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 200)
    chance = np.clip(np.where(labels == 1, 0.73, 0.33) + rng.normal(0, 0.18, 400), 0.01, 0.99)
    table = np.stack([1 - chance, chance], axis=1)
    best, chosen = choose_threshold(labels, table, num_standard_errors=0), choose_threshold(labels, table)
    assert abs(best - 0.5) > 0.01
    assert chosen == 0.5
    reached, most = (balanced_accuracy_score(labels, chance >= value) for value in (chosen, best))
    assert most - reached < np.sqrt(2 * most * (1 - most) / 200)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"shapes \(N,\) and \(N, C\)"):
        reliability_bins([0, 1], [0.2, 0.4])
    with pytest.raises(ValueError, match="classes from 0 to 1; got"):
        reliability_bins([0, 2], [[0.2, 0.8], [0.5, 0.5]])
    with pytest.raises(ValueError, match="Apply a softmax"):
        expected_calibration_error([0], [[-3.0, 2.0]])
    with pytest.raises(ValueError, match="must be finite; 1 values"):
        fit_temperature([[np.nan, 1.0]], [0])
    with pytest.raises(ValueError, match="hold 1 between"):
        fit_temperature([[0.0, 1.0]], [0], bounds=(1.5, 2))
    with pytest.raises(ValueError, match="probabilities of 3"):
        choose_threshold([0], [[0.2, 0.3, 0.5]])
