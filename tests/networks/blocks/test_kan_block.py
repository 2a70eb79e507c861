from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from monai_deqkan.networks.blocks import KANBlock
from monai_deqkan.networks.layers import BSplineBasis


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_normalizes_then_convolves(dims: int) -> None:
    torch.manual_seed(0)
    block = KANBlock(dims, 2, 3)
    x = 100 * torch.rand(2, 2, *[6] * dims) + 7
    axes = tuple(range(2, dims + 2))
    normalized = (x - x.mean(axes, keepdim=True)) / x.std(axes, correction=0, keepdim=True)
    torch.testing.assert_close(block(x), block.conv(normalized), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(KANBlock(dims, 2, 3, norm=None).norm(x), x)
    assert [name for name, _ in block.named_parameters()] == ["conv.weight"]
    assert block.conv.base_weight is None


def test_ignores_scale_and_offset_of_its_input() -> None:
    torch.manual_seed(0)
    block = KANBlock(2, 2, 3)
    x = torch.randn(1, 2, 8, 8)
    torch.testing.assert_close(block(3 * x + 5), block(x), rtol=1e-3, atol=1e-4)


def test_drops_channels_in_training_only() -> None:
    torch.manual_seed(0)
    block = KANBlock(2, 2, 40, dropout=0.5)
    x = torch.randn(1, 2, 8, 8)
    dropped = (block(x) == 0).all(dim=(2, 3)).float().mean()
    assert 0.2 < dropped < 0.8
    block.eval()
    torch.testing.assert_close(block(x), block.conv(F.instance_norm(x)))


def test_normalizations_without_weights() -> None:
    torch.manual_seed(0)
    x = 5 * torch.randn(3, 6, 8, 8) + 2
    for norm, axes, groups in (("batch", (0, 3, 4), 6), (("group", {"num_groups": 4}), (2, 3, 4), 2)):
        block = KANBlock(2, 6, 3, norm=norm)  # type: ignore[arg-type]
        assert [name for name, _ in block.named_parameters()] == ["conv.weight"]
        parts = x.view(3, groups, 6 // groups, 8, 8)
        mean, var = parts.mean(axes, keepdim=True), parts.var(axes, correction=0, keepdim=True)
        expected = ((parts - mean) / (var + 1e-5).sqrt()).view_as(x)
        torch.testing.assert_close(block(x), block.conv(expected), rtol=1e-4, atol=1e-5)
    affine = KANBlock(2, 6, 3, norm=("batch", {"affine": True}))
    assert affine.norm.weight.shape == (6,)
    with pytest.raises(ValueError, match="needs a number of groups"):
        KANBlock(2, 6, 3, norm="group")


def test_stride_and_rank() -> None:
    torch.manual_seed(0)
    dense, x = KANBlock(2, 3, 4, stride=2), torch.randn(2, 3, 7, 8)
    whole = KANBlock(2, 3, 4)
    whole.load_state_dict(dense.state_dict())
    torch.testing.assert_close(dense(x), whole(x)[:, :, ::2, ::2])
    low = KANBlock(2, 3, 4, stride=2, rank=2, outside="linear")
    torch.testing.assert_close(low(x), low.conv.to_conv()(F.instance_norm(x)), rtol=1e-4, atol=1e-5)
    assert low.conv.functions.basis == BSplineBasis(outside="linear")
    with pytest.raises(ValueError, match="`init` must be one of variance, zero_spline"):
        KANBlock(2, 3, 4, rank=2, init="identity")


def test_settings_reach_the_convolution() -> None:
    torch.manual_seed(0)
    block = KANBlock(2, 3, 3, norm=None, basis="chebyshev", outside="linear", init="identity", base_activation="silu")
    x = torch.randn(1, 3, 6, 6)
    assert (block(x) - x).square().mean().sqrt() < 0.05
    assert KANBlock(2, 1, 1, outside="clamp").conv.basis == BSplineBasis(outside="clamp")
    assert not KANBlock(2, 1, 1, init="zero_spline", base_activation="silu").conv.coefficients.any()


def test_one_element_per_channel() -> None:
    x = torch.rand(2, 3, 1, 1)
    with pytest.raises(ValueError, match="more than one element per channel"):
        KANBlock(2, 3, 2).eval()(x)
    block = KANBlock(2, 3, 2, norm=None)
    torch.testing.assert_close(block(x), block.conv(x))


def test_wrong_settings() -> None:
    with pytest.raises(ValueError, match="`kernel_size` must be odd"):
        KANBlock(2, 1, 1, 2)
    with pytest.raises(ValueError, match="`norm` must be one of instance, batch, group, None"):
        KANBlock(2, 1, 1, norm="layer")
    with pytest.raises(ValueError, match="`dropout`"):
        KANBlock(2, 1, 1, dropout=1.0)
    with pytest.raises(ValueError, match="spatial_dims"):
        KANBlock(4, 1, 1)
