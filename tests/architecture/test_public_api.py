"""Public names change on purpose only.

After a deliberate change: ``python tests/architecture/test_public_api.py`` writes the stored list and the page
``docs/reference/index.md`` anew; commit both with the change and its line in CHANGELOG.md.
"""

from __future__ import annotations

import enum
import importlib
import inspect
import json
import pkgutil
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import monai_deqkan

REFERENCE = Path(__file__).parents[1] / "reference" / "public_api.json"
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "index.md"
REGENERATE = "If that is meant, run `python tests/architecture/test_public_api.py` and commit the result."


def rooms() -> list[ModuleType]:
    """Return every package and the public modules at the top: where users import from."""
    found = [monai_deqkan]
    for info in pkgutil.walk_packages(monai_deqkan.__path__, "monai_deqkan."):
        at_top = info.name.count(".") == 1 and not info.name.split(".")[1].startswith("_")
        if info.ispkg or at_top:
            found.append(importlib.import_module(info.name))
    return found


def public(room: ModuleType) -> dict[str, Any]:
    return {name: getattr(room, name) for name in room.__all__ if not isinstance(getattr(room, name), ModuleType)}


class Bare(str):
    """A postponed annotation that prints without quotes."""

    __repr__ = str.__str__

    @classmethod
    def of(cls, annotation: Any) -> Any:
        return cls(annotation) if isinstance(annotation, str) else annotation


def signature(value: Any) -> str:
    """Describe how a name is called; of an object that is not called, its kind."""
    if inspect.isclass(value):
        if issubclass(value, enum.Enum):
            return "enum " + ", ".join(value.__members__)
        if issubclass(value, BaseException) or getattr(value, "_is_protocol", False):
            return "class"
    elif not callable(value):
        return type(value).__name__
    found = inspect.signature(value)
    bare = found.replace(
        parameters=[
            parameter.replace(annotation=Bare.of(parameter.annotation)) for parameter in found.parameters.values()
        ],
        return_annotation=Bare.of(found.return_annotation),
    )
    # Defaults that print their address, and spellings that differ between Python versions.
    return re.sub(r" at 0x[0-9a-f]+", "", str(bare)).replace("typing.", "").replace("NoneType", "None")


def first_line(value: Any) -> str:
    return (value.__doc__ or "").strip().partition("\n")[0]


def described() -> dict[str, dict[str, str]]:
    return {room.__name__: {name: signature(value) for name, value in sorted(public(room).items())} for room in rooms()}


@pytest.mark.parametrize("room", rooms(), ids=lambda room: room.__name__)
def test_public_names_and_signatures_are_the_stored_ones(room: ModuleType) -> None:
    stored = json.loads(REFERENCE.read_text())
    assert room.__name__ in stored, f"{room.__name__} is new. {REGENERATE}"
    assert described()[room.__name__] == stored[room.__name__], REGENERATE


def test_no_room_was_lost() -> None:
    assert set(json.loads(REFERENCE.read_text())) == {room.__name__ for room in rooms()}, REGENERATE


@pytest.mark.parametrize("room", rooms(), ids=lambda room: room.__name__)
def test_every_public_name_has_a_docstring_whose_first_line_is_a_sentence(room: ModuleType) -> None:
    lacking = []
    for name, value in {"": room, **public(room)}.items():
        if not (name == "" or inspect.isclass(value) or inspect.isroutine(value)):
            continue  # a constant or a registry: no docstring of its own
        if not first_line(value).endswith("."):
            lacking.append(name or room.__name__)
    assert not lacking


@pytest.mark.parametrize("room", rooms(), ids=lambda room: room.__name__)
def test_a_room_lists_what_it_imports_from_its_files(room: ModuleType) -> None:
    listed = set(room.__all__)
    assert len(listed) == len(room.__all__), "a name is listed twice"
    own = {
        name
        for name, value in vars(room).items()
        if not name.startswith("_")
        and room is not monai_deqkan
        and getattr(value, "__module__", "").startswith(room.__name__)
        and (inspect.isclass(value) or inspect.isroutine(value))
    }
    assert own <= listed


def markdown(text: str) -> str:
    """Turn the reST of a docstring's line into Markdown."""
    text = re.sub(r":math:`([^`]*)`", r"$\1$", text)
    return re.sub(r":\w+:`(?:[\w.]+\.)?(\w+)`", r"`\1`", text).replace("``", "`")


def page() -> str:
    """Return the reference page: each public name with the first line of its docstring."""
    lines = ["# Names by room", "", "`help(name)` in Python shows the rest: arguments, shapes, errors, sources.", ""]
    for room in rooms():
        names = {
            name: value
            for name, value in sorted(public(room).items())
            if inspect.isroutine(value) or inspect.isclass(value)
        }
        # Rooms that only hand on what the rooms inside them have are not listed twice.
        if names and room.__name__ != "monai_deqkan.transforms":
            lines += [f"## `{room.__name__}`", "", markdown(first_line(room)), ""]
            lines += [f"- `{name}`: {markdown(first_line(value))}" for name, value in names.items()]
            lines.append("")
    return "\n".join(lines)


def test_the_reference_page_has_every_name() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), REGENERATE


if __name__ == "__main__":
    REFERENCE.write_text(json.dumps(described(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")
