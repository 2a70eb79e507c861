"""Multi-coil k-space made from magnitude images, for tests and for pretraining; always labelled as simulated."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config.type_definitions import KeysCollection
from monai.transforms.transform import MapTransform, RandomizableTransform
from torch import Tensor

from monai_deqkan._checks import check_finite, check_int, check_range, check_tensor
from monai_deqkan.operators import add_complex_noise, simulate_kspace, smooth_coil_maps, smooth_phase
from monai_deqkan.transforms.kspace.checks import item_seed_of, one_key

__all__ = ["SimulateKspace", "SimulateKspaced"]


class SimulateKspace(RandomizableTransform):
    """Make fully sampled k-space from a magnitude image: smooth phase, smooth coil maps on a ring, complex noise.

    Real data differ: their noise is coloured between coils, their phase less smooth, their matrix larger than the
    image. Say so where results on such data are shown.

    Args:
        num_coils: number of coils, or several numbers of which each call draws one; 1 has no coil map.
        max_phase: largest absolute phase of the image, in radians.
        snr_db: signal-to-noise ratio of k-space in dB, see :func:`monai_deqkan.operators.add_complex_noise`; two values
            are a range from which each call draws; None adds no noise.
        tissue_phase: largest difference of phase, in radians, between what is darker and what is brighter than a value
            drawn per call: tissues that differ in chemical shift or flow. 0 for none.
    """

    def __init__(
        self,
        num_coils: int | Sequence[int] = 8,
        max_phase: float = math.pi / 2,
        snr_db: float | Sequence[float] | None = None,
        tissue_phase: float = 0.0,
    ) -> None:
        super().__init__(prob=1.0)
        counts = tuple(num_coils) if isinstance(num_coils, Sequence) else (num_coils,)
        if not counts:
            raise ValueError("`num_coils` must be a number of coils, or several; got none.")
        self.num_coils = tuple(check_int("num_coils", count) for count in counts)
        self.max_phase = check_range("max_phase", max_phase, 0.0)
        ends = () if snr_db is None else (snr_db, snr_db) if isinstance(snr_db, (int, float)) else tuple(snr_db)
        if len(ends) not in (0, 2) or any(not math.isfinite(end) for end in ends) or list(ends) != sorted(ends):
            raise ValueError(
                f"`snr_db` must be a number in dB, a range of two with the smaller first, or None; got {snr_db!r}."
            )
        self.snr_range = ends
        self.tissue_phase = check_range("tissue_phase", tissue_phase, 0.0)
        self._seed = 0

    def randomize(self, data: Any = None) -> None:
        """Draw the seed of the next simulation."""
        self._seed = int(self.R.randint(2**31))

    def __call__(self, image: Tensor, seed: int | None = None) -> Tensor:
        """Simulate k-space.

        Args:
            image: real, not negative, shape ``(1, *space)`` with two or three axes of space, any unit.
            seed: makes phase, coils and noise; None draws others in every call.

        Returns:
            Complex64 in the unit of ``image``, shape ``(K, *space)``.

        Raises:
            ValueError: if the image has another shape, or values that are negative or not finite.
        """
        return self.simulate(image, seed)[0]

    def simulate(self, image: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Simulate k-space as a call does; return it with noise, without, and the coil maps ``(K, *space)``."""
        if check_tensor("image", image).is_complex() or image.ndim not in (3, 4) or image.shape[0] != 1:
            raise ValueError(
                f"`image` must be a magnitude image of shape (1, *space); got {image.dtype} of shape "
                f"{tuple(image.shape)}. Turn colors into grey first."
            )
        check_finite("image", image)
        if bool((image < 0).any()):
            raise ValueError(
                f"`image` must not be negative, as magnitudes are; its least value is {image.min():g}. Shift it first."
            )
        if seed is None:
            self.randomize()
        generator = torch.Generator().manual_seed(self._seed if seed is None else seed)
        space = tuple(image.shape[1:])
        phase = smooth_phase(space, self.max_phase, generator=generator)
        maps = torch.ones((1, *space), dtype=torch.complex64)
        num_coils = self.num_coils[0]
        if len(self.num_coils) > 1:
            num_coils = self.num_coils[int(torch.randint(len(self.num_coils), (), generator=generator))]
        if num_coils > 1:
            maps = smooth_coil_maps(space, num_coils, generator=generator)
        snr_db = None
        if self.snr_range:
            low, high = self.snr_range
            snr_db = low + (high - low) * float(torch.rand((), generator=generator))
        magnitude = torch.as_tensor(image, dtype=torch.float32).as_subclass(Tensor).cpu()
        if self.tissue_phase:
            phase = phase + _tissue_phase(magnitude[0], self.tissue_phase, generator)
        clean = simulate_kspace(magnitude, maps, phase=phase)
        noisy = clean if snr_db is None else add_complex_noise(clean, snr_db, generator=generator)
        return noisy[0], clean[0], maps


