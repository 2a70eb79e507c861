"""The fully connected KAN layer."""

# No postponed annotations here: torch.jit.script cannot read them on methods that it leaves out.

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monai_deqkan._checks import check_int
from monai_deqkan.networks.layers.basis import BasisSpec, build_basis
from monai_deqkan.networks.layers.kan_features import Contraction
from monai_deqkan.networks.layers.kan_layer import KANLayer, check_weight_dtype

__all__ = ["KANLinear"]


class _Matmul(Contraction):
    def forward(self, features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(features.flatten(1), weight, bias)

    def grad_weight(self, features: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
        return grad.t() @ features.flatten(1)

    def grad_features(self, shape: torch.Size, weight: Tensor, grad: Tensor) -> Tensor:
        return (grad @ weight).view(shape)

    def grad_bias(self, grad: Tensor) -> Tensor:
        return grad.sum(0)


class KANLinear(KANLayer):
    r"""Apply a learnable function on every edge between inputs and outputs: ``nn.Linear`` with functions as weights.

    .. math:: y_j = b_j + \sum_i \Big( w_{ji}\, \mathrm{silu}(x_i) + \sum_{k=1}^{K} c_{jki}\, B_k(x_i) \Big)

    It is one matrix product on ``K + 1`` features per input. The gradient recomputes the features instead of keeping
    them; under ``torch.compile``, export, tracing, scripting and ``torch.func`` ordinary operations are used.

    Args:
        in_features: number of inputs.
        out_features: number of outputs.
        bias: whether to add :math:`b`.
        basis: the functions :math:`B_k`: a name, a pair ``(name, settings)``, or a `Basis`.
        grid_size: number of intervals of the grid, for a basis given by name.
        spline_order: order of its splines.
        grid_range: first and last knot, in the unit of the inputs.
        outside: how functions go on beyond the grid, ``"zero"``, ``"clamp"`` (the value at its end) or ``"linear"``
            (the tangent there), for a basis given by name; ``None`` for the basis's own default.
        base_activation: ``"silu"``, or ``None`` to leave the first term out.
        init: how weights are drawn: ``"variance"`` keeps the mean squares of outputs and gradients, ``"identity"``
            passes inputs on, ``"zero_spline"`` starts with the base term alone; see `reset_parameters`.
        device: where the parameters are made.
        dtype: their dtype.

    Attributes:
        weight: packed parameter, shape ``(out_features, F * in_features)``; the outer part of the second axis counts
            features, SiLU first. `coefficients` and `base_weight` are views of it.
        bias: shape ``(out_features,)`` or ``None``.

    Shape:
        ``(*, in_features)`` to ``(*, out_features)``.

    Raises:
        ValueError: if a number is out of its range.
        TypeError: if one is of the wrong kind.

    Example:
        >>> layer = KANLinear(3, 2)
        >>> layer(torch.zeros(5, 3)).shape, layer.coefficients.shape
        (torch.Size([5, 2]), torch.Size([2, 8, 3]))

    Reference:
        Z. Liu et al., "KAN: Kolmogorov-Arnold networks", ICLR 2025, equation (2.10); here without their extra scale per
        edge, and with the initialization of `reset_parameters`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        basis: BasisSpec = "bspline",
        grid_size: int = 5,
        spline_order: int = 3,
        grid_range: tuple[float, float] = (-3.0, 3.0),
        outside: str | None = None,
        base_activation: str | None = "silu",
        init: str = "variance",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(build_basis(basis, grid_size, spline_order, grid_range, outside), base_activation, init)
        self.in_features = check_int("in_features", in_features)
        self.out_features = check_int("out_features", out_features)
        check_weight_dtype(dtype)
        columns = self.num_features * in_features
        self.weight = nn.Parameter(torch.empty(out_features, columns, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer.

        Raises:
            ValueError: if the last axis is not ``in_features`` long.
            TypeError: if the dtype is not the weight's, outside of autocast.
        """
        if input.shape[-1] != self.in_features:
            raise ValueError(
                f"The input of KANLinear must have {self.in_features} features on its last axis; "
                f"got shape {list(input.shape)}."
            )
        x = input.reshape(-1, self.in_features)
        if torch.jit.is_scripting() or self._must_be_plain():
            y = F.linear(self._plain_features(x, self._mapped(x)).flatten(1), self.weight, self.bias)
        else:
            y = self._forward_eager(x)
        return y.reshape(list(input.shape[:-1]) + [self.out_features])  # noqa: RUF005, TorchScript

    @torch.jit.unused
    def _forward_eager(self, x: Tensor) -> Tensor:
        return self._evaluate(x, self.bias, _Matmul())

    def extra_repr(self) -> str:
        """Say the arguments."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"basis={self.basis}, base_activation={self.base_activation!r}"
        )
