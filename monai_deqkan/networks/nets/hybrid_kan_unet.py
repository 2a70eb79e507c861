"""HybridKANUNet: a residual U-Net with learnable functions where they cost little."""

# No postponed annotations here: torch.jit.script cannot read them on methods that it leaves out.

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.blocks.dynunet_block import UnetResBlock
from monai.networks.layers import Conv, Dropout, Pool, split_args
from torch import Tensor, nn

from monai_deqkan._checks import check_choice, check_image, check_int, check_range, check_spatial_dims
from monai_deqkan.adjoints import Adjoint
from monai_deqkan.networks.blocks.deq_cell import KANCell
from monai_deqkan.networks.blocks.kan_block import KANBlock
from monai_deqkan.networks.blocks.kan_gate import KANGate
from monai_deqkan.networks.blocks.kan_tokens import ChannelNorm, KANTokenBlock
from monai_deqkan.networks.layers.deq import DEQLayer
from monai_deqkan.solvers import FixedPointSolver

__all__ = ["HybridKANUNet"]


class HybridKANUNet(nn.Module):
    r"""Segment images with a residual U-Net of plain convolutions that has KAN layers at the deepest level.

    Functions on every edge of every convolution cost five to ten times an ordinary U-Net. Here they stand where the
    maps are small: at the bottleneck, and in gates on the skips by choice. The encoder halves the resolution by
    averages; the decoder adds the skips. Every level of the decoder votes: its logits, interpolated, are summed from
    coarse to fine, so the deep levels learn from the first step on.

    Args:
        spatial_dims: 2 or 3.
        in_channels: number of input channels.
        out_channels: number of classes, background included.
        features: number of channels per level, finest first, at least two levels.
        bottleneck: what stands at the deepest level: ``"tokens"``, blocks of U-KAN
            (:class:`~monai_deqkan.networks.blocks.KANTokenBlock`); ``"conv"``, 3x3 KAN convolutions beside a shortcut;
            ``"low_rank"``, the same of low rank; ``"equilibrium"``, the equilibrium of a
            :class:`~monai_deqkan.networks.blocks.KANCell` on the map; ``"none"``, nothing, for comparison.
        num_bottleneck: number of such blocks; one for an equilibrium.
        skip: ``"add"``, or ``"kan_gate"`` for a :class:`~monai_deqkan.networks.blocks.KANGate` on each skip.
        act: activation of the plain convolutions, as in MONAI's networks.
        norm: normalization after them, as in MONAI's networks; ``"instance"`` needs two elements on the deepest map.
        dropout: probability of dropping a channel of the deepest map, in training.
        rank: number of terms for ``bottleneck="low_rank"``.
        kan_settings: further settings of the KAN layers: ``basis``, ``grid_size``, ``spline_order``, ``grid_range``,
            ``outside``, such as ``{"grid_size": 8}``; and those that only the chosen block has.
        contraction: contraction factor of the equilibrium's cell, dimensionless, in ``(0, 1)``.
        solver: fixed-point solver of the equilibrium, by name, ``(name, settings)`` or object.
        adjoint: how gradients get through its solve, in the same three ways.
        deep_supervision: whether the network returns, in training, the logits of all levels of the decoder as a list,
            finest first, each at its own resolution: what ``monai.losses.DeepSupervisionLoss`` takes.

    Shape:
        ``(B, in_channels, *space)`` to logits ``(B, out_channels, *space)``. Any size works from
        ``2 ** (len(features) - 1)`` per axis on; with instance normalization, and with batch normalization for training
        on a batch of one, one axis must have twice that.

    Raises:
        ValueError: if a setting is out of its range.

    Example:
        >>> net = HybridKANUNet(spatial_dims=2, in_channels=1, out_channels=2, features=(4, 8, 8))
        >>> net(torch.rand(2, 1, 17, 20)).shape
        torch.Size([2, 2, 17, 20])

    Reference:
        The project's own design. Residual U-Net: Z. Zhang, Q. Liu and Y. Wang, "Road extraction by deep residual
        U-Net", IEEE Geosci. Remote Sens. Lett. 15 (2018) 749-753. Sum of the levels' logits: J. Long, E. Shelhamer and
        T. Darrell, "Fully convolutional networks for semantic segmentation", CVPR 2015, section 4.2.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        features: Sequence[int] = (16, 32, 64, 96, 128, 160),
        *,
        bottleneck: str = "tokens",
        num_bottleneck: int = 1,
        skip: str = "add",
        act: str | tuple[str, dict[str, Any]] = "leakyrelu",
        norm: str | tuple[str, dict[str, Any]] = "instance",
        dropout: float = 0.0,
        rank: int = 8,
        kan_settings: dict[str, Any] | None = None,
        contraction: float = 0.9,
        solver: str | tuple[str, dict[str, Any]] | FixedPointSolver = "anderson",
        adjoint: str | tuple[str, dict[str, Any]] | Adjoint = "implicit",
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        self.spatial_dims = check_spatial_dims(spatial_dims)
        self.in_channels = check_int("in_channels", in_channels)
        self.out_channels = check_int("out_channels", out_channels)
        self.deep_supervision = deep_supervision
        widths = [check_int("features", width) for width in features]
        if len(widths) < 2:
            raise ValueError(f"`features` must give the number of channels of at least two levels; got {features}.")
        check_range("dropout", dropout, 0.0, 1.0, open_high=True)
        self.interpolation = "bilinear" if spatial_dims == 2 else "trilinear"
        self.min_size = 2 ** (len(widths) - 1)
        self.normalizes_samples = str(split_args(norm)[0]).lower() == "instance"

        def level(inputs: int, outputs: int) -> UnetResBlock:
            return UnetResBlock(spatial_dims, inputs, outputs, 3, 1, norm_name=norm, act_name=act)

        def linear(inputs: int, outputs: int, bias: bool) -> nn.Module:
            return Conv[Conv.CONV, spatial_dims](inputs, outputs, 1, bias=bias)

        pairs = list(pairwise(widths))
        self.stem = level(in_channels, widths[0])
        self.pool = Pool[Pool.AVG, spatial_dims](2)
        self.encoder = nn.ModuleList([level(fine, coarse) for fine, coarse in pairs])
        kan = kan_settings or {}
        check_range("contraction", contraction, 0.0, 1.0, open_low=True, open_high=True)
        if kan and bottleneck == "none" and skip == "add":
            raise ValueError("`kan_settings` are for KAN layers; with no bottleneck and plain skips there are none.")
        self.bottleneck = nn.Sequential(
            *(
                _equilibrium(num_bottleneck, spatial_dims, widths[-1], kan, contraction, solver, adjoint)
                if bottleneck == "equilibrium"
                else _kan_blocks(bottleneck, num_bottleneck, spatial_dims, widths[-1], rank, kan)
            )
        )
        self.dropout = Dropout[Dropout.DROPOUT, spatial_dims](dropout) if dropout > 0 else nn.Identity()
        check_choice("skip", skip, ("add", "kan_gate"))
        self.gates = nn.ModuleList(
            [
                KANGate(spatial_dims, fine, coarse, **kan) if skip == "kan_gate" else _Ungated()
                for fine, coarse in reversed(pairs)
            ]
        )
        self.ups = nn.ModuleList([linear(coarse, fine, False) for fine, coarse in reversed(pairs)])
        self.decoder = nn.ModuleList([level(fine, fine) for fine, _ in reversed(pairs)])
        self.votes = nn.ModuleList([linear(width, out_channels, True) for width in reversed(widths[:-1])])
        self.first_vote = linear(widths[-1], out_channels, True)

    def forward(self, x: Tensor) -> Any:
        """Return logits; a list of those of all levels in training with ``deep_supervision``.

        Raises:
            TypeError: if the image holds no floating-point numbers.
            ValueError: if rank, channels or size do not fit.
        """
        if torch.jit.is_scripting():
            return self.levels(x)[-1]
        self._check_input(x)
        logits = self.levels(x)
        return logits[:0:-1] if self.training and self.deep_supervision else logits[-1]

    def levels(self, x: Tensor) -> list[Tensor]:
        """Return the logits of all levels, each at its own resolution, the coarsest first."""
        x = self.stem(x)
        skips = [x]
        for stage in self.encoder:
            x = stage(self.pool(x))
            skips.append(x)
        x = self.dropout(self.bottleneck(skips.pop()))
        logits = [self.first_vote(x)]
        for gate, rise, stage, vote in zip(self.gates, self.ups, self.decoder, self.votes):  # noqa: B905, TorchScript
            skip = skips.pop()
            skip = gate(skip, x)
            x = stage(skip + self.enlarge(rise(x), skip))
            logits.append(self.enlarge(logits[-1], skip) + vote(x))
        return logits

    def enlarge(self, x: Tensor, like: Tensor) -> Tensor:
        """Interpolate maps to the size of others."""
        return F.interpolate(x, size=like.shape[2:], mode=self.interpolation)

    @torch.jit.unused
    def _check_input(self, x: Tensor) -> None:
        check_image("x", x, self.in_channels, self.spatial_dims)
        space = tuple(x.shape[2:])
        bottom = [size // self.min_size for size in space]
        alone = self.normalizes_samples or (self.training and len(x) == 1)
        if min(bottom) < 1 or (alone and max(bottom) < 2):
            more = f" and {2 * self.min_size} along one, to normalize the deepest map" if alone else ""
            raise ValueError(
                f"The image must have at least {self.min_size} elements along each axis{more}; got {space}. Pad it, or "
                "use fewer `features`."
            )


class _Ungated(nn.Module):
    """A skip that is left as it is."""

    def forward(self, skip: Tensor, gate: Tensor) -> Tensor:
        """Return the skip."""
        return skip


class _Shortcut(nn.Module):
    """Maps plus a block's result on them."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        return x + self.block(x)


