"""Undersampled k-space for the reconstruction studies beside it, made on their device, and measured files.

``DATA`` holds ``train/<source>/*`` and ``val/<source>/*``, 8-bit grey images
(``prepare_reconstruction_images.py`` makes such a folder). They are kept on the device; each batch gives them simulated
coils, phase, noise and masks there. ``--measured`` names fully sampled k-space files to score on in addition, through
the cases of ``monai-deqkan reconstruction evaluate``; single-coil ones are seen through simulated coils.

References are root sums of squares of noise-free coil images. Training targets have the reference's magnitude and the
phase of the noise-free image combined with the coil maps that the network is given.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from monai_deqkan.data import image_files, kspace_slices
from monai_deqkan.engines.reconstruction_cases import SuiteSettings, make_case
from monai_deqkan.metrics import head_region
from monai_deqkan.operators import (
    MASKS,
    CoilOperator,
    FourierOperator,
    add_complex_noise,
    estimate_sensitivity_maps,
    simulate_kspace,
    smooth_coil_maps,
    smooth_phase,
)
from monai_deqkan.transforms import LoadKspaceSlice, NormalizeKspace

__all__ = ["Batch", "Scans", "add_common_options", "scored_places"]

_NUM_SCANS = 64  # sets of coil maps and phases that are drawn once
_SCORED_SEED = 2026  # of the val images' coils, phase, noise and masks: the same for every network and seed


def add_common_options(parser: argparse.ArgumentParser, *, steps: int = 400, num_val: int = 16) -> None:
    """Add the options of data, training and device."""
    parser.add_argument("data", type=Path, help="folder with train/<source>/* and val/<source>/*")
    parser.add_argument("--size", type=int, default=160, help="height and width of the images")
    parser.add_argument("--coils", type=int, default=8)
    parser.add_argument("--accelerations", nargs="+", type=float, default=[4, 8])
    parser.add_argument("--snr", type=float, default=30, help="signal-to-noise ratio of scored val images, in dB")
    parser.add_argument("--num-val", type=int, default=num_val, help="number of val images, as many of each source")
    parser.add_argument("--measured", nargs="+", type=Path, default=[], help="fully sampled k-space files")
    parser.add_argument("--measured-slices", nargs="+", type=int, help="their slices; all by default")
    parser.add_argument("--steps", type=int, default=steps, help="training steps; those of denoising in addition")
    parser.add_argument("--seconds", type=float, help="train for this long in place of a number of steps")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--features", nargs="+", type=int, default=[24, 48, 88], help="levels of the U-shaped denoiser")
    parser.add_argument(
        "--jacobian-weight", type=float, default=0.0, help="penalty of equilibria without a certificate"
    )
    parser.add_argument("--max-iter", type=int, default=50, help="most evaluations of a solve in training")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Batch:
    """Undersampled slices, scaled as in training, and what is known of them.

    Attributes:
        kspace: complex ``(B, K, H, W)``.
        mask: bool ``(B, 1, 1, W)``.
        maps: coil maps estimated from the undersampled k-space, ``(B, K, H, W)``.
        reference: magnitude ``(B, 1, H, W)``.
        target: complex image as two channels ``(B, 2, H, W)``; None for measured files.
        region: pixels that are scored, bool ``(B, 1, H, W)``; None in training.
    """

    kspace: Tensor
    mask: Tensor
    maps: Tensor
    reference: Tensor
    target: Tensor | None = None
    region: Tensor | None = None

    def scaled(self) -> Batch:
        """Divide each sample by the brightness of its zero-filled image, as the bundle's training does."""
        normalize = NormalizeKspace()
        scale = torch.stack([normalize(sample)[1] for sample in self.kspace]).view(-1, 1, 1, 1)
        target = None if self.target is None else self.target / scale
        return replace(self, kspace=self.kspace / scale, reference=self.reference / scale, target=target)


