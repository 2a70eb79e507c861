"""Normalization and a KAN convolution."""

# No postponed annotations here: torch.jit.script cannot read them on methods that it leaves out.

import math
from typing import Any, TypeAlias

import torch
from monai.networks.layers import Dropout, Norm, split_args
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from monai_deqkan._checks import check_choice, check_int, check_range, check_spatial_dims
from monai_deqkan.networks.layers.basis import BasisSpec
from monai_deqkan.networks.layers.kan_conv import KAN_CONVOLUTIONS
from monai_deqkan.networks.layers.kan_low_rank import LOW_RANK_KAN_CONVOLUTIONS

__all__ = ["KANBlock", "NormSpec", "grid_norm"]

NormSpec: TypeAlias = str | tuple[str, dict[str, Any]] | None
"""A normalization in MONAI's words: its name, a pair ``(name, settings)``, or ``None``."""


def grid_norm(norm: NormSpec, spatial_dims: int, channels: int) -> nn.Module:
    """Return a normalization that puts its output on a KAN layer's grid: without weights unless they are asked for.

    Args:
        norm: ``"instance"``, ``"batch"``, ``("group", {"num_groups": 4})``, or ``None`` for none. Settings are those
            of torch's modules; ``affine`` is false unless given. Where ``num_groups`` does not divide the channels,
            their greatest common divisor takes its place.
        spatial_dims: 1, 2 or 3.
        channels: number of channels.

    Raises:
        ValueError: if the name is unknown, or a group normalization has no number of groups.
    """
    if norm is None:
        return nn.Identity()
    name, settings = split_args(norm)
    check_choice("norm", name.lower() if isinstance(name, str) else name, ("instance", "batch", "group", None))
    settings = {"affine": False, **settings}
    if name.lower() != "group":
        return Norm[name, spatial_dims](channels, **settings)
    if "num_groups" not in settings:
        raise ValueError('`norm=\'group\'` needs a number of groups. Give ("group", {"num_groups": 4}).')
    groups = math.gcd(check_int("num_groups", settings.pop("num_groups")), channels)
    return nn.GroupNorm(groups, channels, **settings)


class KANBlock(nn.Module):
    """Normalize, convolve by learnable functions, drop channels or not.

    The normalization, by default of each channel of each sample and without weights, puts most values on the grid
    ``[-3, 3]``, and keeps them there in training. Without one, values drift off the grid while the network learns; then
    move the grids to them with `refit_grids` or `KANGridHandler`, and choose ``outside="linear"``. With stride 1 the
    output has the input's size, with stride ``s`` it has ``ceil(size / s)``; zeros are put around the normalized input.

    Args:
        spatial_dims: 1, 2 or 3.
        in_channels: number of input channels.
        out_channels: number of output channels.
        kernel_size: odd size of the kernel along each axis.
        stride: step between outputs.
        rank: number of terms of a KAN convolution of low rank (`LowRankKANConv2d`), ``None`` for a dense one.
        basis: the functions: a name, a pair ``(name, settings)``, or a `Basis`.
        grid_size: number of intervals of the grid, for a basis given by name.
        spline_order: order of its splines.
        grid_range: first and last knot, in the unit of the (normalized) input.
        outside: how functions go on beyond the grid: ``"zero"``, ``"clamp"``, ``"linear"``, or ``None`` for the
            basis's own default.
        base_activation: ``"silu"`` for a base term, ``None`` for none.
        init: ``"variance"``, ``"identity"`` (not with ``rank``) or ``"zero_spline"``; see
            `KANLayer.reset_parameters`.
        bias: whether the convolution has a bias.
        norm: ``"instance"``, ``"batch"``, ``("group", {"num_groups": 4})``, or ``None`` to leave the normalization to
            the caller; without weights unless the settings say ``affine``.
        dropout: probability of dropping a channel of the output in training.
        checkpointing: whether training keeps only the input and computes the block again for the gradient: less
            memory, more time.

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
        stride: int = 1,
        rank: int | None = None,
        basis: BasisSpec = "bspline",
        grid_size: int = 5,
        spline_order: int = 3,
        grid_range: tuple[float, float] = (-3.0, 3.0),
        outside: str | None = None,
        base_activation: str | None = None,
        init: str = "variance",
        bias: bool = False,
        norm: NormSpec = "instance",
        dropout: float = 0.0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_spatial_dims(spatial_dims, (1, 2, 3))
        check_range("dropout", dropout, 0.0, 1.0, open_high=True)
        if kernel_size % 2 == 0:
            raise ValueError(f"`kernel_size` must be odd, so that the output has the input's size; got {kernel_size}.")
        self.norm = grid_norm(norm, spatial_dims, in_channels)
        self.normalizes = isinstance(self.norm, nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d)
        low_rank: dict[str, Any] = {} if rank is None else {"rank": rank}
        kind = (KAN_CONVOLUTIONS if rank is None else LOW_RANK_KAN_CONVOLUTIONS)[spatial_dims]
        self.conv = kind(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding=kernel_size // 2,
            bias=bias,
            basis=basis,
            grid_size=grid_size,
            spline_order=spline_order,
            grid_range=grid_range,
            outside=outside,
            base_activation=base_activation,
            init=init,
            **low_rank,
        )
        self.dropout = Dropout[Dropout.DROPOUT, spatial_dims](dropout) if dropout > 0 else nn.Identity()
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to ``(B, C, *space)``.

        Raises:
            ValueError: if a channel has a single element, whose instance-normalized value could only be zero.
        """
        if self.normalizes and x[0, 0].numel() == 1:
            raise ValueError(
                f"Instance normalization needs more than one element per channel; got shape {list(x.shape)}. "
                "Use larger images, fewer levels, or norm=None."
            )
        if not torch.jit.is_scripting() and self.checkpointing and self.training and torch.is_grad_enabled():
            return self._recomputed(x)
        return self._computed(x)

    def _computed(self, x: Tensor) -> Tensor:
        return self.dropout(self.conv(self.norm(x)))

    @torch.jit.unused
    def _recomputed(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(self._computed, x, use_reentrant=False)
        return result
