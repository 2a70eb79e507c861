"""Integer weights for KAN layers."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from monai_deqkan._checks import check_finite, check_int
from monai_deqkan.networks.layers.kan_channels import channel_edges, grid_inputs, layer_edges
from monai_deqkan.networks.layers.kan_importance import channel_features
from monai_deqkan.networks.layers.kan_inputs import kan_layers
from monai_deqkan.networks.layers.kan_layer import KANLayer
from monai_deqkan.networks.layers.plain_weight import make_weight_plain, weight_parametrizations

__all__ = ["KANDequantizer", "dequantize_kan", "quantize_kan"]

_FEW = 16  # weights per feature and output below which features share one scale

_RIDGE = 1e-6  # relative to the mean diagonal of the features' moments: keeps errors that are moved small


class KANDequantizer(nn.Module):
    """Parametrization that turns integers into the weight of a KAN layer; registered by :func:`quantize_kan`.

    Args:
        scale: unit of the integers, broadcast over ``(out, F, in / groups * kernel elements)``.
    """

    scale: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, codes: Tensor) -> Tensor:
        """Return the weight of ``codes``, int8 of the weight's shape."""
        parts = codes.reshape(codes.shape[0], self.scale.shape[1], -1)
        return (parts.to(self.scale.dtype) * self.scale).reshape(codes.shape)


def quantize_kan(network: nn.Module, bits: int = 8) -> nn.Module:
    r"""Return a copy of a network whose KAN layers hold their weights as 8-bit integers.

    .. math:: w \approx s\, q, \qquad s = \max |w| / (2^{b-1} - 1), \quad q \in \{-(2^{b-1} - 1), \dots, 2^{b-1} - 1\}

    with one scale :math:`s` per output and feature (per output where a feature has few weights). An edge's integers are
    the nearest ones, or those near them whose errors make up for each other, whichever changes its function less in
    the mean square over the grid: the features are rounded one after the other, and each one's error is moved to the
    later ones, as in GPTQ. Zeros stay zeros. The
    integers are turned back into floating-point numbers for each product: this saves storage and state dict, a quarter
    of float32, not time. The copy is for inference: its KAN weights have no gradients. Masks and norms on the weights
    are applied once, here; a certified bound then holds only up to the rounding.

    A state dict of the copy loads strictly into ``quantize_kan`` of any network of the same kind. For TorchScript or
    ONNX, :func:`dequantize_kan` first.

    Args:
        network: network or layer.
        bits: width :math:`b` of the integers, 2 to 8; they are stored as int8.

    Returns:
        The copy. :func:`compare_outputs` measures its error.

    Raises:
        ValueError: if ``bits`` is out of its range, the network is quantized already, or a weight is not finite.

    Example:
        >>> from monai_deqkan.networks.layers import KANLinear
        >>> small = quantize_kan(KANLinear(16, 4))
        >>> small.state_dict()["parametrizations.weight.original"].dtype
        torch.int8

    Reference:
        E. Frantar et al., "GPTQ: Accurate post-training quantization for generative pre-trained transformers", ICLR
        2023, section 3; here with the second moments of each channel's features over the grid, one edge at a time.
    """
    if check_int("bits", bits, 2) > 8:
        raise ValueError(f"`bits` must be at most 8, as integers are stored as int8; got {bits}.")
    network = copy.deepcopy(network)
    for layer in kan_layers(network).values():
        if _is_quantized(layer):
            raise ValueError("`network` is quantized already. Call `dequantize_kan` first to choose other `bits`.")
        make_weight_plain(layer)
        _quantize(layer, 2 ** (bits - 1) - 1)
    return network


def dequantize_kan(network: nn.Module) -> nn.Module:
    """Return a copy of a quantized network with plain floating-point weights, which hold the rounded values.

    Args:
        network: network or layer; parts that are not quantized stay as they are.
    """
    network = copy.deepcopy(network)
    for layer in kan_layers(network).values():
        if _is_quantized(layer):
            weight = layer.weight.detach()
            make_weight_plain(layer, keep_value=False)  # an int8 parameter cannot take the value
            layer.weight = nn.Parameter(weight)
    return network


