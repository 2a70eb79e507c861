"""A U-shaped denoiser without biases."""

# No postponed annotations here: torch.jit.script cannot read them on methods that it leaves out.

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from monai.networks.layers.factories import Conv
from torch import Tensor, nn

from monai_deqkan._checks import check_int, check_noise_level, check_shape, check_spatial_dims

__all__ = ["UNetDenoiser"]


class UNetDenoiser(nn.Module):
    r"""Denoise an image by a residual U-Net of plain convolutions that is told the noise level.

    .. math:: D(x, \sigma) = x - N(x, \sigma), \qquad D(s\,x, s\,\sigma) = s\,D(x, \sigma) \text{ for } s > 0

    Each level is a chain of residual blocks (convolution, ReLU, convolution); strided convolutions lead down,
    transposed ones up, and features of the same level are added. No layer has a bias or normalizes, so the map is
    homogeneous: images may have any unit, and a network trained at some noise levels keeps working at others. Its
    level enters as a constant channel. Images of any size are padded to a multiple of the coarsest pixel, then cut.

    Args:
        spatial_dims: number of spatial dimensions, 2 or 3.
        channels: number of image channels, in and out.
        features: features of each level, finest first; at least two levels. The default has about as many parameters
            (0.53 M) as a :class:`DnCNN` of 17 layers of 64 (0.56 M), and takes a fifth of its multiply-adds.
        num_blocks: residual blocks of each level, on the way down and again on the way up.
        blind: whether the network is not told the noise level.

    Raises:
        ValueError: for a number out of range.

    Example:
        >>> denoiser = UNetDenoiser(spatial_dims=2, features=(8, 16))
        >>> denoiser(torch.zeros(1, 2, 17, 20), noise_level=0.1).shape
        torch.Size([1, 2, 17, 20])

    Reference:
        K. Zhang et al., "Plug-and-play image restoration with deep denoiser prior", IEEE Trans. Pattern Anal. Mach.
        Intell. 44 (2022) 6360-6376 (DRUNet: the same parts, four levels, 32 M parameters; the noise is not subtracted
        there). On homogeneity: S. Mohan et al., "Robust and interpretable blind image denoising via bias-free
        convolutional neural networks", ICLR 2020.
    """

    def __init__(
        self,
        spatial_dims: int,
        channels: int = 2,
        features: Sequence[int] = (24, 48, 88),
        num_blocks: int = 2,
        *,
        blind: bool = False,
    ) -> None:
        super().__init__()
        self.spatial_dims = check_spatial_dims(spatial_dims)
        self.channels = check_int("channels", channels)
        check_int("num_blocks", num_blocks)
        if not isinstance(features, Sequence) or len(features) < 2:
            raise ValueError(
                f"`features` must name the channels of at least two levels, such as (24, 48); got {features!r}."
            )
        widths = [check_int("features", width) for width in features]
        self.takes_noise_level = not blind
        self.coarsest = 2 ** (len(widths) - 1)  # pixels of the image in one of the last level, per axis
        convolution, transposed = Conv[Conv.CONV, spatial_dims], Conv[Conv.CONVTRANS, spatial_dims]

        def level(width: int) -> nn.Sequential:
            return nn.Sequential(*(_Block(spatial_dims, width) for _ in range(num_blocks)))

        self.head = convolution(channels + self.takes_noise_level, widths[0], 3, padding=1, bias=False)
        self.down = nn.ModuleList(
            _Down(level(fine), convolution(fine, coarse, 2, stride=2, bias=False)) for fine, coarse in pairwise(widths)
        )
        self.bottom = level(widths[-1])
        self.up = nn.ModuleList(
            _Up(transposed(coarse, fine, 2, stride=2, bias=False), level(fine))
            for coarse, fine in pairwise(widths[::-1])
        )
        self.tail = convolution(widths[0], channels, 3, padding=1, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw normal weights that keep the variance, ten times smaller ones where a branch ends: near the identity."""
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
        for layer in self.modules():
            if isinstance(layer, _Block):
                layer.second.weight.mul_(0.1)
        self.tail.weight.mul_(0.1)

    @torch.jit.unused
    def forward(self, image: Tensor, noise_level: Tensor | float | None = None) -> Tensor:
        """Denoise.

        Args:
            image: shape ``(B, channels, *space)``, any unit.
            noise_level: standard deviation of the noise in each channel, in the unit of the image: one number, or one
                per sample, shape ``(B,)`` or ``(1,)``; None for a blind network.

        Returns:
            Image of the same shape and unit.

        Raises:
            ValueError: if the image has another shape, or the noise level is missing, or given to a blind network.
        """
        check_shape("image", image, ("B", self.channels, *"HWD"[: self.spatial_dims]))
        level = check_noise_level(noise_level, image, self.takes_noise_level)
        x = image if level is None else torch.cat((image, level.expand(len(image), 1, *image.shape[2:])), dim=1)
        return image - self.predict_noise(x)

    @torch.jit.export
    def predict_noise(self, x: Tensor) -> Tensor:
        """Return the noise ``(B, channels, *space)`` of an image that has its noise level as last channel, if told."""
        space = x.shape[2:]
        for axis in range(2, x.dim()):
            # The last pixel is repeated, by indices: exporters know that for any size.
            size = x.shape[axis]
            padded = (size + self.coarsest - 1) // self.coarsest * self.coarsest
            x = x.index_select(axis, torch.arange(padded, device=x.device).clamp(max=size - 1))
        x = self.head(x)
        fine: list[Tensor] = []
        for down in self.down:
            before, x = down(x)
            fine.append(before)
        x = self.bottom(x)
        for up in self.up:
            x = up(x, fine.pop())
        x = self.tail(x)
        for axis in range(2, x.dim()):
            x = x.narrow(axis, 0, space[axis - 2])
        return x


class _Down(nn.Module):
    """The blocks of a level, and the way to the next coarser one."""

    def __init__(self, blocks: nn.Module, shrink: nn.Module) -> None:
        super().__init__()
        self.blocks, self.shrink = blocks, shrink

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.blocks(x)
        return x, self.shrink(x)


class _Up(nn.Module):
    """The way from the next coarser level, and the blocks of a level."""

    def __init__(self, grow: nn.Module, blocks: nn.Module) -> None:
        super().__init__()
        self.grow, self.blocks = grow, blocks

    def forward(self, x: Tensor, fine: Tensor) -> Tensor:
        y: Tensor = self.blocks(self.grow(x) + fine)
        return y


class _Block(nn.Module):
    """``x + W2 relu(W1 x)``."""

    def __init__(self, spatial_dims: int, features: int) -> None:
        super().__init__()
        convolution = Conv[Conv.CONV, spatial_dims]
        self.first = convolution(features, features, 3, padding=1, bias=False)
        self.second = convolution(features, features, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(x)))
