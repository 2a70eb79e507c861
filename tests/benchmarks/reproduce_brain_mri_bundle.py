"""Train, evaluate and document the weights of ``brain_mri_deq_reconstruction``, by one command.

    python tests/benchmarks/reproduce_brain_mri_bundle.py OUT --shared DATA --publish

Stages, in order; ``--only`` runs some of them. What is there is not done again, and a training that was cut short goes
on:

- ``images``: the images to train on (``prepare_reconstruction_images.py``).
- ``pretrain``, ``train``, ``certified``: the bundle's own configurations in a copy below OUT: the energy, learned from
  denoising, the shipped model with it, and the certified model with a convex denoiser (in ``models/certified``).
- ``evaluate``: PSNR and SSIM on real data that no model was trained on, see ``evaluate_brain_mri_bundle.py``.
- ``budget``: the same weights at several tolerances and budgets (``bench_reconstruction_budget.py``), and ``spread``:
  calibration of the spread, on cardiac images seen through 8 simulated coils.
- ``figures``: pictures of all this.

``--bundle`` takes the trained bundle of another folder for the last four. ``--validate`` runs them on cardiac images
that are kept for choices during development, never on the final ones. ``--publish`` puts models, manifest, pictures
and tables into the bundle of this checkout. ``--quick`` tries everything with next to no training.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from draw_brain_mri_bundle import draw_examples, draw_residuals, draw_tolerances, save_small
from evaluate_brain_mri_bundle import (
    FINAL,
    HEART,
    HEART_VALIDATION,
    VALIDATION,
    bundle_methods,
    evaluate,
    tables,
)

from monai_deqkan.data import bundle_folder, copy_bundle, image_files, write_kspace
from monai_deqkan.engines import load_task
from monai_deqkan.operators import FourierOperator, simulate_kspace, smooth_coil_maps
from monai_deqkan.transforms import LoadKspaceSlice

NAME = "brain_mri_deq_reconstruction"
HERE = Path(__file__).parent
STAGES = ("images", "pretrain", "train", "certified", "evaluate", "budget", "spread", "figures")

DENOISER: dict[str, Any] = {"form": "reweighted", "prior": "weakly_convex_ridge"}
CONVEX: dict[str, Any] = {"form": "cg", "prior": "complex_ridge"}
# Small crops of few images: the energy has three thousand numbers to learn.
PRETRAINING: dict[str, Any] = {
    "epoch_length": 100,
    "patch_size": [48, 48],
    "val_size": [96, 96],
    "batch_size": 8,
    "ema_momentum": 0,
    "error": "log_mse",
    "brightness_range": [0.6, 1.8],  # of the normalized images of reconstruction
    "inversion_prob": 0.0,
}
COARSE: dict[str, Any] = {"max_epochs": 12, "learning_rate": 0.005, "val_interval": 3, "noise_range": [0.005, 0.12]}
# Then on images with as much detail as scans of few pixels have.
FINE: dict[str, Any] = {
    "max_epochs": 9,
    "learning_rate": 0.004,
    "val_interval": 3,
    "noise_range": [0.01, 0.12],
    "zoom_range": [0.5, 1.1],
    "source_balance": 1.0,
}
# And with finer steps.
FINER: dict[str, Any] = {**FINE, "max_epochs": 12, "learning_rate": 0.002}
CONVEX_LENGTH: dict[str, Any] = {**FINE, "max_epochs": 36, "learning_rate": 0.01, "val_interval": 12}
SAMPLING: dict[str, Any] = {
    "acceleration": [4, 8],
    "center_fraction": [0.08, 0.04],
    "pattern": ["random", "equispaced"],
    "maps_method": "espirit",
    "image_size": [160, 160],  # crops of the images that k-space is simulated from
}
# The energy is taken as it was learned from denoising; fine-tuning it was not tried. Its weight and unit of misfit, the
# cell's defaults, were chosen on cardiac images for validation.
ASSEMBLING: dict[str, Any] = {"max_epochs": 1, "epoch_length": 1, "learning_rate": 0.0, "rtol": 0.001}
# Chosen on the same images.
CERTIFICATE: dict[str, Any] = {"contraction": 0.999, "weight": 0.08, "noise_level": 0.03}
QUICK: dict[str, Any] = {"max_epochs": 1, "epoch_length": 2, "batch_size": 2, "val_interval": 1}
NUM_COILS = 8  # simulated
FOLDERS = ("models", "models/certified")
NOT_RUN = "Not run yet."
BUDGET_SLICES, SPREAD_SLICES = 1, 4


def main() -> None:
    options = _options()
    run = Run(options)
    for stage in options.only or STAGES:
        print(f"== {stage}", flush=True)
        getattr(run, stage)()
    if options.publish:
        publish(run)


class Run:
    """The stages, on the folder of a run.

    Args:
        options: see the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.out = options.out.resolve() / ("quick" if options.quick else "")  # what is there counts as done
        self.shared = options.shared.resolve()
        self.mri = self.shared / "mri"
        self.quick, self.validate, self.methods = options.quick, options.validate, options.methods
        self.scores = self.out / ("validation" if options.validate else "final")
        if options.bundle is not None:
            self.bundle = options.bundle.resolve()
        else:
            self.bundle = self.out / "bundle"
            if not self.bundle.exists():
                copy_bundle(NAME, self.bundle)
                shutil.rmtree(self.bundle / "models", ignore_errors=True)

    def images(self) -> None:
        """Write the images to train on."""
        target = self.out / "images"
        if not (target / "training_images.csv").is_file():  # written last
            shutil.rmtree(target, ignore_errors=True)
            _call(HERE / "prepare_reconstruction_images.py", target, "--shared", self.shared)
        if self.quick:
            for folder in target.glob("*/*"):
                for path in image_files(folder)[2:]:
                    path.unlink()

    def pretrain(self) -> None:
        """Train the energy, as a denoiser."""
        self._fit("pretrain", "models/denoiser_coarse", "logs_denoiser_coarse", {**DENOISER, **PRETRAINING, **COARSE})
        for last, name, length in (("coarse", "fine", FINE), ("fine", "finer", FINER)):
            start = {"pretrained": self.bundle / "models" / f"denoiser_{last}" / "model.pt"}
            settings = {**DENOISER, **PRETRAINING, **length, **start}
            self._fit("pretrain", f"models/denoiser_{name}", f"logs_denoiser_{name}", settings)

    def train(self) -> None:
        """Put the energy into the equilibrium."""
        start = {"pretrained": self.bundle / "models" / "denoiser_finer" / "model.pt"}
        self._fit("train", "models", "logs", {**DENOISER, **SAMPLING, **ASSEMBLING, **start})

    def certified(self) -> None:
        """Train the convex denoiser, and put it into the certified form."""
        folder = "models/denoiser_convex"
        self._fit("pretrain", folder, "logs_denoiser_convex", {**CONVEX, **PRETRAINING, **CONVEX_LENGTH})
        start = {"pretrained": self.bundle / folder / "model.pt"}
        settings = {**CONVEX, **CERTIFICATE, **SAMPLING, **ASSEMBLING, **start}
        self._fit("train", "models/certified", "logs_certified", settings)

    def _fit(self, config: str, models: str, logs: str, settings: dict[str, Any]) -> None:
        folder = self.bundle / models
        started = any(folder.glob("checkpoint_epoch=*.pt"))
        # A training killed in its first epoch leaves logs without a checkpoint: then a new folder is taken.
        output = f"$monai_deqkan.engines.training_folder('{self.bundle / logs}', resume=@resume)"
        given = {**settings, **(QUICK if self.quick else {})}
        self._step(
            config, logs, dataset_dir=self.out / "images", ckpt_dir=folder, output_dir=output, resume=started, **given
        )

    def _step(self, configs: str, name: str, **settings: Any) -> None:
        """Run configurations of the bundle laid over each other, unless it was done."""
        done = self.bundle / f"{name}.done"
        if done.exists():
            return
        paths = [str(self.bundle / "configs" / f"{config}.json") for config in configs.split("+")]
        words: list[Any] = ["--config_file", str(paths), "--bundle_root", self.bundle]
        for key, value in {**settings, "progress": False}.items():
            words += [f"--{key}", value]
        subprocess.run([sys.executable, "-m", "monai.bundle", "run", *map(str, words)], check=True)
        done.touch()

    def evaluate(self) -> None:
        """Score all methods; write the tables."""
        methods = [m for m in bundle_methods(self.bundle) if self.methods is None or m.name in self.methods]
        sets = VALIDATION if self.validate else FINAL
        self.records = evaluate(self.mri, self.scores / "cells", methods, sets, max_slices=1 if self.quick else None)
        made = tables(self.records)
        self._write("evaluation.json", json.dumps(made))
        print("\n\n".join(made.values()))

    def budget(self) -> None:
        """Score tolerances and budgets."""
        self._heart()
        words = ["--maps-method", self._maps_method(), "--slices", *range(1 if self.quick else BUDGET_SLICES)]
        words += ["--masks", "random", "--accelerations", 4, "--max-iter", 2] if self.quick else []
        _call(
            HERE / "bench_reconstruction_budget.py",
            self.bundle,
            self.scores / "heart" / "test",
            "--out",
            self.scores / "budget",
            *words,
        )

    def spread(self) -> None:
        """Calibrate the spread on some cardiac images, and show on others whether it holds."""
        self._heart()
        target = self.scores / "spread"
        if (target / "spread_calibration.json").is_file():
            return
        self._step(
            "evaluate+uncertainty_calibration",
            f"spread_{self.scores.name}",
            dataset_dir=self.scores / "heart",
            output_dir=target,
            num_slices=1 if self.quick else SPREAD_SLICES,
            num_samples=2 if self.quick else 8,
            acceleration=4,
            center_fraction=0.08,
            pattern="random",
            crop_size=[-1, -1],
        )

    def _maps_method(self) -> str:
        task = load_task(self.bundle / "models" / "model.json")
        return str(task["sampling"].get("maps_method", "low_frequency"))

    def _heart(self) -> None:
        """Write the cardiac images as k-space of simulated coils: those for validation, and the ones for the scores."""
        kept = HEART_VALIDATION.slices(self.mri)
        parts = {"val": kept, "test": HEART.slices(self.mri)}
        if self.validate:
            parts = {"val": kept[:3], "test": kept[3:]}
        for part, indices in parts.items():
            target = self.scores / "heart" / part / "heart.h5"
            if target.exists():
                continue
            full = torch.stack([LoadKspaceSlice()(self.mri / HEART.file, index) for index in indices])[:, 0]
            maps = [
                smooth_coil_maps(full.shape[1:], NUM_COILS, generator=torch.Generator().manual_seed(index))
                for index in indices
            ]
            kspace = simulate_kspace(FourierOperator(2).adjoint(full), torch.stack(maps))
            write_kspace(target, kspace, attrs={"simulated": True})

    def figures(self) -> None:
        """Draw what there is to draw."""
        out = self.scores / "figures"
        methods = bundle_methods(self.bundle)
        self.evaluate()
        few = 1 if self.quick else None
        drawn = draw_examples(self.mri, out, methods, self.records, validate=self.validate, max_slices=few)
        drawn += draw_residuals(self.mri, out, methods, validate=self.validate, max_cases=few)
        if any((self.scores / "budget").glob("*.json")):
            drawn.append(draw_tolerances(self.scores / "budget", out))
        for name in ("spread_calibration", "spread_map"):
            if (self.scores / "spread" / f"{name}.png").is_file():
                drawn.append(save_small(self.scores / "spread" / f"{name}.png", out / f"{name}.png"))
        for path in drawn:
            print(f"{path} ({path.stat().st_size / 1000:.0f} kB)")

    def tables(self) -> dict[str, str]:
        """Return all tables of the model card, as Markdown; of a stage that has not been run, a line that says so."""
        made: dict[str, str] = json.loads((self.scores / "evaluation.json").read_text())
        budget = self.scores / "budget" / "table.md"
        made["budget"] = budget.read_text().strip() if budget.is_file() else NOT_RUN
        calibration = self.scores / "spread" / "spread_calibration.json"
        if not calibration.is_file():
            return {**made, "spread": NOT_RUN}
        curves = json.loads(calibration.read_text())["curves"]
        names = ["test, as it is", "test, times the factor"]
        lines = [f"| spreads | normal law | {' | '.join(names)} |", "|---|---|---|---|"]
        for i, factor in enumerate(curves[names[0]]["factors"]):
            shares = [curves[names[0]]["normal_shares"][i], *(curves[name]["shares"][i] for name in names)]
            lines.append(f"| {factor:g} | {' | '.join(f'{share:.1%}' for share in shares)} |")
        made["spread"] = "\n".join(lines)
        return made

    def _write(self, name: str, text: str) -> None:
        self.scores.mkdir(parents=True, exist_ok=True)
        (self.scores / name).write_text(text)


