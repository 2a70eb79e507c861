from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from monai_deqkan.networks.blocks import KANTokenBlock
from monai_deqkan.networks.layers import InputStatistics, KANConv2d, KANLinear


def by_tokens(block: KANTokenBlock, x: Tensor) -> Tensor:
    """Evaluate the formula with KANLinear on tokens, sums over neighbors, and torch's LayerNorm."""
    _, c, height, width = x.shape
    kan, depthwise = block.layers[0], block.layers[1]
    assert isinstance(kan, KANConv2d)
    linear = KANLinear(c, c, bias=False, dtype=x.dtype)
    with torch.no_grad():
        linear.weight.copy_(kan.weight.flatten(1))
    mixed = linear(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)
    padded = F.pad(mixed, (1, 1, 1, 1))
    weight: Tensor = depthwise.weight  # type: ignore[assignment]
    summed = torch.zeros_like(mixed)
    for i in range(3):
        for j in range(3):
            summed += weight[:, 0, i, j].view(1, c, 1, 1) * padded[:, :, i : i + height, j : j + width]
    mean, var = summed.mean((0, 2, 3), keepdim=True), summed.var((0, 2, 3), correction=0, keepdim=True)
    tokens = x + ((summed - mean) / (var + 1e-5).sqrt()).relu()
    return torch.nn.LayerNorm(c, elementwise_affine=False)(tokens.movedim(1, -1)).movedim(-1, 1)


def test_equals_the_formula_on_tokens() -> None:
    torch.manual_seed(0)
    block = KANTokenBlock(2, 3).double()
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(block(x), by_tokens(block, x))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_inputs_of_chained_blocks_stay_on_the_grid(dims: int) -> None:
    torch.manual_seed(0)
    blocks = torch.nn.Sequential(*(KANTokenBlock(dims, 8, num_layers=3) for _ in range(3)))
    x = torch.randn(4, 8, *[6] * dims)
    with InputStatistics(blocks) as statistics:
        y = blocks(x)
    assert len(statistics.layers) == 9
    assert max(inputs.outside for inputs in statistics.layers.values()) < 0.03
    torch.testing.assert_close(y.mean(1), torch.zeros_like(y[:, 0]), rtol=0, atol=1e-5)
    y.square().mul(torch.rand_like(y)).mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in blocks.parameters())
    settings = sum(p.numel() for p in KANTokenBlock(dims, 4, num_layers=2, grid_size=3, spline_order=2).parameters())
    assert settings == 2 * (4 * 4 * 6 + 4 * 3**dims)


def test_options() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 6)
    block = KANTokenBlock(2, 4, dropout=0.5, norm="instance", act=("leakyrelu", {"negative_slope": 0.2}))
    assert not torch.equal(block(x), block(x))
    block.eval()
    torch.testing.assert_close(block(x)[:1], block(x[:1]))
    assert sum(p.numel() for p in KANTokenBlock(2, 4, norm=("batch", {"affine": True})).parameters()) == 144 + 36 + 8
    for settings, message in (
        ({"channels": 0}, "channels"),
        ({"num_layers": 0}, "num_layers"),
        ({"dropout": 1.0}, "dropout"),
        ({"norm": "layer"}, "`norm` must be one of"),
        ({"norm": "group"}, "number of groups"),
    ):
        with pytest.raises(ValueError, match=message):
            KANTokenBlock(**{"spatial_dims": 2, "channels": 4, **settings})  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # deprecated, and still asked for by users
def test_scripts_and_exports() -> None:
    torch.manual_seed(0)
    block = KANTokenBlock(3, 4).eval()
    x = torch.randn(1, 4, 3, 4, 5)
    torch.testing.assert_close(torch.jit.script(block)(x), block(x))
    torch.testing.assert_close(torch.export.export(block, (x,)).module()(x), block(x))
