"""Networks, training and scores that the reconstruction studies beside it share.

PSNR and SSIM are of magnitudes, within the head, their data range the reference's maximum: as
``monai-deqkan reconstruction evaluate`` scores. ``reconstruction_scans.py`` says what the data are.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from reconstruction_scans import Batch, Scans
from torch import Tensor, nn

from monai_deqkan.engines.reconstruction_methods import RIVALS, ReconstructionMethod
from monai_deqkan.losses import DenoisingLoss, JacobianRegularizedLoss, PerpendicularLoss
from monai_deqkan.metrics import magnitude, psnr, ssim
from monai_deqkan.networks.nets import DEQReconstructor, UNetDenoiser, WeaklyConvexRidgeDenoiser
from monai_deqkan.solvers import AndersonSolver, SolveRecorder

__all__ = [
    "FORMS",
    "best_rival",
    "build_equilibrium",
    "call",
    "denoised",
    "fit",
    "pretrain",
    "score",
    "train_equilibrium",
    "train_reconstructor",
    "trained_denoiser",
]


def call(network: nn.Module) -> Callable[[Batch], Tensor]:
    """Return the network as a method that :func:`score` takes."""
    return lambda batch: network(batch.kspace, batch.mask, batch.maps)


@torch.no_grad()
def score(reconstruct: Callable[[Batch], Tensor], batches: Sequence[Batch]) -> dict[str, float | None]:
    """Score a method: means over the slices.

    Returns:
        ``psnr`` (dB), ``ssim``; ``bias``, mean of magnitude minus reference in the head, over the reference's mean
        there; ``phase``, mean absolute phase error there, in degrees; ``evaluations`` per slice, ``converged`` (share)
        and ``ms`` per slice. None where a value does not exist.
    """
    values: dict[str, list[float]] = {key: [] for key in ("psnr", "ssim", "bias", "phase")}
    seconds = 0.0
    with SolveRecorder() as recorder:
        for batch in batches:
            _synchronize(batch.kspace)
            started = time.perf_counter()
            output = reconstruct(batch)
            _synchronize(batch.kspace)
            seconds += time.perf_counter() - started
            image, reference, region = magnitude(output).float(), batch.reference, batch.region
            values["psnr"] += psnr(image, reference, region).tolist()
            values["ssim"] += ssim(image, reference, region).tolist()
            head = torch.ones_like(reference) if region is None else region.to(reference.dtype)
            axes = (1, 2, 3)
            values["bias"] += (((image - reference) * head).sum(axes) / (reference * head).sum(axes)).tolist()
            if batch.target is not None and output.shape[1] == 2:
                values["phase"] += (_phase_error(output, batch.target) * head).sum(axes).div(head.sum(axes)).tolist()
    count = sum(len(batch.kspace) for batch in batches)
    spent, converged = recorder.evaluations().double(), recorder.converged().double()
    return {
        **{key: sum(found) / len(found) if found else None for key, found in values.items()},
        "evaluations": float(spent.mean()) if len(spent) else None,
        "converged": float(converged.mean()) if len(converged) else None,
        "ms": 1000 * seconds / count,
    }


def best_rival(name: str, batches: Sequence[Batch]) -> dict[str, float | None]:
    """Score a method of ``RIVALS`` with the weight of highest mean PSNR on these very slices, and name it."""
    method = RIVALS[name]
    low, high = method.search or (math.nan, math.nan)
    ratio = (high / low) ** (1 / 7)
    weights = [low * ratio**i for i in range(8)]
    if method.whole:
        weights = [float(weight) for weight in sorted({round(weight) for weight in weights})]
    best: dict[str, float | None] = {}
    for weight in weights:
        found = score(partial(_apply, method, weight), batches)
        if not best or float(found["psnr"] or 0) > float(best["psnr"] or 0):
            best = {**found, "weight": weight}
    return best


def _apply(method: ReconstructionMethod, weight: float, batch: Batch) -> Tensor:
    return method(batch.kspace, batch.mask, batch.maps, weight).image


def _phase_error(image: Tensor, target: Tensor) -> Tensor:
    """Return the absolute angle between two-channel images, in degrees: ``(B, 1, H, W)``."""
    first, second = (torch.complex(x[:, 0], x[:, 1]) for x in (image.float(), target.float()))
    return torch.rad2deg((first * second.conj()).angle().abs())[:, None]


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def fit(
    network: nn.Module,
    loss_of_step: Callable[[], Tensor],
    *,
    steps: int,
    seconds: float | None = None,
    learning_rate: float = 1e-3,
) -> dict[str, float]:
    """Train by Adam with warm-up and cosine decay, for a number of steps or of seconds.

    Returns:
        ``steps``, ``train_seconds``, ``train_loss`` (mean of the last tenth), and ``skipped``: steps left out because
        their gradient was not finite.
    """
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=learning_rate)
    losses: list[float] = []
    skipped = 0
    network.train()
    started = time.perf_counter()
    while (done := (time.perf_counter() - started) / seconds if seconds else len(losses) / max(steps, 1)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min((len(losses) + 1) / 30, 0.5 + 0.5 * math.cos(math.pi * done))
        optimizer.zero_grad()
        loss = loss_of_step()
        loss.backward()
        if bool(nn.utils.clip_grad_norm_(network.parameters(), 1.0).isfinite()):
            optimizer.step()
        else:
            skipped += 1
        losses.append(loss.item())
    network.eval()
    tail = losses[-max(len(losses) // 10, 1) :]
    return {
        "steps": len(losses),
        "train_seconds": round(time.perf_counter() - started, 1),
        "train_loss": sum(tail) / max(len(tail), 1),
        "skipped": skipped,
    }


def denoised(denoiser: nn.Module, noisy: Tensor, noise_level: Tensor) -> Tensor:
    """Denoise, telling the noise level ``(B,)`` to a network that wants it."""
    return denoiser(noisy, noise_level) if getattr(denoiser, "takes_noise_level", False) else denoiser(noisy)


def pretrain(
    denoiser: nn.Module,
    scans: Scans,
    *,
    steps: int,
    seconds: float | None = None,
    learning_rate: float = 1e-3,
    max_noise: float = 0.12,
) -> dict[str, float]:
    """Train a denoiser of complex images, white noise of up to ``max_noise`` of the image's range in each channel."""
    compare = DenoisingLoss()

    def loss_of_step() -> Tensor:
        images, phases = scans.draw_images(scans.options.batch_size)
        clean = torch.view_as_real(torch.polar(images, phases)).movedim(-1, 1).contiguous()
        level = 0.002 + max_noise * torch.rand(len(clean), generator=scans.generator, device=scans.device)
        noise = torch.randn(clean.shape, generator=scans.generator, device=scans.device)
        return compare(denoised(denoiser, clean + level.view(-1, 1, 1, 1) * noise, level), (clean, level))

    return fit(denoiser, loss_of_step, steps=steps, seconds=seconds, learning_rate=learning_rate)


