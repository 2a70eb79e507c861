"""Train SensitivityNet on simulated coils over photographs and slices of a brain template.

Run by hand: ``python tests/benchmarks/train_sensitivity_net.py --out sensitivity.pt [--minutes 20]``. The images are
those that scikit-image ships and axial slices of nilearn's MNI152 template; ``--images FOLDER`` adds the pictures below
a folder. Coils (4 to 12, on rings of several radii around shifted fields of view), phases, noise, object outlines and
sampling masks are drawn at random. It writes a weights file and beside it a list of the images, and prints the loss of
fresh simulations of held-out images. Research only; not for clinical use.
"""

import argparse
import hashlib
import json
import math
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from nilearn import datasets
from PIL import Image
from skimage import data as photographs
from torch import Tensor
from torch.nn import functional as F

from monai_deqkan.networks.nets import SensitivityNet
from monai_deqkan.operators import (
    MRIOperator,
    equispaced_mask,
    espirit_maps,
    low_frequency_images,
    random_mask,
    simulate_kspace,
    smooth_coil_maps,
    smooth_phase,
)

NAMES = (
    "astronaut",
    "brick",
    "camera",
    "cell",
    "chelsea",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "moon",
    "page",
    "text",
)
SHAPES = ((64, 64), (80, 64), (72, 56), (64, 80))  # small ones: sensitivities are smooth


