"""Score coil sensitivity maps from few central lines by the CG-SENSE images they give.

Run by hand: ``python tests/benchmarks/bench_sensitivity_maps.py [--weights sensitivity.pt]``. It reads the folder that
MONAI_DEQKAN_SHARED_DATA names: real complex cardiac images (one subject, 7 of 14 images), from which
8-coil k-space is simulated with noise of 30 dB, and one measured 8-coil brain with a reduced field of view. Neither is
trained on. ``--weights`` adds SensitivityNet, as trained by ``train_sensitivity_net.py``; ``--validate`` takes the
other half of the cardiac images, to choose settings by. It prints Markdown; nothing is asserted.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import torch
from torch import Tensor

from monai_deqkan.networks.nets import SensitivityNet
from monai_deqkan.operators import (
    CoilOperator,
    FourierOperator,
    MRIOperator,
    equispaced_mask,
    espirit_maps,
    estimate_sensitivity_maps,
    random_mask,
    simulate_kspace,
    smooth_coil_maps,
)
from monai_deqkan.variational import cg_sense_path

SETTINGS = ((4, 0.08), (8, 0.04))
PATTERNS = {"random": random_mask, "equispaced": equispaced_mask}
TEST, VALIDATION = slice(7, 14), slice(0, 7)
Method = Callable[[Tensor, Tensor, Tensor], Tensor]


def methods(weights: Path | None) -> dict[str, Method]:
    """Return functions of the full k-space, the measured one and the mask."""
    named: dict[str, Method] = {
        "low frequencies, all lines": lambda full, y, mask: estimate_sensitivity_maps(full),
        "ESPIRiT, all lines": lambda full, y, mask: espirit_maps(full),
        "low frequencies": lambda full, y, mask: estimate_sensitivity_maps(y, mask),
        "ESPIRiT": lambda full, y, mask: espirit_maps(y, mask),
        "ESPIRiT, 2 sets": lambda full, y, mask: espirit_maps(y, mask, num_sets=2, crop=0.8),
    }
    if weights is not None:
        network = SensitivityNet(2).eval()
        network.load_state_dict(torch.load(weights, weights_only=True))
        named["learned (SensitivityNet)"] = lambda full, y, mask: network(y, mask)
    return named


def score(y: Tensor, mask: Tensor, maps: Tensor, reference: Tensor, head: Tensor) -> tuple[float, float]:
    """Return the PSNR of the best of 15 iterates and of the tenth, of the coils' root sum of squares where signal is.

    The image is what the maps say that the coils saw, so one and two sets, and maps of any norm, compare alike.
    """
    scores = []
    operator = MRIOperator(mask, maps, spatial_dims=2)
    coils = CoilOperator(maps, spatial_dims=2)
    for image in cg_sense_path(y, operator=operator, max_iter=15):
        magnitude = coils(image).abs().square().sum(1).sqrt()
        error = ((magnitude - reference).square() * head).sum() / head.sum()
        scores.append(float(10 * torch.log10(reference.max().square() / error)))
    return max(scores), scores[9]


def table(rows: dict[tuple[str, str, int], list[tuple[float, float, float]]], names: list[str]) -> None:
    """Print means over images, with the gap to the first row in the best iterate."""
    columns = [(pattern, acceleration) for acceleration, _ in SETTINGS for pattern in PATTERNS]
    print("| maps | " + " | ".join(f"{a}x {p}" for p, a in columns) + " | s per slice |")
    print("|---" * (len(columns) + 2) + "|")
    for name in names:
        cells, seconds = [], []
        for pattern, acceleration in columns:
            best, tenth, spent = (sum(v) / len(v) for v in zip(*rows[name, pattern, acceleration], strict=True))
            first = [b for b, _, _ in rows[names[0], pattern, acceleration]]
            cells.append(f"{best:.2f} ({best - sum(first) / len(first):+.2f}) / {tenth:.2f}")
            seconds.append(spent)
        print(f"| {name} | " + " | ".join(cells) + f" | {sum(seconds) / len(seconds):.2f} |", flush=True)


def run(
    full: Tensor, references: Tensor, named: dict[str, Method], generator: torch.Generator
) -> dict[tuple[str, str, int], list]:
    """Score all methods on all slices of fully sampled k-space."""
    rows: dict[tuple[str, str, int], list[tuple[float, float, float]]] = {}
    for kspace, reference in zip(full.split(1), references.split(1), strict=True):
        head = (reference > 0.1 * reference.max()).float()
        for acceleration, fraction in SETTINGS:
            for pattern, draw in PATTERNS.items():
                mask = draw(kspace.shape[-1], acceleration, fraction, generator=generator).reshape(1, 1, 1, -1)
                for name, estimate in named.items():
                    start = time.perf_counter()
                    with torch.no_grad():
                        maps = estimate(kspace, kspace * mask, mask)
                    spent = time.perf_counter() - start
                    result = (*score(kspace * mask, mask, maps, reference, head), spent)
                    rows.setdefault((name, pattern, acceleration), []).append(result)
    return rows


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=None)
    parser.add_argument("--validate", action="store_true", help="the other cardiac images, and no brain")
    options = parser.parse_args()
    folder = Path(os.environ["MONAI_DEQKAN_SHARED_DATA"]) / "mri"
    named = methods(options.weights)
    generator = torch.Generator().manual_seed(0)
    with h5py.File(folder / "singlecoil_cardiac_fatwater.h5") as file:
        part = VALIDATION if options.validate else TEST
        images = FourierOperator(2).adjoint(torch.from_numpy(file["kspace"][part]).reshape(-1, 256, 192))
    truth = torch.stack([smooth_coil_maps((256, 192), 8, generator=generator) for _ in images])
    full = simulate_kspace(images, truth, snr_db=30, generator=generator)
    known = {"true": lambda full, y, mask: current["maps"]}
    rows: dict[tuple[str, str, int], list] = {}
    current: dict[str, Tensor] = {}
    for kspace, image, maps in zip(full.split(1), images.split(1), truth.split(1), strict=True):
        current["maps"] = maps
        for key, values in run(kspace, image.abs(), known | named, generator).items():
            rows.setdefault(key, []).extend(values)
    print(f"Simulated 8-coil k-space of {len(images)} real cardiac images, PSNR in dB:\n")
    table(rows, ["true", *named])
    if not options.validate:
        with h5py.File(folder / "multicoil_brain_smallfov.h5") as file:
            brain = torch.from_numpy(file["kspace"][()])
        print("\nMeasured 8-coil brain whose field of view wraps, 3 masks each, PSNR in dB:\n")
        reference = FourierOperator(2).adjoint(brain).abs().square().sum(1).sqrt()
        brain, reference = brain.expand(3, -1, -1, -1), reference.expand(3, -1, -1)
        table(run(brain, reference, named, generator), list(named))


if __name__ == "__main__":
    main()
