"""Equilibrium networks against their unrolled twins and fastMRI's networks, trained on the same images.

    python tests/benchmarks/study_reconstruction_networks.py DATA --measured FILES
    python tests/benchmarks/study_reconstruction_networks.py DATA --measured FILES --seconds 120 --results TIMED

The first command gives all the same number of steps, the second the same time. Equilibria without a certificate and
unrolled networks start from a denoiser pre-trained for half as many steps, or for a quarter of that time; its time is
part of theirs. fastMRI's U-Net (``fastmri.models.Unet``, 32 channels) maps the zero-filled complex image to the image;
its VarNet (``fastmri.models.VarNet``, 8 cascades) estimates coil maps of its own and gives magnitudes, which are
compared with the reference by L1. Both need ``pip install fastmri``, else they are named missing. The memory is what
one training step allocates at its peak. ``tv`` is total variation with the weight that is best on the scored images.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from reconstruction_scans import Scans, add_common_options, scored_places
from reconstruction_study import (
    FORMS,
    best_rival,
    call,
    score,
    train_equilibrium,
    train_reconstructor,
    trained_denoiser,
)
from segmentation_cost import peak_mib
from study_runs import Study, run_study
from torch import Tensor, nn

from monai_deqkan.networks.nets import UnrolledReconstructor
from monai_deqkan.operators import MRIOperator

UNROLLED = {f"unrolled_{steps}": steps for steps in (5, 10, 20)}


class FastMRIUnet(nn.Module):
    """fastMRI's U-Net on the zero-filled complex image, as two channels."""

    def __init__(self) -> None:
        super().__init__()
        from fastmri.models import Unet  # noqa: PLC0415 (an extra)

        self.unet = Unet(2, 2, chans=32, num_pool_layers=4)

    def forward(self, kspace: Tensor, mask: Tensor, maps: Tensor) -> Tensor:
        image = MRIOperator(mask, maps).adjoint(kspace)
        return self.unet(torch.view_as_real(image).movedim(-1, 1).contiguous())


class FastMRIVarNet(nn.Module):
    """fastMRI's VarNet with the size of its demonstration; returns magnitudes."""

    def __init__(self) -> None:
        super().__init__()
        from fastmri.models import VarNet  # noqa: PLC0415 (an extra)

        self.varnet = VarNet(num_cascades=8, sens_chans=8, sens_pools=4, chans=18, pools=4)

    def forward(self, kspace: Tensor, mask: Tensor, maps: Tensor) -> Tensor:
        return self.varnet(torch.view_as_real(kspace).contiguous(), mask[..., None])[:, None]


FASTMRI: dict[str, Callable[[], nn.Module]] = {"fastmri_unet": FastMRIUnet, "fastmri_varnet": FastMRIVarNet}
CELLS = [*(f"deq_{form}" for form in FORMS), *UNROLLED, *FASTMRI, "tv"]


def run(options: argparse.Namespace, cell: str, seed: int) -> list[dict[str, Any]]:
    if cell == "tv":
        places = scored_places(options, options.snr)
        return [{"data": place, **best_rival("tv", batches)} for place, batches in places.items()]
    started = time.perf_counter()
    network, scans, trained = train(options, cell, seed)
    trained["train_seconds"] = round(time.perf_counter() - started, 1)
    batch = scans.draw_batch()
    network.zero_grad()  # a step allocates its gradients

    def step() -> None:
        network(batch.kspace, batch.mask, batch.maps).square().mean().backward()

    size = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    common = {**trained, "parameters": size, "peak_mib": peak_mib(step, options.device)}
    return [
        {**common, "data": place, **score(call(network), batches)}
        for place, batches in scored_places(options, options.snr).items()
    ]


def train(options: argparse.Namespace, cell: str, seed: int) -> tuple[nn.Module, Scans, dict[str, float]]:
    if cell.startswith("deq_"):
        return train_equilibrium(cell.removeprefix("deq_"), options, seed)
    torch.manual_seed(seed)
    scans = Scans(options, "train", seed)
    seconds = options.seconds
    if cell in UNROLLED:
        network: nn.Module = UnrolledReconstructor(
            2, trained_denoiser(options, scans), form="cg", num_steps=UNROLLED[cell]
        )
        rate, seconds = 5e-4, None if seconds is None else 0.75 * seconds
    else:
        network, rate = FASTMRI[cell](), 1e-3
    network = network.to(scans.device)
    trained = train_reconstructor(network, scans, steps=options.steps, seconds=seconds, learning_rate=rate)
    return network, scans, trained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser)
    values = {
        "parameters (M)": ("parameters", ".3f"),
        "PSNR (dB)": ("psnr", ".2f"),
        "SSIM": ("ssim", ".4f"),
        "evaluations": ("evaluations", ".1f"),
        "converged": ("converged", ".0%"),
        "ms per slice": ("ms", ".0f"),
        "memory of a step (MiB)": ("peak_mib", ".0f"),
        "steps": ("steps", ".0f"),
        "training (s)": ("train_seconds", ".0f"),
    }
    run_study(Study("reconstruction_networks", CELLS, run, {"network": "cell", "data": "data"}, values), parser)


if __name__ == "__main__":
    main()
