"""The transposed KAN convolution that doubles the size."""

# No postponed annotations here: torch.jit.script cannot read them.

from typing import Any

import torch
from torch import Tensor, nn

from monai_deqkan._checks import check_int, check_spatial_dims
from monai_deqkan.networks.blocks.kan_block import KANBlock

__all__ = ["KANUpsample"]


class KANUpsample(nn.Module):
    r"""Double the size of maps by a transposed KAN convolution of kernel size and stride 2, after a normalization.

    .. math:: Y[2 x + \delta, o] = \sum_i F_{\delta o i}\big(\mathrm{N}(X)[x, i]\big), \qquad \delta \in \{0, 1\}^d

    It is the sub-pixel form: a 1x1 KAN convolution at the input's size to ``2 ** d`` maps per output channel, which are
    then woven together. No zeros are put between pixels, where functions need not vanish, and nothing overlaps.

    Args:
        spatial_dims: 1, 2 or 3.
        in_channels: number of input channels.
        out_channels: number of output channels.
        block_settings: keyword arguments of `KANBlock`, but for kernel size and stride. ``init="identity"`` makes
            each output channel its matching input, repeated.

    Shape:
        ``(B, in_channels, *space)`` to ``(B, out_channels, *(2 * size for size in space))``.

    Raises:
        ValueError: if a setting is out of its range.

    Example:
        >>> KANUpsample(2, 4, 3, {"grid_size": 3})(torch.rand(1, 4, 5, 6)).shape
        torch.Size([1, 3, 10, 12])

    Reference:
        W. Shi et al., "Real-time single image and video super-resolution using an efficient sub-pixel convolutional
        neural network", CVPR 2016, section 3.2.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        block_settings: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.spatial_dims = check_spatial_dims(spatial_dims, (1, 2, 3))
        settings = dict(block_settings or {})
        copies = 2**spatial_dims
        self.block = KANBlock(
            spatial_dims, in_channels, check_int("out_channels", out_channels) * copies, 1, **settings
        )
        if settings.get("init") == "identity":
            one = KANBlock(spatial_dims, in_channels, out_channels, 1, **settings)
            with torch.no_grad():
                self.block.conv.weight.copy_(one.conv.weight.repeat_interleave(copies, dim=0))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        x = self.block(x)
        for axis in range(2, self.spatial_dims + 2):
            x = torch.stack((x[:, ::2], x[:, 1::2]), dim=axis + 1).flatten(axis, axis + 1)
        return x
