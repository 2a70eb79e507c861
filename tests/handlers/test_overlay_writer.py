from types import SimpleNamespace

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from PIL import Image

from monai_deqkan.handlers import MaskOverlayWriter


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
    axial = plain[:30, :20]
    colored = np.argwhere((axial != axial[..., :1]).any(-1))
    assert colored.min(0).tolist() == [2, 12]  # rows from the front: 30 - 28; columns from the left
    assert colored.max(0).tolist() == [9, 17]
    coronal = plain[:24, 24:44]  # 12 slices of 2 mm
    rows = np.argwhere((coronal != coronal[..., :1]).any(-1))[:, 0]
    assert rows.min() in (1, 2, 3)
    assert rows.max() in (11, 12)
