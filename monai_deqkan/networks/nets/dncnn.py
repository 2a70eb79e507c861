"""A denoiser of plain convolutions, optionally with a certified Lipschitz constant."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

import torch
from monai.networks.layers.factories import Conv
from monai.networks.layers.utils import get_act_layer, get_norm_layer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from monai_deqkan._checks import check_choice, check_int, check_range, check_spatial_dims
from monai_deqkan.networks.layers.lipschitz import certified_spectral_norm, keeps_certified_norm
from monai_deqkan.networks.layers.nonexpansive_norm import NonexpansiveGroupNorm
from monai_deqkan.networks.layers.operator_norm import conv_norm_bound

__all__ = ["DnCNN"]

_POWER_ITERATIONS = 15  # as torch does for the first weights


class DnCNN(nn.Module):
    r"""Denoise an image by a stack of convolutions that predicts the noise.

    .. math:: D(x) = x - N(x) \text{ (residual)} \quad\text{or}\quad D(x) = N(x), \qquad
              N = W_n \circ \sigma \circ W_{n-1} \circ \dots \circ \sigma \circ W_1

    Without bias and normalization, and with ReLU, the map is homogeneous, :math:`D(s x) = s D(x)` for :math:`s > 0`:
    the input may have any unit.

    With ``spectral_norm="certified"`` every convolution has norm at most ``lipschitz_bound ** (1 / num_layers)`` for
    every image size, so :math:`N` has Lipschitz constant ``lipschitz_bound``. Its initialization passes the signal on:
    the first layer maps to pairs of opposite features, of which ReLU keeps half each, the hidden layers are close to
    the identity, and the last one joins the pairs again. (With random kernels of norm one the output of 17 layers
    would be about 1e-8 of the input.)

    ``spectral_norm="spectral"`` is the published practice, torch's spectral norm of the kernel as a matrix with one row
    per output channel, found by one power iteration per reading in training. It certifies nothing: the true norm of a
    layer with kernels :math:`k \times k` is up to :math:`k` times as large (1.6 to 3.0 were measured for
    :math:`k = 3`), to the power of ``num_layers`` for the network. The initialization is that of the certified form.
    During the solve of a :class:`~monai_deqkan.networks.layers.DEQLayer` the weights stay constant.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input.
        out_channels: channels of the output; equal to ``in_channels`` if ``residual``.
        num_layers: number of convolutions, at least 2.
        features: channels between them.
        kernel_size: odd size of every kernel.
        residual: whether the network predicts what is to be taken off the input.
        act: activation between the convolutions, as in MONAI's networks. With a certificate: ReLU, ReLU6, LeakyReLU,
            ELU, tanh or sigmoid with a slope of at most one.
        norm: normalization after the hidden convolutions, as in MONAI's networks; with a certificate none or
            ``"nonexpansive_group"`` (:class:`~monai_deqkan.networks.layers.NonexpansiveGroupNorm`), which is not
            homogeneous.
        bias: whether the convolutions have a bias.
        spectral_norm: ``"certified"``, ``"spectral"`` or ``None``.
        lipschitz_bound: Lipschitz constant of :math:`N`, dimensionless; only with ``spectral_norm="certified"``.

    Raises:
        ValueError: for sizes out of range, a residual between different numbers of channels, or settings that leave
            no certificate.

    Example:
        >>> net = DnCNN(spatial_dims=2, in_channels=2, out_channels=2, num_layers=3, features=8)
        >>> net(torch.zeros(1, 2, 16, 16)).shape
        torch.Size([1, 2, 16, 16])

    Reference:
        K. Zhang et al., "Beyond a Gaussian denoiser: residual learning of deep CNN for image denoising", IEEE Trans.
        Image Process. 26 (2017) 3142-3155. They use batch normalization (here ``norm="batch"``) and a bias in the
        first layer; neither is the default here, because batch normalization couples the samples and no Lipschitz
        constant survives it. ``norm="batch", spectral_norm="spectral"`` is close to E. Ryu et al., "Plug-and-play
        methods provably converge with properly trained denoisers", ICML 2019, who iterate on the convolution, which
        approaches its norm from below. Initialization with a spectral norm: D. Balduzzi et al., "The shattered
        gradients problem", ICML 2017 (mirrored features), with delta kernels as in L. Xiao et al., ICML 2018.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        num_layers: int = 17,
        features: int = 64,
        *,
        kernel_size: int = 3,
        residual: bool = True,
        act: str | tuple[str, dict[str, Any]] = "relu",
        norm: str | tuple[str, dict[str, Any]] | None = None,
        bias: bool = False,
        spectral_norm: str | None = None,
        lipschitz_bound: float = 1.0,
    ) -> None:
        super().__init__()
        check_spatial_dims(spatial_dims)
        check_int("num_layers", num_layers, minimum=2)
        check_choice("spectral_norm", spectral_norm, (None, "spectral", "certified"))
        if check_int("kernel_size", kernel_size) % 2 == 0:
            raise ValueError(f"`kernel_size` must be odd, so that the image keeps its size; got {kernel_size}.")
        if residual and in_channels != out_channels:
            raise ValueError(
                f"A residual network needs as many output as input channels; got {in_channels} and {out_channels}. "
                "Set `residual=False`, or make them equal."
            )
        self.residual = residual
        self.lipschitz_bound = check_range("lipschitz_bound", lipschitz_bound, 0, open_low=True, open_high=True)
        self.spectral_norm = spectral_norm
        self.is_certified = spectral_norm == "certified"
        if not self.is_certified and lipschitz_bound != 1.0:
            raise ValueError("`lipschitz_bound` acts only with `spectral_norm='certified'`. Set both, or neither.")

        channels = [check_int("in_channels", in_channels)]
        channels += [check_int("features", features)] * (num_layers - 1)
        channels += [check_int("out_channels", out_channels)]
        layers: list[nn.Module] = []
        for index in range(num_layers):
            layers.append(
                Conv[Conv.CONV, spatial_dims](
                    channels[index], channels[index + 1], kernel_size, padding=kernel_size // 2, bias=bias
                )
            )
            if 0 < index < num_layers - 1 and norm is not None:
                layers.append(get_norm_layer(norm, spatial_dims=spatial_dims, channels=features))
            if index < num_layers - 1:
                layers.append(get_act_layer(act))
        self.layers = nn.Sequential(*layers)
        self._memo: tuple[list[Tensor], float] | None = None  # weights, and the product of their norms
        if self.is_certified:
            _check_nonexpansive(layers, act, norm)
        self.reset_parameters()
        for layer in filter(_is_convolution, layers):
            if self.is_certified:
                certified_spectral_norm(layer, self.lipschitz_bound ** (1 / num_layers))
            elif spectral_norm == "spectral":
                nn.utils.parametrizations.spectral_norm(layer)

    def forward(self, x: Tensor) -> Tensor:
        """Denoise an image ``(B, C, *space)``, any unit.

        Returns:
            Image of shape ``(B, out_channels, *space)``, in the unit of ``x``.
        """
        return x - self.layers(x) if self.residual else self.layers(x)

    @torch.jit.unused
    def certified_lipschitz(self) -> float:
        r"""Return a certified :math:`\ell_2` Lipschitz constant of the whole map, for every image size.

        It is ``lipschitz_bound``, plus one for a residual network. Without a certified spectral norm, or after
        `remove_spectral_norm`, it is computed from the present weights (about 0.1 s per layer of 64 features, and
        usually large; again only when they have changed), and infinite if activation or normalization allow none. It is
        infinite with ``spectral_norm="spectral"``, whose weights change from reading to reading in training.
        """
        convolutions = [layer for layer in self.layers if _is_convolution(layer)]
        # Nothing can be computed while a graph is traced; the weights are then those that were normalized.
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if self.is_certified and (traced or all(map(keeps_certified_norm, convolutions))):
            constant = self.lipschitz_bound
        elif any(map(parametrize.is_parametrized, convolutions)) and not self.is_certified:
            return math.inf
        elif all(_is_convolution(layer) or _is_nonexpansive(layer) for layer in self.layers):
            constant = self._norm_product([layer.weight for layer in convolutions])
        else:
            return math.inf
        return constant + 1.0 if self.residual else constant

    @torch.jit.unused
    @torch.no_grad()
    def _norm_product(self, weights: list[Tensor]) -> float:
        memo = self._memo
        # Copies, not the tensors' version counters: assignments through `.data` do not count.
        if memo is None or not all(_is_same(known, weight) for known, weight in zip(memo[0], weights, strict=True)):
            product = math.prod(float(conv_norm_bound(weight)) for weight in weights)
            self._memo = memo = ([weight.detach().clone() for weight in weights], product)
        return memo[1]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights: He's normal ones, or those that pass the signal on with a spectral norm; biases are 0."""
        convolutions = [layer for layer in self.layers if _is_convolution(layer)]
        in_channels, half = convolutions[0].in_channels, convolutions[0].out_channels // 2
        mix = nn.init.orthogonal_(torch.empty(half, in_channels)) if half else torch.zeros(0, in_channels)
        for layer in convolutions:
            if layer.bias is not None:
                layer.bias.zero_()
            weight = layer.get_parameter(
                "parametrizations.weight.original" if parametrize.is_parametrized(layer) else "weight"
            )
            if self.spectral_norm is None:
                nn.init.kaiming_normal_(weight, nonlinearity="relu")
                continue
            # Noise of norm near 0.02 makes the features differ.
            nn.init.normal_(weight, std=0.01 / math.sqrt(weight[0, 0].numel() * max(weight.shape[:2])))
            center = weight.flatten(2)[..., weight[0, 0].numel() // 2]  # (out, in), a view
            if layer is convolutions[0]:
                center[: 2 * half] += torch.cat((mix, -mix)).to(center)
            elif layer is convolutions[-1]:
                join = torch.eye(len(center), in_channels) @ torch.cat((mix, -mix)).T
                center[:, : 2 * half] += join.to(center)
            else:
                center += torch.eye(len(center)).to(center)
        if self.spectral_norm == "spectral":
            _repeat_power_iterations(convolutions)


def _check_nonexpansive(layers: list[nn.Module], act: object, norm: object) -> None:
    """Raise an error if an activation or normalization between the convolutions may expand."""
    for layer in layers:
        if not _is_convolution(layer) and not _is_nonexpansive(layer):
            raise ValueError(
                "With a certified spectral norm `act` must have a slope of at most one ('relu', 'relu6', 'leakyrelu', "
                "'elu', 'tanh' or 'sigmoid') and `norm` must be None or 'nonexpansive_group'; got "
                f"act={act!r} and norm={norm!r}: {type(layer).__name__} may expand."
            )


@torch.no_grad()
def _repeat_power_iterations(convolutions: list[Any]) -> None:
    """Bring the singular vectors of new weights near: each reading in training mode is one power iteration."""
    for layer in convolutions:
        if parametrize.is_parametrized(layer, "weight"):
            was_training = layer.training
            layer.train()
            for _ in range(_POWER_ITERATIONS):
                _ = layer.weight
            layer.train(was_training)


def _is_same(known: Tensor, weight: Tensor) -> bool:
    return known.dtype == weight.dtype and known.device == weight.device and torch.equal(known, weight)


def _is_convolution(layer: nn.Module) -> TypeGuard[nn.Conv2d | nn.Conv3d]:
    return isinstance(layer, (nn.Conv2d, nn.Conv3d))


def _is_nonexpansive(layer: nn.Module) -> bool:
    """Tell whether a layer is an activation or a normalization whose Lipschitz constant is known to be at most one."""
    if isinstance(layer, nn.LeakyReLU):
        return abs(layer.negative_slope) <= 1
    if isinstance(layer, nn.ELU):
        return abs(layer.alpha) <= 1
    return isinstance(layer, (nn.ReLU, nn.ReLU6, nn.Tanh, nn.Sigmoid, nn.Identity, NonexpansiveGroupNorm))
