"""What a solver and its tolerance cost and give on one trained equilibrium network.

    python tests/benchmarks/study_reconstruction_solvers.py DATA --weights BUNDLE --measured FILES

``--weights`` names a trained bundle's folder, or its weights; without it a network is trained first. Distances are to
the solution of the same network in float64 to a relative residual of 1e-7, relative to it. A run holds all solvers.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from reconstruction_scans import Batch, add_common_options, scored_places
from reconstruction_study import score, train_equilibrium
from study_runs import Study, run_study
from torch import Tensor, nn

from monai_deqkan.engines.reconstruction_methods import load_reconstructor
from monai_deqkan.networks.nets import DEQReconstructor
from monai_deqkan.solvers import SOLVERS, SolveRecorder, solve_budget

SOLVER_NAMES = {"Picard": "fixed_point_iteration", "Anderson": "anderson", "Broyden": "broyden", "automatic": "auto"}
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5)


def run(options: argparse.Namespace, cell: str, seed: int) -> list[dict[str, Any]]:
    if options.weights is None:
        network: nn.Module = train_equilibrium(options.form, options, seed)[0]
    else:
        network = load_reconstructor(options.weights, options.device)
    if not isinstance(network, DEQReconstructor):
        raise TypeError(f"--weights must be those of a DEQReconstructor; got those of a {type(network).__name__}.")
    rows = []
    for place, batches in scored_places(options, options.snr).items():
        exact, solved = solve_exactly(network, batches, 20 * options.max_iter)
        for title, name in SOLVER_NAMES.items():
            for rtol in TOLERANCES:
                settings = {"rtol": rtol, "max_iter": 4 * options.max_iter, "on_failure": "ignore"}
                network.equilibrium.solver = SOLVERS.build((name, settings))
                images: list[Tensor] = []
                scores = score(partial(_kept, images, network), batches)
                pairs = zip(torch.cat(images), exact, strict=True)
                distances = [float((image - wanted).norm() / wanted.norm()) for image, wanted in pairs]
                row = {"data": place, "solver": title, "tolerance": f"{rtol:.0e}", "exact_converged": solved, **scores}
                row |= {"distance": sum(distances) / len(distances), "worst_distance": max(distances)}
                rows.append(row)
    return rows


@torch.no_grad()
def solve_exactly(network: nn.Module, batches: Sequence[Batch], max_iter: int) -> tuple[Tensor, float]:
    """Return the images in float64 to a relative residual of 1e-7, and the share of slices that reached it."""
    precise = copy.deepcopy(network).double()
    with SolveRecorder() as recorder, solve_budget(rtol=1e-7, max_iter=max_iter, on_failure="ignore"):
        images = [
            precise(batch.kspace.to(torch.complex128), batch.mask, batch.maps.to(torch.complex128)) for batch in batches
        ]
    return torch.cat(images), float(recorder.converged().double().mean())


def _kept(images: list[Tensor], network: nn.Module, batch: Batch) -> Tensor:
    images.append(network(batch.kspace, batch.mask, batch.maps))
    return images[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser, num_val=8)
    parser.add_argument("--weights", type=Path, help="a trained bundle's folder, or its weights")
    parser.add_argument("--form", default="cg", help="form of the network that is trained without --weights")
    labels = {"data": "data", "solver": "solver", "tolerance": "tolerance"}
    values = {
        "evaluations": ("evaluations", ".1f"),
        "converged": ("converged", ".0%"),
        "ms per slice": ("ms", ".0f"),
        "PSNR (dB)": ("psnr", ".3f"),
        "mean distance": ("distance", ".1e"),
        "largest distance": ("worst_distance", ".1e"),
        "float64 converged": ("exact_converged", ".0%"),
    }
    run_study(Study("reconstruction_solvers", ["solvers"], run, labels, values), parser)


if __name__ == "__main__":
    main()
