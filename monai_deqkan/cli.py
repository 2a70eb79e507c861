"""The command ``monai-deqkan``: demonstration, sample data, a user's data, bundles, and what there is."""

from __future__ import annotations

import argparse
import inspect
import shlex
import sys
import traceback
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from monai_deqkan import __version__
from monai_deqkan._checks import check_empty_folder
from monai_deqkan.adjoints import ADJOINTS
from monai_deqkan.data import (
    SAMPLES,
    TableColumns,
    bundle_metadata,
    bundle_names,
    check_dataset,
    convert_dataset,
    copy_bundle,
    simulate_kspace_folder,
    write_sample,
)
from monai_deqkan.demo import run_demo
from monai_deqkan.engines import (
    RIVALS,
    SuiteSettings,
    evaluate_reconstructions,
    trained_maps_method,
    tune_reconstruction,
)
from monai_deqkan.networks import nets
from monai_deqkan.networks.layers import BASES
from monai_deqkan.solvers import LINEAR_SOLVERS, SOLVERS

__all__ = ["main"]

_SAMPLE_TEXTS = {
    "brain_lesion": "classification: real MRI template slices, half of them with a simulated lesion",
    "brain_tissue": "segmentation: real MRI template slices with masks of fluid, grey and white matter",
    "brain_tissue_volumes": "segmentation in 3-D: the template as volumes, deformed and tilted, with the same masks",
    "brain_kspace": "reconstruction: 8-coil k-space simulated from real MRI template slices",
}
_SAMPLE_OF_TASK = {"classification": "brain_lesion", "segmentation": "brain_tissue", "reconstruction": "brain_kspace"}
_NO_WEIGHTS = "it has no weights yet: train it first"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after ``monai-deqkan``; by default those of the process.

    Returns:
        The exit status: 0; 1 where ``data check`` finds leakage or unusable files; or 2 after an error that the user
        can mend, which is told in one line.

    Raises:
        SystemExit: from argparse, for words that it does not understand, and for ``--help`` and ``--version``.
    """
    options = _parser().parse_args(arguments)
    try:
        status: int | None = options.run(options)
    except (ValueError, OSError, RuntimeError) as error:
        cause = _unwrapped(error)
        if not isinstance(cause, (ValueError, OSError)):  # a defect, whose place the traceback tells
            raise
        if "traceback" in options:
            traceback.print_exception(error)
        print(f"monai-deqkan: error: {' '.join(str(cause).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("monai-deqkan: interrupted", file=sys.stderr)
        return 130
    return status or 0


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    # Suppressed, so that a subcommand's default does not undo what stands before it.
    common.add_argument(
        "--traceback", action="store_true", default=argparse.SUPPRESS, help="show where an error comes from"
    )
    parser = argparse.ArgumentParser(
        prog="monai-deqkan",
        description="Kolmogorov-Arnold networks, deep equilibrium models and equilibrium MRI reconstruction for MONAI. "
        "Not for clinical use.",
        parents=[common],
    )
    versions = f"torch {version('torch')}, MONAI {version('monai')}"
    parser.add_argument("--version", action="version", version=f"monai-deqkan {__version__} ({versions})")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", parents=[common], help="train and evaluate all three bundles on sample data")
    demo.add_argument(
        "--out", type=Path, metavar="DIR", help="a new folder for the results (default: deqkan-demo, numbered if taken)"
    )
    demo.add_argument("--only", metavar="TASK", help=f"one task: {', '.join(_SAMPLE_OF_TASK)}")
    demo.add_argument("--quick", action="store_true", help="a short run that shows the way, not the quality")
    demo.set_defaults(run=_demo)

    listing = commands.add_parser("list", parents=[common], help="list samples, bundles, networks and solvers")
    listing.set_defaults(run=_list)

    samples = commands.add_parser("samples", parents=[common], help="write a sample data set")
    samples.add_argument("name", metavar="NAME", help=f"one of {', '.join(SAMPLES)}")
    samples.add_argument("folder", metavar="DIR", type=Path, help="a new or empty folder")
    samples.set_defaults(run=_samples)

    bundle = commands.add_parser("bundle", parents=[common], help="work with the bundles")
    actions = bundle.add_subparsers(required=True, metavar="ACTION")
    copying = actions.add_parser("copy", parents=[common], help="copy a bundle, to train it on your own data")
    copying.add_argument("name", metavar="NAME", help="a bundle's name, see `monai-deqkan list`")
    copying.add_argument("folder", metavar="DIR", type=Path, help="a new or empty folder, which becomes the bundle")
    copying.set_defaults(run=_copy_bundle)

    _add_data(commands, common)

    _add_reconstruction(commands, common)
    return parser


def _add_reconstruction(commands: Any, common: argparse.ArgumentParser) -> None:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("folder", metavar="FOLDER", type=Path, help="fully sampled k-space files (*.h5)")
    shared.add_argument("--masks", nargs="+", metavar="NAME", help="patterns of masks (default: random equispaced)")
    shared.add_argument("--accelerations", nargs="+", type=float, metavar="R", help="default: 2 4 6 8 10")
    shared.add_argument("--center-fraction", type=float, metavar="F", help="share of central lines (default: 0.32 / R)")
    shared.add_argument("--noise", nargs="+", type=_snr, metavar="DB", help="added noise, SNR in dB, or none (default)")
    shared.add_argument("--reference", help="rss (default) or sense")
    shared.add_argument("--region", help="head (default) or all")
    shared.add_argument("--phase-axis", metavar="AXIS", help="undersampled axis: last (default), first, shorter")
    shared.add_argument("--simulated-coils", type=int, metavar="N", help="see one coil's images through N coils")
    shared.add_argument(
        "--maps-method",
        metavar="NAME",
        help="coil maps: low_frequency or espirit (default: what the first bundle that knows says, else the former)",
    )
    shared.add_argument("--crop", nargs=2, type=int, metavar=("H", "W"), help="score the centre, such as 320 320")
    shared.add_argument("--slices", nargs="+", type=int, metavar="I", help="indices of slices in each file")
    shared.add_argument(
        "--max-slices", type=int, metavar="N", help="at most N slices of all files together, evenly spread"
    )
    shared.add_argument("--part", help="train, val or evaluate of a data set in parts (default: all files)")
    shared.add_argument("--seed", type=int)
    shared.add_argument("--device", default="cpu", help="default: cpu")
    shared.add_argument("--quiet", action="store_true", help="no progress bar")
    reconstruction = commands.add_parser(
        "reconstruction", parents=[common], help="compare MRI reconstructions, and tune their weights"
    )
    actions = reconstruction.add_subparsers(required=True, metavar="ACTION")
    evaluating = actions.add_parser("evaluate", parents=[common, shared], help="score methods; goes on if cut short")
    evaluating.add_argument(
        "--methods", nargs="+", default=list(RIVALS), metavar="M", help=f"{', '.join(RIVALS)}, or a bundle's folder"
    )
    evaluating.add_argument(
        "--weights", nargs="+", type=Path, default=[], metavar="FILE", help="files of tuned weights"
    )
    evaluating.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new folder, or that of the run")
    evaluating.set_defaults(run=_evaluate_reconstructions)
    tuning = actions.add_parser("tune", parents=[common, shared], help="choose a rival's weight against references")
    tuning.add_argument("--method", required=True, help=f"one of {', '.join(n for n in RIVALS if RIVALS[n].search)}")
    tuning.add_argument("--out", required=True, type=Path, metavar="FILE", help="a new JSON file")
    tuning.set_defaults(run=_tune_reconstruction)


def _snr(text: str) -> float | None:
    return None if text == "none" else float(text)


def _suite_settings(options: argparse.Namespace) -> SuiteSettings:
    given = {field.name: getattr(options, field.name) for field in fields(SuiteSettings)}
    if options.maps_method is None:
        given["maps_method"] = next(filter(None, map(trained_maps_method, getattr(options, "methods", ()))), None)
    return SuiteSettings(**{name: value for name, value in given.items() if value is not None})


def _evaluate_reconstructions(options: argparse.Namespace) -> None:
    result = evaluate_reconstructions(
        options.folder,
        options.out,
        options.methods,
        _suite_settings(options),
        weights=options.weights,
        device=options.device,
        progress=not options.quiet,
    )
    print(result["statement"])
    for row in result["results"]:
        scores = f"PSNR {row['psnr']:6.2f} dB  SSIM {row['ssim']:.3f}  NMSE {row['nmse']:.4f}  VIF {row['vif']:.3f}"
        print(f"  {row['scenario']:20} {row['method']:16} {scores}")
    print(f"Tables and report.html are in {options.out}.")


def _tune_reconstruction(options: argparse.Namespace) -> None:
    result = tune_reconstruction(
        options.folder,
        options.method,
        options.out,
        _suite_settings(options),
        device=options.device,
        progress=not options.quiet,
    )
    for entry in result["entries"]:
        edge = " (at the edge of the search)" if entry["at_the_edge"] else ""
        print(f"  {entry['mask']} {entry['acceleration']:g}x: {entry['weight']:g}, {entry['psnr']:.2f} dB{edge}")
    print(f"Wrote {options.out}; give it to `reconstruction evaluate --weights`.")


def _add_data(commands: Any, common: argparse.ArgumentParser) -> None:
    shared = argparse.ArgumentParser(add_help=False)
    text = "how to know patients: a pattern of file names, whose group in parentheses is the patient, or a CSV file"
    shared.add_argument("--patients", metavar="P", help=text)
    data = commands.add_parser(
        "data", parents=[common], help="check a data set, bring one into the layout, or simulate k-space"
    )
    actions = data.add_subparsers(required=True, metavar="ACTION")
    text = (
        "unusable files, copies, leakage between parts, balance; exit status 1 if leakage or unusable files are found"
    )
    checking = actions.add_parser("check", parents=[common, shared], help=text, description=text)
    checking.add_argument("folder", metavar="DIR", type=Path, help="the data set")
    checking.add_argument("--mirrored", action="store_true", help="also find copies with left and right exchanged")
    checking.add_argument(
        "--min-correlation", type=float, default=0.97, metavar="R", help="of near-copies (default: 0.97)"
    )
    checking.add_argument("--out", type=Path, metavar="DIR", help="a new folder for the report as text, JSON and CSV")
    checking.set_defaults(run=_check_data)
    text = "make train|val|test/<class>/* and a manifest from a folder per class, a CSV file, or a MedMNIST archive"
    converting = actions.add_parser("convert", parents=[common, shared], help=text, description=text)
    converting.add_argument("source", metavar="SOURCE", type=Path, help="a folder, a .csv or a .npz")
    converting.add_argument("folder", metavar="DIR", type=Path, help="a new or empty folder")
    for column in fields(TableColumns):
        converting.add_argument(
            f"--{column.name}-column", metavar="NAME", help=f"the CSV's column of the {column.name}, if not found"
        )
    converting.add_argument("--images", type=Path, metavar="DIR", help="what the CSV's paths are relative to")
    converting.add_argument("--class-names", nargs="+", metavar="NAME", help="of MedMNIST's classes 0, 1, ...")
    converting.add_argument("--val", type=float, default=0.2, metavar="F", help="share of val, if to be drawn (0.2)")
    converting.add_argument("--test", type=float, default=0.2, metavar="F", help="share of test, likewise (0.2)")
    converting.add_argument("--seed", type=int, default=0, help="of the parts (0)")
    converting.add_argument("--link", action="store_true", help="symbolic links in place of copies")
    converting.set_defaults(run=_convert_data)
    text = "make k-space files from images or volumes: smooth phase, smooth coil maps, noise; labelled as simulated"
    simulating = actions.add_parser("simulate", parents=[common], help=text, description=text)
    simulating.add_argument("source", metavar="SOURCE", type=Path, help="a folder of images; its folders are kept")
    simulating.add_argument("folder", metavar="DIR", type=Path, help="a new or empty folder")
    simulating.add_argument("--coils", type=int, default=8, metavar="N", help="number of coils (8)")
    simulating.add_argument("--snr", type=float, default=30.0, metavar="DB", help="signal-to-noise ratio in dB (30)")
    simulating.add_argument("--slices", metavar="S", help="slices of volumes, such as 11-27 (default: all)")
    simulating.add_argument("--seed", type=int, default=0, help="of phase, coils and noise (0)")
    simulating.set_defaults(run=_simulate_data)


def _unwrapped(error: BaseException) -> BaseException:
    """Return what is inside the RuntimeErrors in which MONAI's configuration parser wraps an error."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _simulate_data(options: argparse.Namespace) -> None:
    written = simulate_kspace_folder(
        options.source,
        options.folder,
        num_coils=options.coils,
        snr_db=options.snr,
        slices=options.slices,
        seed=options.seed,
    )
    print(f"Wrote {len(written)} k-space files to {options.folder}, simulated; its README.md says how.")


