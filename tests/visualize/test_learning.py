from __future__ import annotations

import ast
import inspect
from pathlib import Path

import numpy as np
import pytest

import monai_deqkan.visualize
from monai_deqkan.visualize import plot_bars, plot_learning_curves


def test_no_module_imports_matplotlib_at_its_top_and_none_imports_pyplot():
    files = list(Path(monai_deqkan.visualize.__file__).parent.glob("*.py"))
    assert Path(inspect.getfile(plot_learning_curves)) in files  # the folder that is meant, and not an empty one
    for file in files:
        tree = ast.parse(file.read_text())
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not [node for node in top if "matplotlib" in ast.unparse(node)], file.name
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not [node for node in imports if "pyplot" in ast.unparse(node)], file.name


def test_curves_hold_the_data_and_share_panels_by_unit():
    history = {
        "train loss": [(1, 0.9), (2, 0.5), (3, 0.4)],
        "val loss": [(2, 0.6)],
        "val AUC": [(1, 0.7), (2, float("nan")), (3, 0.9)],
        "val PSNR (dB)": [(1, 28.0), (3, 31.0)],
        "SNR (dB)": [(1, 20.0)],
        "steps": [(1, 12), (2, 9)],
    }
    figure = plot_learning_curves(history)
    panels = {axes.get_ylabel(): axes for axes in figure.axes if axes.get_visible()}
    assert {kind: len(axes.lines) for kind, axes in panels.items()} == {"loss": 2, "score": 1, "dB": 2, "steps": 1}
    lines = {line.get_label(): line for axes in panels.values() for line in axes.lines}
    for name, points in history.items():
        np.testing.assert_array_equal(lines[name].get_xydata(), points)


def test_losses_over_two_decades_get_a_logarithmic_axis():
    wide, narrow = (plot_learning_curves({"loss": [(1, 5.0), (2, end)]}).axes[0] for end in (0.01, 1.0))
    assert (wide.get_yscale(), narrow.get_yscale()) == ("log", "linear")


def test_a_curve_without_finite_values_says_so(tmp_path):
    figure = plot_learning_curves({"loss": [(1, float("nan")), (2, float("inf"))]})
    figure.savefig(tmp_path / "nan.png")
    assert figure.axes[0].get_legend().get_texts()[0].get_text() == "loss (no finite value)"


@pytest.mark.parametrize("history", [{}, {"loss": []}, {"loss": [1.0, 2.0]}, {"loss": [(1, 2, 3)]}])
def test_bad_histories_are_rejected(history):
    with pytest.raises(ValueError, match="at least one"):
        plot_learning_curves(history)


def test_bars_hold_the_numbers_and_say_where_there_is_none():
    values = {"ours": {"PSNR (dB)": 33.2, "NMSE": 0.01}, "zero-filled": {"PSNR (dB)": float("nan")}}
    figure = plot_bars(values, highlight="ours", better={"NMSE": "lower"})
    psnr, nmse = figure.axes
    assert [bar.get_width() for bar in psnr.patches] == [33.2, 0.0]
    assert [bar.get_width() for bar in nmse.patches] == [0.01, 0.0]
    assert [text.get_text() for text in psnr.texts] == ["33.2", "n/a"]
    assert [text.get_text() for text in nmse.texts] == ["0.01", "n/a"]
    assert nmse.get_title() == "NMSE\n(lower is better)"
    assert psnr.patches[0].get_facecolor() != psnr.patches[1].get_facecolor()
    top, bottom = psnr.get_ylim()[1], psnr.get_ylim()[0]
    assert top < 0 < 1 < bottom  # the first method stands above the second


@pytest.mark.parametrize(
    ("values", "options", "match"),
    [
        ({}, {}, "at least one method"),
        ({"a": {}}, {}, "at least one method"),
        ({"ours": {"Dice": 1.0}}, {"highlight": "our"}, "Did you mean 'ours'"),
        ({"ours": {"Dice": 1.0}}, {"better": {"Dice": "up"}}, "higher, lower"),
    ],
)
def test_bad_comparisons_are_rejected(values, options, match):
    with pytest.raises(ValueError, match=match):
        plot_bars(values, **options)
