"""Every setting is checked, and has an effect."""

from dataclasses import dataclass, fields
from importlib.metadata import EntryPoint

import pytest
import torch

from monai_deqkan import plugins
from monai_deqkan.solvers import (
    SOLVERS,
    AndersonSolver,
    AutoSolver,
    BroydenSolver,
    FixedPointIteration,
    SolveStatus,
    solve_fixed_point,
)
from monai_deqkan.testing import check_solver

DOUBLE = torch.float64
NAMES = SOLVERS.names()
OWN = [
    *[(cls, "history_size", 0, 2) for cls in (AndersonSolver, BroydenSolver, AutoSolver)],
    *[(cls, "damping", 1.0, 0.5) for cls in (FixedPointIteration, AndersonSolver, BroydenSolver, AutoSolver)],
    *[(cls, "restart_growth", 1.0, 1.01) for cls in (AndersonSolver, BroydenSolver, AutoSolver)],
    *[(cls, "regularization", 0.0, 1.0) for cls in (AndersonSolver, AutoSolver)],
    (AutoSolver, "fast_factor", 1.0, 0.01),
    (AutoSolver, "check_every", 0, 1),
]


def fast_then_slow(z):
    """A map that looks fast from a start far out on its first axis, and is slow and not monotone near its solution."""
    slopes = torch.linspace(0.1, 0.95, 12, dtype=DOUBLE) * torch.tensor([1.0, -1.0], dtype=DOUBLE).repeat(6)
    return slopes * z + torch.sin(3 * z.roll(1, 1)) * 0.3 + 1.0


def trace(solver):
    start = torch.zeros(1, 12, dtype=DOUBLE)
    start[:, 0] = 1e3
    return solve_fixed_point(fast_then_slow, start, solver).stats.history[:, 0]


def test_the_list_below_names_every_setting():
    common = {"rtol", "atol", "max_iter", "on_failure"}
    listed = {(cls, name) for cls, name, _, _ in OWN}
    classes = (SOLVERS.get(name) for name in NAMES)
    assert listed == {(cls, field.name) for cls in classes for field in fields(cls) if field.name not in common}


@pytest.mark.parametrize(("cls", "name", "wrong", "other"), OWN)
def test_own_settings_are_checked_and_have_an_effect(cls, name, wrong, other):
    with pytest.raises(ValueError, match=name):
        cls(**{name: wrong})
    with pytest.raises(TypeError, match=name):
        cls(**{name: "many"})
    with pytest.raises(TypeError):
        cls(**{name + "s": other})
    settings = {"rtol": 1e-10, "max_iter": 40, "on_failure": "ignore"}
    usual, changed = trace(cls(**settings)), trace(cls(**settings, **{name: other}))
    assert usual.shape != changed.shape or not torch.allclose(usual, changed, rtol=1e-3, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_common_settings_are_checked_and_have_an_effect(name):
    cls = SOLVERS.get(name)
    for setting, wrong in (("rtol", -1.0), ("atol", -1.0), ("max_iter", -1), ("on_failure", "shout")):
        with pytest.raises(ValueError, match=setting):
            cls(**{setting: wrong})
        with pytest.raises(TypeError):
            cls(**{setting.upper(): wrong})
    assert len(trace(cls(rtol=1e-2, max_iter=300))) < len(trace(cls(rtol=1e-3, max_iter=300)))
    loose, tight = (
        solve_fixed_point(lambda z: z / 2 + 1, torch.zeros(1, 3), cls(rtol=0.0, atol=a)) for a in (0.6, 0.1)
    )
    assert int(loose.stats.evaluations) < int(tight.stats.evaluations)
    assert float(tight.stats.residual) <= 0.1


@pytest.mark.parametrize("name", NAMES)
def test_limits_of_zero_one_and_two(name):
    for limit in (0, 1, 2):
        calls = []

        def f(z, calls=calls):
            calls.append(z)
            return 0.5 * z + 1.0

        start = torch.full((2, 3), 5.0)
        solution = solve_fixed_point(f, start, SOLVERS.build(name, max_iter=limit, on_failure="ignore"))
        assert len(calls) == limit
        assert solution.stats.evaluations.tolist() == [limit] * 2
        assert solution.stats.status.tolist() == [SolveStatus.MAX_ITER] * 2
        # The last iterate that was evaluated: 5, then 0.5 * 5 + 1 by a plain step.
        assert torch.equal(solution.z, start if limit < 2 else torch.full((2, 3), 3.5))
        assert solution.stats.history.shape == (limit, 2)
        assert bool(solution.stats.residual.isnan().all()) == (limit == 0)


@dataclass(frozen=True, kw_only=True)
class Halfway(FixedPointIteration):
    """A solver of another package."""

    damping: float = 0.5


def test_solvers_of_other_packages_are_found_by_name(monkeypatch):
    point = EntryPoint("halfway", f"{__name__}:Halfway", "monai_deqkan.solvers")

    def entry_points(group, name=None):
        return [point] if group == point.group and name in (None, point.name) else []

    monkeypatch.setattr(plugins, "entry_points", entry_points)
    monkeypatch.setattr(SOLVERS, "_classes", dict(SOLVERS._classes))
    assert "halfway" in SOLVERS.names()
    solver = SOLVERS.build(("halfway", {"rtol": 1e-5}), max_iter=70)
    assert type(solver).__name__ == "Halfway"
    assert (solver.damping, solver.rtol, solver.max_iter) == (0.5, 1e-5, 70)
    check_solver(solver)


def test_auto_hands_over_from_one_method_to_the_next():
    # Fast contraction: exactly the plain iterates. Slow: fewer evaluations. Expanding: solved all the same.
    settings = {"rtol": 1e-8, "max_iter": 200, "on_failure": "ignore"}
    auto, plain = AutoSolver(**settings), FixedPointIteration(**settings)
    b = torch.linspace(1, 2, 6, dtype=DOUBLE)[None]
    slopes = torch.linspace(-1.0, 1.0, 6, dtype=DOUBLE)
    results = {
        size: [solve_fixed_point(lambda z, s=size: s * slopes * z + b, torch.zeros_like(b), s) for s in (auto, plain)]
        for size in (0.3, 0.95, 3.0)
    }
    fast, slow, expanding = results.values()
    assert torch.equal(fast[0].z, fast[1].z)
    assert torch.equal(fast[0].stats.history, fast[1].stats.history)
    assert int(slow[0].stats.evaluations) * 4 < int(slow[1].stats.evaluations)
    assert [bool(solution.converged) for solution in expanding] == [True, False]
    assert torch.allclose(expanding[0].z, b / (1 - 3.0 * slopes), rtol=1e-6)


def test_broyden_ends_in_twice_as_many_steps_as_dimensions():
    # D. M. Gay, "Some convergence properties of Broyden's method", SIAM J. Numer. Anal. 16 (1979) 623-630.
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 6, dtype=DOUBLE, generator=generator)
    b = torch.randn(3, 6, dtype=DOUBLE, generator=generator)
    solver = BroydenSolver(rtol=1e-7, max_iter=60, restart_growth=1e6)
    solution = solve_fixed_point(lambda z, b: z @ matrix + b, torch.zeros_like(b), solver, b)
    assert int(solution.stats.evaluations.max()) <= 13
    exact = torch.linalg.solve((torch.eye(6, dtype=DOUBLE) - matrix).T, b.T).T
    assert torch.allclose(solution.z, exact, rtol=1e-4, atol=1e-4)
