"""A denoiser that minimizes an explicit learned energy of complex images, and that energy for reconstruction."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from monai.networks.layers.simplelayers import separable_filtering
from monai.networks.utils import pixelshuffle, pixelunshuffle
from monai.utils import ensure_tuple
from scipy.fft import dct
from torch import Tensor, nn

from monai_deqkan._checks import check_int, check_noise_level, check_range, check_shape, check_spatial_dims
from monai_deqkan.networks.layers.positive import positive, raw_of_positive

__all__ = ["WeaklyConvexRidgeDenoiser"]

_UNIT_LEVEL = 0.05  # noise level at which the first of the three coefficients alone makes the energy's weight
_NORM_GRID = 32  # frequencies per axis on which the norm of the kernels is found
_PART = 16  # kernels that are applied at a time


class WeaklyConvexRidgeDenoiser(nn.Module):
    r"""Denoise a complex image by minimizing the distance to it plus a learned energy.

    .. math:: R(x) = \sum_c \sum_i \psi_c\big(|(W_c x)_i|\big), \qquad
              \frac{\psi_c'(t)}{t} = \max\left(\varphi,
              \frac{1}{\sqrt{\max(1, t^2 / \tau_c^2)}\, \sqrt{1 + t^2 / (\beta_c \tau_c)^2}}\right)

    with kernels :math:`W_c` of zero mean, learned thresholds :math:`\tau_c > 0` and tails :math:`\beta_c > 1`. Small
    responses cost their square, larger ones their size, and those beyond :math:`\beta_c \tau_c` their logarithm only:
    edges are hardly smoothed. That is what convex functions cannot do, and what makes the energy weakly convex: it may
    have several local minima. The quotient never falls below a floor, so the largest responses cost their square again:
    without it, bright stripes that no measured line holds would cost next to nothing, and solves take longer to end.
    The same kernels see real and imaginary part, so a constant phase of the image does not matter.
    The second, third, ... set of kernels has 2, 4, ... times the spacing, on an image blurred accordingly.

    ``forward`` takes the image at a noise level :math:`s` some steps of accelerated gradient descent (Nesterov's)
    towards the minimum of :math:`\tfrac12 \|z - x\|^2 + \lambda(s) R(z)`, with a learned
    :math:`\log \lambda(s) = a_0 + a_1 l + a_2 l^2,\ l = \log(s / 0.05)`.
    In :class:`~monai_deqkan.networks.blocks.ReweightedCell` the energy itself is the prior: see :meth:`energy`,
    :meth:`weights` and :meth:`curvature`.

    Args:
        spatial_dims: number of spatial dimensions, 2 or 3.
        features: number of kernels of each set; a number for a single set.
        kernel_size: size of the kernels per axis, odd, at least 3.
        num_steps: number of gradient steps of ``forward``.
        threshold: :math:`\tau` to start from, in the unit of the image.
        tail: :math:`\beta` to start from, dimensionless, above 1.
        floor: :math:`\varphi`, dimensionless, at most 0.5; 0 for none.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> denoiser = WeaklyConvexRidgeDenoiser(spatial_dims=2, features=(8, 4))
        >>> denoiser(torch.randn(1, 2, 16, 16), noise_level=0.1).shape
        torch.Size([1, 2, 16, 16])

    Reference:
        A. Goujon, S. Neumayer and M. Unser, "Learning weakly convex regularizers for convergent image-reconstruction
        algorithms", SIAM J. Imaging Sci. 17 (2024) 91-115. There potentials are splines shared by all kernels, scaled
        by the noise level, kernels are compositions of three, and the whole is 1-weakly convex, so that denoising has
        one solution. Ours have two parameters each, and logarithmic tails like those of S. Roth and M. J. Black,
        "Fields of experts", Int. J. Comput. Vis. 82 (2009) 205-229; they take the size of complex responses, and
        nothing keeps the whole 1-weakly convex.
    """

    takes_noise_level = True

    def __init__(
        self,
        spatial_dims: int,
        features: int | Sequence[int] = (32, 24),
        *,
        kernel_size: int = 7,
        num_steps: int = 10,
        threshold: float = 0.0015,
        tail: float = 4.0,
        floor: float = 3e-4,
    ) -> None:
        super().__init__()
        self.spatial_dims = check_spatial_dims(spatial_dims)
        self.features = tuple(check_int("features", number) for number in ensure_tuple(features))
        if not self.features:
            raise ValueError("`features` must hold the number of kernels of one set at least; got none.")
        if check_int("kernel_size", kernel_size, minimum=3) % 2 == 0:
            raise ValueError(f"`kernel_size` must be odd; got {kernel_size}.")
        self.num_steps = check_int("num_steps", num_steps)
        check_range("threshold", threshold, 1e-6, 1e6)
        check_range("tail", tail, 1.0, 1e6, open_low=True)
        self.floor = check_range("floor", floor, 0.0, 0.5)
        start = _cosines(kernel_size, spatial_dims)
        self.raw_kernels = nn.ParameterList(_first(start, number) for number in self.features)
        self.raw_thresholds = nn.ParameterList(raw_of_positive(torch.full((n,), threshold)) for n in self.features)
        self.raw_tails = nn.ParameterList(raw_of_positive(torch.full((n,), tail - 1)) for n in self.features)
        # log of the weight over ten, for the speed at which it learns
        self.raw_level_weights = nn.Parameter(torch.tensor([0.28, 0.23, 0.06]))

    def kernels(self) -> list[Tensor]:
        """Return the kernels of each set, ``(features, 1, *kernel)``, of zero mean.

        All of them together have norm 1 on a grid of frequencies.
        """
        axes = tuple(range(2, 2 + self.spatial_dims))
        kernels = [raw - raw.mean(dim=axes, keepdim=True) for raw in self.raw_kernels]
        precise = torch.promote_types(kernels[0].dtype, torch.float32)
        power = torch.zeros([_NORM_GRID] * self.spatial_dims, dtype=precise, device=kernels[0].device)
        for index, kernel in enumerate(kernels):
            spectrum = torch.fft.fftn(kernel.to(precise), s=[_NORM_GRID] * self.spatial_dims, dim=axes)
            # A kernel of twice the spacing has twice the frequency.
            own = spectrum.abs().square().sum(dim=(0, 1))
            for axis in range(self.spatial_dims):
                own = own.index_select(axis, 2**index * torch.arange(_NORM_GRID, device=own.device) % _NORM_GRID)
            power = power + own * _blur_power(index, own)
        scale = power.amax().clamp_min(1e-20).rsqrt().to(kernels[0].dtype)
        return [scale * kernel for kernel in kernels]

    def weights(self, image: Tensor, kernels: list[Tensor]) -> list[Tensor]:
        r"""Return :math:`\psi_c'(t) / t` at the responses of an image ``(B, 2, *space)``.

        They are what makes :meth:`curvature` the gradient of the energy at the image, and its quadratic form there an
        upper bound of the energy elsewhere.

        Returns:
            In ``(0, 1]``, for each few kernels, in the layout of their responses.
        """
        return [self._weight(self._response(image, part), part) for part in _parts(kernels)]

    def _weight(self, response: Tensor, part: _Part) -> Tensor:
        square, tail = self._squares(response, part), self._tail(part)
        return (square.clamp_min(1.0) * (1 + square / tail.square())).rsqrt().clamp_min(self.floor)

    def curvature(self, image: Tensor, kernels: list[Tensor], weights: list[Tensor]) -> Tensor:
        r"""Apply :math:`\sum_c W_c^\top \operatorname{diag}(w_c)\, W_c` to an image ``(B, 2, *space)``.

        It is self-adjoint and positive semidefinite for positive weights.
        """
        given = iter(weights)
        return self._filtered(image, kernels, lambda response, part: next(given))

    def diagonals(self, image: Tensor, kernels: list[Tensor], weights: list[Tensor]) -> tuple[Tensor, Tensor]:
        r"""Return about the diagonals of :meth:`curvature` among pixels and among frequencies.

        Rough near the border, and for sets of wider spacing: good enough for a preconditioner.

        Args:
            image: of the shape that matters, ``(B, 2, *space)``.
            kernels: as for :meth:`weights`.
            weights: what that returned.

        Returns:
            Two real tensors ``(B, *space)``; frequencies in the order of ``torch.fft``.
        """
        batch, space, axes = len(image), image.shape[2:], tuple(range(-self.spatial_dims, 0))
        pixels = torch.zeros_like(image[:, :1])
        frequencies = torch.zeros_like(image[:, 0])
        for part, weight in zip(_parts(kernels), weights, strict=True):
            spacing = 2**part.set_index
            spread = _joined(_correlated(weight, part.kernel.square()), spacing, (batch, 1, *space))
            # What the squares of the blur, a triangle of width 2 spacing - 1, add up to per axis.
            squares = (2 * spacing**2 + 1) / (3 * spacing**3)
            pixels = pixels + squares**self.spatial_dims * _blurred(spread, part.set_index)
            mean = weight.mean(dim=axes).view(batch, -1, len(part.kernel)).mean(dim=1)
            sizes = [2 * part.kernel.shape[-1]] * self.spatial_dims  # no autocorrelation wraps around
            power = torch.fft.fftn(part.kernel.squeeze(1), s=sizes, dim=axes).abs().square()
            correlation = torch.fft.ifftn(torch.tensordot(mean, power, dims=1), dim=axes).real
            spectrum = torch.fft.fftn(_placed(correlation, spacing, space), dim=axes).real
            frequencies = frequencies + spectrum * _blur_power(part.set_index, frequencies[0])
        return pixels.squeeze(1), frequencies.clamp_min(0.0)

    def gradient(self, image: Tensor, kernels: list[Tensor]) -> Tensor:
        """Return the gradient of the energy at an image ``(B, 2, *space)``."""
        return self._filtered(image, kernels, self._weight)

    def energy(self, image: Tensor) -> Tensor:
        """Return the energy of images ``(B, 2, *space)``: ``(B,)``, in the squared unit of the image."""
        check_shape("image", image, ("B", 2, *"HWD"[: self.spatial_dims]))
        total = torch.zeros(len(image), dtype=image.dtype, device=image.device)
        for part in _parts(self.kernels()):
            square = self._squares(self._response(image, part), part)
            threshold, tail = (
                self._column(positive(self.raw_thresholds[part.set_index][part.features])),
                self._tail(part),
            )
            # Both without a difference of nearly equal numbers, which would leave nothing of small responses.
            small = square.clamp_max(1.0)
            below = tail * small / ((tail.square() + small).sqrt() + tail)
            end = self._end(tail)  # from where the quotient is the floor
            above = _asinh_increase(square.clamp_min(1.0).minimum(end).sqrt(), tail)
            beyond = self.floor / 2 * (square - end).clamp_min(0.0) if self.floor else 0.0
            # The pixels of a set of wider spacing are spread over several samples.
            total = total + (threshold.square() * (below + tail * above + beyond)).reshape(len(image), -1).sum(dim=1)
        return total

    def level_weight(self, noise_level: Tensor) -> Tensor:
        r"""Return :math:`\lambda(s)`, dimensionless, for noise levels in the unit of the image."""
        ratio = (noise_level / _UNIT_LEVEL).log()
        a, b, c = self.raw_level_weights
        return positive(a + b * ratio + c * ratio.square())

    def forward(self, image: Tensor, noise_level: Tensor | float | None = None) -> Tensor:
        """Denoise an image ``(B, 2, *space)``.

        Args:
            image: real and imaginary part, with a brightness of about 1.
            noise_level: standard deviation of each channel's noise, positive, in the unit of the image: a number, or
                ``(B,)``.

        Raises:
            ValueError: if the image has another rank or number of channels, or the noise level is missing or of another
                shape.
        """
        check_shape("image", image, ("B", 2, *"HWD"[: self.spatial_dims]))
        level = check_noise_level(noise_level, image, True)
        weight = self.level_weight(torch.as_tensor(level, dtype=image.dtype, device=image.device))
        kernels = self.kernels()
        z, ahead, momentum = image, image, 1.0
        for _ in range(self.num_steps):
            slope = ahead - image + weight * self.gradient(ahead, kernels)
            last, z = z, ahead - slope / (1 + weight)
            following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
            ahead = z + (momentum - 1) / following * (z - last)
            momentum = following
        return z

    def _column(self, values: Tensor) -> Tensor:
        return values.view(-1, *[1] * self.spatial_dims)

    def _tail(self, part: _Part) -> Tensor:
        return self._column(1 + positive(self.raw_tails[part.set_index][part.features]))

    def _end(self, tail: Tensor) -> Tensor:
        """Return the square of the response, in thresholds, at which the quotient reaches the floor."""
        if not self.floor:
            return torch.full_like(tail, math.inf)
        # The root of s (1 + s / tail^2) = 1 / floor^2, without a difference of large numbers.
        return 2 / self.floor**2 / (1 + (1 + 4 / (self.floor * tail).square()).sqrt())

    def _squares(self, response: Tensor, part: _Part) -> Tensor:
        """Return squared sizes of complex responses over squared thresholds, ``(N, features, *space)``."""
        threshold = self._column(positive(self.raw_thresholds[part.set_index][part.features]))
        return response.square().sum(dim=1) / threshold.square()

    def _response(self, image: Tensor, part: _Part) -> Tensor:
        """Return the responses to some kernels, ``(N, 2, features, *space)``.

        A set of spacing ``s`` sees ``s`` interleaved images per axis, which are samples of their own:
        ``N = B s^spatial_dims``.
        """
        # Channels last makes convolutions of few channels several times faster on a CPU.
        layout = torch.channels_last if self.spatial_dims == 2 else torch.channels_last_3d
        x = _split(_blurred(image, part.set_index), 2**part.set_index).flatten(0, 1).unsqueeze(1)
        response = _CONVOLVE[self.spatial_dims](
            x, part.kernel.contiguous(memory_format=layout), padding=part.kernel.shape[-1] // 2
        )
        return response.unflatten(0, (-1, 2))

    def _filtered(self, image: Tensor, kernels: list[Tensor], weigh: Callable[[Tensor, _Part], Tensor]) -> Tensor:
        """Sum the adjoints of weighted responses."""
        total = torch.zeros_like(image)
        for part in _parts(kernels):
            response = self._response(image, part)
            weight = weigh(response, part).unsqueeze(1)
            response = response * weight if torch.is_grad_enabled() else response.mul_(weight)
            images = _correlated(response.flatten(0, 1), part.kernel).unflatten(0, (-1, 2)).squeeze(2)
            joined = _joined(images, 2**part.set_index, image.shape)
            total = total + _blurred(joined, part.set_index, adjoint=True)
        return total


def _asinh_increase(size: Tensor, tail: Tensor) -> Tensor:
    r"""Return :math:`\operatorname{asinh}(s / t) - \operatorname{asinh}(1 / t)` for sizes of at least one."""
    # asinh(s / t) = log(s + sqrt(s^2 + t^2)) - log t; the difference of the two roots as a quotient.
    start, end = (1 + tail.square()).sqrt(), (size.square() + tail.square()).sqrt()
    more = (size - 1) * (1 + (size + 1) / (start + end))
    return torch.log1p(more / (1 + start))


class _Part(NamedTuple):
    """Some kernels of a set: its index, their places in it, and the kernels."""

    set_index: int
    features: slice
    kernel: Tensor


def _parts(kernels: list[Tensor]) -> Iterator[_Part]:
    """Take the kernels few at a time: less memory, and on a CPU twice as fast where large blocks are slow to get."""
    for index, kernel in enumerate(kernels):
        for start in range(0, len(kernel), _PART):
            features = slice(start, start + _PART)
            yield _Part(index, features, kernel[features])


_CONVOLVE = {2: F.conv2d, 3: F.conv3d}
_BLOCK = {2: 4, 3: 2}  # pixels per axis that one output position of `_correlated` holds


def _correlated(response: Tensor, kernel: Tensor) -> Tensor:
    """Apply the adjoint of a convolution of one channel to ``(N, features, *space)``: ``(N, 1, *space)``.

    It is a convolution with a single output, for which CPUs have no fast kernel. So blocks of pixels are the channels
    of a convolution of that stride, with kernels moved by the pixel's place in the block: three times faster.
    """
    dims, size = response.ndim - 2, kernel.shape[-1]
    block, axes = _BLOCK[dims], tuple(range(2, response.ndim))
    mirrored = kernel.flip(axes).transpose(0, 1)
    moved = [
        F.pad(mirrored, [end for place in reversed(places) for end in (place, block - 1 - place)])
        for places in itertools.product(range(block), repeat=dims)
    ]
    layout = torch.channels_last if dims == 2 else torch.channels_last_3d
    bank = torch.cat(moved).contiguous(memory_format=layout)
    space = response.shape[2:]
    if any(n % block for n in space):  # else no copy, which costs as much as the convolution
        response = F.pad(response, [end for n in reversed(space) for end in (0, -n % block)])
    blocks = _CONVOLVE[dims](response, bank, stride=block, padding=size // 2)
    return _cropped(pixelshuffle(blocks, dims, block), space)


def _split(image: Tensor, spacing: int) -> Tensor:
    """Return the interleaved images of every ``spacing``-th pixel as samples; zeros fill up the last ones."""
    if spacing == 1:
        return image
    channels, dims = image.shape[1], image.ndim - 2
    image = F.pad(image, [end for n in reversed(image.shape[2:]) for end in (0, -n % spacing)])
    return pixelunshuffle(image, dims, spacing).unflatten(1, (channels, -1)).transpose(1, 2).flatten(0, 1)


def _joined(parts: Tensor, spacing: int, shape: Sequence[int]) -> Tensor:
    """Undo `_split` to an image of a shape; on what it filled up, its adjoint."""
    if spacing == 1:
        return parts
    places = parts.unflatten(0, (shape[0], -1)).transpose(1, 2).flatten(1, 2)
    return _cropped(pixelshuffle(places, parts.ndim - 2, spacing), shape[2:])


def _cropped(image: Tensor, space: Sequence[int]) -> Tensor:
    for axis, size in enumerate(space, start=2):
        image = image.narrow(axis, 0, size)
    return image


def _blurred(x: Tensor, times: int, *, adjoint: bool = False) -> Tensor:
    """Blur ``(B, C, *space)`` by (1, 2, 1) / 4 per axis, once for each halving of the sampling, zero outside."""
    # Each is its own adjoint, but near the border their order matters.
    for step in reversed(range(times)) if adjoint else range(times):
        kernel = x.new_zeros(2 ** (step + 1) + 1)
        kernel[0], kernel[2**step], kernel[-1] = 0.25, 0.5, 0.25
        x = separable_filtering(x, [kernel] * (x.ndim - 2))
    return x


def _blur_power(times: int, like: Tensor) -> Tensor:
    """Return the squared transfer function of `_blurred` on a grid of frequencies, of the shape of ``like``."""
    power = torch.ones_like(like)
    for axis, size in enumerate(like.shape):
        frequency = 2 * math.pi * torch.fft.fftfreq(size, dtype=like.dtype, device=like.device)
        line = torch.ones_like(frequency)
        for step in range(times):
            line = line * (0.5 + 0.5 * torch.cos(2**step * frequency))
        power = power * line.square().view([-1 if other == axis else 1 for other in range(like.ndim)])
    return power


def _placed(correlation: Tensor, spacing: int, space: Sequence[int]) -> Tensor:
    """Return ``(B, *sizes)``, offset zero first, as a function on ``space`` whose offsets are ``spacing`` times those.

    What does not fit wraps around.
    """
    for axis, size in enumerate(space, start=1):
        number = correlation.shape[axis]
        offsets = torch.arange(number, device=correlation.device)
        offsets = spacing * torch.where(offsets < number - number // 2, offsets, offsets - number) % size
        shape = [*correlation.shape[:axis], size, *correlation.shape[axis + 1 :]]
        correlation = correlation.new_zeros(shape).index_add(axis, offsets, correlation)
    return correlation


def _cosines(size: int, spatial_dims: int) -> Tensor:
    """Return the basis of the discrete cosine transform without the constant, slow ones first: ``(N, 1, *size)``."""
    lines = dct(np.eye(size), norm="ortho", axis=0)
    orders = sorted(itertools.product(range(size), repeat=spatial_dims), key=lambda order: (sum(order), order))[1:]
    basis = [reduce(np.multiply.outer, [lines[number] for number in order]) for order in orders]
    return torch.from_numpy(np.stack(basis)).to(torch.get_default_dtype()).unsqueeze(1)


def _first(basis: Tensor, number: int) -> Tensor:
    """Return so many kernels of a basis, random ones after its last."""
    missing = max(0, number - len(basis))
    scale = 1 / math.sqrt(basis[0].numel())
    return torch.cat((basis[:number], scale * torch.randn(missing, *basis.shape[1:])))
