"""Checks that the k-space transforms share."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

from monai.config.type_definitions import KeysCollection
from torch import Tensor

from monai_deqkan._checks import check_tensor


def check_kspace(kspace: Tensor) -> Tensor:
    """Return k-space of one item.

    Raises:
        TypeError: if it is no tensor.
        ValueError: if it is not complex of shape ``(K, *space)``.
    """
    if not check_tensor("kspace", kspace).is_complex() or kspace.ndim not in (3, 4):
        raise ValueError(
            f"`kspace` must be complex of shape (K, H, W) or (K, H, W, D), without batch axis; got {kspace.dtype} of "
            f"shape {tuple(kspace.shape)}. Single-coil k-space needs a coil axis of size 1."
        )
    return kspace


def check_maps(sensitivity_maps: Tensor, kspace: Tensor) -> Tensor:
    """Return coil maps of one item.

    Raises:
        TypeError: if they are no tensor.
        ValueError: if they are not of the size of k-space, possibly with an axis of map sets in front.
    """
    shape = tuple(check_tensor("sensitivity_maps", sensitivity_maps).shape)
    if shape[-kspace.ndim :] != tuple(kspace.shape) or len(shape) > kspace.ndim + 1:
        raise ValueError(
            f"`sensitivity_maps` must have the shape (K, *space) of k-space, {tuple(kspace.shape)}, or one axis of map "
            f"sets before it; got {shape}. Make them from the same file, after the same crop."
        )
    return sensitivity_maps


def masked(kspace: Tensor, mask: Tensor) -> Tensor:
    """Return k-space with zeros where a mask is false.

    Raises:
        ValueError: if the mask does not broadcast to ``(K, *space)``, or keeps nothing.
    """
    if mask.ndim != kspace.ndim or any(m not in (1, n) for m, n in zip(mask.shape, kspace.shape, strict=True)):
        raise ValueError(
            f"`mask` must broadcast to k-space of shape {tuple(kspace.shape)}, with as many axes; got "
            f"{tuple(mask.shape)}. A mask of columns has shape (1, 1, W) in 2-D."
        )
    kept = kspace * mask
    if not bool((kept != 0).any()):
        raise ValueError(
            f"`mask` must keep some measured samples; none of the {int(mask.sum())} of {mask.numel()} that it keeps "
            "holds signal. Check the mask, or remove the empty slice."
        )
    return kept


def has_gaps(kspace: Tensor, axis: int) -> bool:
    """Return whether lines are missing between measured ones; zero-padded ends are no gap."""
    measured = (kspace != 0).movedim(axis, 0).flatten(1).any(dim=1).nonzero().flatten()
    return len(measured) > 0 and int(measured[-1] - measured[0]) + 1 > len(measured)


def one_key(keys: KeysCollection) -> KeysCollection:
    """Return ``keys`` if they are one key.

    Raises:
        ValueError: otherwise.
    """
    if not isinstance(keys, str) and isinstance(keys, Sequence) and len(keys) != 1:
        raise ValueError(f"`keys` must be one key, since the results have one key each; got {keys!r}.")
    return keys


def item_seed_of(item: Mapping[Hashable, Any], item_seed: int | None, source_key: str, slice_key: str) -> int | None:
    """Return a seed that belongs to a file's name and a slice; None where ``item_seed`` is None.

    Raises:
        KeyError: if the item lacks one of the keys.
    """
    if item_seed is None:
        return None
    for key in (source_key, slice_key):
        if key not in item:
            raise KeyError(f"With `item_seed`, an item must have '{key}'; it has {sorted(map(str, item))}.")
    # The file's name, not its path: the same data in another folder get the same draws.
    return crc32(f"{item_seed}/{Path(item[source_key]).name}/{int(item[slice_key])}".encode())
