"""DEQ-KAN: an image classifier whose last features are the equilibrium of a Kolmogorov-Arnold cell."""

# No postponed annotations here: torch.jit.script cannot read them on functions that it compiles.

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
import torch.nn.functional as F
from monai.networks.nets import ResNet
from torch import Tensor, nn

from monai_deqkan._checks import check_choice, check_int, check_range, check_spatial_dims
from monai_deqkan.adjoints import Adjoint
from monai_deqkan.networks.blocks.deq_cell import KANCell, MLPCell
from monai_deqkan.networks.blocks.image_features import ImageFeatures
from monai_deqkan.networks.layers.basis import BASES
from monai_deqkan.networks.layers.deq import DEQLayer
from monai_deqkan.networks.layers.lipschitz import frozen_weights
from monai_deqkan.solvers import FixedPointSolver

__all__ = ["DEQKANClassifier", "ExplicitSteps", "FeatureClassifier", "pool_space"]

_GRID = {2: 16, 3: 8}  # side of the image's thumbnail without a convolutional network


def pool_space(maps: Tensor, pool: str) -> Tensor:
    """Pool maps ``(B, C, *space)`` over space, by ``"max"``, ``"avg"`` or ``"both"``, which doubles the channels.

    Vectors ``(B, C)`` are maps of one place.
    """
    places = maps.unsqueeze(2) if maps.dim() == 2 else maps.flatten(2)
    if pool == "max":
        return places.amax(dim=2)
    if pool == "avg":
        return places.mean(dim=2)
    return torch.cat([places.mean(dim=2), places.amax(dim=2)], dim=1)


