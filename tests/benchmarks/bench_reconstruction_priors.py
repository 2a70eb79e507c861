"""Compare the priors of DEQReconstructor trained for the same number of steps on the same simulated k-space.

Run by hand: ``python tests/benchmarks/bench_reconstruction_priors.py [--steps 100]``. It writes the ``brain_kspace``
sample to a temporary folder (no download), trains each prior from the same seed, and prints PSNR on the test slab
beside zero-filling and the best CG-SENSE iterate. Nothing is asserted.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from monai.transforms import Compose, CopyItemsd
from monai.utils import set_determinism

from monai_deqkan.adjoints import ImplicitAdjoint
from monai_deqkan.data import kspace_items, write_sample
from monai_deqkan.demo.baselines import best_cg_sense, zero_filled
from monai_deqkan.losses import PerpendicularLoss
from monai_deqkan.metrics import magnitude, psnr
from monai_deqkan.networks.nets import DEQReconstructor
from monai_deqkan.solvers import AndersonSolver, SolveRecorder
from monai_deqkan.transforms import (
    EstimateSensitivityMapsd,
    LoadKspaceSliced,
    NormalizeKspaced,
    ReferenceImaged,
    UndersampleKspaced,
)

PRIORS = {
    "ridge, 4 x 16": {"prior": "ridge", "num_layers": 4, "features": 16},
    "certified DnCNN, 8 x 32": {"prior": "dncnn", "num_layers": 8, "features": 32},
}
LEARNING_RATES = {"ridge, 4 x 16": 1e-2, "certified DnCNN, 8 x 32": 2e-3}


def load(folder: Path, part: str) -> dict[str, torch.Tensor]:
    """Return every slice of a part, undersampled 4 times, stacked."""
    chain = Compose(
        [
            LoadKspaceSliced(),
            CopyItemsd("kspace", names="full_kspace"),
            UndersampleKspaced(accelerations=4.0, center_fractions=0.12, item_seed=0),
            EstimateSensitivityMapsd(),
            ReferenceImaged("full_kspace", maps_key="sensitivity_maps"),
            NormalizeKspaced(),
        ]
    )
    items = [chain(item) for item in kspace_items(folder, part)]
    return {key: torch.stack([torch.as_tensor(item[key]) for item in items]) for key in KEYS}


KEYS = ("kspace", "mask", "sensitivity_maps", "image", "reference_rss")


def train(name: str, data: dict[str, torch.Tensor], steps: int) -> DEQReconstructor:
    """Train one prior for a number of steps of two slices."""
    set_determinism(0)
    quiet = {"on_failure": "ignore"}
    network = DEQReconstructor(
        2,
        **PRIORS[name],
        solver=("anderson", {"rtol": 1e-3, **quiet}),
        adjoint=ImplicitAdjoint(solver=AndersonSolver(rtol=1e-2, **quiet)),
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATES[name])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, LEARNING_RATES[name] / 20)
    loss_function = PerpendicularLoss()
    for _ in range(steps):
        rows = torch.randint(0, len(data["kspace"]), (2,))
        kspace, mask, maps, image = (data[key][rows] for key in KEYS[:4])
        optimizer.zero_grad()
        loss_function(network(kspace, mask, maps), image).backward()
        optimizer.step()
        schedule.step()
    return network


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        root = write_sample("brain_kspace", Path(folder) / "data")
        data, test = load(root, "train"), load(root, "evaluate")
    kspace, mask, maps, _, reference = (test[key] for key in KEYS)
    print(f"{'method':28} {'PSNR (dB)':>10} {'evaluations':>12} {'seconds':>8}")
    print(f"{'zero-filled':28} {float(psnr(zero_filled(kspace), reference).mean()):10.2f}")
    print(f"{'CG-SENSE, best iterate':28} {float(best_cg_sense(kspace, mask, maps, reference)[1].mean()):10.2f}")
    for name in PRIORS:
        start = time.perf_counter()
        network = train(name, data, steps)
        seconds = time.perf_counter() - start
        with torch.no_grad(), SolveRecorder() as recorder:
            image = magnitude(network(kspace, mask, maps))
        score, spent = float(psnr(image, reference).mean()), float(recorder.evaluations().double().mean())
        print(f"{name:28} {score:10.2f} {spent:12.1f} {seconds:8.0f}")


if __name__ == "__main__":
    main()
