"""How networks and total variation stand noise that they did not train on, or trained on.

    python tests/benchmarks/study_reconstruction_noise.py DATA --weights BUNDLE [BUNDLE ...] --measured FILES

``--weights`` names trained bundles' folders, or weights in their ``models``; without them the equilibrium of form
``"cg"`` is trained first. White complex noise of an SNR in dB is added to the fully sampled k-space of val images, and
to what was measured of the files. Total variation has, in each row, the weight that is best on the scored images, and
CG-SENSE its best number of iterations: rivals that know the reference. Weights that are named need a name each.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from reconstruction_scans import add_common_options, scored_places
from reconstruction_study import best_rival, call, score, train_equilibrium
from study_runs import Study, run_study

from monai_deqkan.engines.reconstruction_methods import load_reconstructor

NOISE: tuple[float | None, ...] = (None, 30.0, 25.0, 20.0)


def run(options: argparse.Namespace, cell: str, seed: int) -> list[dict[str, Any]]:
    networks = {}
    if cell == "networks":
        networks = {_name(path): load_reconstructor(path, options.device) for path in options.weights}
        if len(networks) < len(options.weights):
            raise ValueError("Two of `--weights` have the same name; rename one of the folders.")
        networks = networks or {"cg": train_equilibrium("cg", options, seed)[0]}
    rows = []
    for snr in NOISE:
        noise = {"snr": "none" if snr is None else f"{snr:g}"}
        for place, batches in scored_places(options, snr, snr).items():
            common = {"data": place, **noise}
            for name, network in networks.items():
                rows.append({**common, "method": name, **score(call(network), batches)})
            if not networks:
                rows.append({**common, "method": cell, **best_rival(cell, batches)})
    return rows


def _name(path: Path) -> str:
    return path.name if path.is_dir() else path.parent.name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser)
    parser.add_argument(
        "--weights", nargs="+", type=Path, default=[], help="trained bundles' folders, or their weights"
    )
    labels = {"method": "method", "data": "data", "SNR (dB)": "snr"}
    values = {
        "PSNR (dB)": ("psnr", ".2f"),
        "SSIM": ("ssim", ".4f"),
        "evaluations": ("evaluations", ".1f"),
        "converged": ("converged", ".0%"),
        "weight": ("weight", ".3g"),
    }
    run_study(Study("reconstruction_noise", ["networks", "tv", "cg_sense"], run, labels, values), parser)


if __name__ == "__main__":
    main()
