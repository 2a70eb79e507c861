"""Sample data sets on disk, made without a download from the real template images that nilearn ships."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

from monai_deqkan._checks import check_choice, check_empty_folder
from monai_deqkan.data.fastmri import write_kspace
from monai_deqkan.data.tissue_volumes import TISSUE_VOLUMES_README, TISSUE_VOLUMES_SPLIT, write_tissue_volumes
from monai_deqkan.operators import simulate_kspace, smooth_coil_maps, smooth_phase

__all__ = ["SAMPLES", "write_sample"]

Array = NDArray[np.float64]
_Slabs = dict[str, tuple[tuple[int, int], ...]]

# Axial positions in MNI space, in mm, both ends included: slabs of different parts are at least 10 mm apart. Where
# lesions are looked for, training has the deep grey matter and the ventricles: networks trained without them took them
# for lesions. Val and test lie between training slabs: a slab beyond the end of training's ranks networks by chance,
# and one 22 mm from the next has probabilities that are off, whatever their ranks.
_ABOVE: _Slabs = {"train": ((4, 30),), "val": ((60, 66),), "test": ((40, 50),)}
_BETWEEN: _Slabs = {"train": ((-14, -8), (20, 26), (53, 60)), "val": ((36, 43),), "test": ((2, 10),)}
_SLABS = {
    "brain_lesion": {"train": ((0, 14), (36, 38), (62, 68)), "val": ((24, 26),), "test": ((48, 52),)},
    "brain_tissue": _BETWEEN,
    "brain_kspace": _ABOVE,
}
_SHAPE = (96, 80)  # rows (front to back) and columns (right to left) of a picture
_PIXEL = 2.0  # mm
_GREY_SCALE = 190.0  # 8-bit value of the template's highest intensity; the bias field needs the room above
_SEED = 2009

# Lesions are drawn from triangular distributions that rise to the upper end. Drawn evenly from 8 mm and 10 % on, a
# small network learned nothing in minutes: grey matter is only 25 % darker than white, so faint spots look like it.
_DIAMETER = (12.0, 21.5)  # mm, of the circle of the same mean radius
_OUTLINE = 0.15  # relative variation of the radius at most
_CONTRAST = (0.22, 0.30)  # of white matter's intensity
_EDGE = (0.5, 1.5)  # mm, scale of the logistic edge
_LESION_PICTURES = {"train": 26, "val": 30, "test": 28}  # per slice, half of them with a lesion
_LESION_BIAS, _LESION_NOISE = 0.1, 0.01

_TISSUE_PICTURES = {"train": 3, "val": 1, "test": 1}  # per slice
_TISSUE_BIAS, _TISSUE_NOISE = 0.3, 0.03

_KSPACE_FILES = {"train": (4, 2), "val": (2, 1), "test": (3, 1)}  # interleaved stacks, and scans of each
_NUM_COILS = 8
_SNR_DB = 30.0


@dataclass(frozen=True)
class _Template:
    """One slice of the template at 1 mm, rows from front to back, columns from the right side to the left."""

    t1: Array
    grey: Array
    white: Array
    brain: Array
    white_level: float


@dataclass(frozen=True)
class _Lesion:
    """A dark spot: position and mean radius in pixels of 1 mm, contrast relative to white matter, edge in mm."""

    center: tuple[float, float]
    radius: float
    contrast: float
    edge: float
    harmonics: tuple[tuple[float, float], ...]

    def outline(self, angle: Array) -> Array:
        """Return the radius at an angle."""
        wave = sum(weight * np.cos((k + 2) * angle + phase) for k, (weight, phase) in enumerate(self.harmonics))
        return self.radius * (1 + np.asarray(wave))

    def profile(self, shape: tuple[int, ...]) -> Array:
        """Return the lesion's weight per pixel: near one inside, one half on the outline, near zero outside."""
        rows, columns = np.indices(shape, dtype=float)
        rows, columns = rows - self.center[0], columns - self.center[1]
        inside = self.outline(np.arctan2(rows, columns)) - np.hypot(rows, columns)
        return 1 / (1 + np.exp(-np.clip(inside / self.edge, -50, 50)))


