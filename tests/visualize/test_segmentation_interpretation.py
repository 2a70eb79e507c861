import numpy as np
import pytest
import torch
from torch import nn

from monai_deqkan.networks.layers import KANConv2d
from monai_deqkan.visualize import segmentation_interpretation_report
from monai_deqkan.visualize.segmentation_interpretation import plot_channels, plot_filters, plot_pruning


def filter_row(label, score=0.9):
    return {"label": label, "score": score, "nearest": "edge", "direction": [0.0, 1.0], "linear_share": 0.75}


def function(shape, simple):
    return {
        **{"edge": "0 to 0", "importance": 1.0, "share_of_layer": 0.45, "shape": shape},
        **{"formula": "1 sin(2 x)", "r2": 0.99 if simple else 0.5, "is_simple": simple},
    }


@pytest.fixture
def numbers():
    layer = {"layer": "0", "inputs": 1, "outputs": 2, "edges": 18, "zero_edges": 3, "dead_edges": 6}
    pruning = [
        {"amount": amount, "num_edges": round(18 * (1 - amount)), "dice": dice, "logit_change": 0.1}
        for amount, dice in ((0.0, 0.9), (0.25, 0.895), (0.5, 0.7))
    ]
    return {
        **{"intended_use": "Research only; not for clinical use.", "network": "Net", "images": 3, "dice": 0.9},
        "layers": [
            {
                **layer,
                "half_of_the_signal_in": 2,
                "outside_grid": 0.0625,
                "grid_range": [-3.0, 3.0],
                "positions_per_image": 64.0,
            }
        ],
        "layers_not_called": ["aux"],
        "functions": {"0": [function("sin", True), function("exp", False)]},
        "first_layer": {
            "layer": "0",
            "is_kan": True,
            "detectors": 1,
            "chance": 0.1,
            "filters": [filter_row("edge"), filter_row("other", 0.3)],
        },
        "channels": [
            {"layer": "0", "channel": channel, "dice_lost": lost, "logit_change": 0.2}
            for channel, lost in ((1, 0.3), (0, -0.02))
        ],
        "pruning": pruning,
        **{"edges": 18, "live_edges": 18, "dead_edges": 6},
    }


def page_of(numbers):
    network = nn.Sequential(KANConv2d(1, 2, 3))
    samples = {"0": torch.linspace(-2, 2, 50).reshape(-1, 1, 1, 1)}
    count = len(numbers["first_layer"]["filters"]) if numbers["first_layer"] else 2
    patterns = torch.arange(9.0 * count).reshape(count, 3, 3)
    return segmentation_interpretation_report(numbers, network, samples, patterns).to_html()


def test_conclusions_follow_the_numbers(numbers):
    page = page_of(numbers)
    for text in (
        "33.3%",  # dead edges
        "the layer with most inputs outside its grid is 0 (6.2%). More than 5 % is much",
        "Not used in inference: aux.",
        "1 x edge (borders between bright and dark); 1 x other (no template). 1 of 2 filters look like",
        "no more than chance gives",
        "75% of the curves",
        "together they carry 90.0%",
        "Nearest shapes: 1 sin, 1 no simple formula.",
        "1 of 2 of these curves have one",
        "leans most on channel 1 of 0 (Dice falls by 0.300)",
        "Replacing 1 of them raised Dice",
        "up to 22% of the 18 edges that were not zero yet can go",
        "Research only; not for clinical use.",
    ):
        assert text in page, text


def test_labels_beyond_chance_and_edges_that_were_zero_before(numbers):
    numbers["first_layer"]["filters"] = [*[filter_row("edge")] * 5, *[filter_row("other", 0.3)] * 5]
    for row in numbers["pruning"]:  # half of the edges are zero: taking half of them away takes nothing
        row["num_edges"], row["dice"] = 9, 0.9
    numbers["first_layer"]["detectors"] = 5
    numbers["live_edges"] = 9
    page = page_of(numbers)
    assert "5 of 10 filters detect edges or texture; the others" in page
    assert "already the smallest amount tried costs more" not in page
    assert "no edge that was not zero before" in page


def test_small_losses_are_not_called_bottlenecks(numbers):
    numbers["channels"] = [{"layer": "0", "channel": 1, "dice_lost": 0.002, "logit_change": 0.2}]
    for row in numbers["pruning"]:
        row["dice"] = 0.899
    page = page_of(numbers)
    assert "no channel is needed by itself: the most sensitive one, channel 1 of 0, costs 0.0020" in page
    assert "wins much of the loss back" not in page
    axes = plot_pruning(numbers["pruning"]).axes[0]
    assert axes.get_ylim()[0] > 0.8  # the differences can be seen


def test_what_does_not_apply_is_said(numbers):
    numbers |= {"first_layer": None, "channels": [], "pruning": []}
    assert page_of(numbers).count("This does not apply") == 3
    assert "a plain convolution" not in page_of(numbers)


def test_figures_show_the_numbers(numbers):
    panel = plot_channels(numbers["channels"], ["0"]).axes[0]
    assert list(panel.lines[1].get_xdata()) == [0.3, -0.02]
    assert [text.get_text() for text in panel.texts] == ["1"]  # the most sensitive channel
    assert list(plot_pruning(numbers["pruning"]).axes[0].lines[0].get_ydata()) == [0.9, 0.895, 0.7]
    rows = [filter_row("other", 0.9), filter_row("edge", 0.85)]
    figure = plot_filters(torch.stack([torch.ones(3, 3), -torch.eye(3)]), rows)
    assert [panel.get_title() for panel in figure.axes] == ["1: edge\n0.85", "0: (edge)\n0.90"]
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), -np.eye(3))


def test_slices_of_volumes_stand_side_by_side():
    kernel = torch.arange(27.0).reshape(1, 3, 3, 3)
    picture = plot_filters(kernel, [filter_row("edge")]).axes[0].images[0].get_array()
    assert picture.shape == (3, 3 * 3 + 2)
    np.testing.assert_array_equal(picture[:, 4:7], kernel[0, 1])
