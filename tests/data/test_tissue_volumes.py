from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import voxel_sizes
from scipy import ndimage

from monai_deqkan.data import tissue_volumes, write_sample


def test_volumes_lie_where_their_affines_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tissue_volumes, "_COUNTS", {"train": 2, "val": 1, "test": 1})
    monkeypatch.setattr(tissue_volumes, "_SIZES", ((36, 40),) * 3)
    folder = write_sample("brain_tissue_volumes", tmp_path / "sample")
    (t1, *_), affine = tissue_volumes._load_maps()
    for part, count in (("train", 2), ("val", 1), ("test", 1)):
        for index in range(count):
            image, mask = (nib.load(folder / part / kind / f"volume_{index}.nii.gz") for kind in ("images", "masks"))
            assert np.array_equal(image.affine, mask.affine)
            assert np.allclose(voxel_sizes(image.affine), 2.0, atol=1e-5)
            assert (np.linalg.det(image.affine) < 0) == (index % 2 == 1)
            assert 1e-3 < np.abs(image.affine[:3, :3] / 2 - np.diag(np.sign(np.diag(image.affine)[:3]))).max() < 0.3
            pixels, labels = np.asarray(image.dataobj), np.asarray(mask.dataobj)
            assert np.unique(labels).tolist() == [0, 1, 2, 3]
            means = [pixels[labels == value].mean() for value in (1, 2, 3)]
            assert means == sorted(means)
            # Taken from the template by the affine alone, without the deformation: much the same picture.
            points = np.einsum("ij,jxyz->ixyz", (np.linalg.inv(affine) @ image.affine)[:3], homogeneous(pixels.shape))
            undeformed = ndimage.map_coordinates(t1, points, order=1)
            assert np.corrcoef(undeformed.ravel(), pixels.ravel())[0, 1] > 0.6


def homogeneous(shape: tuple[int, ...]) -> np.ndarray:
    return np.concatenate([np.indices(shape), np.ones((1, *shape))])
