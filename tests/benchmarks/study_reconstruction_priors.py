"""Which prior denoises best at equal size, and what becomes of that inside the equilibrium.

    python tests/benchmarks/study_reconstruction_priors.py DATA --measured FILES

Each prior of about 0.56 M parameters is trained as a denoiser of complex images (noise of 0 to 0.12 of the image's
range in each channel), scored on val images at three levels of noise, then put into an equilibrium and trained on:
form ``"contracting"`` for priors with a certified Lipschitz constant, ``"cg"`` for the others. ``ridge_small`` has the
size that DEQReconstructor gives it by default. ``unet_blind`` is the U-shaped one without the noise level, which DnCNN
and the ridge prior are not told either.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from reconstruction_scans import Scans, add_common_options, scored_places
from reconstruction_study import build_equilibrium, call, denoised, pretrain, score, train_reconstructor
from study_runs import Study, run_study
from torch import nn

from monai_deqkan.metrics import psnr
from monai_deqkan.networks.nets import ConvexRidgeDenoiser, DnCNN, UNetDenoiser

NOISE_LEVELS = (0.02, 0.05, 0.1)
# The network, the form of its equilibrium, and learning rates of denoising and of the equilibrium.
PRIORS: dict[str, tuple[Callable[[argparse.Namespace], nn.Module], str, float, float]] = {
    "unet": (lambda options: UNetDenoiser(2, 2, options.features), "cg", 1e-3, 5e-4),
    "unet_blind": (lambda options: UNetDenoiser(2, 2, options.features, blind=True), "cg", 1e-3, 5e-4),
    "dncnn": (lambda options: DnCNN(2, 2, 2), "cg", 1e-3, 5e-4),
    "dncnn_spectral": (lambda options: DnCNN(2, 2, 2, spectral_norm="spectral"), "cg", 1e-3, 5e-4),
    "dncnn_certified": (
        lambda options: DnCNN(2, 2, 2, residual=False, spectral_norm="certified"),
        "contracting",
        2e-3,
        2e-3,
    ),
    "ridge": (
        lambda options: ConvexRidgeDenoiser(2, 2, 12, 192, kernel_size=11, threshold=0.002),
        "contracting",
        1e-2,
        1e-2,
    ),
    "ridge_small": (lambda options: ConvexRidgeDenoiser(2, 2), "contracting", 1e-2, 1e-2),
}


def run(options: argparse.Namespace, name: str, seed: int) -> list[dict[str, Any]]:
    torch.manual_seed(seed)
    build, form, denoising_rate, rate = PRIORS[name]
    scans = Scans(options, "train", seed)
    prior = build(options).to(scans.device)
    size = {"parameters": sum(parameter.numel() for parameter in prior.parameters()) / 1e6, "form": form}
    denoising = pretrain(prior, scans, steps=2 * options.steps, seconds=options.seconds, learning_rate=denoising_rate)
    first: dict[str, Any] = {**size, **denoising_scores(prior, options), "denoise_seconds": denoising["train_seconds"]}
    network = build_equilibrium(form, prior, 0.98 if form == "contracting" else None, options).to(scans.device)
    trained = train_reconstructor(network, scans, steps=options.steps, seconds=options.seconds, learning_rate=rate)
    return [
        {
            **first,
            **trained,
            "data": place,
            **score(call(network), batches),
        }
        for place, batches in scored_places(options, options.snr).items()
    ]


@torch.no_grad()
def denoising_scores(prior: nn.Module, options: argparse.Namespace) -> dict[str, float]:
    """Return the mean PSNR over real and imaginary part of denoised val images, by noise level."""
    scans = Scans(options, "val", 0)
    phases = scans.phases[torch.arange(len(scans.images)) % len(scans.phases)]
    clean = torch.view_as_real(torch.polar(scans.images.float() / 255, phases)).movedim(-1, 1).contiguous()
    scores = {}
    for level in NOISE_LEVELS:
        noisy = clean + level * torch.randn(clean.shape, generator=scans.generator, device=scans.device)
        images = [
            denoised(prior, part, torch.full((len(part),), level, device=part.device))
            for part in noisy.split(options.batch_size)
        ]
        # One channel with the parts one below the other; the range is that of the magnitude.
        pair = (torch.cat(images).flatten(1, 2)[:, None], clean.flatten(1, 2)[:, None])
        scores[f"denoised_{level:g}"] = float(psnr(*pair, data_range=clean.norm(dim=1).amax((1, 2))).mean())
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser)
    labels = {"prior": "cell", "form": "form", "data": "data"}
    values = {
        "parameters (M)": ("parameters", ".3f"),
        **{f"denoising at {level:g} (dB)": (f"denoised_{level:g}", ".2f") for level in NOISE_LEVELS},
        "PSNR (dB)": ("psnr", ".2f"),
        "SSIM": ("ssim", ".4f"),
        "evaluations": ("evaluations", ".1f"),
        "converged": ("converged", ".0%"),
        "denoiser's training (s)": ("denoise_seconds", ".0f"),
        "equilibrium's training (s)": ("train_seconds", ".0f"),
    }
    run_study(Study("reconstruction_priors", list(PRIORS), run, labels, values), parser)


if __name__ == "__main__":
    main()
