"""Convolutional features of an image at several scales: the default backbone of the DEQ-KAN classifier."""

# No postponed annotations here: torch.jit.script cannot read them on functions that it compiles.

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from monai.networks.layers.factories import Conv, Norm, Pool
from torch import Tensor, nn

from monai_deqkan._checks import check_int, check_spatial_dims

__all__ = ["ImageFeatures"]


class ImageFeatures(nn.Module):
    r"""Turn an image into features, by residual blocks that noise, contrast and brightness hardly reach.

    The image is smoothed by the binomial filter (1, 2, 1) / 4 along each axis, which takes out most of a detector's
    noise and little of the anatomy, and standardized by its own mean and standard deviation, so that a linear change of
    its gray scale changes next to nothing. Stages of residual blocks follow; each but the first halves the resolution
    by an average, not by leaving pixels out. In all, the maps have 1/32 of the image's resolution for four stages.

    Args:
        spatial_dims: number of spatial dimensions, 2 or 3.
        in_channels: number of image channels; all are standardized together, so that colors keep their relation.
        features: channels of the stages.
        blocks: number of residual blocks of each stage; one each by default.

    Attributes:
        out_channels: channels of the maps, those of the last stage.

    Raises:
        ValueError: for a number or name out of range.

    Example:
        >>> ImageFeatures(2, 1, features=(8, 16))(torch.rand(3, 1, 32, 32)).shape
        torch.Size([3, 16, 4, 4])

    Reference:
        Residual blocks: K. He, X. Zhang, S. Ren and J. Sun, "Deep residual learning for image recognition", CVPR 2016.
        Halving by an average: R. Zhang, "Making convolutional networks shift-invariant again", ICML 2019, and for the
        shortcut T. He et al., "Bag of tricks for image classification with convolutional neural networks", CVPR 2019.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        *,
        features: Sequence[int] = (48, 72, 112, 160),
        blocks: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.spatial_dims = check_spatial_dims(spatial_dims)
        check_int("in_channels", in_channels)
        widths = [check_int("features", width) for width in features]
        counts = [1] * len(widths) if blocks is None else [check_int("blocks", count) for count in blocks]
        if not widths or len(counts) != len(widths):
            raise ValueError(f"`features` and `blocks` need one entry for each stage; got {features} and {blocks}.")
        self.out_channels = widths[-1]
        self.stem = nn.Sequential(
            Conv[Conv.CONV, spatial_dims](in_channels, widths[0], 7, stride=2, bias=False),
            Norm[Norm.BATCH, spatial_dims](widths[0]),
            nn.ReLU(),
            _Halve(spatial_dims, Pool.MAX),
        )
        stages: list[nn.Module] = []
        channels = widths[0]
        for index, (width, count) in enumerate(zip(widths, counts, strict=True)):
            stages.append(_Block(spatial_dims, channels, width, halve=index > 0))
            stages += [_Block(spatial_dims, width, width, halve=False) for _ in range(count - 1)]
            channels = width
        self.stages = nn.Sequential(*stages)

    def forward(self, image: Tensor) -> Tensor:
        """Return the last maps ``(B, out_channels, *space)`` of images ``(B, in_channels, *space)``."""
        image = _standardized(_smoothed(image, self.spatial_dims))
        # Not by the convolution itself: for volumes of depth 5 its gradient then writes beyond its memory on CPUs with
        # AVX-512 (torch 2.14), and the process dies.
        padded = F.pad(image, [3] * (2 * self.spatial_dims))
        return self.stages(self.stem(padded))


class _Block(nn.Module):
    """Two convolutions beside a shortcut, at half the resolution if ``halve``."""

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int, halve: bool) -> None:
        super().__init__()
        convolution, norm = Conv[Conv.CONV, spatial_dims], Norm[Norm.BATCH, spatial_dims]
        self.down = _Halve(spatial_dims, Pool.AVG) if halve else nn.Identity()
        self.body = nn.Sequential(
            convolution(in_channels, out_channels, 3, padding=1, bias=False),
            norm(out_channels),
            nn.ReLU(),
            convolution(out_channels, out_channels, 3, padding=1, bias=False),
            norm(out_channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Sequential(convolution(in_channels, out_channels, 1, bias=False), norm(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return torch.relu(self.shortcut(x) + self.body(x))


class _Halve(nn.Module):
    """Pool over windows of two, with the last line repeated where the size is odd: any size goes through."""

    def __init__(self, spatial_dims: int, kind: str) -> None:
        super().__init__()
        self.spatial_dims = spatial_dims
        self.pool = Pool[kind, spatial_dims](2)

    def forward(self, x: Tensor) -> Tensor:
        for axis in range(2, 2 + self.spatial_dims):
            x = torch.cat([x, x.narrow(axis, x.size(axis) - 1, 1)], dim=axis)
        return self.pool(x)


def _smoothed(image: Tensor, spatial_dims: int) -> Tensor:
    """Return images ``(B, C, *space)`` after the filter (1, 2, 1) / 4 along each axis, edges repeated."""
    for axis in range(2, 2 + spatial_dims):
        size = image.size(axis)
        first, last = image.narrow(axis, 0, 1), image.narrow(axis, size - 1, 1)
        padded = torch.cat([first, image, last], dim=axis)
        neighbors = padded.narrow(axis, 0, size) + padded.narrow(axis, 2, size)
        image = 0.5 * image + 0.25 * neighbors
    return image


def _standardized(image: Tensor) -> Tensor:
    """Return images of mean 0 and standard deviation 1 over channels and space.

    The constant in the root keeps the noise of an almost empty image in [0, 1] from being blown up.
    """
    axes = list(range(1, image.dim()))
    centered = image - image.mean(dim=axes, keepdim=True)
    return centered / (centered.square().mean(dim=axes, keepdim=True) + 1e-6).sqrt()
