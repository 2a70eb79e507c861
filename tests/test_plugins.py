from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

import pytest

from monai_deqkan import plugins
from monai_deqkan.plugins import Registry


class Base:
    def __init__(self, size: int = 1) -> None:
        self.size = size


class Other(Base):
    pass


@pytest.fixture
def registry() -> Registry[Base]:
    registry: Registry[Base] = Registry("monai_deqkan.tests", "part", Base)
    registry.register("base")(Base)
    return registry


@pytest.fixture
def third_party(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package that offers one good and one bad class, and one under a name of ours."""
    points = [
        EntryPoint("other", "argparse:ArgumentParser", "monai_deqkan.tests"),
        EntryPoint("counter", "collections:Counter", "monai_deqkan.counters"),
        EntryPoint("base", "collections:Counter", "monai_deqkan.tests"),
    ]

    def entry_points(**wanted: Any) -> list[EntryPoint]:
        return [point for point in points if all(getattr(point, key) == value for key, value in wanted.items())]

    monkeypatch.setattr(plugins, "entry_points", entry_points)


def test_get_returns_what_was_registered(registry: Registry[Base]) -> None:
    assert registry.get("base") is Base
    assert registry.names() == ["base"]


def test_a_class_may_be_registered_twice_but_a_name_only_once(registry: Registry[Base]) -> None:
    assert registry.register("base")(Base) is Base
    with pytest.raises(ValueError, match="The part name 'base' is taken"):
        registry.register("base")(Other)
    with pytest.raises(TypeError, match="subclass of Base"):
        registry.register("wrong")(int)  # type: ignore[arg-type]


def test_third_parties_come_after_our_own(registry: Registry[Base], third_party: None) -> None:
    assert registry.names() == ["base", "other"]
    assert registry.get("base") is Base
    counters: Registry[dict[str, int]] = Registry("monai_deqkan.counters", "counter", dict)
    assert counters.build("counter", a=2) == {"a": 2}


def test_a_third_party_class_of_another_kind_is_refused(registry: Registry[Base], third_party: None) -> None:
    with pytest.raises(TypeError, match="'other' must be a subclass of Base"):
        registry.get("other")


def test_unknown_names_suggest_the_closest(registry: Registry[Base]) -> None:
    with pytest.raises(ValueError, match=r"Unknown part 'bose'; known ones are base. Did you mean 'base'\?"):
        registry.get("bose")
    with pytest.raises(ValueError, match=r"known ones are base\.$"):
        registry.get("xyz")


@pytest.mark.parametrize("spec", [("base", {"size": 3}), ["base", {"size": 3}], Base(3)])
def test_build_takes_pairs_and_objects(registry: Registry[Base], spec: Any) -> None:
    assert registry.build(spec).size == 3


def test_build_lets_settings_override_those_of_a_pair(registry: Registry[Base]) -> None:
    assert registry.build("base").size == 1
    assert registry.build(("base", {"size": 3}), size=4).size == 4


def test_build_refuses_what_it_would_ignore(registry: Registry[Base]) -> None:
    with pytest.raises(TypeError, match="cannot change a part that is already built"):
        registry.build(Base(), size=3)
    with pytest.raises(TypeError, match="unexpected keyword"):
        registry.build("base", sise=3)
    for spec in (3, ("base",), ("base", 3), (Base, {})):
        with pytest.raises(TypeError, match="is given by name"):
            registry.build(spec)  # type: ignore[arg-type]
