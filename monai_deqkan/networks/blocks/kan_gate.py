"""Attention gate with a learnable function."""

# No postponed annotations here: torch.jit.script cannot read them.

import torch
import torch.nn.functional as F
from monai.networks.layers import Conv
from torch import Tensor, nn

from monai_deqkan._checks import check_int, check_spatial_dims
from monai_deqkan.networks.blocks.kan_block import KANBlock, NormSpec
from monai_deqkan.networks.layers.basis import BasisSpec

__all__ = ["KANGate"]


class KANGate(nn.Module):
    r"""Weight each pixel of a skip connection by what a deeper signal says about it: additive attention.

    .. math:: \alpha = \sigma\Big(b + \sum_f \phi_f\big(\mathrm{N}(W_s s + \mathrm{up}(W_g g))_f\big)\Big), \qquad
        s' = \alpha\, s

    The functions :math:`\phi_f` are one 1x1 KAN convolution; :math:`W_s, W_g` are plain 1x1 convolutions, up
    interpolates linearly to the skip's size, and N is a normalization without weights.

    Args:
        spatial_dims: 2 or 3.
        channels: number of channels of the skip.
        gate_channels: number of channels of the gating signal.
        features: number of functions; half of ``channels`` by default.
        basis: the functions: a name, a pair ``(name, settings)``, or a `Basis`.
        grid_size: number of intervals of the grid, for a basis given by name.
        spline_order: order of its splines.
        grid_range: first and last knot.
        outside: how functions go on beyond the grid; ``None`` for the basis's own default.
        base_activation: ``"silu"`` for a base term, ``None`` for none.
        norm: ``"instance"``, ``"batch"``, ``("group", {"num_groups": 4})`` or ``None``; see `KANBlock`.

    Raises:
        ValueError: if a setting is out of its range.

    Example:
        >>> gate = KANGate(2, channels=4, gate_channels=8)
        >>> gate(torch.rand(1, 4, 9, 8), torch.rand(1, 8, 4, 4)).shape
        torch.Size([1, 4, 9, 8])

    Reference:
        O. Oktay et al., "Attention U-Net: learning where to look for the pancreas", MIDL 2018, equations (1) and (2);
        there :math:`\phi_f` is a weighted ReLU without a normalization before it, and :math:`\alpha` is computed at
        the resolution of the gating signal.
    """

    def __init__(
        self,
        spatial_dims: int,
        channels: int,
        gate_channels: int,
        *,
        features: int | None = None,
        basis: BasisSpec = "bspline",
        grid_size: int = 5,
        spline_order: int = 3,
        grid_range: tuple[float, float] = (-3.0, 3.0),
        outside: str | None = None,
        base_activation: str | None = None,
        norm: NormSpec = "instance",
    ) -> None:
        super().__init__()
        check_spatial_dims(spatial_dims)
        width = max(check_int("channels", channels) // 2, 1) if features is None else check_int("features", features)
        self.interpolation = "bilinear" if spatial_dims == 2 else "trilinear"
        self.skip = Conv[Conv.CONV, spatial_dims](channels, width, 1)
        self.gate = Conv[Conv.CONV, spatial_dims](check_int("gate_channels", gate_channels), width, 1, bias=False)
        self.attention = KANBlock(
            spatial_dims,
            width,
            1,
            1,
            basis=basis,
            grid_size=grid_size,
            spline_order=spline_order,
            grid_range=grid_range,
            outside=outside,
            base_activation=base_activation,
            bias=True,
            norm=norm,
        )

    def forward(self, skip: Tensor, gate: Tensor) -> Tensor:
        """Return the weighted skip.

        Args:
            skip: maps, shape ``(B, channels, *space)``.
            gate: gating signal, shape ``(B, gate_channels, *other_space)``.
        """
        return skip * self.weights(skip, gate)

    @torch.jit.export
    def weights(self, skip: Tensor, gate: Tensor) -> Tensor:
        r"""Return :math:`\alpha`, shape ``(B, 1, *space)``, for pictures of what the gate looks at."""
        signal = F.interpolate(self.gate(gate), size=skip.shape[2:], mode=self.interpolation)
        return torch.sigmoid(self.attention(self.skip(skip) + signal))