def write_sample(name: str, folder: str | Path) -> Path:
    """Write a sample data set from the MNI152 template that nilearn ships: no download, always the same files.

    Args:
        name: ``"brain_lesion"`` (classification: slices with and without a synthetic lesion), ``"brain_tissue"``
            (segmentation: background, cerebrospinal fluid, grey and white matter), ``"brain_tissue_volumes"`` (the same
            in 3-D, as NIfTI) or ``"brain_kspace"`` (reconstruction: simulated 8-coil k-space in fastMRI's layout).
        folder: where to write it: absent, or empty.

    Returns:
        The folder, which then holds ``train``, ``val``, ``test`` and a README.md on what is real and what is not.

    Raises:
        ValueError: if there is no sample of that name.
        FileExistsError: if the folder holds something.
    """
    check_choice("name", name, SAMPLES)
    target = check_empty_folder(folder, f"the sample {name}").absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    # Written beside the target and renamed at the end, so that an interrupted run leaves no half sample there.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
        draft = Path(temporary) / "sample"
        draft.mkdir()
        _WRITERS[name](draft)
        (draft / "README.md").write_text(_README[name] + _README_SOURCE + _split_text(name), encoding="utf-8")
        if target.exists():
            target.rmdir()
        draft.rename(target)
    return target


def _positions(name: str, part: str) -> list[int]:
    return [z for low, high in _SLABS[name][part] for z in range(low, high + 1)]


def _all_slices(name: str) -> Iterable[tuple[str, int]]:
    """Return part and position of every slice, with a progress bar."""
    slices = [(part, z) for part in _SLABS[name] for z in _positions(name, part)]
    return tqdm(slices, desc=name, unit="slice", leave=False)


