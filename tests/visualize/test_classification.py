from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    average_precision_score,
    confusion_matrix,
    precision_recall_curve,
    roc_auc_score,
    roc_curve,
)

from monai_deqkan.visualize import plot_confusion_matrix, plot_image_grid, plot_precision_recall, plot_roc


def _legend(figure):
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


@pytest.mark.parametrize("decimals", [1, 8], ids=["ties", "no ties"])
def test_binary_roc_matches_sklearn(decimals):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 80)
    scores = np.round(labels + rng.normal(0, 1, 80), decimals)
    baseline = np.round(rng.normal(0, 1, 80), decimals)
    figure = plot_roc(labels, torch.tensor(scores), ["healthy", "lesion"], {"linear": baseline})
    for line, values in zip(figure.axes[0].lines, (scores, baseline), strict=False):
        false_rate, true_rate, _ = roc_curve(labels, values, drop_intermediate=False)
        np.testing.assert_allclose(line.get_xdata(), false_rate)
        np.testing.assert_allclose(line.get_ydata(), true_rate)
    assert _legend(figure) == [
        f"model: AUC {roc_auc_score(labels, scores):.3f}",
        f"linear: AUC {roc_auc_score(labels, baseline):.3f}",
        "chance: AUC 0.500",
    ]


def test_two_columns_use_the_second_and_a_column_alone_is_class_one():
    labels, scores = [0, 1, 1, 0], np.array([[0.9, 0.1], [0.6, 0.4], [0.1, 0.9], [0.5, 0.5]])
    both, column, flat = (
        _legend(plot_roc(labels, values, ["a", "b"])) for values in (scores, scores[:, 1:], scores[:, 1])
    )
    assert both == column == flat
    assert both[0] == "model: AUC 0.750"


def test_one_vs_rest_roc_matches_sklearn():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, 90)
    scores = np.eye(3)[labels] + rng.normal(0, 1, (90, 3))
    expected = [
        f"model, {name}: AUC {roc_auc_score(labels == k, scores[:, k]):.3f}" for k, name in enumerate(["x", "y", "z"])
    ]
    assert _legend(plot_roc(labels, scores, ["x", "y", "z"]))[:3] == expected


def test_roc_of_a_single_class_is_undefined_not_an_error():
    figure = plot_roc([1, 1, 1], [0.1, 0.5, 0.2], ["healthy", "lesion"])
    assert _legend(figure)[0] == "model: AUC undefined (one class only)"
    assert len(figure.axes[0].lines[0].get_xdata()) == 0


@pytest.mark.parametrize(
    ("labels", "scores", "match"),
    [
        ([], [], "none of them empty"),
        ([0, 1], [0.1, 0.2, 0.3], r"shape \(2, 2\)"),
        ([0, 2], [0.1, 0.2], "class numbers from 0 to 1"),
        ([0, 1], [0.1, float("nan")], "must be finite; 1 of 2"),
        ([0, 1], 0.5, r"shape \(2, 2\)"),
    ],
)
def test_roc_rejects_bad_input(labels, scores, match):
    with pytest.raises(ValueError, match=match):
        plot_roc(labels, scores, ["a", "b"])


def test_confusion_counts_match_sklearn():
    rng = np.random.default_rng(2)
    labels, predictions = rng.integers(0, 3, (2, 50))
    figure = plot_confusion_matrix(torch.tensor(labels), predictions, ["x", "$y", "_z"])
    panel = figure.axes[0]
    counts = np.array([int(text.get_text().split()[0]) for text in panel.texts]).reshape(3, 3)
    np.testing.assert_array_equal(counts, confusion_matrix(labels, predictions))
    np.testing.assert_allclose(panel.images[0].get_array(), confusion_matrix(labels, predictions, normalize="true"))
    assert f"accuracy {np.mean(labels == predictions):.1%}" in panel.get_title()


def test_confusion_of_an_absent_class_is_zero():
    panel = plot_confusion_matrix([0, 0], [0, 1], ["a", "b"]).axes[0]
    np.testing.assert_array_equal(panel.images[0].get_array(), [[0.5, 0.5], [0, 0]])


def test_confusion_rejects_lengths_that_differ():
    with pytest.raises(ValueError, match="`labels` has 2, `predictions` has 3"):
        plot_confusion_matrix([0, 1], [0, 1, 1], ["a", "b"])


def test_grid_shows_each_image_upright_with_its_verdict():
    images = [np.arange(6.0).reshape(2, 3), torch.eye(4)]
    figure = plot_image_grid(images, ["first", "second"], correct=[True, False])
    for panel, image in zip(figure.axes, images, strict=True):
        np.testing.assert_array_equal(panel.images[0].get_array(), np.asarray(image))
        assert panel.images[0].origin == "upper"
        assert panel.get_aspect() == 1
    assert [panel.get_title() for panel in figure.axes] == ["first\nright", "second\nwrong"]


@pytest.mark.parametrize(
    ("images", "titles", "error", "match"),
    [
        ([], [], ValueError, "at least one"),
        ([np.ones((2, 2))], [], ValueError, "`titles` has 0"),
        ([np.full((2, 2), np.nan)], ["a"], ValueError, r"`images\[0\]` must be finite; 4 of 4"),
        ([np.ones((1, 2, 2))], ["a"], ValueError, r"2 axes.*\(1, 2, 2\)"),
        ([[["a"]]], ["a"], TypeError, "numbers"),
    ],
)
def test_grid_rejects_bad_input(images, titles, error, match):
    with pytest.raises(error, match=match):
        plot_image_grid(images, titles)


def test_precision_recall_matches_sklearn_and_its_band_holds_the_curve():
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, 60)
    scores = np.round(labels + rng.normal(0, 1, 60), 1)
    figure = plot_precision_recall(labels, scores, ["healthy", "lesion"], num_resamples=50)
    precision, recall, _ = precision_recall_curve(labels, scores)
    line = figure.axes[0].lines[0]
    np.testing.assert_allclose(line.get_xdata(), recall)
    np.testing.assert_allclose(line.get_ydata(), precision)
    assert _legend(figure) == [f"lesion: AP {average_precision_score(labels, scores):.3f}"]
    assert figure.axes[0].lines[1].get_ydata()[0] == pytest.approx(labels.mean())
    assert len(figure.axes[0].collections) == 1


def test_bands_are_narrow_where_there_are_many_cases_and_wide_where_there_are_few():
    rng = np.random.default_rng(4)
    areas = []
    for count in (40, 4000):
        labels = np.repeat([0, 1], count // 2)
        figure = plot_roc(labels, labels + rng.normal(0, 1, count), ["healthy", "lesion"], num_resamples=40)
        (band,) = figure.axes[0].collections
        corners = band.get_paths()[0].vertices
        x, y = corners.T
        areas.append(abs(np.sum(x[1:] * y[:-1] - x[:-1] * y[1:])) / 2)
    assert areas[0] > 5 * areas[1] > 0


def test_precision_recall_of_a_single_class_is_undefined_not_an_error():
    assert _legend(plot_precision_recall([1, 1], [0.1, 0.5], ["a", "b"], num_resamples=5)) == ["b: AP undefined"]
