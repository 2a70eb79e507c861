"""The published DEQ-KAN recurrence as a network of finite depth, for comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from monai_deqkan._checks import check_int, check_range
from monai_deqkan.networks.layers.kan_linear import KANLinear
from monai_deqkan.networks.nets.deqkan_classifier import FeatureClassifier

__all__ = ["RecurrentKANClassifier"]


class RecurrentKANClassifier(FeatureClassifier):
    r"""Classify images by finitely many steps of the published DEQ-KAN recurrence; a baseline, not an equilibrium.

    .. math::
        z_{k+1} = (1 - \alpha)\, z_k + \alpha\, F(z_k), \qquad F(z) = z + p + \mathrm{KAN}(z + p), \qquad
        \mathrm{KAN}(u) = u + K_2\, \mathrm{relu}(K_1(u)), \qquad z_0 = 0

    with two Gaussian KAN layers :math:`K_1, K_2`: :math:`F(z) = 2 (z + p) + K_2\, \mathrm{relu}(K_1(z + p))`. While the
    last term is small, the Jacobian has a spectral radius of about 2, and **there is no fixed point to converge to**:
    each step multiplies the state by about :math:`1 + \alpha`, whatever the damping, and more steps give other logits.
    What it returns is the state after ``num_steps`` steps, and gradients go through each of them.

    Differences from the published code: features are computed once, not in every step; dropout sits in front of the
    head; the injection is normalized, as in :class:`~monai_deqkan.networks.nets.DEQKANClassifier`, whose arguments the
    others are.

    Args:
        spatial_dims: number of spatial dimensions, 2 or 3.
        in_channels: number of image channels.
        out_channels: number of classes.
        num_steps: number of steps, at least 1.
        alpha: weight :math:`\alpha` of the new state, dimensionless, in ``(0, 1]``.
        features: channels of the four stages of the residual network.
        blocks: number of residual blocks of each stage.
        hidden_features: size of the state.
        pool: ``"max"``, ``"avg"`` or ``"both"`` over space.
        dropout: probability of dropping a feature in front of the head.
        backbone: ``"residual"``, ``"none"``, or a network of your own.
        backbone_channels: number of channels of such a network.
        kan_settings: settings of both KAN layers, over 16 Gaussians on [-3, 3] and no base term.

    Raises:
        ValueError: for a number or name out of range.

    Example:
        >>> network = RecurrentKANClassifier(2, 1, 2, num_steps=3)
        >>> network(torch.rand(3, 1, 64, 64)).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        num_steps: int = 10,
        alpha: float = 0.5,
        features: Sequence[int] = (48, 72, 112, 160),
        blocks: Sequence[int] = (1, 1, 1, 1),
        hidden_features: int = 64,
        pool: str = "both",
        dropout: float = 0.2,
        backbone: str | nn.Module = "residual",
        backbone_channels: int | None = None,
        kan_settings: dict[str, Any] | None = None,
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
        )
        self.num_steps = check_int("num_steps", num_steps)
        self.alpha = check_range("alpha", alpha, 0.0, 1.0, open_low=True)
        settings = {"basis": "gaussian", "grid_size": 15, "base_activation": None, **(kan_settings or {})}
        self.first = KANLinear(hidden_features, hidden_features, **settings)
        self.second = KANLinear(hidden_features, hidden_features, **settings)

    def recurrence(self, z: Tensor, p: Tensor) -> Tensor:
        """Return :math:`F(z)` for states and injections ``(B, hidden_features)``."""
        u = z + p
        return u + u + self.second(torch.relu(self.first(u)))

    def state_features(self, image: Tensor) -> Tensor:
        """Return the state after the last step, ``(B, hidden_features)``."""
        p = self.injection(image)
        p = p.float() if p.dtype in (torch.float16, torch.bfloat16) else p
        z = torch.zeros_like(p)
        with torch.autocast(p.device.type, enabled=False):
            for _ in range(self.num_steps):
                z = torch.lerp(z, self.recurrence(z, p), self.alpha)
        return z
