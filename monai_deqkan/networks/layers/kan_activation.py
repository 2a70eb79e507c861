"""Learnable activation functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monai_deqkan._checks import check_int
from monai_deqkan.networks.layers.basis import BasisSpec
from monai_deqkan.networks.layers.kan_conv import KANConv1d

__all__ = ["KANActivation"]


class KANActivation(nn.Module):
    r"""Apply one learnable function to all elements, or one to each channel: PReLU with a whole function to learn.

    .. math:: \phi_c(t) = w_c\, \mathrm{silu}(t) + \sum_{k=1}^{K} c_{ck}\, B_k(t)

    It starts as SiLU: exactly with a base term (coefficients zero); without one as the best fit of SiLU on the grid.
    Outside of the grid B-splines fade to zero. In MONAI's networks it is ``act="kan"``.

    Args:
        num_parameters: number of functions: 1 shared by all, or the number of channels on axis 1.
        basis: the functions :math:`B_k`: a name, a pair ``(name, settings)``, or a `Basis`.
        grid_size: number of intervals of the grid, for a basis given by name.
        spline_order: order of its splines.
        grid_range: first and last knot, in the unit of the input.
        base_activation: ``"silu"``, or ``None`` to leave the first term out.

    Attributes:
        functions: the layer that holds the functions; its ``coefficients`` have shape ``(num_parameters, K, 1, 1)``.

    Raises:
        ValueError: if a setting is out of its range.
        TypeError: if one is of the wrong kind.

    Example:
        >>> x = torch.linspace(-2, 2, 5)
        >>> torch.allclose(KANActivation()(x), torch.nn.functional.silu(x))
        True
    """

    def __init__(
        self,
        num_parameters: int = 1,
        *,
        basis: BasisSpec = "bspline",
        grid_size: int = 5,
        spline_order: int = 3,
        grid_range: tuple[float, float] = (-3.0, 3.0),
        base_activation: str | None = "silu",
    ) -> None:
        super().__init__()
        self.num_parameters = check_int("num_parameters", num_parameters)
        self.functions = KANConv1d(
            num_parameters,
            num_parameters,
            1,
            groups=num_parameters,
            bias=False,
            basis=basis,
            grid_size=grid_size,
            spline_order=spline_order,
            grid_range=grid_range,
            base_activation=base_activation,
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start as SiLU."""
        functions = self.functions
        if functions.base_weight is not None:
            functions.coefficients.zero_()
            functions.base_weight.fill_(1.0)
            return
        low, high = getattr(functions.basis, "grid_range", (-1.0, 1.0))
        points = torch.linspace(low, high, 401, dtype=torch.float64)
        values = functions.basis.values(points)  # (K, P)
        gram = values @ values.t() + 1e-6 * torch.eye(len(values), dtype=torch.float64)
        fit = torch.linalg.solve(gram, values @ F.silu(points))
        functions.coefficients.copy_(fit[None, :, None, None])

    def forward(self, input: Tensor) -> Tensor:
        """Apply the functions to ``(B, C, *)``; to a tensor of any shape where one is shared.

        Raises:
            ValueError: if axis 1 is not ``num_parameters`` long and these are more than 1.
        """
        if self.num_parameters == 1:
            return self.functions(input.reshape(1, 1, -1)).reshape(input.shape)
        if input.dim() < 2 or input.shape[1] != self.num_parameters:
            raise ValueError(
                f"KANActivation(num_parameters={self.num_parameters}) needs as many channels on axis 1; "
                f"got shape {list(input.shape)}. Use num_parameters=1 to share one function."
            )
        return self.functions(input.reshape(input.shape[0], self.num_parameters, -1)).reshape(input.shape)
