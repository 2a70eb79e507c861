"""A plug-in that MONAI's users do not notice until they use it."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import monai
import pytest
from monai.bundle import ComponentLocator, ConfigParser

import monai_deqkan

# What loads on first use only: extras, and what takes long.
LATE = ("fastmri", "matplotlib", "nilearn", "onnx", "onnxruntime", "pytorch_lightning", "requests")


def own_modules() -> list[ModuleType]:
    names = [info.name for info in pkgutil.walk_packages(monai_deqkan.__path__, "monai_deqkan.")]
    return [importlib.import_module(name) for name in names if not name.endswith("__main__")]


def defined_names(module: ModuleType) -> set[str]:
    tree = ast.parse(inspect.getsource(module))
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")}


def test_no_name_of_ours_is_one_of_monais() -> None:
    """MONAI's parser looks a short `_target_` up among both, and would warn users who never mention us."""
    monais = ComponentLocator(excludes=["monai_deqkan"])
    assert monais.get_component_module_name("Dataset"), "MONAI's table of names is empty: this test would see nothing"
    taken = {name: monais.get_component_module_name(name) for module in own_modules() for name in defined_names(module)}
    assert not {name: place for name, place in taken.items() if place}


def test_no_two_of_ours_have_one_name() -> None:
    places: dict[str, list[str]] = {}
    for module in own_modules():
        for name in defined_names(module):
            places.setdefault(name, []).append(module.__name__)
    assert not {name: found for name, found in places.items() if len(found) > 1}


@pytest.mark.parametrize("name", ["KANUNet", "DEQReconstructor", "PerpendicularLoss", "NMSEMetric"])
def test_configurations_find_our_classes_by_short_name(name: str) -> None:
    parser = ConfigParser({"imports": ["$import monai_deqkan"], "found": {"_target_": name, "_mode_": "callable"}})
    found = parser.get_parsed_content("found")
    assert getattr(found, "func", found).__module__.startswith("monai_deqkan.")


def test_import_loads_nothing_heavy_beyond_monai() -> None:
    code = (
        "import sys, monai; before = set(sys.modules); import monai_deqkan, monai_deqkan.cli, monai_deqkan.testing; "
        "print(*(set(sys.modules) - before))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    loaded = {name.partition(".")[0] for name in run.stdout.split()}
    assert "monai_deqkan" in loaded
    assert not loaded & set(LATE)


def test_the_packages_that_the_readme_names_are_there_after_the_import() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (row,) = [line for line in readme.splitlines() if line.startswith("| `monai_deqkan/` |")]
    # The command must not depend on the checks for plug-ins, so these are loaded by their own name only.
    assert set(re.findall(r"`(\w+)`", row)) == {"testing", *monai_deqkan.__all__} - {"__version__"}


def test_monai_activations_include_ours() -> None:
    assert monai.networks.layers.factories.Act["kan"] is monai_deqkan.networks.layers.KANActivation
