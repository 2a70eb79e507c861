"""KAN convolutions of low rank: a chain of small convolutions in place of one large."""

# No postponed annotations here: torch.jit.script cannot read them.

import math
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monai_deqkan._checks import check_choice, check_finite, check_int
from monai_deqkan.networks.layers.basis import BasisSpec
from monai_deqkan.networks.layers.kan_channels import grid_inputs
from monai_deqkan.networks.layers.kan_conv import KAN_CONVOLUTIONS, KANConv1d, KANConv2d, KANConv3d
from monai_deqkan.networks.layers.kan_importance import channel_features

__all__ = ["LOW_RANK_KAN_CONVOLUTIONS", "LowRankKANConv1d", "LowRankKANConv2d", "LowRankKANConv3d"]

_PLAIN: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_RIDGE = 1e-12  # relative to the mean diagonal: only keeps singular systems solvable

LowRankT = TypeVar("LowRankT", bound="_LowRankKANConvNd")


class _LowRankKANConvNd(nn.Module):
    """Everything but the number of dimensions; see `LowRankKANConv2d`."""

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
        rank: int,
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
        super().__init__()
        check_choice("init", init, ("variance", "zero_spline"))
        if groups != 1:
            raise ValueError(f"`groups` must be 1 for a KAN convolution of low rank; got {groups}. Use the dense one.")
        self.rank = check_int("rank", rank)
        grid = {"grid_size": grid_size, "spline_order": spline_order, "grid_range": grid_range, "outside": outside}
        options = {"basis": basis, **grid, "base_activation": base_activation, "init": init}
        # The dense layer on the meta device checks the arguments and gives their one-per-axis forms.
        dense = KAN_CONVOLUTIONS[self.spatial_dims](
            in_channels, out_channels, kernel_size, stride, padding, dilation, 1, bias, padding_mode,
            **options, device="meta",
        )  # fmt: skip
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.dilation = dense.kernel_size, dense.stride, dense.dilation
        self.padding, self.padding_mode, self.groups = dense.padding, dense.padding_mode, 1
        self._input_padding: list[int] = dense._input_padding
        place = {"device": device, "dtype": dtype}
        self.functions = KAN_CONVOLUTIONS[self.spatial_dims](in_channels, rank, 1, bias=False, **options, **place)
        self.spatial = nn.ModuleList([self._along(axis, place) for axis in range(self.spatial_dims)])
        self.project = _PLAIN[self.spatial_dims](rank, out_channels, 1, bias=bias, **place)
        self.reset_parameters()

    def _along(self, axis: int, place: dict[str, Any]) -> nn.Module:
        """Return the convolution of each of the ``rank`` channels along one axis."""

        def only(values: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(value if i == axis else 1 for i, value in enumerate(values))

        kernel, stride, dilation = only(self.kernel_size), only(self.stride), only(self.dilation)
        convolution: nn.Module = _PLAIN[self.spatial_dims](
            self.rank, self.rank, kernel, stride, dilation=dilation, groups=self.rank, bias=False, **place
        )
        return convolution

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights, such that inputs from :math:`N(0, 1)` give outputs of mean square 1; zero the bias."""
        self.functions.reset_parameters()
        for weight in self._spatial_weights():
            nn.init.normal_(weight, std=1 / math.sqrt(weight[0].numel()))
        nn.init.normal_(self.project.weight, std=1 / math.sqrt(self.rank))
        if self.project.bias is not None:
            nn.init.zeros_(self.project.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to ``(B, C, *space)`` or ``(C, *space)``."""
        x = input
        if max(self._input_padding) > 0:
            x = F.pad(x, self._input_padding, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)
        x = self.functions(x)
        for part in self.spatial:
            x = part(x)
        return self.project(x)

    def to_conv(self) -> KANConv1d | KANConv2d | KANConv3d:
        """Return the dense KAN convolution with the same values."""
        weight = self.functions.weight
        has_bias = self.project.bias is not None
        dense = KAN_CONVOLUTIONS[self.spatial_dims](
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation, 1,
            has_bias, self.padding_mode, basis=self.functions.basis, base_activation=self.functions.base_activation,
            device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
        with torch.no_grad():
            dense.weight.copy_(_compose(self._factors()).view(dense.weight.shape))
            if has_bias:
                dense.bias.copy_(self.project.bias)
            dense.set_input_map(self.functions.input_scale, self.functions.input_shift)
        return dense

    @classmethod
    def from_conv(
        cls: type[LowRankT], layer: KANConv1d | KANConv2d | KANConv3d, rank: int, *, num_sweeps: int = 50
    ) -> tuple[LowRankT, float]:
        r"""Approximate a KAN convolution.

        Alternating least squares in float64 from the leading singular vectors of each unfolding. The error that is made
        small is that of the functions in mean square over the basis's range, not that of the coefficients.

        Args:
            layer: dense layer; masks and norms on its weight are applied once, here.
            rank: number of terms. The number of parameters falls from ``F * in * out * kernel elements`` to
                ``rank * (F * in + out + sum of kernel_size)``.
            num_sweeps: number of sweeps over all factors.

        Returns:
            The layer of low rank, and the root mean square error of all edges' functions relative to their root mean
            square, both over the basis's range.

        Raises:
            TypeError: if ``layer`` has another number of axes or is no KAN convolution.
            ValueError: if it has groups, or its weight is not finite.
        """
        if not isinstance(layer, KAN_CONVOLUTIONS[cls.spatial_dims]):
            raise TypeError(f"`layer` must be a KANConv{cls.spatial_dims}d; got {type(layer).__name__}.")
        weight = layer.weight.detach()
        check_finite("layer.weight", weight, "Reload the layer; no factors come close to it.")
        bias = layer.bias
        low = cls(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
            layer.groups, bias is not None, layer.padding_mode, rank=rank, basis=layer.basis,
            base_activation=layer.base_activation, device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
        features = channel_features(layer, grid_inputs(layer)).detach().cpu()  # (in, F, P)
        root = _moment_roots(features @ features.mT / features.shape[2])  # (in, F, F)
        parts = weight.cpu().double().unflatten(1, (layer.num_features, layer.in_channels))
        target = torch.einsum("ofi...,ifg->ogi...", parts, root).flatten(1, 2)
        factors = _decompose(target, rank, check_int("num_sweeps", num_sweeps))
        error = torch.linalg.vector_norm(_compose(factors) - target) / torch.linalg.vector_norm(target)
        columns = factors[1].unflatten(0, (layer.num_features, layer.in_channels))  # (F, in, R)
        solved = torch.linalg.solve(root.mT, columns.transpose(0, 1)).transpose(0, 1)
        factors[1] = solved.reshape(-1, rank)
        low._set_factors(factors)
        with torch.no_grad():
            if bias is not None:
                low.project.bias.copy_(bias)
            low.functions.set_input_map(layer.input_scale, layer.input_shift)
        return low, float(error.nan_to_num(0.0))

    def _factors(self) -> list[Tensor]:
        """Return the factors ``(size, rank)``: outputs, features times inputs, then one per spatial axis."""
        functions = self.functions.weight.flatten(1).t()
        return [
            self.project.weight.flatten(1),
            functions,
            *(weight.flatten(1).t() for weight in self._spatial_weights()),
        ]

    @torch.no_grad()
    def _set_factors(self, factors: list[Tensor]) -> None:
        self.project.weight.copy_(factors[0].view_as(self.project.weight))
        self.functions.weight.copy_(factors[1].t().reshape(self.functions.weight.shape))
        for weight, factor in zip(self._spatial_weights(), factors[2:], strict=True):
            weight.copy_(factor.t().reshape(weight.shape))

    def _spatial_weights(self) -> list[Tensor]:
        return [cast(Tensor, part.weight) for part in self.spatial]

    def extra_repr(self) -> str:
        """Say the arguments that the parts do not show."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, padding={self.padding!r}, "
            f"padding_mode={self.padding_mode!r}, rank={self.rank}"
        )


class LowRankKANConv1d(_LowRankKANConvNd):
    """Convolve signals ``(B, C, L)`` by a KAN convolution of low rank; see `LowRankKANConv2d`."""

    spatial_dims = 1


class LowRankKANConv2d(_LowRankKANConvNd):
    r"""Convolve images by a KAN convolution whose packed weight is a sum of ``rank`` products of vectors.

    .. math:: W_{o, (f, i), \delta} = \sum_{r=1}^{R} A_{o r}\, G_{(f, i) r} \prod_a S^{(a)}_{\delta_a r}

    It is computed as a chain: the input is padded, :math:`R` sums of functions of its channels are taken in each pixel
    (`functions`, a 1x1 KAN convolution), each is convolved along one axis after the other (`spatial`), and the results
    are combined (`project`, with the bias). Everything that acts on KAN layers, such as grid refits, acts on
    `functions`.

    Args:
        in_channels: number of input channels.
        out_channels: number of output channels.
        kernel_size: size of the kernel, one number or one per axis; so are the next three.
        stride: step between outputs.
        padding: rim added around the input before the functions, ``"same"`` or ``"valid"``.
        dilation: step between kernel elements.
        groups: 1; there for the order of the arguments.
        bias: whether to add a bias.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        rank: number of terms :math:`R`.
        basis: the functions: a name, a pair ``(name, settings)``, or a `Basis`.
        grid_size: number of intervals of the grid, for a basis given by name.
        spline_order: order of its splines.
        grid_range: first and last knot, in the unit of the inputs.
        outside: how functions go on beyond the grid; see `KANConv2d`.
        base_activation: ``"silu"``, or ``None`` for no base term.
        init: how `functions` are drawn: ``"variance"``, or ``"zero_spline"`` for the base term alone.
        device: where the parameters are made.
        dtype: their dtype.

    Raises:
        ValueError: if a number is out of its range, or ``groups`` is not 1.
        TypeError: if a number is of the wrong kind.

    Example:
        >>> layer = LowRankKANConv2d(16, 32, 3, padding=1, rank=8)
        >>> layer(torch.zeros(1, 16, 8, 8)).shape, sum(p.numel() for p in layer.parameters())
        (torch.Size([1, 32, 8, 8]), 1488)

    Reference:
        V. Lebedev et al., "Speeding-up convolutional neural networks using fine-tuned CP-decomposition", ICLR 2015,
        section 3, for plain convolutions; here the features of KAN layers join the input channels.
    """

    spatial_dims = 2


class LowRankKANConv3d(_LowRankKANConvNd):
    """Convolve volumes ``(B, C, D, H, W)`` by a KAN convolution of low rank; see `LowRankKANConv2d`."""

    spatial_dims = 3


LOW_RANK_KAN_CONVOLUTIONS: dict[int, Any] = {1: LowRankKANConv1d, 2: LowRankKANConv2d, 3: LowRankKANConv3d}
"""The layer for each number of spatial axes."""


def _moment_roots(moments: Tensor) -> Tensor:
    """Return lower factors ``L`` with ``L @ L.T`` equal to the moments ``(in, F, F)``, which need not be regular."""
    size = moments.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    ridge = torch.eye(moments.shape[-1], dtype=moments.dtype) * (1e-9 * size[:, None, None] + 1e-300)
    return torch.linalg.cholesky(moments + ridge)


def _compose(factors: list[Tensor]) -> Tensor:
    """Return the sum of the products of the factors' columns; each factor is ``(size, R)``."""
    product = factors[0]
    for factor in factors[1:]:
        product = product.unsqueeze(-2) * factor
    return product.sum(dim=-1)


def _decompose(target: Tensor, rank: int, num_sweeps: int) -> list[Tensor]:
    """Return factors whose `_compose` is near ``target``, by alternating least squares; sizes shared evenly."""
    order = target.dim()
    unfolded = [target.movedim(n, 0).flatten(1) for n in range(order)]
    factors = [_leading_vectors(matrix, rank) for matrix in unfolded]
    for _ in range(num_sweeps):
        for n in range(order):
            others = [factors[m] for m in range(order) if m != n]
            gram = torch.stack([factor.T @ factor for factor in others]).prod(dim=0)
            ridge = _RIDGE * gram.diagonal().mean() + 1e-300
            right = unfolded[n] @ _products(others)
            factors[n] = torch.linalg.solve(gram + ridge * torch.eye(rank, dtype=gram.dtype), right.T).T
            if n < order - 1:
                factors[n] = factors[n] / _lengths(factors[n])
    total = torch.stack([_lengths(factor) for factor in factors]).prod(dim=0) ** (1 / order)
    return [factor / _lengths(factor) * total for factor in factors]


def _lengths(factor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(factor, dim=0).clamp(min=1e-150)


def _products(factors: list[Tensor]) -> Tensor:
    """Return the products of the columns of all factors, flattened: ``(product of sizes, R)``."""
    product = factors[0]
    for factor in factors[1:]:
        product = (product.unsqueeze(1) * factor).flatten(0, 1)
    return product


def _leading_vectors(matrix: Tensor, rank: int) -> Tensor:
    """Return the leading left singular vectors, and random columns where there are fewer than ``rank``."""
    vectors = torch.linalg.eigh(matrix @ matrix.T).eigenvectors.flip(1)[:, :rank]
    missing = rank - vectors.shape[1]
    noise = torch.randn(len(matrix), missing, dtype=matrix.dtype, generator=torch.Generator().manual_seed(0))
    return torch.cat((vectors, noise), dim=1)