def _demo(options: argparse.Namespace) -> None:
    report = run_demo(options.out, only=options.only, quick=options.quick)
    print(f"\nOpen the report in a browser: {report}")


def _list(options: argparse.Namespace) -> None:
    networks = {name: (inspect.getdoc(getattr(nets, name)) or "").partition("\n")[0] for name in nets.__all__}
    _print_table("Samples (monai-deqkan samples NAME DIR)", {name: _SAMPLE_TEXTS.get(name, "") for name in SAMPLES})
    _print_table(
        "Bundles (monai-deqkan bundle copy NAME DIR)", {name: bundle_metadata(name)["task"] for name in bundle_names()}
    )
    _print_table("Networks (monai_deqkan.networks.nets)", networks)
    for title, registry in (
        ("Fixed-point solvers", SOLVERS),
        ("Linear solvers", LINEAR_SOLVERS),
        ("Adjoints", ADJOINTS),
        ("KAN bases", BASES),
    ):
        print(f"{title}: {', '.join(registry.names())}")


def _print_table(title: str, rows: dict[str, str]) -> None:
    width = max(map(len, rows), default=0)
    print(title)
    for name, text in rows.items():
        print(f"  {name:{width}}  {text}")
    print()


def _samples(options: argparse.Namespace) -> None:
    folder = write_sample(options.name, options.folder)
    print(f"Wrote {options.name} to {folder}; its README.md says what is real and what is simulated.")


