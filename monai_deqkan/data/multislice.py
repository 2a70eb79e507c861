"""The slices of many k-space volumes as one data set, and batches of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.data import Dataset, list_data_collate
from torch import Tensor
from torch.nn.functional import pad

from monai_deqkan._checks import check_choice
from monai_deqkan.data.fastmri import Slices, find_kspace_files, kspace_items, kspace_slices
from monai_deqkan.transforms.kspace.dictionary import LoadKspaceSliced

__all__ = ["KspaceSliceDataset", "collate_kspace"]


class KspaceSliceDataset(Dataset):
    """The slices of the k-space volumes in a folder, in fastMRI's layout: one item per slice, read on demand.

    An item is read by the process that asks for it, which opens the file, reads one slice and closes it: no open file
    is shared between the workers of a loader, and no volume is ever in memory whole. Unusable files are left out, with
    a line each and their number in the log.

    Args:
        dataset_dir: see :func:`kspace_items`.
        part: as for :func:`kspace_items`; or ``"all"``: every file below the folder, those that were measured
            undersampled too.
        transform: what is done to an item ``{"kspace": path, "slice": index}``; None is :class:`LoadKspaceSliced`.
        slices: see :func:`kspace_items`; such as ``"11-27"``, the middle of fastMRI's volumes.
        seed: see :func:`kspace_items`.
        challenge: see :func:`kspace_items`; not for ``"all"``.
        index_dir: see :func:`kspace_items`.

    Raises:
        FileNotFoundError: if a folder that is needed is missing.
        ValueError: if there is no usable file, or no such slice.
    """

    def __init__(
        self,
        dataset_dir: str | Path,
        part: str = "train",
        transform: Callable[[Any], Any] | None = None,
        *,
        slices: Slices = None,
        seed: int = 0,
        challenge: str | None = None,
        index_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        if check_choice("part", part, ("train", "val", "evaluate", "all")) == "all":
            if challenge is not None:
                raise ValueError("`challenge` picks parts; with part 'all' name the folder itself as `dataset_dir`.")
            items = kspace_slices(find_kspace_files(dataset_dir, index_dir), slices, index_dir)
        else:
            items = kspace_items(dataset_dir, part, slices=slices, seed=seed, challenge=challenge, index_dir=index_dir)
        super().__init__(items, LoadKspaceSliced() if transform is None else transform)


def collate_kspace(batch: Sequence[Mapping[Any, Any]], pad_coils: bool = False) -> Any:
    """Collate items of one size, as MONAI does; for a loader's ``collate_fn``.

    Volumes differ in matrix and number of coils. Padding images would make anatomy that was never measured: take a
    batch size of 1, or crop to one size. Padding coils changes nothing but cost, and is done by choice.

    Args:
        batch: items with ``kspace`` ``(K, *space)``, or lists of them, as MONAI's random crops make.
        pad_coils: whether items with fewer coils get coils of zeros, in k-space and in ``sensitivity_maps``.

    Raises:
        ValueError: if items differ in shape.
    """
    batch = [one for item in batch for one in (item if isinstance(item, list) else [item])]
    if pad_coils and len({len(item["kspace"]) for item in batch}) > 1:
        count = max(len(item["kspace"]) for item in batch)
        batch = [_with_coils(item, count) for item in batch]
    for key in batch[0]:
        shapes = {tuple(item[key].shape) for item in batch if isinstance(item[key], Tensor)}
        if len(shapes) > 1:
            raise ValueError(
                f"The items of a batch must have one shape; '{key}' comes in {', '.join(map(str, sorted(shapes)))}. "
                "Take batch_size 1, or slices of one matrix and number of coils (crop_size makes one matrix)."
            )
    return list_data_collate(list(batch))


def _with_coils(item: Mapping[Any, Any], count: int) -> dict[Any, Any]:
    """Return an item with coils of zeros added to its k-space and maps; the coil axis is the same from the end."""
    space = item["kspace"].ndim - 1
    missing = (0, 0) * space + (0, count - len(item["kspace"]))
    padded = {key: pad(item[key], missing) for key in ("kspace", "sensitivity_maps") if key in item}
    return {**item, **padded}
