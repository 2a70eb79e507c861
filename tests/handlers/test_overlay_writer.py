from types import SimpleNamespace

import nibabel as nib
import numpy as np
import torch
from matplotlib.colors import to_rgb
from monai.data import MetaTensor
from PIL import Image

from monai_deqkan.handlers import MaskOverlayWriter
from monai_deqkan.visualize.segmentation import class_color


def test_a_volume_is_drawn_front_up_with_square_pixels_wherever_its_axes_point(tmp_path):
    # A bright corner at the right, front, top in the patient; the file stores the axes from left to right or back.
    size, spacing = (20, 30, 12), (1.0, 1.0, 2.0)
    for name, sign in (("plain", 1), ("mirrored", -1)):
        volume = np.zeros(size, np.float32)
        volume[12:18, 20:28, 6:11] = 100
        affine = np.diag([sign * spacing[0], spacing[1], spacing[2], 1.0])
        stored = volume if sign > 0 else volume[::-1].copy()
        nib.save(nib.Nifti1Image(stored, affine), tmp_path / f"{name}.nii.gz")
        meta = {"filename_or_obj": str(tmp_path / f"{name}.nii.gz")}
        mask = MetaTensor(torch.from_numpy((stored > 50).astype(np.float32))[None], affine=torch.tensor(affine))
        sample = {"image": MetaTensor(torch.zeros(1, 4, 4, 4), meta=meta), "pred": mask}
        MaskOverlayWriter(tmp_path / "out", tmp_path)._write(SimpleNamespace(state=SimpleNamespace(output=[sample])))
    plain, mirrored = (
        np.asarray(Image.open(tmp_path / "out" / "overlays" / f"{name}.nii.gz_overlay.png"))
        for name in ("plain", "mirrored")
    )
    assert np.array_equal(plain, mirrored)
    zoom = 9  # 30 pixels are drawn as 256 or more
    axial = plain[: 30 * zoom, : 20 * zoom]
    colored = np.argwhere((axial != axial[..., :1]).any(-1))
    assert colored.min(0).tolist() == [2 * zoom, 12 * zoom]  # rows from the front: 30 - 28; columns from the left
    assert colored.max(0).tolist() == [10 * zoom - 1, 18 * zoom - 1]
    start = 20 * zoom + 4
    coronal = plain[: 24 * zoom, start : start + 20 * zoom]  # 12 slices of 2 mm
    rows = np.argwhere((coronal != coronal[..., :1]).any(-1))[:, 0]
    assert (rows.min(), rows.max()) == (2 * zoom, 12 * zoom - 1)


def test_classes_are_named_below_in_their_colors(tmp_path):
    Image.fromarray(np.full((40, 60), 90, np.uint8)).save(tmp_path / "x.png")
    meta = {"filename_or_obj": str(tmp_path / "x.png")}
    sample = {"image": MetaTensor(torch.zeros(1, 4, 4), meta=meta), "pred": MetaTensor(torch.zeros(1, 60, 40))}
    names = ["background", "liver", "a tumour with a long name"]
    pictures = []
    for given in (None, names):
        writer = MaskOverlayWriter(tmp_path / "out", tmp_path, class_names=given)
        writer._write(SimpleNamespace(state=SimpleNamespace(output=[sample])))
        pictures.append(np.asarray(Image.open(tmp_path / "out" / "overlays" / "x.png_overlay.png")))
    plain, named = pictures
    assert plain.shape == (40, 60, 3)
    assert np.array_equal(named[:40, :60], plain)
    legend = named[40:]
    lines = [np.argwhere((legend == np.round(255 * np.array(to_rgb(class_color(i))))).all(-1))[:, 0] for i in (1, 2)]
    assert len(lines[0]) > 0
    assert lines[1].min() > lines[0].max()  # no room for two in a line
