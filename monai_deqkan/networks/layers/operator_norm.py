"""Certified operator norms of linear and convolution layers."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from monai_deqkan._checks import check_int, check_tensor

__all__ = [
    "OperatorNorm",
    "Peak",
    "conv_norm_bound",
    "find_peak",
    "grid_sizes",
    "linear_norm_bound",
    "norm_at",
    "padding_gain",
    "root_of_largest_eigenvalue",
    "rounding",
    "wide_dtype",
]

# How much a bound may exceed the norm because frequencies are sampled, by number of kernel axes longer than one.
_GRID_SLACK = (1.0, 1.01, 1.025, 1.05)
# Complex numbers per block of transfer matrices: 2 MiB in single precision, the fastest of 2^14 to 2^22.
_BLOCK_ELEMENTS = 2**18


@dataclass(frozen=True)
class Peak:
    """Where the transfer matrix of a weight is largest, and the certified bound of the norm."""

    bound: float
    group: int = 0
    frequency: tuple[float, ...] = ()  # rad per sample, one per kernel axis
    vector: Tensor | None = field(default=None, compare=False, repr=False)  # left singular vector of that matrix


@dataclass(frozen=True)
class OperatorNorm:
    """The certified norm of one linear or convolution layer: search without gradient, then evaluate with one.

    Args:
        groups: number of blocked connections.
        sizes: frequencies on each kernel axis, none for a linear layer.
        gain: bound of the norm of the padding.
    """

    groups: int
    sizes: tuple[int, ...]
    gain: float

    def find_peak(self, weight: Tensor) -> Peak:
        """Search for the certified norm of a weight, without gradient."""
        peak = find_peak(weight, self.groups, self.sizes)
        return replace(peak, bound=peak.bound * self.gain)

    def at(self, weight: Tensor, peak: Peak) -> Tensor:
        """Return the certified norm found, as a differentiable scalar."""
        return norm_at(weight, self.groups, peak)


def padding_gain(layer: Any) -> float:
    r"""Return how many times the norm of a convolution its padding can raise, at most, for every image size.

    Per axis let :math:`p` be the wider padding and :math:`e` the number of outputs minus inputs at stride 1. The
    convolution is one on a periodic signal, or on the whole line, after a map that repeats elements and before one that
    cuts out outputs, which may repeat too; the square of the norm of such a map is its largest number of repetitions:

    - "zeros": no repetition. "circular": the period is the image; outputs repeat :math:`1 + \lceil e / p \rceil` times
      if :math:`e > 0`, as :math:`p` is at most the image.
    - "reflect": the period is :math:`2 n - 2`, with each element twice; or, padded as it is, an element is repeated at
      most three times, which counts if :math:`e \ge p`.
    - "replicate": an end is repeated :math:`1 + p` times; images of one element have :math:`1 + e` equal outputs.

    Args:
        layer: convolution with ``kernel_size``, ``dilation``, ``padding`` and ``padding_mode``.
    """
    if layer.padding_mode == "zeros" or layer.padding == "valid":
        return 1.0
    square = 1
    for axis, (taps, dilation) in enumerate(zip(layer.kernel_size, layer.dilation, strict=True)):
        span = dilation * (taps - 1)
        before, after = (span // 2, span - span // 2) if layer.padding == "same" else (layer.padding[axis],) * 2
        width, excess = max(before, after), before + after - span
        if width == 0:
            continue
        if layer.padding_mode == "circular":
            square *= 1 + max(0, math.ceil(excess / width))
        elif layer.padding_mode == "reflect":
            square *= 2 if excess < width else 3
        else:
            square *= 1 + max(width, excess)
    return math.sqrt(square)


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
    return norm_at(weight, 1, find_peak(weight, 1, ()))


def conv_norm_bound(weight: Tensor, *, groups: int = 1, num_frequencies: int | None = None) -> Tensor:
    r"""Return an upper bound of the :math:`\ell_2` operator norm of a convolution, for every image size.

    The bound holds for zero padding of any width and for circular padding of at most half of the kernel; other padding
    can raise the norm, which :func:`certified_spectral_norm` takes into account. It holds for every dilation, because
    dilation only repeats the transfer function along the frequency axes, and for every stride, because striding only
    drops outputs.

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
    return norm_at(weight, groups, find_peak(weight, groups, grid_sizes(weight.shape[2:], num_frequencies)))


def grid_sizes(kernel: torch.Size, num_frequencies: int | None) -> tuple[int, ...]:
    """Return the number of frequencies for each kernel axis; axes of length one need one."""
    long_axes = [taps for taps in kernel if taps > 1]
    if num_frequencies is not None:
        check_int("num_frequencies", num_frequencies, minimum=max(kernel))
        return tuple(num_frequencies if taps > 1 else 1 for taps in kernel)
    angle = math.acos(_GRID_SLACK[len(long_axes)] ** (-1 / max(len(long_axes), 1)))
    return tuple(math.ceil(math.pi * (taps - 1) / (2 * angle)) if taps > 1 else 1 for taps in kernel)


