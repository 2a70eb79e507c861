"""Short names for the parts that can be exchanged, open to third parties through entry points."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from monai_deqkan._checks import did_you_mean

__all__ = ["Registry"]

T = TypeVar("T")


class Registry(Generic[T]):
    """Map short names to the classes of one exchangeable part.

    A third-party package adds a class without touching this one, by an entry point in its ``pyproject.toml``::

        [project.entry-points."monai_deqkan.solvers"]
        my_solver = "my_package.solvers:MySolver"

    Args:
        group: entry-point group, such as ``"monai_deqkan.solvers"``.
        kind: what one entry is called in error messages, such as ``"solver"``.
        base: class that every entry must derive from.
    """

    def __init__(self, group: str, kind: str, base: Any) -> None:
        self.group = group
        self.kind = kind
        self.base = base
        self._classes: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Return a class decorator that registers the class under ``name``.

        Raises:
            ValueError: if the name is taken by another class.
            TypeError: if the class does not derive from the registry's base class.
        """

        def add(cls: type[T]) -> type[T]:
            if self._classes.get(name, cls) is not cls:
                raise ValueError(f"The {self.kind} name '{name}' is taken by {self._classes[name]}. Choose another.")
            self._classes[name] = self._checked(name, cls)
            return cls

        return add

    def names(self) -> list[str]:
        """Return all known names, own ones first, then those of installed third parties."""
        third_party = [point.name for point in entry_points(group=self.group)]
        return list(dict.fromkeys([*self._classes, *third_party]))

    def get(self, name: str) -> type[T]:
        """Return the class called ``name``.

        Raises:
            ValueError: if no class has that name; the message lists the names and the likeliest one.
        """
        if name in self._classes:
            return self._classes[name]
        for point in entry_points(group=self.group, name=name):
            self._classes[name] = self._checked(name, point.load())
            return self._classes[name]
        hint = did_you_mean(name, self.names())
        raise ValueError(f"Unknown {self.kind} '{name}'; known ones are {', '.join(self.names())}.{hint}")

    def build(self, spec: str | tuple[str, dict[str, Any]] | T, **settings: Any) -> T:
        """Return an object from a name, a pair ``(name, settings)``, or an object that is already built.

        Args:
            spec: ``"anderson"``, ``("anderson", {"rtol": 1e-4})``, or an instance of the base class.
            settings: further constructor arguments, only with a name or a pair.

        Raises:
            TypeError: if ``spec`` is of another kind, or settings come with a built object.
        """
        if isinstance(spec, self.base):
            if settings:
                raise TypeError(f"Settings {sorted(settings)} cannot change a {self.kind} that is already built.")
            return spec
        if isinstance(spec, str):
            return self.get(spec)(**settings)
        if isinstance(spec, (tuple, list)) and len(spec) == 2:
            name, own_settings = spec
            if isinstance(name, str) and isinstance(own_settings, dict):
                return self.get(name)(**{**own_settings, **settings})
        raise TypeError(
            f"A {self.kind} is given by name, by (name, settings) or as a {self.base.__name__}; got {spec!r}."
        )

    def _checked(self, name: str, cls: Any) -> type[T]:
        if not (isinstance(cls, type) and issubclass(cls, self.base)):
            raise TypeError(f"The {self.kind} '{name}' must be a subclass of {self.base.__name__}; got {cls!r}.")
        return cls