class FeatureClassifier(nn.Module, ABC):
    """What the classifiers on image features share: features, projection to an injection, and a head.

    A subclass computes a state from the injection in `state_features`. Arguments are those of
    :class:`DEQKANClassifier`; ``on_map`` keeps space in the injection.

    Raises:
        ValueError: for a number or name out of range.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        features: Sequence[int],
        blocks: Sequence[int],
        hidden_features: int,
        pool: str,
        dropout: float,
        backbone: str | nn.Module,
        backbone_channels: int | None,
        on_map: bool = False,
    ) -> None:
        super().__init__()
        self.spatial_dims = check_spatial_dims(spatial_dims)
        self.in_channels = check_int("in_channels", in_channels)
        self.out_channels = check_int("out_channels", out_channels)
        self.pool = check_choice("pool", pool, ("max", "avg", "both"))
        self.on_map = on_map
        check_int("hidden_features", hidden_features)
        check_range("dropout", dropout, 0.0, 1.0, open_high=True)
        self.backbone, channels = _backbone(
            backbone, backbone_channels, spatial_dims, in_channels, features, blocks, on_map
        )
        pooled = 2 if pool == "both" else 1
        self.projection: nn.Module
        self.injection_norm: nn.Module
        if on_map:
            self.projection = (nn.Conv2d, nn.Conv3d)[spatial_dims - 2](channels, hidden_features, 1)
            self.injection_norm = nn.GroupNorm(1, hidden_features)
        else:
            self.projection = nn.Linear(channels * pooled, hidden_features)
            self.injection_norm = nn.LayerNorm(hidden_features)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden_features * (pooled if on_map else 1), out_channels)
        for layer in (self.projection, self.head):
            nn.init.xavier_uniform_(layer.weight.flatten(1))
            nn.init.zeros_(cast(Tensor, layer.bias))

    def forward(self, image: Tensor) -> Tensor:
        """Return logits ``(B, out_channels)`` of images ``(B, in_channels, *space)``.

        Raises:
            ValueError: if the image has another rank or number of channels.
        """
        return self.head(self.dropout(self.state_features(image)))

    @abstractmethod
    def state_features(self, image: Tensor) -> Tensor:
        """Return what the head sees, ``(B, hidden_features)``; twice as many features for a map pooled both ways."""

    def injection(self, image: Tensor) -> Tensor:
        """Return the injection of images: ``(B, hidden_features)``, with space behind where the state is a map."""
        if image.ndim != self.spatial_dims + 2 or image.shape[1] != self.in_channels:
            raise ValueError(
                f"`image` must have shape (B, {self.in_channels}, {', '.join('DHW'[3 - self.spatial_dims :])}); "
                f"got {tuple(image.shape)}."
            )
        maps = self.backbone(image)
        if isinstance(maps, (list, tuple)):  # MONAI's feature extractors return the maps of all stages
            maps = maps[-1]
        if self.on_map and maps.ndim == 2:
            raise ValueError(
                "`equilibrium_on='map'` needs a backbone that returns maps (B, C, *space); got shape "
                f"{tuple(maps.shape)}. Leave its pooling out, or take `equilibrium_on='features'`."
            )
        maps = maps if self.on_map else pool_space(maps, self.pool)
        return cast(Tensor, self.injection_norm(self.projection(maps)))


class DEQKANClassifier(FeatureClassifier):
    r"""Classify images by the equilibrium of a KAN cell on convolutional features.

    A residual convolutional network makes features; pooled over space, projected and normalized they become the
    injection :math:`p`, computed once. The equilibrium :math:`z^* = p + \kappa\, \mathrm{KAN}(z^*) / L` follows, then
    dropout and a linear head. The cell contracts by construction (:class:`~monai_deqkan.networks.blocks.KANCell`), so
    that the equilibrium exists, is unique and does not depend on the solver. Dropout and normalization sit outside of
    the solve.

    Args:
        spatial_dims: number of spatial dimensions, 2 or 3.
        in_channels: number of image channels.
        out_channels: number of classes; the output has one logit each.
        features: channels of the stages of the residual network, an
            :class:`~monai_deqkan.networks.blocks.ImageFeatures`.
        blocks: number of residual blocks of each stage.
        hidden_features: size :math:`F` of the state and the injection.
        pool: how maps are pooled over space: ``"max"`` finds small things anywhere, ``"avg"`` looks at the whole,
            ``"both"`` puts the two side by side.
        contraction: contraction factor :math:`\kappa` of the cell, dimensionless, in ``(0, 1)``.
        dropout: probability of dropping a feature of the equilibrium, outside of the solve.
        backbone: ``"residual"``; ``"resnet"``, MONAI's ResNet of four stages, not smoothed or standardized and at
            1/16 of the resolution, for small, faint things; ``"none"`` for a 16 x 16 (8 x 8 x 8) thumbnail of the
            image; or a network of your own: ``(B, in_channels, *space)`` to ``(B, C)``, ``(B, C, *space)`` or a list
            that ends with such maps.
        backbone_channels: the number ``C`` of channels that a ``backbone`` of your own returns; by default its
            attribute ``out_channels``.
        equilibrium_on: ``"features"``, the pooled ones; or ``"map"``: the state has space too and is pooled afterwards.
        cell: ``"kan"``; or ``"mlp"``, an :class:`~monai_deqkan.networks.blocks.MLPCell` of as many parameters.
        kernel_size: size of the cell's convolution on a map; 1 lets each place have its own equilibrium.
        num_steps: ``None`` for the equilibrium; else that many explicit steps ``z <- cell(z, p)`` from ``z = p``, with
            tied weights: an ordinary network of finite depth, for comparison. Nothing is solved, and ``solver`` and
            ``adjoint`` are not used.
        kan_settings: settings of the cell's KAN layer, over ``basis="gaussian"``, ``grid_size=15``: 16 Gaussians on
            [-3, 3]. ``{"basis": "bspline", "grid_size": 5}`` takes splines; a basis without a grid gets no
            ``grid_size``.
        solver: fixed-point solver, by name, ``(name, settings)`` or object.
        adjoint: how gradients get through the solve, in the same three ways.

    Raises:
        ValueError: for a number or name out of range.

    Example:
        >>> import torch
        >>> network = DEQKANClassifier(spatial_dims=2, in_channels=1, out_channels=2)
        >>> network(torch.rand(3, 1, 64, 64)).shape
        torch.Size([3, 2])

    Reference:
        J. Qezelbash-Chamak, "DEQ-KAN: Deep equilibrium Kolmogorov-Arnold networks for robust classification", Biomed.
        Signal Process. Control 110 (2025) 108087, combines the two. This network follows the description in the
        project's founding proposal, which has no public reference, made sound: the recurrence there has no fixed point
        (see :class:`~monai_deqkan.networks.nets.RecurrentKANClassifier`) and recomputes the convolutional features at
        every step.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        features: Sequence[int] = (48, 72, 112, 160),
        blocks: Sequence[int] = (1, 1, 1, 1),
        hidden_features: int = 64,
        pool: str = "both",
        contraction: float = 0.9,
        dropout: float = 0.2,
        backbone: str | nn.Module = "residual",
        backbone_channels: int | None = None,
        equilibrium_on: str = "features",
        cell: str = "kan",
        kernel_size: int = 1,
        num_steps: int | None = None,
        kan_settings: dict[str, Any] | None = None,
        solver: str | tuple[str, dict[str, Any]] | FixedPointSolver = "anderson",
        adjoint: str | tuple[str, dict[str, Any]] | Adjoint = "implicit",
    ) -> None:
        super().__init__(
            spatial_dims,
            in_channels,
            out_channels,
            features=features,
            blocks=blocks,
            hidden_features=hidden_features,
            pool=pool,
            dropout=dropout,
            backbone=backbone,
            backbone_channels=backbone_channels,
            on_map=check_choice("equilibrium_on", equilibrium_on, ("features", "map")) == "map",
        )
        check_choice("cell", cell, ("kan", "mlp"))
        if not self.on_map and kernel_size != 1:
            raise ValueError(f"`kernel_size` is for `equilibrium_on='map'`; got {kernel_size}. Leave it out.")
        settings = _kan_settings(kan_settings)
        dims = spatial_dims if self.on_map else 0
        kan = KANCell(
            hidden_features,
            contraction=contraction,
            spatial_dims=dims,
            kernel_size=kernel_size,
            kan_settings=settings,
        )
        chosen: nn.Module = kan if cell == "kan" else _equal_mlp(kan, hidden_features, dims, kernel_size)
        # Steps of a finite number are no equilibrium, and are not called so in the network's own parts.
        self.equilibrium: Any = DEQLayer(chosen, solver, adjoint) if num_steps is None else None
        self.steps: Any = None if num_steps is None else ExplicitSteps(chosen, num_steps)

    def state_features(self, image: Tensor) -> Tensor:
        """Return the equilibrium, or with ``num_steps`` the last state; pooled if it is a map."""
        layer = self.equilibrium if self.steps is None else self.steps
        state = cast(Tensor, layer(self.injection(image)))
        return pool_space(state, self.pool) if self.on_map else state

    def equilibrium_features(self, image: Tensor) -> Tensor:
        """Return the features of the equilibrium that the head sees, for images ``(B, in_channels, *space)``.

        Raises:
            ValueError: if the network takes explicit steps (``num_steps``), whose last state is no equilibrium.
        """
        if self.steps is not None:
            raise ValueError("With `num_steps` there is no equilibrium. Call `state_features` for the last state.")
        return self.state_features(image)


