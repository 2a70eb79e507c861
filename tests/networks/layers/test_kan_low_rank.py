from __future__ import annotations

import pytest
import torch

from monai_deqkan.networks.layers import (
    KANConv1d,
    KANConv2d,
    KANConv3d,
    KANLinear,
    LowRankKANConv1d,
    LowRankKANConv2d,
    LowRankKANConv3d,
)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (LowRankKANConv1d, {"padding": 2, "dilation": 2, "padding_mode": "circular"}),
        (LowRankKANConv2d, {"padding": (1, 2), "stride": (2, 1), "base_activation": None}),
        (LowRankKANConv2d, {"padding": "same", "dilation": (1, 2), "padding_mode": "reflect", "bias": False}),
        (LowRankKANConv3d, {"padding": 1, "padding_mode": "replicate"}),
    ],
)
@torch.no_grad()
def test_equal_to_the_dense_convolution_of_its_weight(kind: type, settings: dict) -> None:
    torch.manual_seed(0)
    low = kind(3, 4, 3, rank=5, dtype=torch.float64, **settings)
    with torch.no_grad():
        low.functions.set_input_map(torch.tensor([1.0, 0.5, 2.0]), torch.tensor([0.1, 0.0, -0.2]))
    x = torch.randn(2, 3, *[9] * low.spatial_dims, dtype=torch.float64)
    dense = low.to_conv()
    assert float((low(x) - dense(x)).abs().max()) < 1e-10
    spatial = [part.weight.flatten(1) for part in low.spatial]
    weight = sum(
        torch.einsum(
            {1: "o,f,a->ofa", 2: "o,f,a,b->ofab", 3: "o,f,a,b,c->ofabc"}[low.spatial_dims],
            low.project.weight.flatten(1)[:, r],
            low.functions.weight.flatten(1)[r],
            *(axis[r] for axis in spatial),
        )
        for r in range(5)
    )
    torch.testing.assert_close(dense.weight, weight)


@pytest.mark.parametrize(
    ("dense", "low"), [(KANConv1d, LowRankKANConv1d), (KANConv2d, LowRankKANConv2d), (KANConv3d, LowRankKANConv3d)]
)
@torch.no_grad()
def test_a_weight_of_low_rank_is_found(dense: type, low: type) -> None:
    torch.manual_seed(0)
    true = low(4, 6, 3, padding=1, stride=2, rank=3, dtype=torch.float64).to_conv()
    true.set_input_map(torch.full((4,), 1.5), torch.zeros(4))
    found, error = low.from_conv(true, 3, num_sweeps=300)
    assert error < 1e-6
    x = torch.randn(1, 4, *[8] * true.spatial_dims, dtype=torch.float64)
    expected = true(x)
    assert float((found(x) - expected).norm() / expected.norm()) < 1e-5


@torch.no_grad()
def test_the_error_is_that_of_the_functions_and_falls_with_the_rank() -> None:
    torch.manual_seed(0)
    layer = KANConv2d(3, 8, 3, padding=1)
    points = torch.linspace(-3, 3, 2001)
    functions = layer.edge_functions(points)
    errors = []
    for rank in (4, 16, 64, 250):
        low, error = LowRankKANConv2d.from_conv(layer, rank, num_sweeps=20)
        difference = low.to_conv().edge_functions(points) - functions
        assert float(difference.norm() / functions.norm()) == pytest.approx(error, rel=0.02, abs=1e-4)
        errors.append(error)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02


@torch.no_grad()
def test_fresh_layers_keep_the_scale() -> None:
    torch.manual_seed(0)
    layer = LowRankKANConv2d(16, 32, 3, rank=64)
    assert float(layer(torch.randn(4, 16, 24, 24)).square().mean()) == pytest.approx(1.0, abs=0.25)


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # deprecated, and still asked for by users
def test_it_reloads_learns_and_scripts() -> None:
    torch.manual_seed(0)
    layer = LowRankKANConv2d(2, 3, 3, padding=1, rank=4)
    x = torch.randn(1, 2, 6, 6)
    layer(x).square().sum().backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in layer.parameters())
    other = LowRankKANConv2d(2, 3, 3, padding=1, rank=4)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="`groups` must be 1"):
        LowRankKANConv2d(4, 4, 3, groups=2, rank=2)
    with pytest.raises(ValueError, match="`groups` must be 1"):
        LowRankKANConv2d.from_conv(KANConv2d(4, 4, 3, groups=2), 2)
    with pytest.raises(ValueError, match="rank"):
        LowRankKANConv2d(4, 4, 3, rank=0)
    with pytest.raises(TypeError, match="KANConv2d"):
        LowRankKANConv2d.from_conv(KANLinear(2, 2), 2)  # type: ignore[arg-type]


def test_a_weight_that_is_not_finite_is_refused() -> None:
    layer = KANConv2d(2, 3, 3)
    layer.weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"`layer\.weight` must be finite; 1 of"):
        LowRankKANConv2d.from_conv(layer, 2)
