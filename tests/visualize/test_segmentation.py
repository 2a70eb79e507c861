from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba

from monai_deqkan.visualize import plot_segmentation

NAMES = ["background", "CSF", "white matter"]
IMAGE = np.arange(12.0).reshape(3, 4)
MASK = np.array([[0, 0, 1, 1], [0, 2, 2, 1], [0, 0, 0, 2]])


def test_overlays_color_each_class_as_the_legend_says():
    figure = plot_segmentation([IMAGE], [torch.tensor(MASK)], [MASK.T.reshape(3, 4)], NAMES, ["Dice 0.40"], opacity=0.3)
    image, reference, prediction = figure.axes
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == NAMES[1:]
    colors = [(0, 0, 0, 0), *(to_rgba(patch.get_facecolor(), 0.3) for patch in legend.get_patches())]
    assert len(set(colors)) == 3
    for panel, mask in ((reference, MASK), (prediction, MASK.T.reshape(3, 4))):
        np.testing.assert_array_equal(panel.images[0].get_array(), IMAGE)
        np.testing.assert_allclose(panel.images[1].get_array(), np.array(colors)[mask])
        assert panel.images[1].origin == "upper"
    assert len(image.images) == 1
    assert [panel.get_title() for panel in figure.axes] == ["Image 1", "Reference", "Prediction: Dice 0.40"]


def test_each_case_has_a_row_and_may_have_its_own_size():
    figure = plot_segmentation([IMAGE, IMAGE.T], [MASK, MASK.T], [MASK * 0, MASK.T * 0], NAMES)
    np.testing.assert_array_equal(figure.axes[3].images[0].get_array(), IMAGE.T)
    assert not figure.axes[5].images[1].get_array().any()


def test_outlines_run_around_each_mask():
    predicted = np.zeros((3, 4), dtype=int)
    predicted[0, 0] = 1
    figure = plot_segmentation([IMAGE], [(MASK == 1).astype(int)], [predicted], NAMES, outlines=True)
    reference, prediction = figure.axes[0].collections
    for outline, mask in ((reference, MASK == 1), (prediction, predicted == 1)):
        rows, columns = np.nonzero(mask)
        corners = outline.get_paths()[0].get_extents()
        assert (corners.x0, corners.x1) == (columns.min() - 0.5, columns.max() + 0.5)
        assert (corners.y0, corners.y1) == (rows.min() - 0.5, rows.max() + 0.5)
    assert [line.get_linestyle() for line in figure.legends[0].get_lines()] == ["-", "--"]


@pytest.mark.parametrize(
    ("images", "masks", "predictions", "titles", "match"),
    [
        ([], [], [], None, "at least one"),
        ([IMAGE], [MASK], [], None, "`predictions` has 0"),
        ([IMAGE], [MASK], [MASK], ["a", "b"], "`titles` has 2"),
        ([IMAGE], [MASK.T], [MASK], None, r"`masks\[0\]` must have shape \(3, 4\)"),
        ([IMAGE], [MASK], [MASK * 255], None, "class numbers from 0 to 2"),
        ([IMAGE], [MASK], [MASK * 0.5], None, "class numbers from 0 to 2"),
        ([IMAGE * np.nan], [MASK], [MASK], None, "finite"),
    ],
)
def test_bad_input_is_rejected(images, masks, predictions, titles, match):
    with pytest.raises(ValueError, match=match):
        plot_segmentation(images, masks, predictions, NAMES, titles)
