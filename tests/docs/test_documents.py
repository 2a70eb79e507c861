"""The code in README.md and docs/ runs, the links lead somewhere, and the README stays short."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
GUIDES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
DOCUMENTS = [*GUIDES, REPOSITORY / "CHANGELOG.md", *sorted((REPOSITORY / "bundles").glob("*/docs/*.md"))]


def name(file: Path) -> str:
    return file.relative_to(REPOSITORY).as_posix()


def python_blocks(file: Path) -> list[tuple[int, str]]:
    """Return the Python code of a document, block by block, with the line where each begins."""
    text = file.read_text(encoding="utf-8")
    blocks = re.finditer(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, block.start(1)), block.group(1)) for block in blocks]


def shell_lines(file: Path) -> list[str]:
    return [
        line.strip()
        for block in re.findall(r"^ *```bash\n(.*?)^ *```$", file.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
    ]


@pytest.mark.parametrize("file", [file for file in GUIDES if python_blocks(file)], ids=name)
def test_python_code_runs(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The blocks of one document run in order, in one module; what they claim, they assert."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    module = ModuleType("document_of_monai_deqkan")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for line, code in python_blocks(file):
        exec(compile("\n" * line + code, str(file), "exec"), module.__dict__)


@pytest.mark.parametrize("file", DOCUMENTS, ids=name)
def test_relative_links_lead_somewhere(file: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert not [link for link in links if link and not (file.parent / link).exists()]


def test_readme_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_commands_name_bundles_and_configurations_that_exist() -> None:
    bundles = {path.parents[1].name for path in (REPOSITORY / "bundles").glob("*/configs/metadata.json")}
    for file in GUIDES:
        copied = set(re.findall(r"bundle copy (\w+)", "\n".join(shell_lines(file)))) & bundles
        for line in shell_lines(file):
            for found in re.findall(r"configs/\w+\.json", line):
                assert all((REPOSITORY / "bundles" / bundle / found).is_file() for bundle in copied or bundles)
            for found in re.findall(r"bundle copy (\w+)", line):
                assert found == "NAME" or found in bundles


def test_readme_names_every_bundle() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    for metadata in (REPOSITORY / "bundles").glob("*/configs/metadata.json"):
        assert f"`{metadata.parents[1].name}`" in text
