"""A denoiser that never expands: gradient steps on learned convex ridge functions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from monai.networks.layers.factories import Conv
from torch import Tensor, nn

from monai_deqkan._checks import check_int, check_noise_level, check_range, check_shape, check_spatial_dims
from monai_deqkan.networks.layers.lipschitz import certified_spectral_norm, keeps_certified_norm
from monai_deqkan.networks.layers.operator_norm import conv_norm_bound

__all__ = ["ConvexRidgeDenoiser"]


class ConvexRidgeDenoiser(nn.Module):
    r"""Denoise by a few gradient steps on learned convex functions; 1-Lipschitz by construction.

    Layer :math:`l` is a gradient step on :math:`\sum_c \psi_c\big((W_l x)_c\big)` with convex :math:`\psi_c`,

    .. math:: x \mapsto x - \tau_l\, W_l^\top \sigma_l(W_l x), \qquad \sigma(t) = \min(\max(t, -\lambda), \lambda),

    with a convolution of certified norm :math:`\|W_l\| \le 1`, learned thresholds :math:`\lambda > 0` per feature and
    step sizes :math:`0 < \tau_l < 2`. As :math:`\sigma` is monotone with slopes in :math:`[0, 1]`, each layer is
    nonexpansive, and so is their composition. Unlike a plain network of certified layers, which loses signal at every
    activation, it starts close to the identity and can leave an image as it is.

    With ``phase_invariant`` a complex image, real and imaginary part as two channels, is denoised the same way whatever
    its phase: both parts go through the same real kernels, and

    .. math:: \sigma(t) = t\, \min(1, \lambda / |t|)

    limits the size of the complex responses. With kernels that are differences, this is total variation with Huber's
    functions. Sums of :math:`\psi_c(|(W_l x)_c|)` are convex too, so all of the above holds.

    Args:
        spatial_dims: number of spatial dimensions, 2 or 3.
        channels: number of image channels, in and out.
        num_layers: number of gradient steps.
        features: number of features :math:`c` of each step.
        kernel_size: size of the kernels, odd.
        threshold: :math:`\lambda` to start from, in the unit of the image, in ``[1e-6, 1e6]``.
        num_repeats: how often all layers are applied, one after the other and again: more steps of the same functions.
        phase_invariant: whether the two channels are the parts of a complex number, see above.
        blind: False makes ``forward`` take the noise level :math:`s`, and thresholds be in its unit: the denoiser is
            :math:`s\, D(x / s)`, nonexpansive for every level.

    Raises:
        ValueError: if a number is out of range, or ``phase_invariant`` is asked for with other than two channels.

    Example:
        >>> denoiser = ConvexRidgeDenoiser(spatial_dims=2, channels=2)
        >>> denoiser(torch.zeros(1, 2, 8, 8)).shape, denoiser.certified_lipschitz()
        (torch.Size([1, 2, 8, 8]), 1.0)

    Reference:
        A. Goujon et al., "A neural-network-based convex regularizer for inverse problems", IEEE Trans. Comput. Imaging
        9 (2023) 781-795: one such step, with learned splines for :math:`\sigma` (ours are the slopes of Huber
        functions). Several, each with functions of its own, are the layers of L. Meunier et al., "A dynamical system
        perspective for Lipschitz neural networks", ICML 2022, there with ReLU for :math:`\sigma`.
    """

    def __init__(
        self,
        spatial_dims: int,
        channels: int = 2,
        num_layers: int = 4,
        features: int = 16,
        *,
        kernel_size: int = 5,
        threshold: float = 0.015,
        num_repeats: int = 1,
        phase_invariant: bool = False,
        blind: bool = True,
    ) -> None:
        super().__init__()
        self.spatial_dims = check_spatial_dims(spatial_dims)
        self.channels = check_int("channels", channels)
        check_int("num_layers", num_layers)
        check_int("features", features)
        if check_int("kernel_size", kernel_size) % 2 == 0:
            raise ValueError(f"`kernel_size` must be odd; got {kernel_size}.")
        check_range("threshold", threshold, 1e-6, 1e6)
        self.num_repeats = check_int("num_repeats", num_repeats)
        if phase_invariant and channels != 2:
            raise ValueError(f"`phase_invariant` needs 2 channels, real and imaginary part; got {channels}.")
        self.phase_invariant = phase_invariant
        self.takes_noise_level = not blind
        inputs = 1 if phase_invariant else channels
        self.analysis = nn.ModuleList(
            certified_spectral_norm(
                Conv[Conv.CONV, spatial_dims](inputs, features, kernel_size, padding=kernel_size // 2, bias=False)
            )
            for _ in range(num_layers)
        )
        # Softplus of it is the threshold; written without exp(threshold), which overflows.
        inverse = threshold + math.log(-math.expm1(-threshold))
        self.raw_threshold = nn.Parameter(torch.full((num_layers, features), inverse))
        self.raw_step_size = nn.Parameter(torch.zeros(num_layers))
        self._memo: tuple[list[Tensor], list[float]] | None = None  # kernels, and their norms

    @torch.jit.unused
    def certified_lipschitz(self) -> float:
        r"""Return the Lipschitz constant, for every image size: 1 while the kernels are kept normalized.

        After `remove_spectral_norm` it is computed from the present kernels, as the product of
        :math:`\max(1, \tau_l \|W_l\|^2 - 1)`, over all repeats; their norms again only when they have changed.
        """
        # Nothing can be computed while a graph is traced; the kernels are then those that were normalized.
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if traced or all(map(keeps_certified_norm, self.analysis)):
            return 1.0
        steps = (2 * torch.sigmoid(self.raw_step_size.detach())).tolist()
        norms = self._kernel_norms([torch.as_tensor(layer.weight).detach() for layer in self.analysis])
        once = math.prod(max(1.0, step * norm**2 - 1.0) for step, norm in zip(steps, norms, strict=True))
        return once**self.num_repeats

    @torch.jit.unused
    def _kernel_norms(self, kernels: list[Tensor]) -> list[float]:
        # Copies, not the tensors' version counters: assignments through `.data` do not count.
        if self._memo is None or not all(map(_is_same, self._memo[0], kernels)):
            self._memo = ([kernel.clone() for kernel in kernels], [float(conv_norm_bound(k)) for k in kernels])
        return self._memo[1]

    def forward(self, image: Tensor, noise_level: Tensor | float | None = None) -> Tensor:
        """Denoise an image ``(B, channels, *space)``.

        Args:
            image: the image.
            noise_level: standard deviation of each channel's noise, positive, in the unit of the image: a number, or
                ``(B,)``; only with ``blind=False``.

        Raises:
            ValueError: if the image has another rank or number of channels, or the noise level is missing, of another
                shape, or given to a blind denoiser.
        """
        check_shape("image", image, ("B", self.channels, *"HWD"[: self.spatial_dims]))
        unit = check_noise_level(noise_level, image, self.takes_noise_level)
        return self._denoise(image) if unit is None else unit * self._denoise(image / unit)

    def _denoise(self, image: Tensor) -> Tensor:
        convolve, transpose, layout = (
            (F.conv2d, F.conv_transpose2d, torch.channels_last)
            if self.spatial_dims == 2
            else (F.conv3d, F.conv_transpose3d, torch.channels_last_3d)
        )
        thresholds = F.softplus(self.raw_threshold).view(*self.raw_threshold.shape, *[1] * (self.spatial_dims + 1))
        steps = 2 * torch.sigmoid(self.raw_step_size)
        # The thresholds are moved into the kernels, sigma(t) = lambda hardtanh(t / lambda), which spares passes over
        # the features; channels last makes convolutions of few image channels several times faster on a CPU.
        kernels = []
        for layer, threshold, step in zip(self.analysis, thresholds, steps, strict=True):
            kernel = torch.as_tensor(layer.weight)
            kernels.append((kernel / threshold, step * threshold * kernel))
        x = image.flatten(0, 1).unsqueeze(1) if self.phase_invariant else image
        for _ in range(self.num_repeats):
            for analysis, synthesis in kernels:
                padding = analysis.shape[-1] // 2
                response = convolve(x.contiguous(memory_format=layout), analysis, padding=padding)
                response = limited(response) if self.phase_invariant else F.hardtanh(response)
                x = x - transpose(response, synthesis, padding=padding)
        return x.reshape(image.shape).contiguous()


def limited(response: Tensor) -> Tensor:
    """Limit the size of complex numbers to one; real and imaginary parts take turns along the first axis."""
    parts = response.unflatten(0, (-1, 2))
    # The gradient of a root at zero is infinite; what is below one needs none.
    return (parts * parts.square().sum(dim=1, keepdim=True).clamp_min(1.0).rsqrt()).flatten(0, 1)


def _is_same(known: Tensor, kernel: Tensor) -> bool:
    return known.dtype == kernel.dtype and known.device == kernel.device and torch.equal(known, kernel)