@torch.no_grad()
def find_peak(weight: Tensor, groups: int, sizes: tuple[int, ...], dtype: torch.dtype | None = None) -> Peak:
    """Search the frequency grid for the largest transfer matrix and bound the operator norm.

    ``dtype`` is the precision in which the layer keeps its weight, where that is not the one of ``weight``.
    """
    dtype = weight.dtype if dtype is None else dtype
    taps = weight.shape[2:]
    scale = float(weight.abs().amax()) if weight.numel() else 0.0
    if scale == 0 or not math.isfinite(scale):
        return Peak(scale)
    kernel = (weight.detach().to(wide_dtype(weight)) / scale).reshape(groups, -1, weight.shape[1], taps.numel())
    if math.prod(sizes) * groups == 1:
        norm, vector = _largest_singular_value(kernel.sum(-1)[0])
        return Peak(norm * scale * rounding(weight, dtype, torch.float64), 0, (0.0,) * len(sizes), vector)

    # Real kernels have conjugate transfer matrices at opposite frequencies: half of the last long axis will do.
    last = max((axis for axis, size in enumerate(sizes) if size > 1), default=0)
    halved = [range(size // 2 + 1) if axis == last else range(size) for axis, size in enumerate(sizes)]
    grid = torch.tensor(list(itertools.product(*halved)), dtype=torch.float64)
    grid = (grid * (2 * math.pi) / torch.tensor(sizes)).to(kernel)  # (F, axes)
    # On GPUs in double precision, because TF32 would round complex products.
    precision = torch.complex128 if weight.is_cuda or dtype == torch.float64 else torch.complex64
    best, group, frequency = -math.inf, 0, grid[0]
    for block in grid.split(max(1, _BLOCK_ELEMENTS // max(1, weight.shape[0] * weight.shape[1]))):
        squares = torch.linalg.eigvalsh(_gram(_transfer(kernel, block, taps).to(precision)))[..., -1]  # (G, F)
        index = int(squares.argmax())
        if (value := float(squares.flatten()[index])) > best:
            best, group, frequency = value, index // len(block), block[index % len(block)]
    between = math.prod(math.cos(math.pi * (t - 1) / (2 * n)) for t, n in zip(taps, sizes, strict=True))
    bound = math.sqrt(max(best, 0.0)) / between * scale * rounding(weight, dtype, precision.to_real())
    at = tuple(frequency.tolist())
    return Peak(bound, group, at, _largest_singular_value(_matrix_at(kernel[group], at, taps))[1])


def norm_at(weight: Tensor, groups: int, peak: Peak) -> Tensor:
    """Return the bound of a peak as a differentiable function of the weight.

    With the left singular vector held fixed the gradient of the norm is exact, and costs one product with a vector.
    """
    if peak.bound == 0 or not math.isfinite(peak.bound) or peak.vector is None:
        return weight.sum() * 0 + peak.bound
    taps = weight.shape[2:]
    kernel = weight.to(wide_dtype(weight)).reshape(groups, -1, weight.shape[1], taps.numel())[peak.group]
    matrix = _matrix_at(kernel, peak.frequency, taps)
    norm = torch.linalg.vector_norm(peak.vector.to(matrix).conj() @ matrix)
    return (norm * (peak.bound / norm.detach())).to(weight.dtype)


def _matrix_at(kernel: Tensor, frequency: tuple[float, ...], taps: torch.Size) -> Tensor:
    """Return the transfer matrix of a kernel ``(O, I, T)`` at one frequency, real at zero."""
    if not any(frequency):
        return kernel.sum(-1)
    return _transfer(kernel[None], kernel.new_tensor([frequency]), taps)[0, 0]


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


def _largest_singular_value(matrix: Tensor) -> tuple[float, Tensor]:
    """Return the largest singular value of a matrix ``(O, I)`` and its left singular vector ``(O,)``."""
    norm, vector = root_of_largest_eigenvalue(_gram(matrix))
    if matrix.shape[0] > matrix.shape[1]:
        vector = matrix @ vector
        vector = vector / torch.linalg.vector_norm(vector)
    return norm, vector


def root_of_largest_eigenvalue(gram: Tensor) -> tuple[float, Tensor]:
    """Return the root of the largest eigenvalue of a Gram matrix, and its vector."""
    values, vectors = torch.linalg.eigh(gram)
    return math.sqrt(max(float(values[-1]), torch.finfo(torch.float32).tiny)), vectors[:, -1]


def rounding(weight: Tensor, dtype: torch.dtype, precision: torch.dtype) -> float:
    """Return a factor that covers rounding in the eigenvalues and in storing the normalized weight."""
    rank = min(weight.shape[0], weight[0].numel())
    stored = torch.finfo(dtype).eps * (4 + 2 * math.sqrt(rank))
    return 1 + stored + torch.finfo(precision).eps * (4 + max(weight.shape[:2]) ** 1.5)


def wide_dtype(value: Tensor) -> torch.dtype:
    """Return double precision where the device has it; also keeps autocast out of the bound."""
    return torch.float32 if value.device.type == "mps" else torch.float64
