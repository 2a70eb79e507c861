"""Certified Lipschitz bounds of linear, convolution and KAN layers."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from monai_deqkan._checks import check_int, check_tensor
from monai_deqkan.networks.layers.bspline import BSplineBasis
from monai_deqkan.networks.layers.kan_layer import KANLayer

__all__ = ["conv_norm_bound", "kan_lipschitz_bound", "linear_norm_bound"]

# How much a bound may exceed the norm because frequencies are sampled, by number of kernel axes longer than one.
_GRID_SLACK = (1.0, 1.01, 1.025, 1.05)
# Complex numbers per block of transfer matrices: 2 MiB in single precision, the fastest of 2^14 to 2^22.
_BLOCK_ELEMENTS = 2**18
# Largest sum of squares of the B-splines of degree n - 1 at one point, for spline order n: in the middle of a knot
# interval for n = 3 (1/8, 3/4, 1/8), at a knot for n = 2.
_BSPLINE_SQUARE_SUM = {1: 1.0, 2: 1.0, 3: 0.59375}
_SILU_MAX_SLOPE = 1.09984  # rounded up from 1.0998393


class Peak(NamedTuple):
    """Where the transfer matrix of a weight is largest, and the certified bound of the norm."""

    bound: float
    group: int
    frequency: tuple[float, ...]  # rad per sample, one per kernel axis
    balance: tuple[float, float] = (0.0, 1.0)  # KAN layers: weights of the base and the spline part


@dataclass(frozen=True)
class OperatorNorm:
    """The certified norm of one linear or convolution layer: search without gradient, then evaluate with one.

    Args:
        groups: number of blocked connections.
        sizes: frequencies on each kernel axis, none for a linear layer.
    """

    groups: int
    sizes: tuple[int, ...]

    def find_peak(self, weight: Tensor) -> Peak:
        """Search for the certified norm of a weight, without gradient."""
        return _find_peak(weight, self.groups, self.sizes)

    def at(self, weight: Tensor, peak: Peak) -> Tensor:
        """Return the certified norm found, as a differentiable scalar."""
        return _norm_at(weight, self.groups, peak)


@dataclass(frozen=True)
class KANNorm(OperatorNorm):
    """The certified Lipschitz constant of one KAN layer, from its packed weight ``(out, F * in, *kernel)``.

    Args:
        groups: number of blocked connections.
        sizes: frequencies on each kernel axis, none for a linear layer.
        num_features: features per input, the base term included.
        has_base: whether feature 0 is the base term SiLU.
        spline_gain: largest root of the sum of squares of the derivatives' B-splines, over the knot spacing.
    """

    num_features: int
    has_base: bool
    spline_gain: float

    def find_peak(self, weight: Tensor) -> Peak:
        """Search for the certified norm, and for the best balance of base and spline part."""
        balances = [(0.0, 1.0)]
        if self.has_base:
            base, spline = (self._search(weight, balance).bound for balance in ((1.0, 0.0), (0.0, 1.0)))
            balances = [(1.0, 0.0)] if base else balances
            if base and spline:
                # Best if both parts share their singular vectors; for matrices a few others around it are cheap.
                factors = (1.0,) if self.sizes else (0.5, 1.0, 2.0)
                angles = [math.atan(math.sqrt(factor * spline / base)) for factor in factors]
                balances = [(1 / math.cos(angle), 1 / math.sin(angle)) for angle in angles]
        return min((self._search(weight, balance) for balance in balances), key=lambda peak: peak.bound)

    def at(self, weight: Tensor, peak: Peak) -> Tensor:
        """Return the certified norm found, as a differentiable scalar."""
        return _norm_at(self._parts(weight, peak.balance), self.groups, peak)

    def _search(self, weight: Tensor, balance: tuple[float, float]) -> Peak:
        parts = self._parts(weight.detach(), balance)
        return _find_peak(parts, self.groups, self.sizes)._replace(balance=balance)

    def _parts(self, weight: Tensor, balance: tuple[float, float]) -> Tensor:
        """Put base weights and spline slopes, each times its largest gain and its balance, side by side."""
        weight = weight.unflatten(1, (self.num_features, -1))
        coefficients = weight[:, int(self.has_base) :]
        zero = torch.zeros_like(coefficients[:, :1])
        slopes = torch.cat((coefficients, zero), dim=1) - torch.cat((zero, coefficients), dim=1)
        parts = slopes * (balance[1] * self.spline_gain)
        if self.has_base:
            parts = torch.cat((weight[:, :1] * (balance[0] * _SILU_MAX_SLOPE), parts), dim=1)
        return parts.flatten(1, 2)  # (out, (F + 1) * in, *kernel)


def operator_norm(layer: nn.Module) -> OperatorNorm:
    """Return the certified norm that suits a layer.

    Args:
        layer: ``nn.Linear``, ``nn.Conv1d/2d/3d``, ``KANLinear`` or ``KANConv1d/2d/3d``.

    Raises:
        TypeError: if ``layer`` is of another kind, or a KAN layer whose basis is no B-spline.
        ValueError: for padding that can raise the norm.
    """
    if not isinstance(layer, (KANLayer, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        raise TypeError(
            "A certified norm needs nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d or a KAN layer; got "
            f"{type(layer).__name__}. Replace a transposed convolution by interpolation and a convolution."
        )
    kernel = torch.Size(getattr(layer, "kernel_size", ()))
    if kernel:
        _check_padding(layer)
    groups, sizes = int(getattr(layer, "groups", 1)), _grid_sizes(kernel, None)
    if not isinstance(layer, KANLayer):
        return OperatorNorm(groups, sizes)
    if not isinstance(layer.basis, BSplineBasis):
        raise TypeError(f"A certified norm of a KAN layer needs a BSplineBasis; got {layer.basis!r}.")
    gain = math.sqrt(_BSPLINE_SQUARE_SUM[layer.basis.spline_order]) / layer.basis.step
    return KANNorm(groups, sizes, layer.num_features, layer.has_base, gain)


def linear_norm_bound(weight: Tensor) -> Tensor:
    r"""Return the largest singular value of a matrix, rounded up.

    Args:
        weight: real matrix, shape ``(out, in)``.

    Returns:
        Scalar tensor, differentiable with respect to ``weight``, never below the exact norm; above it by rounding
        only (less than 1e-5 relative in float32).

    Raises:
        ValueError: if ``weight`` is not a matrix.

    Example:
        >>> f"{float(linear_norm_bound(torch.tensor([[3.0, 0.0], [0.0, -4.0]]))):.4f}"
        '4.0000'
    """
    if check_tensor("weight", weight).ndim != 2:
        raise ValueError(f"`weight` must have shape (out, in); got {tuple(weight.shape)}.")
    return _norm_at(weight, 1, _find_peak(weight, 1, ()))


def conv_norm_bound(weight: Tensor, *, groups: int = 1, num_frequencies: int | None = None) -> Tensor:
    r"""Return an upper bound of the :math:`\ell_2` operator norm of a convolution, for every image size.

    The bound holds for zero padding of any width and for circular padding of at most half of the kernel. It holds for
    every dilation, because dilation only repeats the transfer function along the frequency axes, and for every
    stride, because striding only drops outputs.

    With the transfer matrices :math:`\hat W(\omega) = \sum_\tau W_\tau e^{-i \langle\omega, \tau\rangle}`,

    .. math:: \|W*\| \le \sup_\omega \|\hat W(\omega)\|_2
              \le \max_{\omega \in \text{grid}} \|\hat W(\omega)\|_2 \prod_a \cos(\pi (k_a - 1) / (2 n_a))^{-1}

    for :math:`n_a > k_a - 1` equidistant frequencies on axis :math:`a` with :math:`k_a` taps. By default the product
    is at most 1.01, 1.025 or 1.05 for kernels with one, two or three axes longer than one. The spectral norms on the
    grid come from the eigenvalues of the smaller Gram matrices, on half of the frequencies as the kernel is real.

    The gradient is that of the largest singular value at the frequency where it was found, times the (constant) ratio
    of the bound and that value. It is exact up to the choice of that frequency.

    Args:
        weight: real kernel, shape ``(out, in / groups, *kernel)`` with one to three kernel axes.
        groups: number of blocked connections, as in :class:`torch.nn.Conv2d`.
        num_frequencies: frequencies :math:`n_a` on each axis longer than one; the default is the smallest number that
            gives the slack named above. More of them cost time and tighten the bound.

    Returns:
        Scalar tensor, differentiable with respect to ``weight``.

    Raises:
        ValueError: if the shape, ``groups`` or ``num_frequencies`` do not fit.

    Example:
        >>> 2.0 <= float(conv_norm_bound(torch.tensor([[[1.0, 0.0, -1.0]]]))) < 2.02
        True

    Reference:
        H. Ehlich and K. Zeller, "Schwankung von Polynomen zwischen Gitterpunkten", Math. Z. 86 (1964) 41-44, for the
        cosine; here axis by axis for :math:`\operatorname{Re}\, u^* \hat W(\omega) v`. Gram iteration (B. Delattre et
        al., ICML 2023) is an upper bound too, but took 2 to 15 times as long on a CPU.
    """
    if not 3 <= check_tensor("weight", weight).ndim <= 5:
        raise ValueError(f"`weight` must have shape (out, in / groups, *kernel); got {tuple(weight.shape)}.")
    if weight.shape[0] % check_int("groups", groups):
        raise ValueError(f"`groups` must divide the {weight.shape[0]} output channels; got {groups}.")
    return _norm_at(weight, groups, _find_peak(weight, groups, _grid_sizes(weight.shape[2:], num_frequencies)))


def kan_lipschitz_bound(layer: nn.Module) -> Tensor:
    r"""Return an upper bound of the :math:`\ell_2` Lipschitz constant of a B-spline KAN layer.

    The Jacobian of :math:`y_o = \sum_i w_{oi} s(x_i) + \sum_m c_{omi} B_m(x_i)` is :math:`[w/a, d]` times a matrix
    whose columns :math:`(a s'(x_i), Q_m(x_i))_m` are orthogonal; :math:`d_m = (c_m - c_{m-1}) / h` with :math:`c`
    extended by zeros, :math:`h` the knot spacing and :math:`Q` the B-splines of one degree less. Hence, for every
    :math:`a > 0`,

    .. math:: L \le \|[w / a, d]\|_2 \sqrt{q + a^2 \max s'^2}, \qquad q = \max_x \sum_m Q_m(x)^2,

    with :math:`q = 0.59375` for cubic splines (1 for order 1 and 2) and :math:`\max s'^2 = 1.2097` for SiLU. The bound
    takes the smallest value over three :math:`a` (one for convolutions) and does not grow with the width. For
    convolutions the norm is that of :func:`conv_norm_bound`, with the same assumptions on padding.

    Args:
        layer: ``KANLinear`` or ``KANConv1d/2d/3d`` with a B-spline basis.

    Returns:
        Scalar tensor, differentiable with respect to the layer's weight.

    Raises:
        TypeError: if ``layer`` is no KAN layer, or its basis is no B-spline.
        ValueError: for padding that can raise the norm.
    """
    norm = operator_norm(layer)
    if not isinstance(norm, KANNorm):
        raise TypeError(f"`layer` must be KANLinear or KANConv; got {type(layer).__name__}.")
    weight = check_tensor("layer.weight", layer.weight)
    return norm.at(weight, norm.find_peak(weight))


def _check_padding(module: Any) -> None:
    mode, padding = module.padding_mode, module.padding
    if mode == "zeros":
        return
    if mode != "circular":
        raise ValueError(
            f"`padding_mode` must be 'zeros' or 'circular' for a certified norm; got '{mode}', which can raise the "
            "norm of the convolution."
        )
    for axis, (taps, dilation) in enumerate(zip(module.kernel_size, module.dilation, strict=True)):
        if not isinstance(padding, str) and 2 * padding[axis] > dilation * (taps - 1):
            raise ValueError(
                f"Circular `padding` must be at most {dilation * (taps - 1) // 2} on axis {axis} for a certified norm, "
                f"so that the output is not larger than the input; got {padding[axis]}."
            )


def _grid_sizes(kernel: torch.Size, num_frequencies: int | None) -> tuple[int, ...]:
    """Return the number of frequencies for each kernel axis; axes of length one need one."""
    long_axes = [taps for taps in kernel if taps > 1]
    if num_frequencies is not None:
        check_int("num_frequencies", num_frequencies, minimum=max(kernel))
        return tuple(num_frequencies if taps > 1 else 1 for taps in kernel)
    angle = math.acos(_GRID_SLACK[len(long_axes)] ** (-1 / max(len(long_axes), 1)))
    return tuple(math.ceil(math.pi * (taps - 1) / (2 * angle)) if taps > 1 else 1 for taps in kernel)


@torch.no_grad()
def _find_peak(weight: Tensor, groups: int, sizes: tuple[int, ...]) -> Peak:
    """Search the frequency grid for the largest transfer matrix and bound the operator norm."""
    taps = weight.shape[2:]
    scale = float(weight.abs().amax()) if weight.numel() else 0.0
    if scale == 0 or not math.isfinite(scale):
        return Peak(scale, 0, (0.0,) * len(sizes))
    kernel = (weight.detach().to(_wide(weight)) / scale).reshape(groups, -1, weight.shape[1], taps.numel())
    if math.prod(sizes) * groups == 1:
        peak = Peak(float(_largest_singular_value(kernel.sum(-1)[0])), 0, (0.0,) * len(sizes))
        return peak._replace(bound=peak.bound * scale * _rounding(weight, torch.float64))

    # Real kernels have conjugate transfer matrices at opposite frequencies: half of the last long axis will do.
    last = max((axis for axis, size in enumerate(sizes) if size > 1), default=0)
    halved = [range(size // 2 + 1) if axis == last else range(size) for axis, size in enumerate(sizes)]
    grid = torch.tensor(list(itertools.product(*halved)), dtype=torch.float64)
    grid = (grid * (2 * math.pi) / torch.tensor(sizes)).to(kernel)  # (F, axes)
    # On GPUs in double precision, because TF32 would round complex products.
    precision = torch.complex128 if weight.is_cuda or weight.dtype == torch.float64 else torch.complex64
    best, group, frequency = -math.inf, 0, grid[0]
    for block in grid.split(max(1, _BLOCK_ELEMENTS // max(1, weight.shape[0] * weight.shape[1]))):
        squares = torch.linalg.eigvalsh(_gram(_transfer(kernel, block, taps).to(precision)))[..., -1]  # (G, F)
        index = int(squares.argmax())
        if (value := float(squares.flatten()[index])) > best:
            best, group, frequency = value, index // len(block), block[index % len(block)]
    between = math.prod(math.cos(math.pi * (t - 1) / (2 * n)) for t, n in zip(taps, sizes, strict=True))
    bound = math.sqrt(max(best, 0.0)) / between * scale * _rounding(weight, precision.to_real())
    return Peak(bound, group, tuple(frequency.tolist()))


def _norm_at(weight: Tensor, groups: int, peak: Peak) -> Tensor:
    """Return the bound of a peak as a differentiable function of the weight."""
    if peak.bound == 0 or not math.isfinite(peak.bound):
        return weight.sum() * 0 + peak.bound
    taps = weight.shape[2:]
    kernel = weight.to(_wide(weight)).reshape(groups, -1, weight.shape[1], taps.numel())[peak.group]
    matrix = kernel.sum(-1)
    if any(peak.frequency):
        matrix = _transfer(kernel[None], kernel.new_tensor([peak.frequency]), taps)[0, 0]
    norm = _largest_singular_value(matrix)
    return (norm * (peak.bound / norm.detach())).to(weight.dtype)


def _transfer(kernel: Tensor, frequencies: Tensor, taps: torch.Size) -> Tensor:
    """Evaluate transfer matrices ``(G, F, O, I)`` of kernels ``(G, O, I, T)`` at frequencies ``(F, axes)``."""
    positions = torch.cartesian_prod(*(torch.arange(count) for count in taps)).reshape(-1, len(taps))
    angles = frequencies @ positions.to(frequencies).T  # (F, T)
    return torch.complex(
        torch.einsum("goit,ft->gfoi", kernel, angles.cos()), torch.einsum("goit,ft->gfoi", kernel, -angles.sin())
    )


def _gram(matrix: Tensor) -> Tensor:
    """Return the smaller of the two Gram matrices."""
    return matrix @ matrix.mH if matrix.shape[-2] <= matrix.shape[-1] else matrix.mH @ matrix


def _largest_singular_value(matrix: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(_gram(matrix))[..., -1].clamp_min(torch.finfo(torch.float32).tiny).sqrt()


def _rounding(weight: Tensor, precision: torch.dtype) -> float:
    """Return a factor that covers rounding in the eigenvalues and in storing the normalized weight."""
    rank = min(weight.shape[0], weight[0].numel())
    stored = torch.finfo(weight.dtype).eps * (4 + 2 * math.sqrt(rank))
    return 1 + stored + torch.finfo(precision).eps * (4 + max(weight.shape[:2]) ** 1.5)


def _wide(value: Tensor) -> torch.dtype:
    """Return double precision where the device has it; also keeps autocast out of the bound."""
    return torch.float32 if value.device.type == "mps" else torch.float64
