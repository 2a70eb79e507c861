"""What an equilibrium costs and gives at several tolerances and budgets, with the same weights.

    python tests/benchmarks/bench_reconstruction_budget.py BUNDLE DATA --out DIR [--slices 0 1] [--simulated-coils 8]

BUNDLE is a trained reconstruction bundle's folder, DATA a folder with fully sampled k-space files. Each slice is
undersampled once per pattern and acceleration and reconstructed at tolerances 1e-2 to 1e-5, and with fixed numbers of
evaluations: 1, 2 and 10 times the budget, which is by default what the slice took at the tolerance that it was trained
with. The distance is that to the same network's solution at 1e-7 in float64, relative to its root mean square. PSNR and
SSIM count the head, with the reference's maximum as data range.

One JSON file per slice and scenario in DIR; the same command goes on where it was cut short. DIR/table.md has the means
and names what is missing.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from monai_deqkan.engines import SuiteSettings
from monai_deqkan.engines.reconstruction_cases import Case, Scenario, is_simulated, list_slices, make_case
from monai_deqkan.engines.reconstruction_methods import load_reconstructor
from monai_deqkan.metrics import magnitude, psnr, ssim
from monai_deqkan.solvers import SolveRecorder, solve_budget
from monai_deqkan.transforms import NormalizeKspace

TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5)
BUDGETS = (1, 2, 10)
EXACT = 1e-7
SEED = 0


def score(image: Tensor, case: Case, scale: float) -> dict[str, float]:
    picture = magnitude(image.float()) * scale
    return {
        "psnr": float(psnr(picture, case.reference, region=case.region)),
        "ssim": float(ssim(picture, case.reference, region=case.region)),
    }


def solve(network: torch.nn.Module, case: Case, kspace: Tensor, rtol: float, max_iter: int) -> tuple[Tensor, dict]:
    start = time.perf_counter()
    with torch.no_grad(), SolveRecorder() as recorder, solve_budget(rtol=rtol, max_iter=max_iter, on_failure="ignore"):
        image = network(kspace, case.mask, case.maps.to(kspace.dtype))
    return image.as_subclass(Tensor), {
        "seconds": time.perf_counter() - start,
        "evaluations": int(recorder.evaluations()),
        "relative_residual": float(recorder.relative_residual()),
        "reached": bool(recorder.converged().all()),
    }


def measure(network: torch.nn.Module, trained_rtol: float, case: Case, max_iter: int, budget: int | None) -> dict:
    """Return one entry per tolerance and budget, and how the exact solution was found."""
    scaled, scale = NormalizeKspace()(case.kspace[0])
    kspace = scaled[None].as_subclass(Tensor)
    double = copy.deepcopy(network).double()
    exact, found = solve(double, case, kspace.to(torch.complex128), EXACT, 10 * max_iter)
    entries: dict[str, Any] = {}

    def add(name: str, image: Tensor, stats: dict) -> None:
        distance = float((image.double() - exact).norm() / exact.norm())
        entries[name] = {**stats, "distance": distance, **score(image, case, float(scale))}

    for rtol in TOLERANCES:
        add(f"rtol {rtol:.0e}", *solve(network, case, kspace, rtol, max_iter))
    if budget is None:
        budget = solve(network, case, kspace, trained_rtol, max_iter)[1]["evaluations"]
    for times in BUDGETS:
        image, stats = solve(network, case, kspace, 1e-30, times * budget)
        add(f"budget {times}x", image, {**stats, "reached": stats["relative_residual"] <= trained_rtol})
    exact_entry = {**found, "distance": 0.0, **score(exact, case, float(scale))}
    return {"entries": entries, "exact": exact_entry, "net_acceleration": case.net_acceleration}


def table(folder: Path, cells: Iterable[str], scenarios: Iterable[Scenario], statement: str) -> str:
    """Return the means over slices as Markdown, one table per scenario; missing cells are named."""
    cells = list(cells)
    missing = [cell for cell in cells if not (folder / f"{cell}.json").is_file()]
    lines = [statement, ""]
    for scenario in scenarios:
        done = [
            json.loads((folder / f"{c}.json").read_text())
            for c in cells
            if c.startswith(f"{scenario.name}_") and c not in missing
        ]
        if not done:
            continue
        net = sum(record["net_acceleration"] for record in done) / len(done)
        lines += [
            f"{scenario.mask}, {scenario.acceleration:g}x (net {net:.2f}), {len(done)} slices:",
            "",
            "| solve | evaluations | PSNR (dB) | SSIM | distance to the exact solution (largest) | seconds | reached |",
            "|---|---|---|---|---|---|---|",
        ]
        for name in [*done[0]["entries"], "exact"]:
            rows = [record["exact"] if name == "exact" else record["entries"][name] for record in done]

            def mean(key: str, rows: list[dict[str, float]] = rows) -> float:
                return sum(row[key] for row in rows) / len(rows)

            label = f"float64, {EXACT:.0e}" if name == "exact" else name
            lines.append(
                f"| {label} | {mean('evaluations'):.1f} | {mean('psnr'):.2f} | {mean('ssim'):.4f} | "
                f"{mean('distance'):.1e} ({max(row['distance'] for row in rows):.1e}) | {mean('seconds'):.2f} | "
                f"{mean('reached'):.0%} |"
            )
        lines.append("")
    if missing:
        lines += [f"Missing ({len(missing)} of {len(cells)}): {', '.join(missing)}.", ""]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--masks", nargs="+", default=["random", "equispaced"])
    parser.add_argument("--accelerations", nargs="+", type=float, default=[4.0, 8.0])
    parser.add_argument("--slices", nargs="+", type=int, help="indices of the slices of each file; all by default")
    parser.add_argument("--simulated-coils", type=int, default=0)
    parser.add_argument("--maps-method", default="low_frequency", help="coil maps: low_frequency (default) or espirit")
    parser.add_argument("--budget", type=int, help="evaluations of 1x; by default what the bundle's tolerance took")
    parser.add_argument("--max-iter", type=int, default=200)
    parser.add_argument("--only-table", action="store_true", help="write the table of what is there")
    options = parser.parse_args(arguments)
    settings = SuiteSettings(
        masks=options.masks,
        accelerations=options.accelerations,
        slices=options.slices,
        simulated_coils=options.simulated_coils,
        maps_method=options.maps_method,
        seed=SEED,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    cells = {
        f"{scenario.name}_{Path(item['kspace']).stem}_{item['slice']}": (scenario, item)
        for scenario in settings.scenarios()
        for item in list_slices(options.data, settings)
    }
    if not options.only_table:
        network = load_reconstructor(options.bundle)
        trained_rtol = network.equilibrium.solver.rtol
        for cell, (scenario, item) in cells.items():
            target = options.out / f"{cell}.json"
            if target.is_file():
                continue
            name = Path(item["kspace"]).relative_to(options.data).as_posix()
            case = make_case(item, name, scenario, settings)
            record = measure(network, trained_rtol, case, options.max_iter, options.budget)
            partial = target.with_suffix(".part")
            partial.write_text(json.dumps(record, indent=1))
            partial.replace(target)
            print(cell, {key: round(entry["psnr"], 2) for key, entry in record["entries"].items()}, flush=True)
    simulated = any(is_simulated(item["kspace"]) for _, item in cells.values())
    coils = f"{options.simulated_coils} simulated coils" if options.simulated_coils else "coils as in the file"
    statement = f"{'Simulated' if simulated else 'Measured'} k-space, {coils}. Research only; not for clinical use."
    text = table(options.out, cells, settings.scenarios(), statement)
    (options.out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