def _load_template(name: str) -> dict[int, _Template]:
    """Return the slices of all parts of a sample by axial position."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from nilearn import datasets

        image = datasets.load_mni152_template(resolution=1)
        maps = {
            "t1": image.get_fdata(),
            "grey": datasets.load_mni152_gm_template(resolution=1).get_fdata(),
            "white": datasets.load_mni152_wm_template(resolution=1).get_fdata(),
            "brain": datasets.load_mni152_brain_mask(resolution=1).get_fdata(),
        }
    white_level = float(np.median(maps["t1"][maps["white"] > 0.9]))
    offset = round(float(image.affine[2, 3]))
    # Axes of the template grow to the right and to the front: a picture starts at the right and the front.
    return {
        z: _Template(**{key: volume[::-1, ::-1, z - offset].T for key, volume in maps.items()}, white_level=white_level)
        for part in _SLABS[name]
        for z in _positions(name, part)
    }


def _jitter(rng: np.random.Generator) -> tuple[Array, Array, bool]:
    """Draw a small rotation (6 degrees at most), a shift (4 mm at most) and a left-right flip."""
    angle = math.radians(rng.uniform(-6, 6))
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return rotation, rng.uniform(-4, 4, 2), bool(rng.random() < 0.5)


def _still(flipped: bool) -> tuple[Array, Array, bool]:
    return np.eye(2), np.zeros(2), flipped


def _to_picture(pixels: Array, placement: tuple[Array, Array, bool]) -> Array:
    """Resample a slice at 1 mm to the pixels of a picture by rotation, shift and flip around its centre."""
    rotation, shift, flipped = placement
    matrix = rotation * _PIXEL
    center = (np.array(pixels.shape) - 1) / 2 + shift
    offset = center - matrix @ ((np.array(_SHAPE) - 1) / 2)
    # A blur of 0.4 pixels of the picture keeps fine structure from folding over.
    smooth = ndimage.gaussian_filter(pixels, 0.4 * _PIXEL)
    picture = ndimage.affine_transform(smooth, matrix, offset, output_shape=_SHAPE, order=1)
    return picture[:, ::-1] if flipped else picture


def _bias_field(rng: np.random.Generator, largest: float) -> Array:
    """Draw a smooth factor around one, a random polynomial of third degree, with its largest deviation in the head."""
    y, x = np.meshgrid(*(np.linspace(-1, 1, size) for size in _SHAPE), indexing="ij")
    field = np.zeros(_SHAPE)
    for i in range(4):
        for j in range(4 - i):
            field += rng.normal() * x**i * y**j
    field -= field.mean()
    within = np.hypot(x, y) < 0.9  # the corners hold no brain
    return 1 + largest * field / np.abs(field[within]).max()


def _to_grey(picture: Array, rng: np.random.Generator, bias: float, noise: float) -> NDArray[np.uint8]:
    """Apply a bias field and Rician noise, and round to 8 bits."""
    picture = picture * _bias_field(rng, bias)
    real, imaginary = rng.normal(0, noise, (2, *_SHAPE))
    return np.clip(np.round(_GREY_SCALE * np.hypot(picture + real, imaginary)), 0, 255).astype(np.uint8)


def _lesion_places(template: _Template) -> NDArray[np.int64]:
    """Return the pixels of the tenth of the brain that is richest in white matter, within some 4 mm."""
    richness = ndimage.gaussian_filter(template.white * template.brain, 4.0)
    return np.argwhere(richness > np.quantile(richness[template.brain > 0], 0.9))


def _draw_lesion(rng: np.random.Generator, places: NDArray[np.int64]) -> _Lesion:
    row, column = rng.choice(places)
    weights = rng.dirichlet(np.ones(3)) * _OUTLINE
    return _Lesion(
        center=(row + rng.uniform(-0.5, 0.5), column + rng.uniform(-0.5, 0.5)),
        radius=rng.triangular(_DIAMETER[0], _DIAMETER[1], _DIAMETER[1]) / 2,
        contrast=rng.triangular(_CONTRAST[0], _CONTRAST[1], _CONTRAST[1]),
        edge=rng.uniform(*_EDGE),
        harmonics=tuple((float(weight), rng.uniform(0, 2 * math.pi)) for weight in weights),
    )


def _insert(template: _Template, lesion: _Lesion) -> Array:
    dark = lesion.contrast * template.white_level * lesion.profile(template.t1.shape) * template.brain
    return np.maximum(template.t1 - dark, 0)


def _write_lesion(folder: Path) -> None:
    slices = _load_template("brain_lesion")
    for part in _SLABS["brain_lesion"]:
        for name in ("lesion", "no_lesion"):
            (folder / part / name).mkdir(parents=True)
    for part, z in _all_slices("brain_lesion"):
        places = _lesion_places(slices[z])
        for index in range(_LESION_PICTURES[part]):
            rng = np.random.default_rng((_SEED, z - min(slices), index))
            name = "lesion" if index % 2 else "no_lesion"
            pixels = _insert(slices[z], _draw_lesion(rng, places)) if index % 2 else slices[z].t1
            picture = _to_grey(_to_picture(pixels, _jitter(rng)), rng, _LESION_BIAS, _LESION_NOISE)
            Image.fromarray(picture).save(folder / part / name / f"z{z:+03d}_{index:02d}.png")


def _tissue_classes(template: _Template, placement: tuple[Array, Array, bool]) -> NDArray[np.int64]:
    """Return 0 outside the brain; inside it 1, 2, 3 where fluid, grey or white matter is the most probable."""
    brain, grey, white = (_to_picture(pixels, placement) for pixels in (template.brain, template.grey, template.white))
    return np.where(brain > 0.5, 1 + np.argmax([1 - grey - white, grey, white], axis=0), 0)


def _write_tissue(folder: Path) -> None:
    slices = _load_template("brain_tissue")
    for part in _SLABS["brain_tissue"]:
        for name in ("images", "masks"):
            (folder / part / name).mkdir(parents=True)
    for part, z in _all_slices("brain_tissue"):
        for index in range(_TISSUE_PICTURES[part]):
            rng = np.random.default_rng((_SEED, z - min(slices), 100 + index))
            placement = _still(flipped=index % 2 == 1)
            picture = _to_grey(_to_picture(slices[z].t1, placement), rng, _TISSUE_BIAS, _TISSUE_NOISE)
            mask = (85 * _tissue_classes(slices[z], placement)).astype(np.uint8)
            name = f"z{z:+03d}_{index}.png"
            Image.fromarray(picture).save(folder / part / "images" / name)
            Image.fromarray(mask).save(folder / part / "masks" / name)


def _write_kspace(folder: Path) -> None:
    slices = _load_template("brain_kspace")
    files = [
        (part, stacks, scan, stack)
        for part, (stacks, scans) in _KSPACE_FILES.items()
        for scan in range(scans)
        for stack in range(stacks)
    ]
    for seed, (part, stacks, scan, stack) in enumerate(tqdm(files, desc="brain_kspace", unit="file", leave=False)):
        placement = _still(flipped=scan % 2 == 1)
        images = [_to_picture(slices[z].t1, placement) for z in _positions("brain_kspace", part)[stack::stacks]]
        generator = torch.Generator().manual_seed(_SEED + seed)
        kspace = simulate_kspace(
            torch.from_numpy(np.stack(images)).float(),
            smooth_coil_maps(_SHAPE, _NUM_COILS, generator=generator),
            phase=smooth_phase(_SHAPE, generator=generator),
            snr_db=_SNR_DB,
            generator=generator,
        )
        attributes = {"acquisition": "simulated", "patient_id": "MNI152"}
        write_kspace(folder / part / f"brain_{scan}{stack}.h5", kspace, attrs=attributes)


_WRITERS: dict[str, Callable[[Path], None]] = {
    "brain_lesion": _write_lesion,
    "brain_tissue": _write_tissue,
    "brain_tissue_volumes": write_tissue_volumes,
    "brain_kspace": _write_kspace,
}

SAMPLES = tuple(_WRITERS)

_README = {
    "brain_lesion": f"""# brain_lesion: slices of a brain template, with and without a synthetic lesion

