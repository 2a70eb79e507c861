"""The tokenized KAN block of U-KAN."""

# No postponed annotations here: torch.jit.script cannot read them.

from typing import Any

import torch.nn.functional as F
from monai.networks.layers import Conv, Dropout, get_act_layer
from torch import Tensor, nn

from monai_deqkan._checks import check_int, check_range, check_spatial_dims
from monai_deqkan.networks.blocks.kan_block import NormSpec, grid_norm
from monai_deqkan.networks.layers.basis import BasisSpec
from monai_deqkan.networks.layers.kan_conv import KAN_CONVOLUTIONS

__all__ = ["ChannelNorm", "KANTokenBlock"]


class ChannelNorm(nn.Module):
    """Normalize the channels of each pixel to mean 0 and variance 1: layer normalization of tokens, without weights.

    Args:
        channels: number of channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = check_int("channels", channels)

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to ``(B, C, *space)``."""
        return F.layer_norm(x.movedim(1, -1), [self.channels]).movedim(-1, 1).contiguous()


class KANTokenBlock(nn.Module):
    r"""Mix the channels of each pixel by learnable functions, then its neighborhood by depth-wise convolutions.

    .. math:: Z' = \mathrm{LN}\big(Z + \mathrm{DwConv}(\mathrm{KAN}(Z))\big)

    A pixel's channels are a token, and the KAN layer on tokens is a 1x1 KAN convolution of the maps. The depth-wise
    3x3 convolution (3x3x3 in 3-D) is followed by a normalization and an activation; KAN layer, convolution,
    normalization and activation are repeated ``num_layers`` times. No normalization has weights, so that the KAN
    layers' inputs stay on their grid. Its own input should have a mean square of about one per token, as the output of
    another such block has.

    Args:
        spatial_dims: 1, 2 or 3.
        channels: number of channels, of the input and of the output.
        num_layers: number of KAN layers, each with its depth-wise convolution.
        basis: the functions: a name, a pair ``(name, settings)``, or a `Basis`.
        grid_size: number of intervals of the grid, for a basis given by name.
        spline_order: order of its splines.
        grid_range: first and last knot.
        outside: how functions go on beyond the grid; ``None`` for the basis's own default.
        base_activation: ``"silu"`` for a base term, ``None`` for none.
        act: activation after each depth-wise convolution, in MONAI's words.
        norm: ``"batch"``, ``"instance"``, ``("group", {"num_groups": 4})`` or ``None``, before it; see `KANBlock`.
        dropout: probability of dropping a channel of the KAN layers' result in training.

    Shape:
        ``(B, channels, *space)`` to the same.

    Raises:
        ValueError: if a setting is out of its range.

    Example:
        >>> import torch
        >>> KANTokenBlock(2, 4)(torch.randn(2, 4, 5, 7)).shape
        torch.Size([2, 4, 5, 7])

    Reference:
        C. Li et al., "U-KAN makes strong backbone for medical image segmentation and generation", AAAI 2025
        (arXiv:2406.02918), tokenized KAN block; theirs has 3 layers, and weights in its normalizations.
    """

    def __init__(
        self,
        spatial_dims: int,
        channels: int,
        *,
        num_layers: int = 1,
        basis: BasisSpec = "bspline",
        grid_size: int = 5,
        spline_order: int = 3,
        grid_range: tuple[float, float] = (-3.0, 3.0),
        outside: str | None = None,
        base_activation: str | None = "silu",
        act: str | tuple[str, dict[str, Any]] = "relu",
        norm: NormSpec = "batch",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_spatial_dims(spatial_dims, (1, 2, 3))
        check_int("channels", channels)
        check_range("dropout", dropout, 0.0, 1.0, open_high=True)
        steps: list[nn.Module] = []
        for _ in range(check_int("num_layers", num_layers)):
            steps += [
                KAN_CONVOLUTIONS[spatial_dims](
                    channels,
                    channels,
                    1,
                    bias=False,
                    basis=basis,
                    grid_size=grid_size,
                    spline_order=spline_order,
                    grid_range=grid_range,
                    outside=outside,
                    base_activation=base_activation,
                ),
                Conv[Conv.CONV, spatial_dims](channels, channels, 3, padding=1, groups=channels, bias=norm is None),
                grid_norm(norm, spatial_dims, channels),
                get_act_layer(act),
            ]
        if dropout > 0:
            steps.append(Dropout[Dropout.DROPOUT, spatial_dims](dropout))
        self.layers = nn.Sequential(*steps)
        self.norm = ChannelNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        return self.norm(x + self.layers(x))
