"""KAN convolutions in one, two and three dimensions."""

# No postponed annotations here: torch.jit.script cannot read them on methods that it leaves out.

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monai_deqkan._checks import check_choice, check_int
from monai_deqkan.networks.layers.basis import Basis, BasisSpec, build_basis
from monai_deqkan.networks.layers.kan_features import Contraction
from monai_deqkan.networks.layers.kan_layer import KANLayer, check_weight_dtype

__all__ = ["KAN_CONVOLUTIONS", "KANConv1d", "KANConv2d", "KANConv3d"]

_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


@dataclass(frozen=True)
class _Convolution(Contraction):
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def rows_together(self) -> int:
        return self.groups

    def _maps(self, shape: torch.Size) -> tuple[int, ...]:
        # (B * G, F, C / G, *space) features are (B, G * F * C / G, *space) maps: group-major, then basis-major
        return (shape[0] // self.groups, self.groups * shape[1] * shape[2], *shape[3:])

    def forward(self, features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        maps = features.view(self._maps(features.shape))
        zeros = [0] * len(self.stride)
        return torch.convolution(
            maps, weight, bias, self.stride, self.padding, self.dilation, False, zeros, self.groups
        )

    def grad_weight(self, features: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
        return self._backward(features.view(self._maps(features.shape)), weight, grad, [False, True, False])[1]

    def grad_features(self, shape: torch.Size, weight: Tensor, grad: Tensor) -> Tensor:
        maps = grad.new_empty(1).expand(self._maps(shape))  # only its shape is used
        return self._backward(maps, weight, grad, [True, False, False])[0].contiguous().view(shape)

    def grad_bias(self, grad: Tensor) -> Tensor:
        return grad.sum([0, *range(2, grad.dim())])

    def _backward(self, maps: Tensor, weight: Tensor, grad: Tensor, mask: list[bool]) -> list[Tensor]:
        zeros = [0] * len(self.stride)
        return torch.ops.aten.convolution_backward(
            grad, maps, weight, None, self.stride, self.padding, self.dilation, False, zeros, self.groups, mask
        )


def _plain_int(value: Any) -> Any:
    """Turn integers of other libraries, such as NumPy's, into plain ones."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value


class _KANConvNd(KANLayer):
    """Everything but the number of dimensions; see `KANConv2d`."""

    spatial_dims: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
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
        self.in_channels = check_int("in_channels", in_channels)
        self.out_channels = check_int("out_channels", out_channels)
        self.groups = check_int("groups", groups)
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"`groups` must divide `in_channels` and `out_channels`; got {groups}, {in_channels}, {out_channels}."
            )
        self.kernel_size = self._per_axis("kernel_size", kernel_size)
        self.stride = self._per_axis("stride", stride)
        self.dilation = self._per_axis("dilation", dilation)
        self.padding_mode = check_choice("padding_mode", padding_mode, _PADDING_MODES)
        if isinstance(padding, str):
            self.padding: tuple[int, ...] | str = check_choice("padding", padding, ("same", "valid"))
            if padding == "same" and any(step != 1 for step in self.stride):
                raise ValueError(f"`padding='same'` needs a stride of 1; got {self.stride}. Give numbers instead.")
        else:
            self.padding = self._per_axis("padding", padding, minimum=0)
        self._plan_padding()
        # nn.ConvNd's other attributes, which some networks read
        self.transposed = False
        self.output_padding = (0,) * self.spatial_dims
        self._reversed_padding_repeated_twice = self._input_padding
        check_weight_dtype(dtype)
        shape = (out_channels, self.num_features * in_channels // groups, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def _per_axis(self, name: str, value: int | Sequence[int], minimum: int = 1) -> tuple[int, ...]:
        values = tuple(value) if isinstance(value, Iterable) else (value,) * self.spatial_dims
        if len(values) != self.spatial_dims:
            raise ValueError(
                f"`{name}` must be one integer or {self.spatial_dims}, one per spatial axis; got {value!r}."
            )
        return tuple(check_int(name, _plain_int(v), minimum) for v in values)

    def _plan_padding(self) -> None:
        """Split the padding into what is put around the input and what the convolution may do itself."""
        pairs = [(0, 0)] * self.spatial_dims
        if self.padding == "same":
            spans = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            pairs = [(span // 2, span - span // 2) for span in spans]
        elif not isinstance(self.padding, str):
            pairs = [(p, p) for p in self.padding]
        around = [p for pair in reversed(pairs) for p in pair]
        self._input_padding: list[int] = around  # as F.pad wants it: last axis first
        self._zero_padding: tuple[int, ...] = (0,) * self.spatial_dims
        if self.padding_mode == "zeros" and all(before == after for before, after in pairs):
            self._zero_padding = tuple(before for before, _ in pairs)
        self._plan_zero()

    def _plan_zero(self) -> None:
        at_zero = self.basis.values(torch.zeros(1, dtype=torch.float64, device="cpu"))[:, 0]
        self._at_zero: list[float] = at_zero.tolist() if any(self._zero_padding) else []

    def _replace_basis(self, basis: Basis, weight: Tensor) -> None:
        super()._replace_basis(basis, weight)
        self._plan_zero()

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to ``(B, C, *space)`` or ``(C, *space)``.

        Raises:
            ValueError: if rank or channels are wrong.
            TypeError: if the dtype is not the weight's, outside of autocast.
        """
        batched = input.dim() == len(self.kernel_size) + 2
        x = input if batched else input.unsqueeze(0)
        if x.dim() != len(self.kernel_size) + 2 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"The input of KANConv{len(self.kernel_size)}d must have shape (B, {self.in_channels}, "
                f"{len(self.kernel_size)} spatial axes); got {list(input.shape)}."
            )
        y = self._forward_plain(x) if torch.jit.is_scripting() or self._must_be_plain() else self._forward_eager(x)
        return y if batched else y.squeeze(0)

    def _forward_plain(self, x: Tensor) -> Tensor:
        x = self._padded(x)
        space = list(x.shape[2:])
        shape = [x.shape[0] * self.groups, x.shape[1] // self.groups] + space  # noqa: RUF005, TorchScript
        features = self._plain_features(x.reshape(shape), self._mapped(x).reshape(shape))
        maps = features.shape[1] * x.shape[1]
        return self._convolve(features.reshape([x.shape[0], maps] + space))  # noqa: RUF005

    @torch.jit.unused
    def _forward_eager(self, x: Tensor) -> Tensor:
        bias = self.bias
        padding, offsets = self._zero_padding, tuple(self._at_zero)
        if self.input_scale is not None:
            padding, offsets = (0,) * len(padding), ()  # a zero is mapped to another point in each channel
            x = self._padded(x)
        elif self._at_zero:
            # Outside the image the formula has B_k(0), not 0. So the features are shifted by B_k(0), padded by zeros in
            # the convolution, and the convolution of the constants B_k(0) goes into the bias.
            sums = self.coefficients.flatten(2).sum(2)  # (out, K)
            constant = sum(value * sums[:, k] for k, value in enumerate(self._at_zero) if value != 0.0)
            if isinstance(constant, Tensor):
                bias = constant if bias is None else bias + constant
        else:
            x = self._padded(x)
        x = x.reshape(x.shape[0] * self.groups, x.shape[1] // self.groups, *x.shape[2:])
        return self._evaluate(x, bias, _Convolution(self.stride, padding, self.dilation, self.groups), offsets)

    def _padded(self, x: Tensor) -> Tensor:
        if max(self._input_padding) == 0:
            return x
        return F.pad(x, self._input_padding, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)

    def _convolve(self, maps: Tensor) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Say the arguments."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding!r}, dilation={self.dilation}, groups={self.groups}, "
            f"bias={self.bias is not None}, padding_mode={self.padding_mode!r}, "
            f"basis={self.basis}, base_activation={self.base_activation!r}"
        )


class KANConv1d(_KANConvNd):
    """Convolve signals ``(B, C, L)`` with kernels of learnable functions; see `KANConv2d`."""

    spatial_dims = 1

    def _convolve(self, maps: Tensor) -> Tensor:
        return F.conv1d(maps, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class KANConv2d(_KANConvNd):
    r"""Convolve images with kernels whose elements are learnable functions: ``nn.Conv2d`` with functions as weights.

    .. math:: Y[x, o] = b_o + \sum_i \sum_{\delta} F_{o i \delta}\big(X[x + \delta, i]\big), \qquad
        F_{o i \delta}(t) = w_{o i \delta}\, \mathrm{silu}(t) + \sum_{k=1}^{K} c_{o k i \delta}\, B_k(t)

    where :math:`X` is padded first: a padded zero contributes :math:`F(0)`, which need not be zero. It is computed as
    one ordinary convolution of ``K + 1`` feature maps per channel, never by unfolding. The gradient recomputes the
    maps instead of keeping them; under ``torch.compile``, export, tracing, scripting and ``torch.func`` ordinary
    operations are used.

    Args:
        in_channels: number of input channels.
        out_channels: number of output channels.
        kernel_size: size of the kernel, one number or one per axis; so are the next three.
        stride: step between outputs.
        padding: rim added around the input before the functions, ``"same"`` or ``"valid"``.
        dilation: step between kernel elements.
        groups: number of channel groups that do not see each other.
        bias: whether to add :math:`b`.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        basis: the functions :math:`B_k`: a name, a pair ``(name, settings)``, or a `Basis`.
        grid_size: number of intervals of the grid, for a basis given by name.
        spline_order: order of its splines.
        grid_range: first and last knot, in the unit of the inputs.
        outside: how functions go on beyond the grid, ``"zero"``, ``"clamp"`` (the value at its end) or ``"linear"``
            (the tangent there), for a basis given by name; ``None`` for the basis's own default.
        base_activation: ``"silu"``, or ``None`` to leave the first term of :math:`F` out.
        init: how weights are drawn: ``"variance"`` keeps the mean squares of outputs and gradients, ``"identity"``
            passes inputs on, ``"zero_spline"`` starts with the base term alone; see `reset_parameters`.
        device: where the parameters are made.
        dtype: their dtype.

    Attributes:
        weight: packed parameter, shape ``(out, F * in / groups, *kernel_size)``; the outer part of the second axis
            counts features, SiLU first. `coefficients` and `base_weight` are views of it.
        bias: shape ``(out,)`` or ``None``.

    Raises:
        ValueError: if a number is out of its range or the groups do not fit.
        TypeError: if a number is of the wrong kind.

    Example:
        >>> layer = KANConv2d(3, 4, kernel_size=3, padding=1)
        >>> layer(torch.zeros(1, 3, 8, 8)).shape, layer.coefficients.shape
        (torch.Size([1, 4, 8, 8]), torch.Size([4, 8, 3, 3, 3]))
    """

    spatial_dims = 2

    def _convolve(self, maps: Tensor) -> Tensor:
        return F.conv2d(maps, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class KANConv3d(_KANConvNd):
    """Convolve volumes ``(B, C, D, H, W)`` with kernels of learnable functions; see `KANConv2d`."""

    spatial_dims = 3

    def _convolve(self, maps: Tensor) -> Tensor:
        return F.conv3d(maps, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


KAN_CONVOLUTIONS: dict[int, Any] = {1: KANConv1d, 2: KANConv2d, 3: KANConv3d}
"""The layer for each number of spatial axes."""
