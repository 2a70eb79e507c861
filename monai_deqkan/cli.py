"""The command ``monai-deqkan``: demonstration, sample data, bundles, and what there is."""

from __future__ import annotations

import argparse
import inspect
import shlex
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from monai_deqkan import __version__
from monai_deqkan.adjoints import ADJOINTS
from monai_deqkan.data import SAMPLES, bundle_metadata, bundle_names, copy_bundle, write_sample
from monai_deqkan.demo import run_demo
from monai_deqkan.networks import nets
from monai_deqkan.networks.layers import BASES
from monai_deqkan.solvers import LINEAR_SOLVERS, SOLVERS

__all__ = ["main"]

_SAMPLE_TEXTS = {
    "brain_lesion": "classification: real MRI template slices, half of them with a simulated lesion",
    "brain_tissue": "segmentation: real MRI template slices with masks of fluid, grey and white matter",
    "brain_kspace": "reconstruction: 8-coil k-space simulated from real MRI template slices",
}
_SAMPLE_OF_TASK = {"classification": "brain_lesion", "segmentation": "brain_tissue", "reconstruction": "brain_kspace"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after ``monai-deqkan``; by default those of the process.

    Returns:
        The exit status: 0, or 2 after an error that the user can mend, which is told in one line.

    Raises:
        SystemExit: from argparse, for words that it does not understand, and for ``--help`` and ``--version``.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
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
    return 0


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
    return parser


def _unwrapped(error: BaseException) -> BaseException:
    """Return what is inside the RuntimeErrors in which MONAI's configuration parser wraps an error."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


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


def _copy_bundle(options: argparse.Namespace) -> None:
    folder = copy_bundle(options.name, options.folder)
    task = options.name.rpartition("_")[2]
    data, test = folder / "dataset", folder / "dataset" / "test"
    images = test / "images" if task == "segmentation" else test
    print(f"Copied {options.name} to {folder}. It has no weights yet; train it first.\n")
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
