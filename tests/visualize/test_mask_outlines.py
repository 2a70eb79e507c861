import numpy as np
import pytest
from matplotlib.colors import to_rgb
from scipy import ndimage

from monai_deqkan.visualize import draw_outlines
from monai_deqkan.visualize.segmentation import class_color


@pytest.mark.parametrize(("size", "width"), [(40, 1), (1000, 2)])
def test_outlines_lie_inside_and_the_rest_is_grey(size, width):
    rng = np.random.default_rng(0)
    image, mask = rng.random((size, size + 7)), np.zeros((size, size + 7), int)
    mask[5:20, 6:30], mask[10:15, 12:20] = 1, 2
    picture = draw_outlines(image, mask, (0.0, 1.0))
    drawn = np.zeros(mask.shape, bool)
    for index in (1, 2):
        inside = mask == index
        line = inside & ~ndimage.binary_erosion(inside, iterations=width, border_value=1)
        drawn |= line
        assert (picture[line] == np.round(255 * np.array(to_rgb(class_color(index))))).all()
    assert (picture[~drawn] == np.round(255 * image[~drawn])[:, None]).all()


def test_an_even_image_is_drawn_and_other_shapes_are_refused():
    assert draw_outlines(np.ones((3, 4)), np.zeros((3, 4))).max() == 0
    with pytest.raises(ValueError, match=r"one shape; got \(3, 4\) and \(4, 3\)"):
        draw_outlines(np.ones((3, 4)), np.zeros((4, 3)))
