"""Train, evaluate and document the weights of ``brain_mri_deq_reconstruction``, by one command.

python tests/benchmarks/reproduce_brain_mri_bundle.py OUT --shared DATA --publish
"""

from __future__ import annotations

import argparse
from pathlib import Path

from evaluate_brain_mri_bundle import FINAL, VALIDATION, bundle_methods, evaluate, tables


def main() -> None:
    options = _options()
    evaluate_bundle(options.bundle, options.shared / "mri", options.out, options.validate)


def evaluate_bundle(bundle: Path, folder: Path, out: Path, validate: bool) -> dict[str, str]:
    """Score the bundle's models; write the records and the tables."""
    name = "validation" if validate else "evaluation"
    records = evaluate(folder, out / name, bundle_methods(bundle), VALIDATION if validate else FINAL)
    made = tables(records)
    text = "\n\n".join(made.values())
    (out / f"{name}.md").write_text(f"Research only; not for clinical use.\n\n{text}\n")
    print(text)
    return made


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the run")
    parser.add_argument("--shared", type=Path, required=True, help="folder with mri/ and classification/")
    parser.add_argument("--only", choices=("evaluate",), help="this stage alone")
    parser.add_argument("--bundle", type=Path, help="folder of a trained bundle, with --only evaluate")
    parser.add_argument("--validate", action="store_true", help="score the images for validation, not the final ones")
    return parser.parse_args()


if __name__ == "__main__":
    main()
