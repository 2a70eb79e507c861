"""Write the images on which the reconstruction bundle's weights are trained, all free to be used for weights that ship.

    python tests/benchmarks/prepare_reconstruction_images.py OUT --shared DATA

``OUT/train/<source>`` and ``OUT/val/<source>`` hold 8-bit grey images, ``OUT/training_images.csv`` their origin,
licence and SHA-256. The same packages and data give the same files:

- ``mni152``: the T1 template that nilearn ships, every third slice with brain in all three orientations. A slab of each
  orientation is kept for val, 3 mm away from that orientation's train slices. (Slices of the other two cross it.)
- ``scikit_image``: photographs that scikit-image ships, turned to grey; val has others than train.
- ``chest_xray_pneumonia``, ``tb_chest_xray``: chest X-rays below ``DATA/classification``, evenly spread over the sorted
  file names, copied as they are. Left out without ``--shared``.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage import color, data, util

from monai_deqkan.data import image_files
from monai_deqkan.data.files import file_sha256

ORIENTATIONS = ("sagittal", "coronal", "axial")
STEP = 3  # mm
MIN_BRAIN = 1500  # mm^2 of brain in a slice
VAL_SLAB = (0.55, 0.65)  # of the brain's extent
PHOTOGRAPHS = {
    "train": ("astronaut", "brick", "camera", "chelsea", "coins", "grass", "gravel", "rocket"),
    "val": ("coffee",),
}
XRAYS = {"chest_xray_pneumonia": {"train": 500, "val": 20}, "tb_chest_xray": {"train": None, "val": 20}}
ORIGINS = {
    "mni152": ("ICBM 152 2009 nonlinear symmetric template, Fonov et al. 2011, in nilearn", "see the home page"),
    "scikit_image": ("photographs of scikit-image (skimage.data)", "CC0 or public domain"),
    "chest_xray_pneumonia": ("Kermany et al. 2018, chest X-rays, Mendeley Data rscbjbr9sj", "CC BY 4.0"),
    "tb_chest_xray": ("Shenzhen chest X-ray set, US National Library of Medicine", "free with citation"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write: absent, or empty")
    parser.add_argument("--shared", type=Path, help="folder with classification/<set>/{train,val}")
    options = parser.parse_args()
    if options.out.exists() and any(options.out.iterdir()):
        raise SystemExit(f"{options.out} holds files already. Name another folder.")
    write_template(options.out)
    write_photographs(options.out)
    if options.shared is not None:
        copy_xrays(options.out, options.shared / "classification")
    total = write_manifest(options.out)
    print(f"{total / 2**20:.1f} MiB of images in {options.out}")


def write_template(out: Path) -> None:
    """Write slices of the template, rows running down as a picture's do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from nilearn import datasets  # noqa: PLC0415 (it warns when imported)

        template = datasets.load_mni152_template(resolution=1).get_fdata()
        brain = datasets.load_mni152_brain_mask(resolution=1).get_fdata() > 0
    grey = np.rint(255 * np.clip(template / template.max(), 0, 1)).astype(np.uint8)
    for axis, name in enumerate(ORIENTATIONS):
        area = brain.sum(axis=tuple({0, 1, 2} - {axis}))
        inside = np.flatnonzero(area >= MIN_BRAIN)
        first, last = int(inside[0]), int(inside[-1])
        low, high = (first + share * (last - first) for share in VAL_SLAB)
        for position in range(first, last + 1, STEP):
            part = "val" if low <= position <= high else "train"
            if part == "train" and low - STEP < position < high + STEP:
                continue
            save(out / part / "mni152" / f"{name}_{position:03d}.png", np.take(grey, position, axis).T[::-1])


def write_photographs(out: Path) -> None:
    """Write the photographs as grey images."""
    for part, names in PHOTOGRAPHS.items():
        for name in names:
            picture = getattr(data, name)()
            if picture.ndim == 3:
                picture = util.img_as_ubyte(color.rgb2gray(picture))
            save(out / part / "scikit_image" / f"{name}.png", picture)


def copy_xrays(out: Path, folder: Path) -> None:
    """Copy the X-rays that are used."""
    for source, counts in XRAYS.items():
        for part, count in counts.items():
            # By name, not by class: so that both classes come in the shares that the set has.
            files = sorted(image_files(folder / source / part), key=lambda file: file.name)
            chosen = np.linspace(0, len(files) - 1, count or len(files)).round().astype(int)
            target = out / part / source
            target.mkdir(parents=True)
            for index in chosen:
                shutil.copyfile(files[index], target / files[index].name)


def write_manifest(out: Path) -> int:
    """Write the table of all images; return their size in bytes."""
    rows = list(manifest_rows(out))
    with (out / "training_images.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "sha256", "origin", "licence"])
        writer.writerows(rows)
    return sum((out / row[0]).stat().st_size for row in rows)


def manifest_rows(out: Path) -> Iterator[tuple[str, str, str, str]]:
    """Return file, checksum, origin and licence of each image."""
    for path in image_files(out):
        yield (path.relative_to(out).as_posix(), file_sha256(path), *ORIGINS[path.parent.name])


def save(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Write one grey image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(pixels)).save(path, optimize=True)


if __name__ == "__main__":
    main()