def _call(script: Path, *words: Any) -> None:
    subprocess.run([sys.executable, str(script), *map(str, words)], check=True)


def publish(run: Run) -> None:
    """Put models, manifest, pictures and tables, as far as they have been made, into the bundle of this checkout."""
    if not (run.scores / "evaluation.json").is_file():
        raise SystemExit("Nothing was published: the stage `evaluate` has not been run in this folder. Run it first.")
    target = bundle_folder(NAME)
    copied = {
        f"{folder}/{name}": run.bundle / folder / name for folder in FOLDERS for name in ("model.pt", "model.json")
    }
    copied["models/training_images.csv"] = run.out / "images" / "training_images.csv"
    copied["models/spread_calibration.json"] = run.scores / "spread" / "spread_calibration.json"
    for name, made in copied.items():
        if not made.is_file():
            print(f"not there, so not published: {made}")
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(made, target / name)
    for picture in sorted((run.scores / "figures").glob("*.png")):
        shutil.copyfile(picture, target / "docs" / picture.name)
    page = target / "docs" / "README.md"
    page.write_text(filled(page.read_text(encoding="utf-8"), run.tables()), encoding="utf-8")


def filled(text: str, made: dict[str, str]) -> str:
    """Return a page with its tables between their markers.

    Raises:
        ValueError: if a table has no place.
    """
    for name, table in made.items():
        start, end = f"<!--table:{name}-->", f"<!--end of table:{name}-->"
        before, found, rest = text.partition(start)
        after = rest.partition(end)
        if not found or not after[1]:
            raise ValueError(f"The page must hold {start} and {end} for a table; got neither or one. Add both.")
        text = f"{before}{start}\n\n{table}\n\n{end}{after[2]}"
    return text


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the run")
    parser.add_argument("--shared", type=Path, required=True, help="folder with mri/ and classification/")
    parser.add_argument("--only", nargs="+", choices=STAGES, metavar="STAGE", help=f"of {', '.join(STAGES)}")
    parser.add_argument("--bundle", type=Path, help="folder of a trained bundle, in place of OUT/bundle")
    parser.add_argument(
        "--methods", nargs="+", metavar="M", help="score only these: zero_filled, cg_sense, tv, model, certified"
    )
    parser.add_argument("--validate", action="store_true", help="score the images for validation, not the final ones")
    parser.add_argument("--quick", action="store_true", help="next to no training: only to try the command")
    parser.add_argument("--publish", action="store_true", help="put the results into the bundle of this checkout")
    options = parser.parse_args()
    trained = {"images", "pretrain", "train", "certified"}
    if options.bundle is not None and trained & set(options.only or STAGES):
        parser.error("`--bundle` is trained already: name stages with `--only` that score it.")
    if options.publish and (options.validate or options.quick or options.methods or options.bundle is not None):
        parser.error("`--publish` needs the final scores of a full run in OUT.")
    return options


if __name__ == "__main__":
    main()
