"""What the loss function changes: PSNR, SSIM, magnitude bias and phase error of networks trained alike.

    python tests/benchmarks/study_reconstruction_losses.py DATA --measured FILES
    python tests/benchmarks/study_reconstruction_losses.py DATA --measured FILES --table

The network is the equilibrium of form ``"cg"`` with the U-shaped denoiser, pre-trained in the same way for all.
``perpendicular`` has the L1 loss of the magnitude with it; ``ssim`` is of magnitudes and does not see the phase.
``study_runs.py`` says how runs are kept, ``reconstruction_scans.py`` what the data are.
"""

from __future__ import annotations

import argparse
from typing import Any

from reconstruction_scans import add_common_options, scored_places
from reconstruction_study import call, score, train_equilibrium
from study_runs import Study, run_study

from monai_deqkan.losses import ReconstructionLoss

LOSSES: dict[str, ReconstructionLoss] = {
    "mse": ReconstructionLoss({"mse": 1.0}),
    "l1": ReconstructionLoss({"l1": 1.0}),
    "l1_kspace": ReconstructionLoss({"l1": 1.0}, domain="kspace"),
    "perpendicular": ReconstructionLoss({"perpendicular": 1.0, "magnitude": 1.0}),
    "ssim": ReconstructionLoss({"ssim": 1.0}),
    "l1_ssim": ReconstructionLoss({"l1": 1.0, "ssim": 0.1}),
    "perpendicular_ssim": ReconstructionLoss({"perpendicular": 1.0, "magnitude": 1.0, "ssim": 0.1}),
    "perpendicular_mse": ReconstructionLoss({"perpendicular": 1.0, "magnitude": 1.0, "mse": 1.0}),
}


def run(options: argparse.Namespace, loss: str, seed: int) -> list[dict[str, Any]]:
    network, _, trained = train_equilibrium("cg", options, seed, LOSSES[loss])
    places = scored_places(options, options.snr)
    return [{**trained, "data": place, **score(call(network), batches)} for place, batches in places.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser)
    values = {
        "PSNR (dB)": ("psnr", ".2f"),
        "SSIM": ("ssim", ".4f"),
        "magnitude bias": ("bias", "+.2%"),
        "phase error (degrees)": ("phase", ".2f"),
        "evaluations": ("evaluations", ".1f"),
        "training (s)": ("train_seconds", ".0f"),
    }
    run_study(Study("reconstruction_losses", list(LOSSES), run, {"loss": "cell", "data": "data"}, values), parser)


if __name__ == "__main__":
    main()
