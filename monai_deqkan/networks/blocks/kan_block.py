"""Normalization and a KAN convolution."""

from __future__ import annotations

from typing import Any

from monai.networks.layers import Dropout
from torch import Tensor, nn

from monai_deqkan._checks import check_choice, check_range, check_spatial_dims
from monai_deqkan.networks.layers.basis import BasisSpec
from monai_deqkan.networks.layers.kan_conv import KAN_CONVOLUTIONS

__all__ = ["KANBlock"]

_NORMS: dict[int, Any] = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


class KANBlock(nn.Module):
    """Normalize each channel of each sample, convolve by learnable functions, drop channels or not.

    The normalization has no weights. It puts most values on the grid ``[-3, 3]``.
    The output has the input's size (stride 1, padded by zeros after the normalization).

    Args:
        spatial_dims: 1, 2 or 3.
        in_channels: number of input channels.
        out_channels: number of output channels.
        kernel_size: odd size of the kernel along each axis.
        basis: the functions: a name, a pair ``(name, settings)``, or a `Basis`.
        grid_size: number of intervals of the grid, for a basis given by name.
        spline_order: order of its splines.
        grid_range: first and last knot, in the unit of the (normalized) input.
        outside: how functions go on beyond the grid: ``"zero"``, ``"clamp"``, ``"linear"``, or ``None`` for the
            basis's own default.
        base_activation: ``"silu"`` for a base term, ``None`` for none.
        init: ``"variance"``, ``"identity"`` or ``"zero_spline"``; see `KANLayer.reset_parameters`.
        bias: whether the convolution has a bias.
        norm: ``"instance"``, or ``None`` to leave the normalization to the caller.
        dropout: probability of dropping a channel of the output in training.

    Raises:
        ValueError: if a setting is out of its range.

    Example:
        >>> import torch
        >>> KANBlock(2, 3, 4)(torch.rand(1, 3, 8, 8)).shape
        torch.Size([1, 4, 8, 8])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        basis: BasisSpec = "bspline",
        grid_size: int = 5,
        spline_order: int = 3,
        grid_range: tuple[float, float] = (-3.0, 3.0),
        outside: str | None = None,
        base_activation: str | None = None,
        init: str = "variance",
        bias: bool = False,
        norm: str | None = "instance",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_spatial_dims(spatial_dims, (1, 2, 3))
        check_choice("norm", norm, ("instance", None))
        check_range("dropout", dropout, 0.0, 1.0, open_high=True)
        if kernel_size % 2 == 0:
            raise ValueError(f"`kernel_size` must be odd, so that the output has the input's size; got {kernel_size}.")
        self.normalizes = norm is not None
        self.norm = _NORMS[spatial_dims](in_channels) if self.normalizes else nn.Identity()
        self.conv = KAN_CONVOLUTIONS[spatial_dims](
            in_channels,
            out_channels,
            kernel_size,
            padding=kernel_size // 2,
            bias=bias,
            basis=basis,
            grid_size=grid_size,
            spline_order=spline_order,
            grid_range=grid_range,
            outside=outside,
            base_activation=base_activation,
            init=init,
        )
        self.dropout = Dropout[Dropout.DROPOUT, spatial_dims](dropout) if dropout > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to ``(B, C, *space)``.

        Raises:
            ValueError: if a channel has a single element, whose normalized value could only be zero.
        """
        if self.normalizes and x[0, 0].numel() == 1:
            raise ValueError(
                f"Instance normalization needs more than one element per channel; got shape {list(x.shape)}. "
                "Use larger images, fewer levels, or norm=None."
            )
        return self.dropout(self.conv(self.norm(x)))