def _is_quantized(layer: KANLayer) -> bool:
    steps = weight_parametrizations(layer)
    return steps is not None and isinstance(steps[0], KANDequantizer)


def _quantize(layer: KANLayer, largest: int) -> None:
    weight = layer.weight.detach()
    check_finite("layer.weight", weight, "Integers cannot hold them; reload the layer.")  # as integers, NaN are zeros
    parts = weight.unflatten(1, (layer.num_features, -1)).flatten(2)  # (out, F, in / groups * kernel elements)
    if parts.shape[2] < _FEW:
        parts = parts.flatten(1).unsqueeze(1)
    peak = parts.abs().amax(dim=2, keepdim=True)
    scale = torch.where(peak > 0, peak / largest, torch.ones_like(peak))
    wide = scale.expand_as(parts).reshape_as(layer._unpacked()).double()
    rounded = _round(layer._unpacked().detach().double(), wide, _moments(layer), layer, largest)
    codes = rounded.to(torch.int8).reshape(weight.shape)
    layer.weight = nn.Parameter(codes, requires_grad=False)
    # unsafe: weight and original differ in dtype, which is the point
    parametrize.register_parametrization(layer, "weight", KANDequantizer(scale), unsafe=True)


@torch.no_grad()
def _moments(layer: KANLayer) -> Tensor:
    """Return the mean products of the features over each channel's grid, ``(in, F, F)``, made regular.

    Half of the weight is even; half is a bell of a sixth of the grid's width, which is N(0, 1) on (-3, 3) and what a
    refit makes of data that are about normal.
    """
    features = channel_features(layer, grid_inputs(layer))
    bell = torch.exp(-0.5 * torch.linspace(-3.0, 3.0, features.shape[2], dtype=features.dtype).square())
    weights = (0.5 / len(bell) + 0.5 * bell / bell.sum()).to(features.device)
    moments = (features * weights) @ features.mT
    diagonal = moments.diagonal(dim1=1, dim2=2)
    diagonal += _RIDGE * diagonal.mean(dim=1, keepdim=True) + torch.finfo(moments.dtype).tiny
    return moments


def _round(weight: Tensor, scale: Tensor, moments: Tensor, layer: KANLayer, largest: int) -> Tensor:
    """Return integers, as floats, for weights and scales ``(out, F, in / groups, *kernel)``.

    On each edge the better of the nearest integers and of those whose errors make up for each other.
    """
    edges, steps = channel_edges(layer, weight), channel_edges(layer, scale)  # (in, F, E)
    nearest = (edges / steps).round().clamp(-largest, largest)
    balanced = _balance(edges, steps, moments, largest)

    def squares(codes: Tensor) -> Tensor:
        error = codes * steps - edges
        return ((moments @ error) * error).sum(dim=1, keepdim=True)

    return layer_edges(layer, torch.where(squares(balanced) < squares(nearest), balanced, nearest))


def _balance(edges: Tensor, steps: Tensor, moments: Tensor, largest: int) -> Tensor:
    """Round one feature after the other, and move its error to those to come such that the function changes least.

    With the error of feature ``j`` given, the mean square of the function's error is smallest where that of the later
    ones is ``-M_rr^-1 M_rj`` times it.
    """
    target, codes = edges.clone(), torch.zeros_like(edges)
    for j in range(edges.shape[1]):
        code = (target[:, j] / steps[:, j]).round().clamp(-largest, largest)
        codes[:, j] = code.where(edges[:, j] != 0, 0.0)  # what is pruned stays so
        error = target[:, j] - codes[:, j] * steps[:, j]  # (in, E)
        later = slice(j + 1, None)
        shares = torch.linalg.solve(moments[:, later, later], moments[:, later, j, None])
        target[:, later] += shares * error[:, None]
    return codes