def train_reconstructor(
    network: nn.Module,
    scans: Scans,
    *,
    steps: int,
    seconds: float | None = None,
    learning_rate: float = 1e-3,
    loss_function: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> dict[str, float]:
    """Train a network ``network(kspace, mask, maps)``; one of magnitudes is compared with the reference by L1."""
    compare = loss_function or PerpendicularLoss()

    def loss_of_step() -> Tensor:
        batch = scans.draw_batch()
        output = network(batch.kspace, batch.mask, batch.maps)
        if output.shape[1] == 1 or batch.target is None:
            return (output - batch.reference).abs().mean()
        return compare(output, batch.target)

    return fit(network, loss_of_step, steps=steps, seconds=seconds, learning_rate=learning_rate)


def trained_denoiser(options: argparse.Namespace, scans: Scans, *, energy: bool = False) -> nn.Module:
    """Return a pre-trained U-shaped denoiser, or one with an energy.

    It gets half of the steps, or a quarter of the seconds, of the whole training.
    """
    denoiser: nn.Module = WeaklyConvexRidgeDenoiser(2) if energy else UNetDenoiser(2, 2, options.features)
    denoiser = denoiser.to(scans.device)
    seconds = None if options.seconds is None else options.seconds / 4
    pretrain(denoiser, scans, steps=options.steps // 2, seconds=seconds)
    return denoiser


def build_equilibrium(
    form: str, prior: str | nn.Module, contraction: float | None, options: argparse.Namespace
) -> DEQReconstructor:
    """Return an equilibrium network as all studies train it."""
    quiet: dict[str, Any] = {"max_iter": options.max_iter, "on_failure": "ignore"}
    return DEQReconstructor(
        2,
        prior,
        form=form,
        contraction=contraction,
        solver=("anderson", {"rtol": 1e-3, **quiet}),
        adjoint=("implicit", {"solver": AndersonSolver(rtol=1e-2, **quiet)}),
    )


# The step's form and its certified contraction factor. With a factor the prior is the ridge denoiser, which starts from
# scratch with a high learning rate; without one the U-shaped denoiser, pre-trained, or the energy that the form needs.
FORMS: dict[str, tuple[str, float | None]] = {
    "contracting": ("contracting", 0.98),
    "cg_certified": ("cg", 0.98),
    "prox": ("prox", None),
    "grad": ("grad", None),
    "cg": ("cg", None),
    "reweighted": ("reweighted", None),
}


def train_equilibrium(
    name: str,
    options: argparse.Namespace,
    seed: int,
    loss_function: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[DEQReconstructor, Scans, dict[str, float]]:
    """Train the equilibrium network of a name in ``FORMS``; return it, its data, and what :func:`fit` does."""
    torch.manual_seed(seed)
    scans = Scans(options, "train", seed)
    form, contraction = FORMS[name]
    prior = "ridge" if contraction else trained_denoiser(options, scans, energy=form == "reweighted")
    network = build_equilibrium(form, prior, contraction, options).to(scans.device)
    seconds = options.seconds if options.seconds is None or contraction else 0.75 * options.seconds
    weight = 0.0 if contraction or form == "reweighted" else options.jacobian_weight
    compare = JacobianRegularizedLoss(loss_function or PerpendicularLoss(), network, weight=weight)
    trained = train_reconstructor(
        network,
        scans,
        steps=options.steps,
        seconds=seconds,
        learning_rate=1e-2 if contraction else 5e-4,
        loss_function=compare,
    )
    compare.remove()
    return network, scans, trained
