import numpy as np

from monai_deqkan.visualize.slice_sheet import slice_sheet


def test_slices_keep_their_pixels_below_their_labels():
    volume = np.zeros((2, 320, 160))
    volume[1, 10, 20] = volume[0, 30, 40:] = 7.0  # more than half a percent: the window's end
    sheet = np.asarray(slice_sheet(volume, ["first", "second"], "note"))
    assert sheet.shape == (320 + 32, 320)
    assert sheet[16 + 10, 160 + 20] == 255
    assert sheet[16 + 30, 40] == 255
    assert sheet[16 + 31, 40] == 0
    assert sheet[:16].any()
    assert sheet[-16:].any()


def test_an_empty_volume_is_black():
    assert not np.asarray(slice_sheet(np.zeros((1, 320, 320)), [""], "")).any()
