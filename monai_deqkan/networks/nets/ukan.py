"""U-KAN: convolutions where the maps are large, KAN layers on tokens where they are small."""

# No postponed annotations here: torch.jit.script cannot read them on methods that it leaves out.

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.blocks import Convolution
from monai.networks.layers import Conv, Pool
from torch import Tensor, nn

from monai_deqkan._checks import check_image, check_int, check_spatial_dims
from monai_deqkan.networks.blocks.kan_block import NormSpec
from monai_deqkan.networks.blocks.kan_tokens import ChannelNorm, KANTokenBlock
from monai_deqkan.networks.layers.basis import BasisSpec

__all__ = ["UKAN"]


class UKAN(nn.Module):
    r"""Segment images with convolutions at the fine levels and tokenized KAN blocks at the coarse ones (U-KAN).

    Encoder: at each convolution level two 3x3 convolutions with normalization and activation, then max-pooling; at each
    token level a patch embedding, which is a 3x3 convolution of stride 2 and a normalization of each token, then token
    blocks (`KANTokenBlock`), :math:`Z' = \mathrm{LN}(Z + \mathrm{DwConv}(\mathrm{KAN}(Z)))`. Decoder: two convolutions,
    interpolation to the skip's size, the skip added, then tokens normalized and token blocks at as many levels as the
    encoder has them; the head is a 1x1 convolution. The finest skip is that after the first pooling.

    Args:
        spatial_dims: 2 or 3.
        in_channels: number of input channels.
        out_channels: number of classes, background included.
        features: number of channels per level, finest first; the last ``len(depths)`` are the token levels.
        depths: number of token blocks at each token level, finest first.
        num_layers: number of KAN layers in a token block, each with a depth-wise convolution.
        basis: the functions: a name, a pair ``(name, settings)``, or a `Basis`; by a name the next two hold.
        spline_order: order of the splines.
        grid_size: number of intervals of the splines' grid.
        grid_range: first and last knot; tokens are normalized to mean 0 and variance 1.
        outside: how functions go on beyond the grid; ``None`` for the basis's own default.
        base_activation: ``"silu"`` for a base term, ``None`` for none.
        act: activation of the convolutions, in MONAI's words.
        norm: normalization of the convolutions, in MONAI's words; in the token blocks, which know ``"batch"``,
            ``"instance"``, ``"group"`` and ``None``, it has no weights unless its settings say ``affine``.
        dropout: probability of dropping a channel, in training: in each convolution and each token block.
        deep_supervision: whether training returns a list: logits of the image's size first, then of coarser levels of
            the decoder at their own size, as ``monai.losses.DeepSupervisionLoss`` takes them. Evaluation returns the
            first alone.
        num_supervised: number of logits in that list.

    Shape:
        ``(B, in_channels, *space)`` to logits ``(B, out_channels, *space)``; any size from ``2 ** c`` per axis on,
        with ``c`` convolution levels (8 by default). Training on a batch of one with batch normalization needs
        ``2 ** c * (2 ** t + 1)`` along one axis, with ``t`` token levels (40 by default).

    Raises:
        ValueError: if a setting is out of its range.

    Example:
        >>> net = UKAN(spatial_dims=2, in_channels=3, out_channels=2, features=(4, 8, 8, 12, 16))
        >>> net(torch.rand(2, 3, 33, 40)).shape
        torch.Size([2, 2, 33, 40])

    Reference:
        C. Li et al., "U-KAN makes strong backbone for medical image segmentation and generation", AAAI 2025
        (arXiv:2406.02918). Differences from the authors' code: each token block is normalized after the residual sum,
        as in the paper's formula, not before it; normalizations of tokens and within token blocks have no weights, so
        that inputs stay on the splines' grid, which reaches from -3 to 3 in place of -1 to 1; splines have no extra
        scale per edge; patch embeddings have no overlap setting; sums with skips are taken at any image size; there
        is no stochastic depth.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        features: Sequence[int] = (16, 32, 128, 160, 256),
        depths: Sequence[int] = (1, 1),
        *,
        num_layers: int = 3,
        basis: BasisSpec = "bspline",
        spline_order: int = 3,
        grid_size: int = 5,
        grid_range: tuple[float, float] = (-3.0, 3.0),
        outside: str | None = None,
        base_activation: str | None = "silu",
        act: str | tuple[str, dict[str, Any]] = "relu",
        norm: NormSpec = "batch",
        dropout: float = 0.0,
        deep_supervision: bool = False,
        num_supervised: int = 3,
    ) -> None:
        super().__init__()
        self.spatial_dims = check_spatial_dims(spatial_dims)
        self.in_channels = check_int("in_channels", in_channels)
        self.out_channels = check_int("out_channels", out_channels)
        widths = [check_int("features", width) for width in features]
        repeats = [check_int("depths", depth, 0) for depth in depths]
        num_convs = len(widths) - len(repeats)
        if num_convs < 1 or not repeats:
            raise ValueError(
                "`depths` must have an entry for each token level, at least one and fewer than `features` has; got "
                f"{len(repeats)} for {len(widths)} features."
            )
        self.interpolation = "bilinear" if spatial_dims == 2 else "trilinear"
        self.deep_supervision = deep_supervision
        self.min_size = 2**num_convs

        def convolutions(inputs: int, middle: int, outputs: int) -> nn.Sequential:
            options: dict[str, Any] = {"act": act, "norm": norm, "dropout": dropout or None, "bias": norm is None}
            return nn.Sequential(
                Convolution(spatial_dims, inputs, middle, **options),
                Convolution(spatial_dims, middle, outputs, **options),
            )

        def tokens(width: int, depth: int) -> list[nn.Module]:
            return [
                KANTokenBlock(
                    spatial_dims,
                    width,
                    num_layers=num_layers,
                    basis=basis,
                    grid_size=grid_size,
                    spline_order=spline_order,
                    grid_range=grid_range,
                    outside=outside,
                    base_activation=base_activation,
                    act=act,
                    norm=norm,
                    dropout=dropout,
                )
                for _ in range(depth)
            ]

        stages: list[nn.Module] = []
        for level, (inputs, outputs) in enumerate(zip([in_channels, *widths], widths, strict=False)):
            if level < num_convs:
                stages.append(nn.Sequential(convolutions(inputs, outputs, outputs), Pool["MAX", spatial_dims](2)))
            else:
                embedding = Conv[Conv.CONV, spatial_dims](inputs, outputs, 3, stride=2, padding=1)
                stages.append(
                    nn.Sequential(embedding, ChannelNorm(outputs), *tokens(outputs, repeats[level - num_convs]))
                )
        self.encoder = nn.ModuleList(stages)
        rises: list[nn.Module] = []
        mixes: list[nn.Module] = []
        for level in reversed(range(1, len(widths))):
            coarse, fine = widths[level], widths[level - 1]
            rises.append(convolutions(coarse, coarse, fine))
            depth = repeats[level - num_convs] if level >= num_convs else 0
            mixes.append(nn.Sequential(ChannelNorm(fine), *tokens(fine, depth)) if depth else nn.Identity())
        self.ups = nn.ModuleList(rises)
        self.decoder = nn.ModuleList(mixes)
        self.final = convolutions(widths[0], widths[0], widths[0])
        self.head = Conv[Conv.CONV, spatial_dims](widths[0], out_channels, 1)
        if check_int("num_supervised", num_supervised) > len(widths):
            raise ValueError(
                f"`num_supervised` must be at most {len(widths)}, one for the image's size and one per skip; got "
                f"{num_supervised}."
            )
        coarser = widths[: num_supervised - 1] if deep_supervision else []
        self.coarse_heads = nn.ModuleList([Conv[Conv.CONV, spatial_dims](width, out_channels, 1) for width in coarser])

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return logits, in training with deep supervision a list of them.

        Raises:
            TypeError: if the image holds no floating-point numbers.
            ValueError: if rank, channels or size do not fit.
        """
        if not torch.jit.is_scripting():
            self._check_input(x)
        size = x.shape[2:]
        skips: list[Tensor] = []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
        x = skips.pop()
        maps = [x]
        for rise, mix in zip(self.ups, self.decoder):  # noqa: B905, TorchScript
            skip = skips.pop()
            x = mix(F.interpolate(rise(x), size=skip.shape[2:], mode=self.interpolation) + skip)
            maps.append(x)
        logits = self.head(F.interpolate(self.final(x), size=size, mode=self.interpolation))
        if not torch.jit.is_scripting() and self.deep_supervision and self.training:
            return self._supervised(logits, maps)
        return logits

    @torch.jit.unused
    def _supervised(self, logits: Tensor, maps: list[Tensor]) -> list[Tensor]:
        return [logits, *(head(x) for head, x in zip(self.coarse_heads, maps[::-1], strict=False))]

    @torch.jit.unused
    def _check_input(self, x: Tensor) -> None:
        check_image("x", x, self.in_channels, self.spatial_dims)
        space = tuple(x.shape[2:])
        if min(space) < self.min_size:
            raise ValueError(
                f"The image must have at least {self.min_size} elements along each axis; got {space}. Pad it, or use "
                "fewer `features` in front of the token levels."
            )