def _check_data(options: argparse.Namespace) -> int:
    if options.out is not None:
        check_empty_folder(options.out, "the report")  # now, not after minutes of reading
    report = check_dataset(
        options.folder, patients=options.patients, min_correlation=options.min_correlation, mirrored=options.mirrored
    )
    print(report.text())
    if options.out is not None:
        print(f"Wrote the report and its tables to {report.write(options.out)}.")
    return int(report.has_errors)


def _convert_data(options: argparse.Namespace) -> None:
    given = {column.name: getattr(options, f"{column.name}_column") for column in fields(TableColumns)}
    folder = convert_dataset(
        options.source,
        options.folder,
        columns=TableColumns(**given) if any(given.values()) else None,
        images_dir=options.images,
        class_names=options.class_names,
        patients=options.patients,
        val_fraction=options.val,
        test_fraction=options.test,
        seed=options.seed,
        link=options.link,
    )
    print(f"Wrote the data set to {folder}; manifest.csv lists its files. Check it:")
    print(f"  {shlex.join([sys.executable, '-m', 'monai_deqkan', 'data', 'check', str(folder)])}")


def _copy_bundle(options: argparse.Namespace) -> None:
    folder = copy_bundle(options.name, options.folder)
    task = options.name.rpartition("_")[2]
    data, test = folder / "dataset", folder / "dataset" / "test"
    images = test / "images" if task == "segmentation" else test
    weights = "its trained weights are in models/" if (folder / "models" / "model.pt").is_file() else _NO_WEIGHTS
    print(f"Copied {options.name} to {folder}; {weights}.\n")
    if task in _SAMPLE_OF_TASK:
        words = [sys.executable, "-m", "monai_deqkan", "samples", _SAMPLE_OF_TASK[task], str(data)]
        print(f"Sample data, to try it on (for your own, change --dataset_dir below):\n  {shlex.join(words)}")
    for title, config, dataset in (
        ("Train", "train", data),
        ("Evaluate on the test part", "evaluate", data),
        ("Run on new data, a folder of files", "inference", images),
    ):
        path = folder / "configs" / f"{config}.json"
        words = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(path), "--dataset_dir", str(dataset)]
        print(f"{title}:\n  {shlex.join(words)}")
