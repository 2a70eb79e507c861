"""DEQ-KAN: an image classifier whose last features are the equilibrium of a Kolmogorov-Arnold cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from monai.networks.nets import ResNet
from torch import Tensor, nn

from monai_deqkan._checks import check_choice, check_int, check_range, check_spatial_dims
from monai_deqkan.adjoints import Adjoint
from monai_deqkan.networks.blocks.deq_cell import KANCell
from monai_deqkan.networks.layers.deq import DEQLayer
from monai_deqkan.solvers import FixedPointSolver

__all__ = ["DEQKANClassifier"]


class DEQKANClassifier(nn.Module):
    r"""Classify images by the equilibrium of a KAN cell on convolutional features.

    A residual convolutional network makes features; pooled over space, projected and normalized they become the
    injection :math:`p`, computed once. The equilibrium :math:`z^* = p + \kappa\, \mathrm{KAN}(z^*) / L` follows, then
    dropout and a linear head. The cell contracts by construction (:class:`KANCell`), so that the equilibrium exists, is
    unique and does not depend on the solver.

    Args:
        spatial_dims: number of spatial dimensions, 2 or 3.
        in_channels: number of image channels.
        out_channels: number of classes; the output has one logit each.
        features: channels of the four stages of the convolutional network.
        blocks: number of residual blocks of each stage.
        hidden_features: size :math:`F` of the state and the injection.
        pool: how features are pooled over space: ``"max"`` finds small things anywhere, ``"avg"`` looks at the whole.
        contraction: contraction factor :math:`\kappa` of the cell, dimensionless, in ``(0, 1)``.
        dropout: probability of dropping a feature of the equilibrium, outside of the solve.
        backbone: a network of your own in place of the residual one: ``(B, in_channels, *space)`` to ``(B, C)`` or
            ``(B, C, *space)``; needs ``backbone_channels``.
        backbone_channels: the number ``C`` of channels that ``backbone`` returns.
        kan_settings: settings of the cell's :class:`~monai_deqkan.networks.layers.KANLinear`.
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
        (see :class:`~monai_deqkan.networks.blocks.KANCell`) and recomputes the convolutional features at every step.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        features: Sequence[int] = (32, 64, 128, 256),
        blocks: Sequence[int] = (1, 1, 1, 1),
        hidden_features: int = 128,
        pool: str = "max",
        contraction: float = 0.9,
        dropout: float = 0.2,
        backbone: nn.Module | None = None,
        backbone_channels: int | None = None,
        kan_settings: dict[str, Any] | None = None,
        solver: str | tuple[str, dict[str, Any]] | FixedPointSolver = "anderson",
        adjoint: str | tuple[str, dict[str, Any]] | Adjoint = "implicit",
    ) -> None:
        super().__init__()
        self.spatial_dims = check_spatial_dims(spatial_dims)
        self.in_channels = check_int("in_channels", in_channels)
        self.out_channels = check_int("out_channels", out_channels)
        self.pool = check_choice("pool", pool, ("max", "avg"))
        check_int("hidden_features", hidden_features)
        check_range("dropout", dropout, 0.0, 1.0, open_high=True)
        if backbone is None:
            if len(features) != 4 or len(blocks) != 4:
                raise ValueError(f"`features` and `blocks` need four entries each; got {features} and {blocks}.")
            backbone, backbone_channels = _ResNetMaps(spatial_dims, in_channels, features, blocks), features[-1]
        elif backbone_channels is None:
            raise ValueError("A `backbone` of your own needs `backbone_channels`, the number of channels it returns.")
        self.backbone = backbone
        self.projection = nn.Linear(check_int("backbone_channels", backbone_channels), hidden_features)
        self.injection_norm = nn.LayerNorm(hidden_features)
        cell = KANCell(hidden_features, contraction=contraction, kan_settings=kan_settings)
        self.equilibrium = DEQLayer(cell, solver, adjoint)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden_features, out_channels)
        for linear in (self.projection, self.head):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits ``(B, out_channels)`` of images ``(B, in_channels, *space)``.

        Raises:
            ValueError: if the image has another rank or number of channels.
        """
        return self.head(self.dropout(self.equilibrium_features(image)))

    def equilibrium_features(self, image: Tensor) -> Tensor:
        """Return the equilibrium features ``(B, hidden_features)`` of images ``(B, in_channels, *space)``."""
        if image.ndim != self.spatial_dims + 2 or image.shape[1] != self.in_channels:
            raise ValueError(
                f"`image` must have shape (B, {self.in_channels}, {', '.join('DHW'[3 - self.spatial_dims :])}); "
                f"got {tuple(image.shape)}."
            )
        maps = self.backbone(image)
        if maps.ndim > 2:
            maps = maps.flatten(2).amax(dim=2) if self.pool == "max" else maps.flatten(2).mean(dim=2)
        return cast(Tensor, self.equilibrium(self.injection_norm(self.projection(maps))))


class _ResNetMaps(ResNet):
    """MONAI's ResNet up to its last feature maps."""

    def __init__(self, spatial_dims: int, in_channels: int, features: Sequence[int], blocks: Sequence[int]) -> None:
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