class Scans:
    """Images of one part of the data on a device, and batches of undersampled k-space of them.

    Args:
        options: see :func:`add_common_options`.
        part: ``"train"`` or ``"val"``.
        seed: seed of everything that is drawn.
    """

    def __init__(self, options: argparse.Namespace, part: str, seed: int) -> None:
        self.device = torch.device(options.device)
        self.options = options
        self.cpu = torch.Generator().manual_seed(seed)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        sources = [image_files(path) for path in sorted((options.data / part).iterdir()) if path.is_dir()]
        if not any(sources):
            raise ValueError(f"There is no image in the folders of {options.data / part}; expected {part}/<source>/*.")
        if part == "val":
            sources = [_spread(files, -(-options.num_val // len(sources))) for files in sources]
        pictures = [_read(file, options.size) for files in sources for file in files]
        self.images = torch.stack(pictures).to(self.device)  # (N, H, W) bytes
        # Each source is drawn as often as any other, however many images it has.
        self.weights = torch.cat([torch.full((len(files),), 1 / len(files)) for files in sources])
        shape = (options.size, options.size)
        maps = [smooth_coil_maps(shape, options.coils, generator=self.cpu) for _ in range(_NUM_SCANS)]
        self.coils = torch.stack(maps).to(self.device)
        phases = [smooth_phase(shape, generator=self.cpu) for _ in range(_NUM_SCANS)]
        self.phases = torch.stack(phases).to(self.device)

    def draw_images(self, count: int) -> tuple[Tensor, Tensor]:
        """Return random images, mirrored and turned at random, with values in [0, 1], and phases: ``(B, H, W)``."""
        rows = torch.multinomial(self.weights, count, replacement=True, generator=self.cpu)
        images = self.images[rows.to(self.device)].float() / 255
        turns = torch.randint(8, (count,), generator=self.cpu).tolist()
        images = torch.stack(
            [(image.flip(0) if turn >= 4 else image).rot90(turn % 4) for image, turn in zip(images, turns, strict=True)]
        )
        return images, self.phases[self._scans(count)]

    def draw_batch(self) -> Batch:
        """Return a batch of training: random images, accelerations, masks, coils, and SNR of 20 to 40 dB."""
        images, phases = self.draw_images(self.options.batch_size)
        choice = torch.randint(len(self.options.accelerations), (len(images),), generator=self.cpu)
        accelerations = [self.options.accelerations[i] for i in choice]
        snr = 20 + 20 * torch.rand(len(images), generator=self.generator, device=self.device)
        return self._batch(images, phases, accelerations, snr)

    def scored_batches(self, acceleration: float, snr_db: float | None) -> list[Batch]:
        """Return all images once, in batches, with their regions."""
        batches = []
        for images in (self.images.float() / 255).split(self.options.batch_size):
            snr = None if snr_db is None else torch.full((len(images),), snr_db, device=self.device)
            batch = self._batch(images, self.phases[self._scans(len(images))], [acceleration] * len(images), snr)
            batches.append(replace(batch, region=head_region(batch.reference)))
        return batches

    def _scans(self, count: int) -> Tensor:
        return torch.randint(_NUM_SCANS, (count,), generator=self.cpu).to(self.device)

    def _batch(self, images: Tensor, phases: Tensor, accelerations: Sequence[float], snr_db: Tensor | None) -> Batch:
        coils = self.coils[self._scans(len(images))]
        full = simulate_kspace(images, coils, phase=phases)
        masks = []
        for acceleration in accelerations:
            pattern = ("random", "equispaced")[int(torch.randint(2, (), generator=self.cpu))]
            masks.append(MASKS[pattern](images.shape[1:], acceleration, 0.32 / acceleration, generator=self.cpu))
        mask = torch.stack(masks)[:, None].to(self.device)
        noisy = full if snr_db is None else add_complex_noise(full, snr_db, generator=self.generator)
        kspace = noisy * mask
        maps = estimate_sensitivity_maps(kspace, mask)
        combined = CoilOperator(maps).adjoint(FourierOperator(2).adjoint(full))
        target = torch.polar(images, combined.angle())
        return Batch(
            kspace, mask, maps, images[:, None], torch.view_as_real(target).movedim(-1, 1).contiguous()
        ).scaled()


def _spread(files: Sequence[Path], count: int) -> list[Path]:
    """Return so many files, evenly spread."""
    count = min(count, len(files))
    return [files[(2 * i + 1) * len(files) // (2 * count)] for i in range(count)]


def _read(file: Path, size: int) -> Tensor:
    with Image.open(file) as image:
        picture = ImageOps.pad(image.convert("L"), (size, size), color=0)
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(size, size)


def scored_places(
    options: argparse.Namespace, snr_db: float | None, added_snr_db: float | None = None
) -> dict[str, list[Batch]]:
    """Return what networks are scored on, by name: the val images and each measured file at each acceleration.

    Args:
        options: see :func:`add_common_options`.
        snr_db: signal-to-noise ratio of the val images.
        added_snr_db: that of noise that is added to measured files; None leaves them as measured.
    """
    places: dict[str, list[Batch]] = {}
    for acceleration in options.accelerations:
        scans = Scans(options, "val", _SCORED_SEED)
        places[f"val {acceleration:g}x"] = scans.scored_batches(acceleration, snr_db)
    for file in options.measured:
        items = kspace_slices([file], options.measured_slices)
        single = LoadKspaceSlice()(file, items[0]["slice"]).shape[0] == 1
        settings = SuiteSettings(
            accelerations=options.accelerations,
            noise=(added_snr_db,),
            simulated_coils=options.coils if single else 0,
        )
        for scenario in settings.scenarios():
            place = places.setdefault(f"{file.stem} {scenario.acceleration:g}x", [])
            for item in items:
                case = make_case(item, file.name, scenario, settings)
                parts = (case.kspace, case.mask, case.maps, case.reference, case.region)
                kspace, mask, maps, reference, region = (part.to(options.device) for part in parts)
                place.append(Batch(kspace, mask, maps, reference, region=region).scaled())
    return places
