"""The cases of a reconstruction suite: slices of measured k-space, undersampled in a stated way."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import torch
from torch import Tensor

from monai_deqkan._checks import check_choice, check_int, check_range
from monai_deqkan.data import find_kspace_files, kspace_items, kspace_slices
from monai_deqkan.metrics import head_region
from monai_deqkan.operators import (
    FourierOperator,
    add_complex_noise,
    net_acceleration,
    simulate_kspace,
    smooth_coil_maps,
)
from monai_deqkan.transforms import (
    EstimateSensitivityMaps,
    ImageMagnitude,
    LoadKspaceSlice,
    ReferenceImage,
    UndersampleKspace,
)

__all__ = ["Case", "Scenario", "SuiteSettings", "is_simulated", "list_slices", "make_case"]


@dataclass(frozen=True)
class Scenario:
    """How k-space is undersampled.

    Attributes:
        mask: pattern of the mask.
        acceleration: lines per measured line, centre included.
        center_fraction: share of lines in the fully sampled centre.
        snr_db: signal-to-noise ratio of noise that is added, in dB; None adds none to what was measured.
    """

    mask: str
    acceleration: float
    center_fraction: float
    snr_db: float | None

    @property
    def name(self) -> str:
        """A short text for tables and file names."""
        noise = "" if self.snr_db is None else f"_{self.snr_db:g}dB"
        return f"{self.mask}_{self.acceleration:g}x{noise}"


@dataclass(frozen=True, kw_only=True)
class SuiteSettings:
    """What a reconstruction suite varies and how it scores.

    Args:
        masks: patterns of :class:`~monai_deqkan.transforms.UndersampleKspace`; each slice draws its own mask.
        accelerations: lines per measured line, centre included.
        center_fraction: share of lines in the centre; None takes 0.32 / acceleration, fastMRI's 8 % at 4 and 4 % at 8.
        noise: signal-to-noise ratios of added noise in dB; None in it stands for the data as measured.
        reference: ``"rss"``, the root sum of squares of fully sampled coil images; or ``"sense"``, their combination
            with maps estimated from their own centre.
        region: ``"head"``, where the root sum of squares exceeds a tenth of its maximum, holes filled; or ``"all"``.
        phase_axis: the axis that is undersampled: ``"last"`` as in fastMRI, ``"first"`` or ``"shorter"``.
        simulated_coils: number of simulated smooth coils that single-coil images are seen through; 0 for none.
        maps_method: how coil maps are estimated, see :class:`~monai_deqkan.transforms.EstimateSensitivityMaps`.
        crop: height and width of the centre of images that is scored, as fastMRI scores 320 x 320; None scores all.
        slices: indices of slices to take from each file; None takes all.
        max_slices: at most so many slices in all, evenly spread; None takes all.
        part: ``"train"``, ``"val"`` or ``"evaluate"`` of a data set in parts; None takes all files below the folder.
        seed: seed of masks, noise and simulated coils.
    """

    masks: Sequence[str] = ("random", "equispaced")
    accelerations: Sequence[float] = (2, 4, 6, 8, 10)
    center_fraction: float | None = None
    noise: Sequence[float | None] = (None,)
    reference: str = "rss"
    region: str = "head"
    phase_axis: str = "last"
    simulated_coils: int = 0
    maps_method: str = "low_frequency"
    crop: Sequence[int] | None = None
    slices: Sequence[int] | None = None
    max_slices: int | None = None
    part: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("reference", self.reference, ("rss", "sense"))
        check_choice("region", self.region, ("head", "all"))
        check_choice("phase_axis", self.phase_axis, ("last", "first", "shorter"))
        check_choice("maps_method", self.maps_method, ("low_frequency", "espirit"))
        check_int("simulated_coils", self.simulated_coils, minimum=0)
        for name in ("masks", "accelerations", "noise"):
            if isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"`{name}` must be a sequence of at least one value; got {getattr(self, name)!r}.")
        for acceleration in self.accelerations:
            check_range("accelerations", acceleration, 1.0)
        for snr in self.noise:
            if snr is not None and not math.isfinite(snr):
                raise ValueError(f"`noise` must hold finite ratios in dB, or None for no noise; got {snr}.")
        if self.max_slices is not None:
            check_int("max_slices", self.max_slices)
        if self.crop is not None and (len(self.crop) != 2 or min(self.crop) < 7):
            raise ValueError(f"`crop` must be a height and a width of at least 7 pixels; got {tuple(self.crop)}.")
        self.scenarios()

    def scenarios(self) -> list[Scenario]:
        """Return all combinations of mask, acceleration and noise.

        Raises:
            ValueError: for a mask that cannot be drawn.
        """
        found: dict[Scenario, None] = {}  # in order; a value given twice counts once
        for mask in self.masks:
            for acceleration in self.accelerations:
                center = 0.32 / acceleration if self.center_fraction is None else self.center_fraction
                UndersampleKspace(acceleration, center, pattern=mask)
                found |= {Scenario(mask, float(acceleration), center, snr): None for snr in self.noise}
        return list(found)


@dataclass(frozen=True)
class Case:
    """One undersampled slice, its reference, and how long its parts took.

    Attributes:
        kspace: undersampled, complex ``(1, K, H, W)``, phase encoding along the last axis.
        mask: bool ``(1, 1, 1, W)``.
        maps: coil maps estimated from the undersampled k-space, ``(1, K, H, W)``.
        reference: magnitude ``(1, 1, H, W)``.
        region: bool, same shape: pixels that count.
        net_acceleration: what the mask really has.
        turned: whether the image must be transposed to lie as in the file.
        seconds: seconds spent on reading and on the coil maps.
    """

    kspace: Tensor
    mask: Tensor
    maps: Tensor
    reference: Tensor
    region: Tensor
    net_acceleration: float
    turned: bool
    seconds: dict[str, float]


def list_slices(folder: str | Path, settings: SuiteSettings) -> list[dict[str, Any]]:
    """List the slices of the fully sampled files of a folder: ``{"kspace": path, "slice": index}`` each.

    Raises:
        ValueError: if there is none.
    """
    if settings.part is not None:
        items = kspace_items(folder, settings.part, slices=settings.slices)
    else:
        files = [file for file in find_kspace_files(folder) if not _undersampled(file)]
        if not files:
            raise ValueError(
                f"All k-space files in {folder} were measured undersampled, so there is no reference. Name a folder "
                "with fully sampled files."
            )
        items = kspace_slices(files, settings.slices)
    if settings.max_slices is not None and len(items) > settings.max_slices:
        count = settings.max_slices
        items = [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]
    return items


def is_simulated(path: str | Path) -> bool:
    """Return whether a k-space file says of itself that it was simulated."""
    with h5py.File(path, "r") as content:
        return bool(content.attrs.get("simulated", False))


def _undersampled(file: Path) -> bool:
    with h5py.File(file, "r") as content:
        return "mask" in content


def make_case(item: dict[str, Any], name: str, scenario: Scenario, settings: SuiteSettings) -> Case:
    """Read a slice and undersample it.

    Args:
        item: entry of :func:`list_slices`.
        name: the file's name within its folder, from which the mask's seed comes.
        scenario: how to undersample.
        settings: the suite's settings.

    Raises:
        ValueError: if coils are to be simulated for multi-coil data, or the centre is too wide for the acceleration.
    """
    seed = zlib.crc32(f"{settings.seed}/{name}/{item['slice']}".encode())
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    full = LoadKspaceSlice()(item["kspace"], item["slice"])
    height, width = full.shape[-2:]
    turned = settings.phase_axis == "first" or (settings.phase_axis == "shorter" and height < width)
    full = full.transpose(-1, -2).contiguous() if turned else full
    if settings.simulated_coils:
        if full.shape[0] != 1:
            raise ValueError(
                f"`simulated_coils` is for single-coil files; {name} has {full.shape[0]} coils. Leave it at 0."
            )
        maps = smooth_coil_maps(full.shape[1:], settings.simulated_coils, generator=generator)
        full = simulate_kspace(FourierOperator(2).adjoint(full), maps)[0]
    combined, rss = ReferenceImage()(full)
    region = head_region(rss[None]) if settings.region == "head" else torch.ones_like(rss[None], dtype=torch.bool)
    reference = rss if settings.reference == "rss" else ImageMagnitude()(combined)
    if scenario.snr_db is not None:
        full = add_complex_noise(full[None], scenario.snr_db, generator=generator)[0]
    undersample = UndersampleKspace(scenario.acceleration, scenario.center_fraction, pattern=scenario.mask)
    kspace, mask = undersample(full, seed=seed % 2**31)
    read = time.perf_counter()
    maps = EstimateSensitivityMaps(method=settings.maps_method)(kspace, mask)
    seconds = {"reading and masking": read - start, "coil maps": time.perf_counter() - read}
    return Case(kspace[None], mask[None], maps[None], reference[None], region, net_acceleration(mask), turned, seconds)
