import pytest
import torch

from monai_deqkan.adjoints import Adjoint, ImplicitAdjoint, PhantomAdjoint, UnrolledAdjoint
from monai_deqkan.solvers import AndersonSolver
from monai_deqkan.testing import check_adjoint

IMPLICIT = ImplicitAdjoint(solver=AndersonSolver(rtol=1e-8))


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, factor):
        ctx.factor = factor
        return tensor.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.factor(gradient), None


class FaultyAdjoint(Adjoint):
    """The unrolled gradient with one fault."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def solve(self, cell, z0, solver, x):
        solution = UnrolledAdjoint().solve(cell, z0, solver, x)
        parts = (solution.z,) if isinstance(solution.z, torch.Tensor) else solution.z
        if self.fault == "value":
            parts = [part * 1.001 for part in parts]
        factor = {
            "factor": lambda g: 1.01 * g,
            "scale": lambda g: g + 1e-9,
            "sign": lambda g: -g,
            "mixing": lambda g: g + 0 * g.sum(),
            "second": lambda g: g.detach(),
        }.get(self.fault)
        if factor is not None and torch.is_grad_enabled():
            parts = [_Scale.apply(part, factor) for part in parts]
        if self.fault == "graph":
            parts = [part.detach().requires_grad_() if not part.requires_grad else part for part in parts]
        z = parts[0] if isinstance(solution.z, torch.Tensor) else tuple(parts)
        return type(solution)(z, solution.stats)


@pytest.mark.parametrize("adjoint", [IMPLICIT, UnrolledAdjoint(), UnrolledAdjoint(checkpoint=True)])
def test_exact_adjoints_pass(adjoint):
    check_adjoint(adjoint, double_backward=True)


def test_inexact_adjoints_pass_as_such():
    check_adjoint(PhantomAdjoint(num_steps=2), exact=False)
    with pytest.raises(AssertionError, match="is right"):
        check_adjoint(PhantomAdjoint(num_steps=2))


@pytest.mark.parametrize(
    ("fault", "settings", "message"),
    [
        ("value", {}, "value is the solution"),
        ("factor", {}, "is right; it is off by 1.0e-02"),
        ("scale", {"exact": False}, "scales with the loss"),
        ("sign", {"exact": False}, "uphill"),
        ("second", {"double_backward": True}, "second derivative"),
        ("mixing", {}, "NaN in the loss of one sample"),
        ("graph", {}, "no graph"),
    ],
)
def test_a_wrong_adjoint_is_caught(fault, settings, message):
    with pytest.raises(AssertionError, match=message):
        check_adjoint(FaultyAdjoint(fault), **settings)


def test_a_second_derivative_has_nothing_to_be_compared_with_where_the_first_is_inexact():
    with pytest.raises(ValueError, match="exact=True"):
        check_adjoint(PhantomAdjoint(), exact=False, double_backward=True)
