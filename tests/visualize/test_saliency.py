import numpy as np
import pytest

from monai_deqkan.visualize import overlay_saliency


def test_no_weight_leaves_the_image_and_full_weight_turns_it_yellow():
    image = np.array([[[0.0, 0.5, 1.0]]])
    plain = overlay_saliency(image, np.zeros((1, 3)))
    assert plain[0].tolist() == [[0, 0, 0], [128, 128, 128], [255, 255, 255]]
    colored = overlay_saliency(image, np.array([[0.0, 0.0, 4.0]]), opacity=1.0)
    assert colored[0, :2].tolist() == plain[0, :2].tolist()
    assert colored[0, 2].tolist() == [255, 255, 0]


def test_colors_stay():
    image = np.random.default_rng(0).random((3, 4, 5))
    expected = np.round(255 * np.moveaxis(image, 0, -1))
    np.testing.assert_array_equal(overlay_saliency(image, np.zeros((4, 5))), expected)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"shape \(1 or 3, H, W\).*got \(1, 2, 2\) and \(3, 3\)"):
        overlay_saliency(np.zeros((1, 2, 2)), np.zeros((3, 3)))
