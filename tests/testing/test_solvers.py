from dataclasses import dataclass, replace

import pytest

from monai_deqkan.solvers import FixedPointIteration
from monai_deqkan.testing import check_solver


@dataclass(frozen=True, kw_only=True)
class Boastful(FixedPointIteration):
    """Calls everything solved."""

    def has_converged(self, residual, scale):
        return residual < float("inf")


@dataclass(frozen=True, kw_only=True)
class Coupled(FixedPointIteration):
    """Lets one sample influence the others."""

    def step(self, state, z, fz):
        return fz - 0.1 * (fz - z).mean(0, keepdim=True), state


@dataclass(frozen=True, kw_only=True)
class Absolute(FixedPointIteration):
    """Stops by a tolerance that has a unit."""

    def has_converged(self, residual, scale):
        return residual <= self.rtol


class Careless(FixedPointIteration):
    """Swallows misspelt settings."""

    def __init__(self, **settings):
        super().__init__(**{name: value for name, value in settings.items() if name != "max_itr"})


@pytest.mark.parametrize(
    ("solver", "promise"),
    [
        (Boastful(), "what the tolerance says"),
        (Coupled(), "leaves the others intact"),
        (Absolute(), "does not depend on the unit of the state"),
        (Careless(), "misspelt"),
    ],
)
def test_broken_promises_are_named(solver, promise):
    with pytest.raises(AssertionError, match=promise):
        check_solver(solver)


def test_settings_are_left_alone():
    solver = FixedPointIteration(damping=0.1, rtol=0.3)
    before = replace(solver)
    check_solver(solver)
    assert solver == before
