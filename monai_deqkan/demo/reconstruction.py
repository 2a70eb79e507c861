"""Undersampled k-space: the DEQ reconstruction bundle on slices of the template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monai_deqkan.data import write_sample
from monai_deqkan.demo.baselines import best_cg_sense, zero_filled
from monai_deqkan.demo.section import Section
from monai_deqkan.demo.workflow import BundleRun
from monai_deqkan.metrics import magnitude, psnr, ssim
from monai_deqkan.operators import net_acceleration
from monai_deqkan.solvers import SolveRecorder
from monai_deqkan.visualize import plot_learning_curves, plot_reconstruction, plot_residuals

__all__ = ["demo_reconstruction"]

# On a matrix of 96 columns, 12 % are 12 central lines: few for coil maps, as fastMRI's 8 % of 320 are 26.
_CENTER_FRACTION = 0.12


def demo_reconstruction(folder: Path, quick: bool) -> Section:
    """Run the task in ``folder`` and return its section of the report."""
    data = write_sample("brain_kspace", folder / "data")
    settings = {
        # The certified form: it converges from the first step on, where the default wants a pre-trained denoiser.
        "form": "contracting",
        "prior": "ridge",
        "rtol": 1e-3,
        "backward_rtol": 1e-2,
        "acceleration": 4.0,
        "center_fraction": _CENTER_FRACTION,
        "max_epochs": 1 if quick else 5,
        "batch_size": 2,
        "learning_rate": 0.01,
    }
    bundle = BundleRun("brain_mri_deq_reconstruction", folder / "bundle", data, settings)
    history = bundle.train()
    metrics, workflow = bundle.evaluate()
    bundle.infer(data / "test")

    network = workflow.parser.get_parsed_content("network").eval()
    device = next(network.parameters()).device
    batch = _stack(list(workflow.parser.get_parsed_content("validate#dataset")))
    kspace, mask, maps, reference = (batch[key] for key in ("kspace", "mask", "sensitivity_maps", "reference_rss"))
    with torch.no_grad(), SolveRecorder() as recorder:
        image = magnitude(network(kspace.to(device), mask.to(device), maps.to(device)).cpu())
    zero = zero_filled(kspace)
    cg, cg_psnr, cg_iterations = best_cg_sense(kspace, mask, maps, reference)
    scores = {
        name: {"psnr": float(psnr(x, reference).mean()), "ssim": float(ssim(x, reference).mean())}
        for name, x in (("equilibrium", image), ("zero-filled", zero), ("CG-SENSE", cg))
    }
    acceleration = float(np.mean([net_acceleration(m) for m in mask]))
    numbers: dict[str, Any] = {
        "psnr": metrics["val_psnr"],
        "ssim": metrics["val_ssim"],
        "nmse": metrics["val_nmse"],
        "net_acceleration": acceleration,
        "center_fraction": _CENTER_FRACTION,
        "reference": "root sum of squares of fully sampled k-space; data range: its maximum per slice",
        "solve_evaluations": metrics["solve_evaluations"],
        "solve_converged": metrics["solve_converged"],
        "contraction_factor": network.equilibrium.cell.contraction,
        "baseline": {
            "zero_filled_psnr": scores["zero-filled"]["psnr"],
            "zero_filled_ssim": scores["zero-filled"]["ssim"],
            "cg_sense_psnr": scores["CG-SENSE"]["psnr"],
            "cg_sense_ssim": scores["CG-SENSE"]["ssim"],
            "cg_sense_best_iteration": cg_iterations.tolist(),
        },
        "num_test_slices": len(kspace),
        "seconds": bundle.seconds,
    }
    middle = len(kspace) // 2
    figures = [
        (
            plot_learning_curves(
                {
                    **{k: v for k, v in history.items() if k == "train_loss"},
                    **{f"{k} (dB)": v for k, v in history.items() if k in ("train_psnr", "val_psnr")},
                }
            ),
            "Learning curves of the training.",
            "Curves of loss and PSNR over the epochs.",
        ),
        (
            plot_reconstruction(
                reference[middle, 0],
                {"zero-filled": zero[middle, 0], "CG-SENSE (best)": cg[middle, 0], "equilibrium": image[middle, 0]},
                {
                    "zero-filled": f"{float(psnr(zero, reference)[middle]):.1f} dB",
                    "CG-SENSE (best)": f"{float(cg_psnr[middle]):.1f} dB",
                    "equilibrium": f"{float(psnr(image, reference)[middle]):.1f} dB",
                },
            ),
            f"A test slice at {acceleration:.1f}x, with error maps on one scale.",
            "Reference, three reconstructions and their error maps.",
        ),
        (
            plot_residuals(
                [
                    h[~h.isnan()]
                    for r in recorder.records
                    if r.kind == "forward"
                    for h in r.stats.history.cpu().unbind(1)
                ],
                rtol=network.equilibrium.solver.rtol,
            ),
            "Residual of the equilibrium per evaluation, one line per test slice. The step contracts for any "
            "sampling mask.",
            "Falling residual curves that end below the tolerance.",
        ),
    ]
    best_iteration = f"iteration {int(cg_iterations.min())} to {int(cg_iterations.max())}"
    return Section(
        title="MRI reconstruction: 4 times fewer measurements (DEQ)",
        text=[
            "Eight-coil k-space simulated from slices of the template, with smooth coil sensitivities and phase, and "
            "noise "
            f"at 30 dB; equispaced sampling, net acceleration {acceleration:.2f}, {_CENTER_FRACTION:.0%} central "
            "lines. "
            "Coil maps are estimated from those lines. CG-SENSE is stopped at the iteration that is best against the "
            "reference, which nobody could do in practice.",
        ],
        key_figures=[
            (
                "PSNR",
                f"{numbers['psnr']:.2f} dB",
                f"zero-filled {scores['zero-filled']['psnr']:.2f} dB, CG-SENSE {scores['CG-SENSE']['psnr']:.2f} dB",
            ),
            (
                "SSIM",
                f"{numbers['ssim']:.3f}",
                f"zero-filled {scores['zero-filled']['ssim']:.3f}, CG-SENSE {scores['CG-SENSE']['ssim']:.3f}",
            ),
            (
                "Solves converged",
                f"{numbers['solve_converged']:.0%}",
                f"{numbers['solve_evaluations']:.1f} evaluations each",
            ),
        ],
        header=["Test slab, reference RSS", "PSNR (dB)", "SSIM"],
        rows=[
            ("Zero-filled", f"{scores['zero-filled']['psnr']:.2f}", f"{scores['zero-filled']['ssim']:.3f}"),
            (
                f"CG-SENSE, best ({best_iteration})",
                f"{scores['CG-SENSE']['psnr']:.2f}",
                f"{scores['CG-SENSE']['ssim']:.3f}",
            ),
            ("DEQ reconstruction", f"{numbers['psnr']:.2f}", f"{numbers['ssim']:.3f}"),
        ],
        numbers=numbers,
        figures=figures,
    )


def _stack(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    keys = ("kspace", "mask", "sensitivity_maps", "reference_rss")
    return {key: torch.stack([torch.as_tensor(item[key]) for item in items]) for key in keys}
