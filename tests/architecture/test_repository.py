"""What holds for the files of the repository."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "monai_deqkan"

# Tested elsewhere, in the file that is named.
TESTED_IN = {
    "_checks.py": "test_checks.py",
    "_complex.py": "test_complex.py",
    "adjoints/base.py": "adjoints/test_adjoints.py",
    "adjoints/outer_tensors.py": "adjoints/test_implicit.py",
    "data/data_report.py": "data/test_check.py",
    "demo/classification.py": "demo/test_demo.py",
    "demo/reconstruction.py": "demo/test_demo.py",
    "demo/run.py": "demo/test_demo.py",
    "demo/section.py": "demo/test_demo.py",
    "demo/segmentation.py": "demo/test_demo.py",
    "demo/workflow.py": "demo/test_demo.py",
    "engines/reconstruction_cases.py": "engines/test_reconstruction_suite.py",
    "engines/reconstruction_methods.py": "engines/test_reconstruction_suite.py",
    "engines/reconstruction_tuning.py": "engines/test_reconstruction_suite.py",
    "handlers/iteration_recorder.py": "handlers/test_solve_stats.py",
    "handlers/metrics_writer.py": "handlers/test_tables.py",
    "handlers/probability_table.py": "handlers/test_tables.py",
    "handlers/saliency.py": "handlers/test_classification_report.py",
    "handlers/table.py": "handlers/test_tables.py",
    "handlers/worst_cases.py": "handlers/test_image_table.py",
    "networks/blocks/mri_export.py": "networks/test_export.py",
    "networks/layers/equilibrium_loop.py": "networks/test_export.py",
    "networks/layers/kan_features.py": "networks/layers/test_kan_linear.py",
    "networks/layers/kan_variance.py": "networks/layers/test_kan_layer.py",
    "networks/layers/plain_weight.py": "networks/layers/test_lipschitz.py",
    "operators/base.py": "operators/test_mri.py",
    "operators/coils.py": "operators/test_mri.py",
    "operators/fourier.py": "operators/test_mri.py",
    "operators/poisson_disc.py": "operators/test_masks.py",
    "solvers/anderson.py": "solvers/test_fixed_point_solvers.py",
    "solvers/auto.py": "solvers/test_settings.py",
    "solvers/base.py": "solvers/test_fixed_point_solvers.py",
    "solvers/fixed_point_iteration.py": "solvers/test_fixed_point_solvers.py",
    "solvers/recorder.py": "solvers/test_fixed_point_solvers.py",
    "solvers/secant.py": "solvers/test_fixed_point_solvers.py",
    "solvers/solution.py": "solvers/test_fixed_point_solvers.py",
    "solvers/solve.py": "solvers/test_fixed_point_solvers.py",
    "transforms/image/dictionary.py": "transforms/image/test_array.py",
    "transforms/kspace/array.py": "transforms/kspace/test_kspace.py",
    "transforms/kspace/dictionary.py": "transforms/kspace/test_kspace.py",
    "variational/regularized.py": "variational/test_total_variation.py",
}

MACHINE_PATH = re.compile(r"(?<![\w.~/-])/(home|Users|root|work|mnt|scratch)/\w|[A-Z]:\\Users|\.\./shared(?!/data)")


def tracked_files() -> list[Path]:
    try:
        run = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [REPOSITORY / name for name in run.stdout.split("\0") if name and (REPOSITORY / name).is_file()]


def public_names(file: Path) -> list[str]:
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return list(ast.literal_eval(node.value))
    return []


def package_files() -> list[Path]:
    return sorted(file for file in PACKAGE.rglob("*.py") if file.name != "__init__.py" and public_names(file))


@pytest.mark.parametrize("file", package_files(), ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_every_file_has_its_tests(file: Path) -> None:
    path = file.relative_to(PACKAGE)
    mirrored = path.with_name(f"test_{path.name}")
    expected = TESTED_IN.get(path.as_posix(), mirrored.as_posix())
    assert (REPOSITORY / "tests" / expected).is_file(), f"{path} needs tests/{mirrored}, or a line in TESTED_IN"


def test_exceptions_are_needed() -> None:
    for path in TESTED_IN:
        mirrored = REPOSITORY / "tests" / Path(path).with_name(f"test_{Path(path).name}")
        assert (PACKAGE / path).is_file(), f"{path} is gone: take it out of TESTED_IN"
        assert not mirrored.exists(), f"{path} has its own tests: take it out of TESTED_IN"


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    found = []
    for file in tracked_files():
        if file == Path(__file__) or file.suffix in (".png", ".pt", ".npz", ".h5"):
            continue
        lines = file.read_text(encoding="utf-8").splitlines()
        found += [f"{file.relative_to(REPOSITORY)}:{i}" for i, line in enumerate(lines, 1) if MACHINE_PATH.search(line)]
    assert not found


def test_modules_stay_short() -> None:
    long = [file.name for file in PACKAGE.rglob("*.py") if len(file.read_text(encoding="utf-8").splitlines()) > 500]
    assert not long, "split these files"


def test_changelog_is_open_for_the_next_version() -> None:
    headings = [
        line for line in (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8").splitlines() if line[:3] == "## "
    ]
    assert headings[0] == "## [Unreleased]"