class ExplicitSteps(nn.Module):
    """Apply a cell ``num_steps`` times from ``z = x``, weights tied and gradients through every step.

    Like :class:`~monai_deqkan.networks.layers.DEQLayer` it runs without autocast, with normalized weights computed
    once. It is no solver: nothing is said about what further steps would change.

    Args:
        cell: module ``cell(z, x) -> z'``.
        num_steps: number of applications, at least 1.
    """

    def __init__(self, cell: nn.Module, num_steps: int) -> None:
        super().__init__()
        self.cell = cell
        self.num_steps = check_int("num_steps", num_steps)

    def forward(self, x: Tensor) -> Tensor:
        """Return the state after the last step, of the shape of ``x``."""
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        z = x
        with ExitStack() as stack:
            stack.enter_context(torch.autocast(x.device.type, enabled=False))
            stack.enter_context(frozen_weights(self.cell))
            for _ in range(self.num_steps):
                z = self.cell(z, x)
        return z


def _kan_settings(given: dict[str, Any] | None) -> dict[str, Any]:
    """Return the settings of the cell's KAN layer; a basis without a grid, such as Chebyshev's, gets none."""
    settings = {"basis": "gaussian", **(given or {})}
    name = settings["basis"]
    if isinstance(name, str) and "grid_size" in inspect.signature(BASES.get(name)).parameters:
        settings.setdefault("grid_size", 15)
    return settings


