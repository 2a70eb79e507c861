"""Write label masks in the geometry of the image that they belong to."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config.type_definitions import KeysCollection
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd
from monai.transforms import MapTransform, Transform
from PIL import Image
from torch import Tensor

from monai_deqkan._checks import check_shape

__all__ = ["CheckSameShaped", "SaveMask", "SaveMaskd"]

_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")


class SaveMask(Transform):
    """Write a mask of class indices as ``<image name>_mask.png`` or ``.nii.gz``, with the values of the training masks.

    Pictures (PNG, JPEG, BMP, TIFF) get a PNG, of 16 bits where a value is above 255; every other format, and values
    that no PNG can hold, get NIfTI with the image's affine. The folders below ``dataset_dir`` are kept.

    Args:
        values: pixel value of each class.
        output_dir: folder to write into; made where absent.
        dataset_dir: folder that images were read from.
    """

    def __init__(self, values: Sequence[int], output_dir: str | Path, dataset_dir: str | Path) -> None:
        super().__init__()
        self.values = torch.tensor([int(value) for value in values])
        self.root = Path(dataset_dir).absolute()
        self.output_dir = Path(output_dir)

    def __call__(self, mask: MetaTensor) -> MetaTensor:
        """Write the mask ``(1, *space)`` and return it.

        Raises:
            FileExistsError: if the file is there already.
            ValueError: if the mask has another rank, or an index without a value.
        """
        check_shape("mask", mask, (1, *"HWD"[: mask.ndim - 1]), "Take the argmax over classes first.")
        classes = mask.as_tensor().long().cpu()
        if int(classes.max()) >= len(self.values) or int(classes.min()) < 0:
            raise ValueError(f"Class indices must lie in [0, {len(self.values)}); got up to {int(classes.max())}.")
        source = Path(str(mask.meta["filename_or_obj"])).absolute()
        folder = self.output_dir / (source.parent.relative_to(self.root) if self.root in source.parents else "")
        stem = source.name[: -len(".nii.gz")] if source.name.lower().endswith(".nii.gz") else source.stem
        target = folder / f"{stem}_mask{'.png' if self._fits_png(source) else '.nii.gz'}"
        if target.exists():
            raise FileExistsError(
                f"The mask is there already: {target}. Two images share a name, or choose a new folder."
            )
        folder.mkdir(parents=True, exist_ok=True)
        pixels = self.values[classes[0]].numpy()
        if target.suffix == ".png":
            # MONAI's readers put a picture's columns first.
            Image.fromarray(pixels.T.astype(np.uint8 if self._lie_in(0, 255) else np.uint16)).save(target)
        else:
            small = self._lie_in(0, 255)
            affine = to_affine_nd(3, mask.affine.cpu().numpy())
            nib.save(nib.Nifti1Image(pixels.astype(np.uint8 if small else np.int32), affine), target)
        return mask

    def _fits_png(self, source: Path) -> bool:
        """Tell whether the image is a picture and a PNG can hold the values, 16 bits at most."""
        picture = source.name.lower().endswith(_PICTURES)
        return picture and self._lie_in(0, 65535)

    def _lie_in(self, low: int, high: int) -> bool:
        return low <= int(self.values.min()) <= int(self.values.max()) <= high


class SaveMaskd(MapTransform):
    """Dictionary form of :class:`SaveMask`.

    Args:
        keys: keys of masks.
        values: see :class:`SaveMask`.
        output_dir: see :class:`SaveMask`.
        dataset_dir: see :class:`SaveMask`.
        allow_missing_keys: whether a key may be absent.
    """

    def __init__(
        self,
        keys: KeysCollection,
        values: Sequence[int],
        output_dir: str | Path,
        dataset_dir: str | Path,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.save = SaveMask(values, output_dir, dataset_dir)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write each mask."""
        for key in self.key_iterator(data):
            self.save(data[key])
        return dict(data)


class CheckSameShaped(MapTransform):
    """Check that an image and its mask cover the same pixels.

    Args:
        keys: keys that must agree in their spatial shape.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data unchanged.

        Raises:
            ValueError: if the shapes differ; the message names the files.
        """
        shapes = {key: tuple(_tensor(data[key]).shape[1:]) for key in self.key_iterator(data)}
        if len(set(shapes.values())) > 1:
            files = [str(getattr(data[key], "meta", {}).get("filename_or_obj", key)) for key in shapes]
            raise ValueError(
                f"Image and mask must have the same size; got {list(shapes.values())} for {files}. Resample the mask."
            )
        return dict(data)


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.as_tensor(value)
