"""The KM-UNet: a U-Net whose convolution kernels are learnable functions."""

# No postponed annotations here: torch.jit.script cannot read them on methods that it leaves out.

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monai_deqkan._checks import check_choice, check_int, check_shape, check_spatial_dims
from monai_deqkan.networks.blocks.kan_block import KANBlock

__all__ = ["KANUNet"]

_POOLS: dict[tuple[str, int], type[nn.Module]] = {
    ("maxpool", 2): nn.MaxPool2d,
    ("maxpool", 3): nn.MaxPool3d,
    ("avgpool", 2): nn.AvgPool2d,
    ("avgpool", 3): nn.AvgPool3d,
}


class KANUNet(nn.Module):
    r"""Segment images with a U-Net of KAN convolutions (KM-UNet).

    Every kernel element is a B-spline, there are no activation functions between the layers, and instance normalization
    without weights goes before each layer. Per level two 3x3 KAN convolutions (3x3x3 in 3-D); down by pooling; up by
    interpolation and a 3x3 KAN convolution; skips are concatenated; the head is a 1x1 KAN convolution.

    With :math:`K` = ``grid_size + spline_order`` (one more with a base term) and :math:`f_0, \dots, f_L` =
    ``features``, it has (without bias)

    .. math:: K \Big[ 3^d \Big( c_{in} f_0 + f_0^2 + \sum_{l=1}^{L} (f_{l-1} f_l + f_l^2)
        + \sum_{l=0}^{L-1} (f_{l+1} f_l + 3 f_l^2) \Big) + f_0 c_{out} \Big]

    parameters: 4.28 million by default in 2-D.

    Args:
        spatial_dims: 2 or 3.
        in_channels: number of input channels.
        out_channels: number of classes, background included.
        features: number of channels per level, finest first.
        spline_order: order of the splines.
        grid_size: number of intervals of the splines' grid.
        grid_range: first and last knot, in units of the normalized inputs' standard deviation.
        base_activation: ``"silu"`` for a base term in each layer, ``None`` for none.
        bias: whether the convolutions have biases.
        norm: ``"instance"``, or ``None`` for no normalization.
        down: ``"maxpool"`` or ``"avgpool"``.
        up: ``"interp"`` for bi- or trilinear interpolation, or ``"nearest"``.
        dropout: probability of dropping a channel after each convolution but the head, in training.

    Shape:
        ``(B, in_channels, *space)`` to logits ``(B, out_channels, *space)``. Any size works from ``2 ** L`` per axis
        on (8 by default); with normalization one axis must have ``2 ** (L + 1)``. Where the size is odd at some level,
        pooling leaves out the last row, and the way up interpolates to the skip's size.

    Raises:
        ValueError: if a setting is out of its range.

    Example:
        >>> net = KANUNet(spatial_dims=2, in_channels=1, out_channels=2, features=(4, 8))
        >>> net(torch.rand(1, 1, 15, 16)).shape
        torch.Size([1, 2, 15, 16])

    Reference:
        The description of a KM-UNet in the project's founding proposal, which has no public reference. Two others with
        like names differ: "KM-UNet: KAN Mamba UNet for medical image segmentation", arXiv:2501.02559 (2025), has
        selective state spaces; C. Li et al., "U-KAN makes strong backbone for medical image segmentation and
        generation", AAAI 2025 (arXiv:2406.02918), has KAN layers on tokens after plain convolutions.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        features: Sequence[int] = (16, 32, 64, 128),
        *,
        spline_order: int = 3,
        grid_size: int = 5,
        grid_range: tuple[float, float] = (-3.0, 3.0),
        base_activation: str | None = None,
        bias: bool = False,
        norm: str | None = "instance",
        down: str = "maxpool",
        up: str = "interp",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.spatial_dims = check_spatial_dims(spatial_dims)
        self.in_channels = check_int("in_channels", in_channels)
        self.out_channels = check_int("out_channels", out_channels)
        widths = [check_int("features", width) for width in features]
        if not widths:
            raise ValueError("`features` must give the number of channels of at least one level; got none.")
        check_choice("down", down, ("maxpool", "avgpool"))
        check_choice("up", up, ("interp", "nearest"))
        linear = "bilinear" if spatial_dims == 2 else "trilinear"
        self.interpolation = "nearest" if up == "nearest" else linear
        self.min_size = 2 ** (len(widths) - 1)
        self.normalizes = norm is not None

        def block(inputs: int, outputs: int, kernel_size: int = 3, drop: float = dropout) -> KANBlock:
            return KANBlock(
                spatial_dims,
                inputs,
                outputs,
                kernel_size,
                grid_size=grid_size,
                spline_order=spline_order,
                grid_range=grid_range,
                base_activation=base_activation,
                bias=bias,
                norm=norm,
                dropout=drop,
            )

        def level(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(block(inputs, outputs), block(outputs, outputs))

        pairs = list(pairwise(widths))
        self.stem = level(in_channels, widths[0])
        self.pool = _POOLS[down, spatial_dims](2)
        self.encoder = nn.ModuleList([level(fine, coarse) for fine, coarse in pairs])
        self.ups = nn.ModuleList([block(coarse, fine) for fine, coarse in reversed(pairs)])
        self.decoder = nn.ModuleList([level(2 * fine, fine) for fine, _ in reversed(pairs)])
        self.head = block(widths[0], out_channels, 1, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits.

        Raises:
            ValueError: if rank, channels or size do not fit.
        """
        if not torch.jit.is_scripting():
            self._check_input(x)
        x = self.stem(x)
        skips = [x]
        for stage in self.encoder:
            x = stage(self.pool(x))
            skips.append(x)
        x = skips.pop()
        for rise, stage in zip(self.ups, self.decoder):  # noqa: B905, TorchScript
            skip = skips.pop()
            x = rise(F.interpolate(x, size=skip.shape[2:], mode=self.interpolation))
            x = stage(torch.cat([skip, x], dim=1))
        return self.head(x)

    @torch.jit.unused
    def _check_input(self, x: Tensor) -> None:
        check_shape("x", x, ("B", self.in_channels, "H", "W", "D")[: self.spatial_dims + 2])
        space = tuple(x.shape[2:])
        bottom = [size // self.min_size for size in space]
        if min(bottom) < 1 or (self.normalizes and max(bottom) < 2):
            raise ValueError(
                f"The image must have at least {self.min_size} elements along each axis and, with normalization, "
                f"{2 * self.min_size} along one; got {space}. Pad it, or use fewer `features`."
            )