Layout: `train|val|test/{{lesion,no_lesion}}/*.png`, 8-bit grey, {_SHAPE[0]} x {_SHAPE[1]} pixels of {_PIXEL:g} mm.

**Real:** the anatomy, axial slices of the template below.

**Simulated:** the lesions, and what makes several pictures of each slice differ. A lesion is a dark spot of irregular
outline and soft edge in tissue rich in white matter: {_DIAMETER[0] * (1 - _OUTLINE):.0f} to
{_DIAMETER[1] * (1 + _OUTLINE):.0f} mm wide, and darker than what was there by {_CONTRAST[0]:.0%} to
{_CONTRAST[1]:.0%} of white matter's intensity, large and dark ones being the most frequent. Every picture has its own
rotation (up to 6 degrees), shift (up to 4 mm), left-right flip, smooth bias field (up to {_LESION_BIAS:.0%}) and
Rician noise ({_LESION_NOISE:.0%} of the highest intensity).
""",
    "brain_tissue": f"""# brain_tissue: slices of a brain template with tissue masks

Layout: `train|val|test/{{images,masks}}/*.png`, 8-bit grey, {_SHAPE[0]} x {_SHAPE[1]} pixels of {_PIXEL:g} mm.
Mask values: 0 background, 85 cerebrospinal fluid, 170 grey matter, 255 white matter.

**Real:** the T1-weighted slices, and the tissue maps of the same template. Within the brain mask a pixel is grey or
white matter where that is the most probable, and fluid where neither is: fluid = brain mask minus grey and white.

**Simulated:** a smooth bias field (up to {_TISSUE_BIAS:.0%}) and Rician noise ({_TISSUE_NOISE:.0%} of the highest
intensity) on each picture, so that thresholds alone do not find the tissues. Each training slice comes three times, the
second time flipped left to right, each with its own field and noise.
""",
    "brain_tissue_volumes": TISSUE_VOLUMES_README,
    "brain_kspace": f"""# brain_kspace: simulated k-space of a brain template

Layout: `train|val|test/*.h5`, fastMRI's HDF5 layout: fully sampled `kspace` of shape
(slices, {_NUM_COILS}, {_SHAPE[0]}, {_SHAPE[1]}) and its root sum of squares `reconstruction_rss`.
Pixels are {_PIXEL:g} mm wide.

**Real:** the magnitude images, axial slices of the template below.

**Simulated:** everything of the measurement: {_NUM_COILS} smooth coil maps, a smooth phase, and complex Gaussian noise
at {_SNR_DB:g} dB. Each file has its own; each training slice comes twice, once flipped left to right.
""",
}

_README_SOURCE = """
## Source

The MNI152 template (ICBM 152, nonlinear, 2009a) as nilearn ships it: an average of the brains of 152 people, not a
person's image, and much smoother than one. nilearn's documentation gives its licence as "unknown"; its home page is
<https://www.bic.mni.mcgill.ca/ServicesAtlases/ICBM152NLin2009>. Please cite:

- V. S. Fonov et al., "Unbiased average age-appropriate atlases for pediatric studies", NeuroImage 54 (2011) 313-327.
- V. S. Fonov et al., "Unbiased nonlinear average age-appropriate brain templates from birth to adulthood",
  NeuroImage 47 (2009) S102.
- D. L. Collins et al., "ANIMAL+INSECT: improved cortical structure segmentation", IPMI 1999, LNCS 1613, 210-223.
"""


def _split_text(name: str) -> str:
    if name not in _SLABS:
        return TISSUE_VOLUMES_SPLIT
    slabs = {part: " and ".join(f"{low} to {high}" for low, high in slabs) for part, slabs in _SLABS[name].items()}
    return f"""
## Split

By axial position in mm of MNI space, with gaps of at least 10 mm between the parts:
{"; ".join(f"{part} {text}" for part, text in slabs.items())}.
All parts come from the same average brain: a result here says that a program works, and nothing about patients.

Not for clinical use.
"""
