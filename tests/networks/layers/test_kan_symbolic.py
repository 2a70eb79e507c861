from __future__ import annotations

import math

import pytest
import torch

from monai_deqkan.networks.layers import (
    KANConv2d,
    SymbolicFit,
    rank_edges,
    suggest_edge_symbolic,
    suggest_symbolic,
)

X = torch.linspace(-1.3, 4.1, 300, dtype=torch.float64)
CURVES = {
    "x": lambda x: -2 * x + 1,
    "x^2": lambda x: 3 * (x - 1.1) ** 2 - 1,
    "x^3": lambda x: -((x - 1.4) ** 3),
    "|x|": lambda x: 2 * (x - 0.7).abs(),
    "relu": lambda x: 2 * torch.relu(-x + 1.3) + 3,
    "step": lambda x: 4.0 * (x > 1.0).double() - 1,
    "1/x": lambda x: 2 / (x + 2.0) + 1,
    "sqrt": lambda x: torch.sqrt(4.5 - x),
    "log": lambda x: 2 * torch.log(x + 1.5) - 1,
    "exp": lambda x: 0.3 * torch.exp(0.9 * x) - 2,
    "tanh": lambda x: torch.sigmoid(3 * x - 4),
    "gaussian": lambda x: -3 * torch.exp(-((1.4 * x - 1) ** 2)) + 1,
    "silu": lambda x: 2 * torch.nn.functional.silu(2 * x - 1.5),
    "sin": lambda x: 1.7 * torch.sin(3.1 * x + 0.3),
    "cos": lambda x: -0.4 * torch.cos(2.2 * x - 0.2) + 5,
}


@pytest.mark.parametrize("name", CURVES)
def test_each_function_is_recognized_with_its_numbers(name):
    best, second = suggest_symbolic(X, CURVES[name](X), num_candidates=2)
    assert best.name == name
    assert best.r2 > 1 - 1e-8
    assert second.r2 < best.r2 or name == "x"  # every straight line is half of an |x|
    torch.testing.assert_close(best(X), CURVES[name](X), atol=2e-4, rtol=1e-4)


def test_formulas_read_well():
    assert str(suggest_symbolic(X, CURVES["cos"](X))[0]) == "-0.4 cos(2.2 x - 0.2) + 5"
    assert str(suggest_symbolic(X, CURVES["1/x"](X))[0]) == "2 / (x + 2) + 1"
    assert str(suggest_symbolic(X, CURVES["x^2"](X))[0]) == "3 (x - 1.1)^2 - 1"
    assert str(suggest_symbolic(X, torch.full_like(X, 0.25))[0]) == "0.25"
    assert str(SymbolicFit("relu", 2.0, -1.0, 1.3, 3.0, 1.0, 2)) == "2 relu(-x + 1.3) + 3"


def test_noise_does_not_change_the_suggestion_and_lowers_r2_by_its_share():
    noise = 0.2 * torch.randn(len(X), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    curve = CURVES["sin"](X)
    best = suggest_symbolic(X, curve + noise)[0]
    assert best.name == "sin"
    assert best.r2 == pytest.approx(float(curve.var() / (curve.var() + noise.var())), abs=0.01)
    assert abs(best.b - 3.1) < 0.02


def test_weights_decide_where_the_curve_is_looked_at():
    curve = torch.where(X < 1, torch.sin(3 * X), 5 * X)
    best = suggest_symbolic(X, curve, (X < 1).double())[0]
    assert best.name in ("sin", "cos")
    half = X < 1
    torch.testing.assert_close(best(X[half]), torch.sin(3 * X[half]), atol=1e-3, rtol=0)
    # Weights are multiplicities.
    counts = torch.randint(1, 4, X.shape, generator=torch.Generator().manual_seed(0))
    weighted = suggest_symbolic(X, curve, counts.double(), num_candidates=20)
    repeated = suggest_symbolic(X.repeat_interleave(counts), curve.repeat_interleave(counts), num_candidates=20)
    assert [fit.name for fit in weighted] == [fit.name for fit in repeated]
    for one, other in zip(weighted, repeated, strict=True):
        assert one.r2 == pytest.approx(other.r2, abs=1e-6)


def test_complexity_breaks_near_ties():
    curve = X + 1e-3 * torch.sin(5 * X)  # a cubic or a sine explains a trifle more
    assert suggest_symbolic(X, curve)[0].name == "x"


def test_edges_are_read_in_the_unit_of_the_input():
    torch.manual_seed(0)
    layer = KANConv2d(2, 2, 1, grid_size=40, grid_range=(-1.0, 1.0), base_activation=None, dtype=torch.float64)
    layer.set_input_map(torch.full((2,), 0.1, dtype=torch.float64), torch.full((2,), -0.3, dtype=torch.float64))
    t = torch.linspace(-1, 1, 400, dtype=torch.float64)
    wanted = torch.sin((t + 0.3) / 0.1)  # sin(x) on the layer's inputs, which lie in [-7, 13]
    fit = layer.basis.fit(t, wanted)
    with torch.no_grad():
        layer.coefficients[1, :, 0, 0, 0] = fit
    (edge,) = [edge for edge in rank_edges(layer) if (edge.out_channel, edge.in_channel) == (1, 0)]
    inputs = torch.randn(2, 2, 30, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for best in (suggest_edge_symbolic(layer, edge)[0], suggest_edge_symbolic(layer, edge, inputs)[0]):
        assert best.name == "sin"
        assert best.b == pytest.approx(1.0, abs=0.01)
        assert abs(math.sin(best.c)) < 0.02
        assert best.r2 > 0.999
    assert suggest_edge_symbolic(layer, edge, torch.zeros(1, 2, 4, 4, dtype=torch.float64)) == []


def test_bad_input_is_rejected():
    with pytest.raises(ValueError, match="8 different"):
        suggest_symbolic(X[:5], X[:5])
    with pytest.raises(ValueError, match="`values` must have shape"):
        suggest_symbolic(X, X[:5])
    with pytest.raises(ValueError, match="`values` must be finite"):
        suggest_symbolic(X, X / 0)
    with pytest.raises(ValueError, match="`weights` must be at least 0"):
        suggest_symbolic(X, X, -torch.ones_like(X))
