"""Simulated k-space files made from a folder of images or volumes."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

import torch
from monai.data import MetaTensor
from torch import Tensor
from tqdm import tqdm

from monai_deqkan._checks import check_empty_folder, check_int
from monai_deqkan.data.fastmri import Slices, parse_slices, write_kspace
from monai_deqkan.data.folders import image_files
from monai_deqkan.transforms.image.array import LoadMedicalImage, read_image
from monai_deqkan.transforms.kspace.simulate import SimulateKspace

__all__ = ["simulate_kspace_folder"]

logger = logging.getLogger(__name__)


def simulate_kspace_folder(
    image_dir: str | Path,
    folder: str | Path,
    *,
    num_coils: int = 8,
    snr_db: float | Sequence[float] | None = 30.0,
    max_phase: float = math.pi / 2,
    slices: Slices = None,
    seed: int = 0,
    progress: bool = True,
) -> list[Path]:
    """Write simulated k-space in fastMRI's layout for every image below a folder.

    See :class:`SimulateKspace` for what is simulated, and how real data differ. Pictures become volumes of one slice,
    volumes a file of all their slices along the last axis; rows run down the picture. Each slice has phase, coils and
    noise of its own, made from the seed, the file's name and the slice's index (in a scanner the slices of a volume
    share their coils). Folders below ``image_dir`` are kept, so ``train/``, ``val/`` and ``test/`` stay what they are;
    of the images' headers nothing but the pixel size is taken. Each file has the attribute ``simulated: True``, and the
    acquisition ``simulated``.

    Args:
        image_dir: images of any kind that :func:`image_files` finds; color is turned into grey.
        folder: where to write: absent, or empty. A README.md there says what the data are.
        num_coils: see :class:`SimulateKspace`.
        snr_db: see :class:`SimulateKspace`.
        max_phase: see :class:`SimulateKspace`.
        slices: slices to take from volumes, see :func:`parse_slices`.
        seed: makes phase, coils and noise.
        progress: whether to show a progress bar.

    Returns:
        The files that were written. Images that cannot be read, or hold negative values, are left out with a line in
        the log.

    Raises:
        FileExistsError: if the folder holds something.
        ValueError: if there is no image, or none could be used.
    """
    source = Path(image_dir)
    files = image_files(source)
    target = check_empty_folder(folder, "the simulated k-space")
    simulate = SimulateKspace(num_coils, max_phase, snr_db)
    wanted = parse_slices(slices)
    check_int("seed", seed, minimum=0)
    written: list[Path] = []
    for number, file in enumerate(tqdm(files, disable=not progress, desc="simulate")):
        name = file.relative_to(source)
        path = target / name.parent / f"{name.name.split('.')[0] or name.stem}.h5"
        if path in written:
            path = path.with_name(f"{path.stem}_{number}.h5")
        try:
            images, pixel_size = _pictures(file)
            indices = range(len(images)) if wanted is None else sorted(set(wanted) & set(range(len(images))))
            if not indices:
                raise ValueError(f"it has {len(images)} slices, none of those wanted.")
            kspace = torch.stack(
                [simulate(images[i][None], crc32(f"{seed}/{name.as_posix()}/{i}".encode())) for i in indices]
            )
        except (ValueError, OSError) as error:
            logger.warning("Left out %s: %s", name, error)
            continue
        write_kspace(
            path,
            kspace,
            reference_rss=images[list(indices)],
            pixel_size=pixel_size,
            attrs={"acquisition": "simulated", "simulated": True},
        )
        written.append(path)
    if len(written) < len(files):
        logger.warning("%d of %d images were left out.", len(files) - len(written), len(files))
    if not written:
        raise ValueError(f"None of the {len(files)} images in {source} could be used; the log says why.")
    (target / "README.md").write_text(_README.format(coils=num_coils, snr=snr_db, seed=seed), encoding="utf-8")
    return written


_README = """# Simulated k-space

Made from magnitude images with smooth phase, {coils} smooth coil maps and complex noise (SNR in dB: {snr}); seed
{seed}. Not measured: results on these files say little about scanners' data. Each file has the attribute `simulated`.
`reconstruction_rss` is the image itself, without noise. Research only; not for clinical use.
"""


def _pictures(file: Path) -> tuple[Tensor, tuple[float, float, float] | None]:
    """Return slices ``(slices, rows, columns)``, and the pixel size (rows, columns, slices) in mm where it is known."""
    raw = read_image(file)
    volume = raw.ndim == 4 and raw.shape[-1] > 1
    image: MetaTensor = LoadMedicalImage(spatial_dims=3 if volume else 2)(file)
    # The first axis of an image is x, from left to right; rows of k-space run down the picture.
    slices = image.as_tensor()[0].movedim(-1, 0).mT if volume else image.as_tensor().mT
    sizes = image.affine[:3, :3].norm(dim=0)
    known = len(sizes) == 3 and bool((sizes > 0).all()) and file.suffix.lower() not in _WITHOUT_SIZE
    x, y, z = sizes.tolist() if known else (1.0, 1.0, 1.0)
    return slices.float().contiguous(), (y, x, z) if known else None


_WITHOUT_SIZE = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
