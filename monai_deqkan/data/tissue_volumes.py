"""The sample of brain volumes with tissue masks, made from the template that nilearn ships."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from tqdm import tqdm

__all__ = ["TISSUE_VOLUMES_README", "TISSUE_VOLUMES_SPLIT", "write_tissue_volumes"]

Array = NDArray[np.float64]

_COUNTS = {"train": 8, "val": 2, "test": 2}
_SIZES = ((68, 76), (84, 92), (68, 76))  # voxels along each axis, smallest and largest
_VOXEL = 2.0  # mm
_CENTER = (0.0, -17.0, 8.0)  # mm in MNI space: the middle of the brain
_TILT = 8.0  # degrees, of the head in the scanner, around each axis
_DEFORMATION, _SCALE = 5.0, 12.0  # mm: largest displacement, and the scale over which it changes
_GREY_SCALE = 190.0  # 8-bit value of the template's highest intensity; the bias field needs the room above
_BIAS, _NOISE = 0.3, 0.03
_SEED = 1152


def write_tissue_volumes(folder: Path) -> None:
    """Write ``train|val|test/{images,masks}/volume_*.nii.gz``; see the README text below."""
    maps, affine = _load_maps()
    volumes = [(part, index) for part, count in _COUNTS.items() for index in range(count)]
    for part, kind in ((part, kind) for part in _COUNTS for kind in ("images", "masks")):
        (folder / part / kind).mkdir(parents=True)
    for seed, (part, index) in enumerate(tqdm(volumes, desc="brain_tissue_volumes", unit="volume", leave=False)):
        rng = np.random.default_rng((_SEED, seed))
        shape = tuple(int(rng.integers(low, high + 1)) for low, high in _SIZES)
        placed = _scanner_affine(rng, shape, mirrored=index % 2 == 1)
        points = _template_points(rng, shape, placed, affine)
        t1, grey, white, brain = (ndimage.map_coordinates(volume, points, order=1) for volume in maps)
        classes = np.where(brain > 0.5, 1 + np.argmax([1 - grey - white, grey, white], axis=0), 0).astype(np.uint8)
        for kind, pixels in (("images", _to_grey(t1, rng)), ("masks", classes)):
            nib.save(nib.Nifti1Image(pixels, placed), folder / part / kind / f"volume_{index}.nii.gz")


def _load_maps() -> tuple[list[Array], Array]:
    """Return T1, grey matter, white matter and brain mask at 1 mm, a little blurred, and their affine."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from nilearn import datasets

        images = [
            datasets.load_mni152_template(resolution=1),
            datasets.load_mni152_gm_template(resolution=1),
            datasets.load_mni152_wm_template(resolution=1),
            datasets.load_mni152_brain_mask(resolution=1),
        ]
    # A blur of 0.4 voxels of the sample keeps fine structure from folding over.
    return [ndimage.gaussian_filter(image.get_fdata(), 0.4 * _VOXEL) for image in images], images[0].affine


def _scanner_affine(rng: np.random.Generator, shape: tuple[int, ...], mirrored: bool) -> Array:
    """Return an oblique map from voxels to mm; ``mirrored`` stores the first axis from right to left."""
    angles = np.radians(rng.uniform(-_TILT, _TILT, 3))
    rotation = np.eye(3)
    for axis, angle in enumerate(angles):
        turn = np.eye(3)
        first, second = (axis + 1) % 3, (axis + 2) % 3
        turn[first, first] = turn[second, second] = math.cos(angle)
        turn[first, second], turn[second, first] = -math.sin(angle), math.sin(angle)
        rotation = rotation @ turn
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag([-_VOXEL if mirrored else _VOXEL, _VOXEL, _VOXEL])
    affine[:3, 3] = np.array(_CENTER) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


def _template_points(rng: np.random.Generator, shape: tuple[int, ...], placed: Array, template: Array) -> Array:
    """Return where in the template's voxels each voxel lies, smoothly deformed."""
    to_template = np.linalg.inv(template) @ placed
    points = np.einsum("ij,j...->i...", to_template[:3, :3], np.indices(shape, dtype=float))
    moves = np.stack([ndimage.gaussian_filter(rng.normal(size=shape), _SCALE / _VOXEL) for _ in range(3)])
    moves *= _DEFORMATION / np.sqrt((moves**2).sum(0)).max()
    return np.asarray(points + to_template[:3, 3, None, None, None] + moves)  # the template's voxels are 1 mm


def _to_grey(pixels: Array, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Apply a bias field and Rician noise, and round to 8 bits."""
    degrees = np.indices((4, 4, 4)).sum(0)
    coefficients = np.where(degrees <= 3, rng.normal(size=degrees.shape), 0.0)
    x, y, z = (np.linspace(-1, 1, size) for size in pixels.shape)
    field = np.polynomial.legendre.leggrid3d(x, y, z, coefficients)
    field -= field.mean()
    biased = pixels * (1 + _BIAS * field / np.abs(field).max())
    real, imaginary = rng.normal(0, _NOISE, (2, *pixels.shape))
    return np.clip(np.round(_GREY_SCALE * np.hypot(biased + real, imaginary)), 0, 255).astype(np.uint8)


_SMALLEST, _LARGEST = (" x ".join(map(str, sizes)) for sizes in zip(*_SIZES, strict=True))

TISSUE_VOLUMES_README = f"""# brain_tissue_volumes: a brain template as volumes with tissue masks

Layout: `train|val|test/{{images,masks}}/*.nii.gz`, 8-bit, voxels of {_VOXEL:g} mm, sizes from
{_SMALLEST} to {_LARGEST}, oblique affines, every second one stored from right to left.
Mask values: 0 background, 1 cerebrospinal fluid, 2 grey matter, 3 white matter.

**Real:** the T1-weighted template, and the tissue maps of the same template. Within the brain mask a voxel is grey or
white matter where that is the most probable, and fluid where neither is: fluid = brain mask minus grey and white.

**Simulated:** what makes the volumes differ. Each has its own tilt (up to {_TILT:g} degrees around each axis), smooth
deformation (up to {_DEFORMATION:g} mm), field of view, smooth bias field (up to {_BIAS:.0%}) and Rician noise
({_NOISE:.0%} of the highest intensity), so that thresholds alone do not find the tissues.
"""

TISSUE_VOLUMES_SPLIT = f"""
## Split

By the seed of deformation, tilt, field and noise: {", ".join(f"{part} {count}" for part, count in _COUNTS.items())}.
All parts show the same average brain, each deformed in its own way, so test volumes are easier than those of new
people: a result here says that a program works, and nothing about patients.

Not for clinical use.
"""
