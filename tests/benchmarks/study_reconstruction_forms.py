"""What the certificate costs: the always-contracting forms against those that converge without a proof.

    python tests/benchmarks/study_reconstruction_forms.py DATA --measured FILES
    python tests/benchmarks/study_reconstruction_forms.py DATA --weights cg=BUNDLE contracting=OTHER --measured FILES

Forms named by ``--weights`` are read from trained bundles (a folder, or weights in its ``models``), the others are
trained first. A network is solved to its own tolerance, then again with one, two and ten times the evaluations that
this took, whatever the residual: a form that got its quality by stopping early loses it there. The certified factor is
proven for every image; the observed Jacobian norm is a lower bound of the true factor at the solutions of one batch.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from reconstruction_scans import add_common_options, scored_places
from reconstruction_study import FORMS, call, score, train_equilibrium
from study_runs import Study, run_study

from monai_deqkan.engines.reconstruction_methods import load_reconstructor
from monai_deqkan.networks import certify
from monai_deqkan.solvers import solve_budget

BUDGETS = (1, 2, 10)
NO_TOLERANCE = 1e-12


def run(options: argparse.Namespace, form: str, seed: int) -> list[dict[str, Any]]:
    weights = dict(options.weights)
    common: dict[str, Any] = {}
    if form in weights:
        network = load_reconstructor(weights[form], options.device)
    else:
        network, _, common = train_equilibrium(form, options, seed)
    rows = []
    for place, batches in scored_places(options, options.snr).items():
        row = {**common, "data": place, **score(call(network), batches)}
        for budget in BUDGETS:
            limit = max(1, round(budget * (row["evaluations"] or 1)))
            with solve_budget(rtol=NO_TOLERANCE, atol=0.0, max_iter=limit, on_failure="ignore"):
                row[f"psnr_{budget}"] = score(call(network), batches)["psnr"]
        first = batches[0]
        certificate = certify(network, first.kspace, first.mask, first.maps, on_violation="ignore")
        row["factor"] = certificate.factor if math.isfinite(certificate.factor) else None
        row["jacobian_norm"] = max(certificate.jacobian_norm)
        row["spectral_radius"] = max(certificate.spectral_radius)
        rows.append(row)
    return rows


def _named(text: str) -> tuple[str, Path]:
    form, _, path = text.partition("=")
    if form not in FORMS or not path:
        raise argparse.ArgumentTypeError(f"expected FORM=PATH with a form of {', '.join(FORMS)}; got {text!r}")
    return form, Path(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser)
    parser.add_argument("--weights", nargs="+", type=_named, default=[], metavar="FORM=PATH", help="trained bundles")
    values = {
        "PSNR (dB)": ("psnr", ".2f"),
        "SSIM": ("ssim", ".4f"),
        "evaluations": ("evaluations", ".1f"),
        "converged": ("converged", ".0%"),
        **{f"PSNR at {budget}x": (f"psnr_{budget}", ".2f") for budget in BUDGETS},
        "certified factor": ("factor", ".4f"),
        "observed Jacobian norm": ("jacobian_norm", ".4f"),
        "observed spectral radius": ("spectral_radius", ".4f"),
        "training (s)": ("train_seconds", ".0f"),
    }
    run_study(Study("reconstruction_forms", list(FORMS), run, {"form": "cell", "data": "data"}, values), parser)


if __name__ == "__main__":
    main()
