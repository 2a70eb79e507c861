from __future__ import annotations

import numpy as np
import pytest
import torch

from monai_deqkan.visualize import plot_residuals


def test_lines_hold_the_histories_and_the_median_keeps_stopped_samples():
    histories = [[1.0, 0.1, 0.01, 0.001], torch.tensor([2.0, 0.2]), np.array([4.0, 0.4, 0.04])]
    panel = plot_residuals(histories, rtol=1e-2).axes[0]
    for line, history in zip(panel.lines, histories, strict=False):
        np.testing.assert_allclose(line.get_ydata(), np.asarray(history))
        np.testing.assert_array_equal(line.get_xdata(), np.arange(1, len(history) + 1))
    np.testing.assert_allclose(panel.lines[3].get_ydata(), [2.0, 0.2, 0.04, 0.04])
    np.testing.assert_array_equal(panel.lines[4].get_ydata(), [0.01, 0.01])
    assert panel.get_yscale() == "log"


def test_non_finite_residuals_leave_gaps_and_are_counted():
    panel = plot_residuals([[1.0, float("inf"), 0.5], [1.0, 0.5, float("nan")]]).axes[0]
    np.testing.assert_array_equal(panel.lines[0].get_ydata(), [1.0, np.nan, 0.5])
    np.testing.assert_array_equal(panel.lines[2].get_ydata(), [1.0, 0.5, 0.5])
    assert "2 with non-finite residuals" in [text.get_text() for text in panel.get_legend().get_texts()]


def test_all_zero_residuals_can_be_drawn(tmp_path):
    plot_residuals([[0.0, 0.0]]).savefig(tmp_path / "zero.png")
    assert plot_residuals([[0.0, 0.0]]).axes[0].get_yscale() == "linear"


@pytest.mark.parametrize(
    ("histories", "rtol", "match"),
    [
        ([], None, "at least one sample"),
        ([[1.0], []], None, r"`histories\[1\]`.*shape \(0,\)"),
        ([[[1.0]]], None, "1-D"),
        ([[1.0, -0.1]], None, "got -0.1"),
        ([[1.0]], 0.0, "`rtol`"),
    ],
)
def test_bad_input_is_rejected(histories, rtol, match):
    with pytest.raises(ValueError, match=match):
        plot_residuals(histories, rtol)
