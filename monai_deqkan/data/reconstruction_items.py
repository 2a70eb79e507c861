"""What a reconstruction network is trained on: slices of k-space files, or images whose k-space is simulated."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai_deqkan._checks import check_folder, check_range
from monai_deqkan.data.fastmri import Slices, kspace_items
from monai_deqkan.data.folders import image_files
from monai_deqkan.data.parts import part_folders, resolve_part
from monai_deqkan.data.splits import hold_out

__all__ = ["reconstruction_items", "source_weights"]

logger = logging.getLogger(__name__)


def reconstruction_items(
    dataset_dir: str | Path,
    part: str,
    *,
    slices: Slices = None,
    seed: int = 0,
    challenge: str | None = None,
    index_dir: str | os.PathLike[str] | None = None,
) -> list[dict[str, Any]]:
    """List one part of a data set of k-space files or, where there are none, of images.

    Args:
        dataset_dir: folder with ``train``, and possibly ``val`` and ``test``. With ``*.h5`` files in them (or fastMRI's
            own folders) it is read by :func:`kspace_items`; else all images below each of them are taken, in any
            folders. Without ``val`` a fifth of ``train`` is held out for it.
        part: ``"train"``, ``"val"``, or ``"evaluate"``: ``test`` where there is one, else as ``"val"``.
        slices: see :func:`kspace_items`; not for images.
        seed: seed of the held-out part.
        challenge: see :func:`kspace_items`.
        index_dir: see :func:`kspace_items`.

    Returns:
        One ``{"kspace": path, "slice": index}`` per slice, or one ``{"image": path, "source": path, "slice": 0}`` per
        image, sorted.

    Raises:
        FileNotFoundError: if the data set's folder, or its ``train`` folder where it is needed, is missing.
        ValueError: if there is neither a usable k-space file nor an image.
    """
    root = check_folder(dataset_dir, "the data set")
    if any(root.glob("*/*.h5")):
        return kspace_items(root, part, slices=slices, seed=seed, challenge=challenge, index_dir=index_dir)
    folders = part_folders(root)
    name, side = resolve_part(part, folders)
    if name not in folders:
        raise FileNotFoundError(
            f"There is no train folder in {root}. Expected layout: train/ and, where you have them, val/ and test/, "
            "with k-space files *.h5, or with images in any folders below."
        )
    files = image_files(folders[name])
    if side:
        files = hold_out(files, side, seed=seed)
        logger.info("There is no val folder in %s: %d train images are for %s.", root, len(files), side)
    return [{"image": str(file), "source": str(file), "slice": 0} for file in files]


def source_weights(items: Sequence[Mapping[str, Any]], power: float = 0.5) -> list[float]:
    """Return sampling weights that let small folders of a data set count for more than their share.

    Args:
        items: as :func:`reconstruction_items` lists them; a source is the folder that a file lies in.
        power: each item weighs the number of its source's items to minus this: 0 gives each item the same chance, 1
            each source.

    Returns:
        One positive weight per item, for :class:`torch.utils.data.WeightedRandomSampler`.

    Raises:
        ValueError: if ``power`` lies outside ``[0, 1]``.

    Example:
        >>> source_weights([{"image": "a/1.png"}, {"image": "b/1.png"}, {"image": "b/2.png"}], power=1)
        [1.0, 0.5, 0.5]
    """
    check_range("power", power, 0.0, 1.0)
    sources = [Path(item["image"] if "image" in item else item["kspace"]).parent for item in items]
    counts = Counter(sources)
    return [counts[source] ** -float(power) for source in sources]