def _kan_blocks(
    name: str, count: int, spatial_dims: int, channels: int, rank: int, settings: dict[str, Any]
) -> list[nn.Module]:
    """Return the parts of a bottleneck of finite depth."""
    check_choice("bottleneck", name, ("tokens", "conv", "low_rank", "equilibrium", "none"))
    check_int("num_bottleneck", count)
    if name == "none":
        return []
    if name == "tokens":
        return [
            ChannelNorm(channels),
            *(KANTokenBlock(spatial_dims, channels, **settings) for _ in range(count)),
        ]
    terms = rank if name == "low_rank" else None
    return [_Shortcut(KANBlock(spatial_dims, channels, channels, rank=terms, **settings)) for _ in range(count)]


def _equilibrium(
    count: int,
    spatial_dims: int,
    channels: int,
    settings: dict[str, Any],
    contraction: float,
    solver: str | tuple[str, dict[str, Any]] | FixedPointSolver,
    adjoint: str | tuple[str, dict[str, Any]] | Adjoint,
) -> list[nn.Module]:
    """Return the parts of a bottleneck that is solved for."""
    if count != 1:
        raise ValueError(f"An equilibrium is of any depth already: `num_bottleneck` must be 1; got {count}.")
    cell = KANCell(channels, contraction=contraction, spatial_dims=spatial_dims, kan_settings=settings)
    return [ChannelNorm(channels), DEQLayer(cell, solver, adjoint)]
