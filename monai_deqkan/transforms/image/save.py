"""Write label masks in the geometry of the image that they belong to."""

from __future__ import annotations

import re
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
from numpy.typing import NDArray
from PIL import Image
from pydicom.misc import is_dicom
from torch import Tensor

from monai_deqkan._checks import check_shape
from monai_deqkan.transforms.image.array import has_position

__all__ = ["CheckSameShaped", "SaveMask", "SaveMaskd", "SaveProbability", "SaveProbabilityd"]

_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")


class SaveMask(Transform):
    """Write a mask of class indices as ``<image name>_mask.png`` or ``.nii.gz``, with the values of the training masks.

    Where a file tells the place of its pixels in space (NIfTI, MetaImage, NRRD, slices and volumes in DICOM), the mask
    is NIfTI with the image's affine. Pictures (PNG, JPEG, BMP, TIFF) and radiographs in DICOM get a PNG of their rows
    and columns, of 16 bits where a value is above 255; NIfTI where no PNG can hold the values. The folders below
    ``dataset_dir`` are kept. Of two images that differ in their suffix only, the second keeps it:
    ``<image file>_mask.png``.

    Args:
        values: pixel value of each class.
        output_dir: folder to write into; made where absent.
        dataset_dir: folder that images were read from.
    """

    def __init__(self, values: Sequence[int], output_dir: str | Path, dataset_dir: str | Path) -> None:
        super().__init__()
        self.values = torch.tensor([int(value) for value in values])
        self.files = _OutputFiles(output_dir, dataset_dir)

    def __call__(self, mask: MetaTensor) -> MetaTensor:
        """Write the mask ``(1, *space)`` and return it, with the file's path as ``meta["mask_file"]``.

        Raises:
            FileExistsError: if the file is there already.
            ValueError: if the mask has another rank, or an index without a value.
        """
        check_shape("mask", mask, (1, *"HWD"[: mask.ndim - 1]), "Take the argmax over classes first.")
        classes = mask.as_tensor().long().cpu()
        if int(classes.max()) >= len(self.values) or int(classes.min()) < 0:
            raise ValueError(f"Class indices must lie in [0, {len(self.values)}); got up to {int(classes.max())}.")
        source = Path(str(mask.meta["filename_or_obj"])).absolute()
        as_picture = mask.ndim == 3 and self._lie_in(0, 65535) and _is_picture(source)
        target = self.files.target(source, f"mask{'.png' if as_picture else '.nii.gz'}")
        pixels = self.values[classes[0]].numpy()
        if as_picture:
            # MONAI's readers put a picture's columns first.
            Image.fromarray(pixels.T.astype(np.uint8 if self._lie_in(0, 255) else np.uint16)).save(target)
        else:
            _save_nifti(pixels.astype(np.uint8 if self._lie_in(0, 255) else np.int32), mask, target)
        mask.meta["mask_file"] = str(target)
        return mask

    def _lie_in(self, low: int, high: int) -> bool:
        return low <= int(self.values.min()) <= int(self.values.max()) <= high


class SaveProbability(Transform):
    """Write the probability of each class, in the geometry of the image.

    Next to a PNG mask, ``<image name>_probability_<class>.png`` for each class but the background: 16 bits, 65535 for
    probability 1. Next to a NIfTI mask, one ``<image name>_probability.nii.gz``: float32, classes on the fourth axis,
    the background first.

    Args:
        class_names: name of each class, the background's first.
        output_dir: folder to write into; made where absent.
        dataset_dir: folder that images were read from.
    """

    def __init__(self, class_names: Sequence[str], output_dir: str | Path, dataset_dir: str | Path) -> None:
        super().__init__()
        self.class_names = list(class_names)
        self.files = _OutputFiles(output_dir, dataset_dir)

    def __call__(self, probability: MetaTensor) -> MetaTensor:
        """Write the probabilities ``(C, *space)``, in [0, 1], and return them.

        Raises:
            FileExistsError: if a file is there already.
            ValueError: if there is not one channel per class.
        """
        classes = len(self.class_names)
        check_shape(
            "probability", probability, (classes, *"HWD"[: probability.ndim - 1]), "Give one channel per class."
        )
        pixels = probability.as_tensor().detach().cpu().float().clamp(0, 1).numpy()
        source = Path(str(probability.meta["filename_or_obj"])).absolute()
        if pixels.ndim == 3 and _is_picture(source):
            for name, plane in zip(self.class_names[1:], pixels[1:], strict=True):
                target = self.files.target(source, f"probability_{re.sub(r'[^0-9A-Za-z.-]+', '-', name)}.png")
                Image.fromarray(np.round(65535 * plane.T).astype(np.uint16)).save(target)
        else:
            last = np.moveaxis(pixels, 0, -1)
            volume = last if pixels.ndim == 4 else last[:, :, None]
            _save_nifti(volume, probability, self.files.target(source, "probability.nii.gz"))
        return probability


class _OutputFiles:
    """Name the files that are written for an image, so that no two share one and none is overwritten."""

    def __init__(self, output_dir: str | Path, dataset_dir: str | Path) -> None:
        self.output_dir = Path(output_dir)
        self.root = Path(dataset_dir).expanduser().absolute()
        self.written: dict[Path, Path] = {}

    def target(self, source: Path, kind: str) -> Path:
        """Return ``<folders below the root>/<image name>_<kind>`` in a folder that is there."""
        folder = self.output_dir / (source.parent.relative_to(self.root) if self.root in source.parents else "")
        stem = source.name[: -len(".nii.gz")] if source.name.lower().endswith(".nii.gz") else source.stem
        target = folder / f"{stem}_{kind}"
        if self.written.get(target, source) != source:
            target = folder / f"{source.name}_{kind}"
        if target.exists():
            raise FileExistsError(
                f"The mask is there already: {target}. Two images share a name, or choose a new folder."
            )
        folder.mkdir(parents=True, exist_ok=True)
        self.written[target] = source
        return target


def _is_picture(source: Path) -> bool:
    """Tell whether a file is a picture, or a DICOM file that does not say where in the patient it lies."""
    return source.name.lower().endswith(_PICTURES) or (is_dicom(source) and not has_position(source))


def _save_nifti(pixels: NDArray[Any], like: MetaTensor, target: Path) -> None:
    """Write pixels, of a slice with or without its axis of length one, in the file's own order of axes."""
    affine = to_affine_nd(3, like.affine.cpu().numpy())
    dropped = int(like.meta.get("dropped_axis", -1))
    if dropped >= 0:
        pixels = np.moveaxis(pixels if pixels.ndim > 2 else pixels[..., None], 2, dropped)
        affine[:, :3] = np.insert(affine[:, :2], dropped, affine[:, 2], axis=1)
    image = nib.Nifti1Image(pixels, affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, target)


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


class SaveProbabilityd(MapTransform):
    """Dictionary form of :class:`SaveProbability`.

    Args:
        keys: keys of probabilities.
        class_names: see :class:`SaveProbability`.
        output_dir: see :class:`SaveProbability`.
        dataset_dir: see :class:`SaveProbability`.
        allow_missing_keys: whether a key may be absent.
    """

    def __init__(
        self,
        keys: KeysCollection,
        class_names: Sequence[str],
        output_dir: str | Path,
        dataset_dir: str | Path,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.save = SaveProbability(class_names, output_dir, dataset_dir)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write each map of probabilities."""
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
