import threading

import pytest
import torch

from monai_deqkan.solvers import FixedPointIteration, solve_budget, solve_fixed_point

SOLVER = FixedPointIteration(rtol=1e-6, max_iter=100, on_failure="ignore")


def evaluations(solver=SOLVER, **kwargs):
    # The relative residual of z -> z / 2 + 1 from 0 first falls to 10^-k after ceil(log2(1 + 10^k)) evaluations.
    return int(solve_fixed_point(lambda z: z / 2 + 1, torch.zeros(1, 1), solver, **kwargs).stats.evaluations)


def test_each_setting_is_replaced_and_comes_back():
    assert evaluations() == 20
    with solve_budget(rtol=1e-2):
        assert evaluations() == 7
    with solve_budget(rtol=0.0, atol=0.25):
        assert evaluations() == 3  # residuals are 1, 1/2, 1/4
    with solve_budget(max_iter=4):
        assert evaluations() == 4
    with pytest.raises(RuntimeError, match="1 of 1"), solve_budget(max_iter=4, on_failure="raise"):
        evaluations()
    assert evaluations() == 20


def test_the_inner_block_wins_where_it_says_something():
    with solve_budget(rtol=1e-2, max_iter=5):
        with solve_budget(max_iter=30):
            assert evaluations() == 7
        assert evaluations() == 5


def test_only_forward_solves_obey():
    with solve_budget(rtol=1e-2):
        assert evaluations(kind="backward") == 20
        assert evaluations(kind="linear") == 20


def test_holds_for_the_thread_that_entered_it():
    seen = []
    with solve_budget(max_iter=3):
        thread = threading.Thread(target=lambda: seen.append(evaluations()))
        thread.start()
        thread.join()
        assert evaluations() == 3
    assert seen == [20]


def test_mistakes_are_refused_on_entry():
    with pytest.raises(TypeError, match="rtoll"), solve_budget(rtoll=1e-3):
        pass
    for wrong in ({"rtol": -1.0}, {"atol": float("nan")}, {"max_iter": -1}, {"on_failure": "shout"}):
        with pytest.raises(ValueError, match=next(iter(wrong))), solve_budget(**wrong):
            pass
    assert evaluations() == 20


def test_blocks_closed_out_of_order_leave_nothing_behind():
    outer, inner = solve_budget(rtol=1e-2), solve_budget(max_iter=4)
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert evaluations() == 4
    inner.__exit__(None, None, None)
    assert evaluations() == 20