def _tissue_phase(image: Tensor, largest: float, generator: torch.Generator) -> Tensor:
    """Return the phase in radians of what is brighter than a drawn value, with a soft edge as partial volumes have."""
    share, size = torch.rand(2, generator=generator).tolist()
    values = image.flatten()
    threshold = values.kthvalue(1 + int((0.2 + 0.7 * share) * (values.numel() - 1))).values
    width = (0.02 * values.max()).clamp_min(torch.finfo(values.dtype).tiny)
    return largest * (2 * size - 1) * torch.sigmoid((image - threshold) / width)


class SimulateKspaced(RandomizableTransform, MapTransform):
    """Add k-space simulated from a magnitude image; see :class:`SimulateKspace`.

    The item gets ``simulated: True`` as well.

    Args:
        keys: key of the image, one.
        kspace_key: key for the k-space.
        clean_key: key for the same k-space without noise, for a reference; None leaves it out.
        maps_key: key for the coil maps that were simulated; None leaves them out.
        num_coils: see :class:`SimulateKspace`.
        max_phase: see :class:`SimulateKspace`.
        snr_db: see :class:`SimulateKspace`.
        tissue_phase: see :class:`SimulateKspace`.
        item_seed: None simulates anew in every call. A number gives every slice one simulation for ever, made from this
            seed, the file's name and the slice.
        source_key: key of the file's path; used with ``item_seed``.
        slice_key: key of the slice's index; used with ``item_seed``.
        allow_missing_keys: whether to skip an absent key.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        kspace_key: str = "kspace",
        num_coils: int | Sequence[int] = 8,
        max_phase: float = math.pi / 2,
        snr_db: float | Sequence[float] | None = None,
        *,
        tissue_phase: float = 0.0,
        clean_key: str | None = None,
        maps_key: str | None = None,
        item_seed: int | None = None,
        source_key: str = "source",
        slice_key: str = "slice",
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, one_key(keys), allow_missing_keys)
        RandomizableTransform.__init__(self, prob=1.0)
        self.kspace_key = kspace_key
        self.clean_key, self.maps_key = clean_key, maps_key
        self.item_seed = None if item_seed is None else check_int("item_seed", item_seed, minimum=0)
        self.source_key, self.slice_key = source_key, slice_key
        self.simulate = SimulateKspace(num_coils, max_phase, snr_db, tissue_phase)

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> SimulateKspaced:
        """Seed the simulations that are drawn per call."""
        super().set_random_state(seed, state)
        self.simulate.set_random_state(seed, state)
        return self

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Simulate."""
        item = dict(data)
        for key in self.key_iterator(item):
            seed = item_seed_of(item, self.item_seed, self.source_key, self.slice_key)
            item[self.kspace_key], clean, maps = self.simulate.simulate(item[key], seed)
            extra = {self.clean_key: clean, self.maps_key: maps}
            item.update({name: value for name, value in extra.items() if name is not None})
            item["simulated"] = True
        return item
