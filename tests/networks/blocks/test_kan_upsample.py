from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from monai_deqkan.networks.blocks import KANUpsample


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_equals_the_transposed_convolution_by_loops(dims: int) -> None:
    """Each input element adds its function's value to each of its 2^d output elements."""
    torch.manual_seed(0)
    block = KANUpsample(dims, 3, 2, {"norm": None, "bias": True, "base_activation": "silu"}).double()
    torch.nn.init.normal_(block.block.conv.bias)
    x = torch.randn(2, 3, *(3, 4, 2)[:dims], dtype=torch.float64)
    functions = block.block.conv.edge_functions(x.flatten())
    functions = functions.view(*x.shape, 2 * 2**dims, 3)  # (B, C, *space, out * 2 ** d, in)
    expected = torch.zeros(2, 2, *(2 * size for size in x.shape[2:]), dtype=torch.float64)
    for place in product(*(range(size) for size in x.shape[2:])):
        for o, delta in product(range(2), product((0, 1), repeat=dims)):
            row = o * 2**dims + sum(bit << axis for axis, bit in enumerate(delta))
            target = (slice(None), o, *(2 * p + d for p, d in zip(place, delta, strict=True)))
            expected[target] += block.block.conv.bias[row]
            for i in range(3):
                expected[target] += functions[(slice(None), i, *place, row, i)]
    torch.testing.assert_close(block(x), expected)


def test_normalizes_and_repeats_at_identity() -> None:
    torch.manual_seed(0)
    block = KANUpsample(2, 3, 3, {"init": "identity"})
    x = 7 * torch.rand(2, 3, 6, 5) - 1
    repeated = F.interpolate(F.instance_norm(x), scale_factor=2.0, mode="nearest")
    assert (block(x) - repeated).square().mean().sqrt() < 0.05


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # deprecated, and still asked for by users
def test_scripts_and_exports() -> None:
    torch.manual_seed(0)
    block = KANUpsample(3, 4, 2, {"rank": 2, "norm": "batch"}).eval()
    x = torch.randn(1, 4, 3, 4, 5)
    torch.testing.assert_close(torch.jit.script(block)(x), block(x))
    torch.testing.assert_close(torch.export.export(block, (x,)).module()(x), block(x))
    with pytest.raises(ValueError, match="out_channels"):
        KANUpsample(2, 4, 0)
