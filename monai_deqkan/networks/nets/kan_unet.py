"""The KM-UNet: a U-Net whose convolution kernels are learnable functions."""

# No postponed annotations here: torch.jit.script cannot read them on methods that it leaves out.

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.layers import Pool
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from monai_deqkan._checks import check_choice, check_image, check_int, check_range, check_spatial_dims
from monai_deqkan.networks.blocks.kan_block import KANBlock, NormSpec
from monai_deqkan.networks.blocks.kan_upsample import KANUpsample
from monai_deqkan.networks.layers.basis import BasisSpec

__all__ = ["KANUNet"]

_POOLS = {"maxpool": Pool.MAX, "avgpool": Pool.AVG}


class _Level(nn.Sequential):
    """Blocks one after another; with ``checkpointing`` training keeps only the input of the first."""

    def __init__(self, *blocks: nn.Module, checkpointing: bool) -> None:
        super().__init__(*blocks)
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting() and self.checkpointing and self.training and torch.is_grad_enabled():
            return self._recomputed(x)
        for block in self:
            x = block(x)
        return x

    @torch.jit.unused
    def _recomputed(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(super().forward, x, use_reentrant=False)
        return result


class KANUNet(nn.Module):
    r"""Segment images with a U-Net of KAN convolutions (KM-UNet).

    Every kernel element is a B-spline, there are no activation functions between the layers, and instance normalization
    without weights goes before each layer. Per level two 3x3 KAN convolutions (3x3x3 in 3-D); down by pooling; up by
    interpolation and a 3x3 KAN convolution; skips are concatenated; the head is a 1x1 KAN convolution.

    With :math:`K` = ``grid_size + spline_order`` (one more with a base term), :math:`f_0, \dots, f_L` =
    ``features`` and :math:`n` = ``num_convs``, it has (dense, without bias, ``norm`` without weights)

    .. math:: K \Big[ 3^d \Big( c_{in} f_0 + (n - 1) f_0^2 + \sum_{l=1}^{L} (f_{l-1} f_l + (n - 1) f_l^2)
        + \sum_{l=0}^{L-1} (n + 1) f_l^2 \Big) + u \sum_{l=0}^{L-1} f_{l+1} f_l + f_0 c_{out} \Big]

    parameters, with :math:`u = 3^d`, and :math:`u = 2^d` for ``up="transposed"``: 4.28 million by default in 2-D.

    On the grid: each layer's input is normalized without weights to mean 0 and variance 1, which puts about 99 % of
    the values on ``grid_range`` at initialization and keeps them there in training (measured in the tests). With
    ``norm=None`` the initialization keeps the mean square, but training does not: choose ``outside="linear"`` and move
    the grids by `refit_grids` or `KANGridHandler`. Weights in the normalization (``("batch", {"affine": True})``) may
    likewise carry values off the grid.

    Learning rate: what a layer gives is normalized by the next one, so the size of its weights does not change the
    function, but for the normalization's ``eps``, which weighs ``1 / init_scale ** 2`` times as much at the start.
    Yet a step of Adam turns small weights further. Starting at ``init_scale`` times the usual size is like a learning
    rate ``1 / init_scale`` times as large at the start (less with ``rank``, whose factors share it): splines
    learned best at 0.02, the largest rate tried, where ordinary convolutions use 0.001, and so both learn at 0.001
    (``tests/benchmarks/bench_kanunet_init.py``). The heads, whose logits nothing normalizes, are multiplied by
    ``1 / init_scale`` to the same end: load a state dict into a network of the same ``init_scale``. Gradients are
    ``1 / init_scale`` times as large, and penalties on weights see the small ones (`KANSmoothnessLoss`: their square).

    Cheap forms: ``stem_stride=2``, ``num_convs=1``, ``up="transposed"``, ``grid_size=3`` with ``spline_order=2``;
    ``rank`` saves parameters more than time, and ``down="strided"`` costs more than pooling, since functions are
    evaluated on the finer maps.

    Args:
        spatial_dims: 2 or 3.
        in_channels: number of input channels.
        out_channels: number of classes, background included.
        features: number of channels per level, finest first.
        basis: the functions: a name, a pair ``(name, settings)``, or a `Basis`; by a name the next two hold.
        spline_order: order of the splines.
        grid_size: number of intervals of the splines' grid.
        grid_range: first and last knot, in units of the normalized inputs' standard deviation.
        outside: how functions go on beyond the grid: ``"zero"``, ``"clamp"``, ``"linear"``, or ``None`` for the
            basis's own default.
        base_activation: ``"silu"`` for a base term in each layer, ``None`` for none.
        init: ``"variance"``, ``"identity"`` or ``"zero_spline"``; see `KANLayer.reset_parameters`.
        init_scale: factor of the initial weights, in ``(0, 1]``; 0.05 by default, 1 with ``norm=None``. See above.
        bias: whether the convolutions have biases.
        norm: ``"instance"``, ``"batch"``, ``("group", {"num_groups": 4})``, or ``None`` for no normalization; without
            weights unless the settings say ``affine``.
        rank: number of terms of KAN convolutions of low rank (`LowRankKANConv2d`), ``None`` for dense ones; the head
            stays dense.
        num_convs: number of KAN convolutions per level, in encoder and decoder.
        stem_stride: 1, or 2 to let the finest level work at half the resolution; logits are then interpolated.
        down: ``"maxpool"``, ``"avgpool"``, or ``"strided"``: the first convolution of a level has stride 2.
        up: ``"interp"`` for bi- or trilinear interpolation, ``"nearest"``, or ``"transposed"`` for a transposed KAN
            convolution of kernel size and stride 2, `KANUpsample`.
        dropout: probability of dropping a channel after each convolution but the heads, in training.
        deep_supervision: whether training returns a list: logits of the finest level first, then of coarser levels of
            the decoder at their own size, as ``monai.losses.DeepSupervisionLoss`` takes them. Evaluation returns the
            first alone.
        num_supervised: number of logits in that list, by default one for each level of the decoder.
        checkpointing: whether training computes each level again for the gradient instead of keeping what is inside:
            less memory, a third more time. Running statistics of a batch normalization are then updated twice.

    Shape:
        ``(B, in_channels, *space)`` to logits ``(B, out_channels, *space)``. Any size works from ``2 ** L`` per axis
        on (8 by default); with instance normalization, and with another one for a batch of one (for batch
        normalization in training only), one axis must have ``2 ** (L + 1)``. Where the size is odd at some level,
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
        generation", AAAI 2025 (arXiv:2406.02918), has KAN layers on tokens after plain convolutions (`UKAN`). Effective
        learning rate of normalized weights: T. van Laarhoven, "L2 regularization versus batch and weight
        normalization", arXiv:1706.05350 (2017).
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        features: Sequence[int] = (16, 32, 64, 128),
        *,
        basis: BasisSpec = "bspline",
        spline_order: int = 3,
        grid_size: int = 5,
        grid_range: tuple[float, float] = (-3.0, 3.0),
        outside: str | None = None,
        base_activation: str | None = None,
        init: str = "variance",
        init_scale: float | None = None,
        bias: bool = False,
        norm: NormSpec = "instance",
        rank: int | None = None,
        num_convs: int = 2,
        stem_stride: int = 1,
        down: str = "maxpool",
        up: str = "interp",
        dropout: float = 0.0,
        deep_supervision: bool = False,
        num_supervised: int | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.spatial_dims = check_spatial_dims(spatial_dims)
        self.in_channels = check_int("in_channels", in_channels)
        self.out_channels = check_int("out_channels", out_channels)
        widths = [check_int("features", width) for width in features]
        if not widths:
            raise ValueError("`features` must give the number of channels of at least one level; got none.")
        check_int("num_convs", num_convs)
        check_choice("down", down, ("maxpool", "avgpool", "strided"))
        check_choice("up", up, ("interp", "nearest", "transposed"))
        if stem_stride not in (1, 2):
            raise ValueError(f"`stem_stride` must be 1 or 2; got {stem_stride!r}.")
        self.linear_mode = "bilinear" if spatial_dims == 2 else "trilinear"
        self.interpolation = "nearest" if up == "nearest" else self.linear_mode
        self.stem_stride = stem_stride
        self.transposed = up == "transposed"
        self.deep_supervision = deep_supervision
        default_scale = 1.0 if norm is None else 0.05
        self.init_scale = check_range(
            "init_scale", default_scale if init_scale is None else init_scale, 0.0, 1.0, open_low=True
        )
        if norm is None and self.init_scale != 1:
            raise ValueError(f"`init_scale` needs a normalization; with `norm=None` it must be 1, got {init_scale}.")
        strided = down == "strided"
        settings: dict[str, Any] = {
            "basis": basis,
            "grid_size": grid_size,
            "spline_order": spline_order,
            "grid_range": grid_range,
            "outside": outside,
            "base_activation": base_activation,
            "init": init,
            "bias": bias,
            "norm": norm,
        }
        inner = {**settings, "rank": rank, "dropout": dropout}

        def level(inputs: int, outputs: int, stride: int = 1) -> _Level:
            blocks = [KANBlock(spatial_dims, inputs, outputs, stride=stride, **inner)]
            blocks += [KANBlock(spatial_dims, outputs, outputs, **inner) for _ in range(num_convs - 1)]
            return _Level(*blocks, checkpointing=checkpointing)

        def rise(inputs: int, outputs: int) -> nn.Module:
            if self.transposed:
                return KANUpsample(spatial_dims, inputs, outputs, {**inner, "checkpointing": checkpointing})
            return KANBlock(spatial_dims, inputs, outputs, checkpointing=checkpointing, **inner)

        def head(inputs: int) -> KANBlock:
            return KANBlock(spatial_dims, inputs, out_channels, 1, **settings)

        pairs = list(pairwise(widths))
        self.stem = level(in_channels, widths[0], stem_stride)
        self.pool = nn.Identity() if strided else Pool[_POOLS[down], spatial_dims](2)
        self.encoder = nn.ModuleList([level(fine, coarse, 2 if strided else 1) for fine, coarse in pairs])
        self.ups = nn.ModuleList([rise(coarse, fine) for fine, coarse in reversed(pairs)])
        self.decoder = nn.ModuleList([level(2 * fine, fine) for fine, _ in reversed(pairs)])
        self.head = head(widths[0])
        most = max(len(pairs), 1)
        total = most if num_supervised is None else check_int("num_supervised", num_supervised)
        if total > most:
            raise ValueError(f"`num_supervised` must be at most {most}, one per level of the decoder; got {total}.")
        self.coarse_heads = nn.ModuleList([head(width) for width in widths[1:total]] if deep_supervision else [])
        needs = [1, 2]  # elements along an axis at the bottom: at least one, and one axis more than one to normalize
        for _ in pairs:
            needs = [2 * need - 1 if strided else 2 * need for need in needs]
        self.min_size, self.normalized_longest = (stem_stride * (need - 1) + 1 for need in needs)
        self.has_norm = norm is not None
        self.min_longest = self.normalized_longest if self.head.normalizes else self.min_size
        self._shrink_weights()

    @torch.no_grad()
    def _shrink_weights(self) -> None:
        for block in self.modules():
            if isinstance(block, KANBlock):
                factors = [parameter for parameter in block.conv.parameters() if parameter.ndim > 1]
                for factor in factors:  # several for low rank, whose product counts
                    factor.mul_(self.init_scale ** (1 / len(factors)))

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return logits, in training with deep supervision a list of them.

        Raises:
            TypeError: if the image holds no floating-point numbers.
            ValueError: if rank, channels or size do not fit.
        """
        if not torch.jit.is_scripting():
            self._check_input(x)
        size = x.shape[2:]
        x = self.stem(x)
        skips = [x]
        for stage in self.encoder:
            x = stage(self.pool(x))
            skips.append(x)
        x = skips.pop()
        maps = [x]
        for rise, stage in zip(self.ups, self.decoder):  # noqa: B905, TorchScript
            skip = skips.pop()
            if self.transposed:
                x = rise(x)
                if x.shape[2:] != skip.shape[2:]:
                    x = F.interpolate(x, size=skip.shape[2:], mode=self.interpolation)
            else:
                x = rise(F.interpolate(x, size=skip.shape[2:], mode=self.interpolation))
            x = stage(torch.cat([skip, x], dim=1))
            maps.append(x)
        logits = self.head(x) / self.init_scale
        if self.stem_stride != 1:
            logits = F.interpolate(logits, size=size, mode=self.linear_mode)
        if not torch.jit.is_scripting() and self.deep_supervision and self.training:
            return self._supervised(logits, maps)
        return logits

    @torch.jit.unused
    def _supervised(self, logits: Tensor, maps: list[Tensor]) -> list[Tensor]:
        finer_first = maps[-2::-1]
        return [logits, *(head(x) / self.init_scale for head, x in zip(self.coarse_heads, finer_first, strict=False))]

    @torch.jit.unused
    def _check_input(self, x: Tensor) -> None:
        check_image("x", x, self.in_channels, self.spatial_dims)
        space = tuple(x.shape[2:])
        # A group or, in training, a batch of one pixel cannot be normalized either.
        alone = len(x) == 1 and (isinstance(self.head.norm, nn.GroupNorm) or (self.training and self.has_norm))
        longest = self.normalized_longest if alone else self.min_longest
        if min(space) < self.min_size or max(space) < longest:
            raise ValueError(
                f"The image must have at least {self.min_size} elements along each axis and, with normalization, "
                f"{longest} along one; got {space}. Pad it, or use fewer `features`."
            )