def gather(folder: Path | None) -> dict[str, Tensor]:
    """Return grey images by name, each scaled to a largest value of one."""
    images = {f"scikit-image {name}": np.asarray(getattr(photographs, name)(), dtype=float) for name in NAMES}
    images = {name: pixels.mean(-1) if pixels.ndim == 3 else pixels for name, pixels in images.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        volume = datasets.load_mni152_template(resolution=1).get_fdata()
    for z in range(60, 140, 2):
        images[f"MNI152 axial slice {z}"] = volume[:, :, z]
    for path in sorted(folder.rglob("*.[jp][pn]g"))[:200] if folder is not None else []:
        images[path.name] = np.asarray(Image.open(path).convert("L"), dtype=float)
    return {name: torch.from_numpy(pixels / pixels.max()).float() for name, pixels in images.items()}


def draw(image: Tensor, shape: tuple[int, int], generator: torch.Generator) -> dict[str, Tensor]:
    """Return one simulated measurement: undersampled k-space, mask, true maps, image, estimate and central images."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    # A random view: rotation, zoom, shift and flip; what lies outside is empty.
    angle, zoom, flip = uniform(-0.5, 0.5), uniform(0.8, 1.7), 1 if uniform(0, 1) < 0.5 else -1
    cos, sin = zoom * math.cos(angle), zoom * math.sin(angle)
    matrix = torch.tensor([[flip * cos, -sin, uniform(-0.3, 0.3)], [flip * sin, cos, uniform(-0.3, 0.3)]])
    grid = F.affine_grid(matrix[None], [1, 1, *shape], align_corners=False)
    view = F.grid_sample(image[None, None], grid, align_corners=False)[0, 0].clamp_min(0)
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in shape), indexing="ij")
    if uniform(0, 1) < 0.7:  # an elliptic object on empty ground
        radius = ((y - uniform(-0.2, 0.2)) / uniform(0.5, 1.0)) ** 2 + ((x - uniform(-0.2, 0.2)) / uniform(0.5, 1)) ** 2
        view = (view + uniform(0, 0.3)) * torch.sigmoid((1 - radius) * 20)
    view = (view / view.max().clamp_min(1e-3)) ** uniform(0.6, 1.5)
    phase = smooth_phase(shape, uniform(0, 2 * math.pi), generator=generator)
    cells = int(torch.randint(8, 25, (), generator=generator))
    rough = torch.randn(1, 1, cells, cells, generator=generator) * uniform(0, 1.5)
    phase = phase + F.interpolate(rough, size=shape, mode="bicubic")[0, 0]
    # The field of view is a window of a larger one, so that the ring's centre is not the image's.
    margin = [int(n * uniform(0, 0.3)) for n in shape]
    maps = smooth_coil_maps(
        [n + m for n, m in zip(shape, margin, strict=True)],
        int(torch.randint(4, 13, (), generator=generator)),
        distance=uniform(1.5, 3.0),
        loop_radius=uniform(0.2, 1.0),
        generator=generator,
    )
    top, left = (int(m * uniform(0, 1)) for m in margin)
    maps = maps[:, top : top + shape[0], left : left + shape[1]][None]
    kspace = simulate_kspace(view[None], maps, phase=phase, snr_db=uniform(15, 40), generator=generator)
    lines = int(torch.randint(5, 17, (), generator=generator))
    acceleration = min(uniform(4, 10), shape[1] / (lines + 3))
    pattern = random_mask if uniform(0, 1) < 0.5 else equispaced_mask
    mask = pattern(shape[1], acceleration, lines / shape[1], generator=generator).reshape(1, 1, 1, -1)
    kspace = kspace * mask
    return {
        "kspace": kspace,
        "mask": mask,
        "truth": maps,
        "image": view[None],
        "start": espirit_maps(kspace, mask),
        "images": low_frequency_images(kspace, mask),
    }


def loss_function(maps: Tensor, item: dict[str, Tensor], steps: int = 5) -> tuple[Tensor, Tensor]:
    """Return what the maps miss of the true direction, weighed by the object, and the error of CG-SENSE's magnitude."""
    image = item["image"]
    weight = (image > 0.05).float() + image
    agreement = (maps.conj() * item["truth"]).sum(1).abs().square()
    missed = (weight * (1 - agreement)).sum() / weight.sum()
    operator = MRIOperator(item["mask"], maps)
    right = operator.adjoint(item["kspace"])
    x, residual = torch.zeros_like(right), right
    direction, power = right, right.abs().square().sum()
    for _ in range(steps):
        turned = operator.normal(direction)
        size = power / (direction.conj() * turned).sum().real.clamp_min(1e-12)
        x, residual = x + size * direction, residual - size * turned
        power, last = residual.abs().square().sum(), power
        direction = residual + power / last.clamp_min(1e-12) * direction
    magnitude = (x.real.square() + x.imag.square() + 1e-8).sqrt()
    return missed, (magnitude - image).square().sum() / image.square().sum()


def main() -> None:
    """Simulate, train, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=20.0, help="of processor time")
    parser.add_argument("--samples", type=int, default=250)
    parser.add_argument("--images", type=Path, default=None)
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists; name a new file.")
    start = time.process_time()
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    images = gather(options.images)
    names = list(images)
    held = names[::9]
    names = [name for name in names if name not in held]

    def simulate(pool: list[str], count: int) -> list[dict[str, Tensor]]:
        picks = torch.randint(len(pool), (count,), generator=generator).tolist()
        return [draw(images[pool[pick]], SHAPES[i % len(SHAPES)], generator) for i, pick in enumerate(picks)]

    network = SensitivityNet(2)
    val, items = simulate(held, 48), simulate(names, options.samples)
    print(f"{len(items)} simulated after {time.process_time() - start:.0f} s", flush=True)

    def validate() -> str:
        with torch.no_grad():
            losses = torch.tensor([loss_function(network.refine(i["start"], i["images"]), i) for i in val])
        return "missed {:.5f}, image error {:.4f}".format(*losses.mean(0).tolist())

    print(f"ESPIRiT: {validate()}", flush=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-4, weight_decay=1e-4)
    begin, step, share, told = time.process_time(), 0, 0.0, -1
    seconds = options.minutes * 60 - (begin - start)
    while share < 1:
        if int(10 * share) > told:
            told = int(10 * share)
            print(f"step {step}, {10 * told} %: {validate()}", flush=True)
        for group in optimizer.param_groups:
            group["lr"] = 5e-4 * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * share)) + 1e-6
        optimizer.zero_grad()
        for pick in torch.randint(len(items), (4,), generator=generator).tolist():
            item = items[pick]
            missed, error = loss_function(network.refine(item["start"], item["images"]), item)
            ((20 * missed + error) / 4).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        step += 4
        share = min((time.process_time() - begin) / seconds, 1.0)
    print(f"step {step}: {validate()}", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), options.out)
    digest = {name: hashlib.sha256(images[name].numpy().tobytes()).hexdigest() for name in names}
    manifest = {"note": "Research only; not for clinical use.", "training_images_sha256_of_float32": digest}
    options.out.with_suffix(".json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