def _equal_mlp(kan: KANCell, features: int, spatial_dims: int, kernel_size: int) -> MLPCell:
    """Return the MLP cell whose number of parameters is nearest to that of a KAN cell."""
    count = sum(parameter.numel() for parameter in kan.parameters())
    per_hidden = features * kernel_size**spatial_dims + 1 + features
    hidden = max(1, round(count / per_hidden))
    return MLPCell(features, hidden, contraction=kan.contraction, spatial_dims=spatial_dims, kernel_size=kernel_size)


def _backbone(
    backbone: str | nn.Module,
    channels: int | None,
    spatial_dims: int,
    in_channels: int,
    features: Sequence[int],
    blocks: Sequence[int],
    on_map: bool,
) -> tuple[nn.Module, int]:
    """Return the feature extractor and its number of channels: the one place that knows them."""
    if isinstance(backbone, nn.Module):
        channels = getattr(backbone, "out_channels", None) if channels is None else channels
        if channels is None:
            raise ValueError("A `backbone` of your own needs `backbone_channels`, the number of channels it returns.")
        return backbone, check_int("backbone_channels", channels)
    if check_choice("backbone", backbone, ("residual", "resnet", "none")) == "none":
        side = _GRID[spatial_dims]
        return _Thumbnail(side, flatten=not on_map), in_channels * (1 if on_map else side**spatial_dims)
    if backbone == "resnet":
        return _ResNetMaps(spatial_dims, in_channels, features, blocks), features[-1]
    residual = ImageFeatures(spatial_dims, in_channels, features=features, blocks=blocks)
    return residual, residual.out_channels


class _ResNetMaps(ResNet):
    """MONAI's ResNet up to its last feature maps."""

    def __init__(self, spatial_dims: int, in_channels: int, features: Sequence[int], blocks: Sequence[int]) -> None:
        if len(features) != 4 or len(blocks) != 4:
            raise ValueError(f"`features` and `blocks` need four entries each for a ResNet; got {features}, {blocks}.")
        super().__init__(
            block="basic",
            layers=list(blocks),
            block_inplanes=list(features),
            spatial_dims=spatial_dims,
            n_input_channels=in_channels,
            conv1_t_size=5,
            conv1_t_stride=2,
            no_max_pool=True,
            feed_forward=False,
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv1(x)))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class _Thumbnail(nn.Module):
    """The image itself, averaged onto a small grid."""

    def __init__(self, side: int, flatten: bool) -> None:
        super().__init__()
        self.side, self.flatten = side, flatten

    def forward(self, image: Tensor) -> Tensor:
        if image.dim() == 4:
            small = F.adaptive_avg_pool2d(image, (self.side, self.side))
        else:
            small = F.adaptive_avg_pool3d(image, (self.side, self.side, self.side))
        return small.flatten(1) if self.flatten else small
