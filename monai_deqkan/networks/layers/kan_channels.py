"""The input channels of KAN layers: their values, their grids and the coefficients of their edges."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from monai_deqkan._checks import check_finite, check_tensor
from monai_deqkan.networks.layers.kan_layer import KANLayer

__all__ = [
    "channel_edges",
    "grid_coordinates",
    "grid_ends",
    "grid_inputs",
    "input_channels",
    "input_map",
    "input_rows",
    "layer_edges",
    "num_channels",
]

_GRID_POINTS = 513


def num_channels(layer: KANLayer) -> int:
    """Return the number of input channels of a layer, over all groups.

    Raises:
        TypeError: if ``layer`` is no KAN layer.
    """
    if not isinstance(layer, KANLayer):
        hint = " Give its `functions`." if isinstance(getattr(layer, "functions", None), KANLayer) else ""
        raise TypeError(f"`layer` must be a KAN layer such as KANLinear; got {type(layer).__name__}.{hint}")
    return layer.groups * (layer.weight.shape[1] // layer.num_features)


def input_rows(layer: KANLayer, inputs: Tensor) -> Tensor:
    """Return the inputs of a layer as plain rows ``(N, in)``, one column per input channel, without copying if it can.

    Args:
        layer: the layer.
        inputs: what it is called with: ``(*, in)`` for a linear layer, ``(B, in, *space)`` or ``(in, *space)`` for a
            convolution.

    Raises:
        TypeError: if ``layer`` is no KAN layer, or ``inputs`` no tensor.
        ValueError: if ``inputs`` do not fit the layer.
    """
    channels, axes = num_channels(layer), layer.weight.dim() - 2
    shape = tuple(check_tensor("inputs", inputs).shape)
    right_rank = axes + 1 <= len(shape) <= axes + 2 if axes else bool(shape)
    if not right_rank or shape[-1 - axes] != channels:
        expected = f"(B, {channels}, {axes} spatial axes)" if axes else f"(*, {channels})"
        raise ValueError(f"`inputs` must be what the layer is called with, of shape {expected}; got {shape}.")
    return inputs.detach().as_subclass(Tensor).movedim(-1 - axes, -1).reshape(-1, channels)  # no MetaTensor


def input_channels(layer: KANLayer, inputs: Tensor) -> Tensor:
    """Sort the inputs of a layer by channel, in float64.

    Args:
        layer: the layer.
        inputs: what it is called with; see `input_rows`.

    Returns:
        Shape ``(in, N)``.

    Raises:
        TypeError: if ``layer`` is no KAN layer, or ``inputs`` no tensor.
        ValueError: if ``inputs`` do not fit the layer, are none, or are not finite.
    """
    rows = input_rows(layer, inputs)
    if not len(rows):
        raise ValueError(f"`inputs` must hold at least one value per channel; got shape {tuple(inputs.shape)}.")
    check_finite("inputs", rows, "Leave these samples out.")
    return rows.t().double().contiguous()


def input_map(layer: KANLayer) -> Tensor:
    """Return scale and shift of the layer's input map, shape ``(2, in)``, float64."""
    channels = num_channels(layer)
    if layer.input_scale is None or layer.input_shift is None:
        ones = torch.ones(channels, dtype=torch.float64, device=layer.weight.device)
        return torch.stack((ones, torch.zeros_like(ones)))
    return torch.stack((layer.input_scale, layer.input_shift)).double()


def grid_ends(layer: KANLayer) -> Tensor:
    """Return where the first and last point of each channel's grid are in the unit of the input, shape ``(in, 2)``."""
    scale, shift = input_map(layer)
    low, high = layer.basis.grid_range
    return torch.stack(((low - shift) / scale, (high - shift) / scale), dim=1)


def grid_coordinates(layer: KANLayer, rows: Tensor) -> Tensor:
    """Return where the values of ``rows`` ``(N, in)`` fall in the basis's own coordinate."""
    if layer.input_scale is None or layer.input_shift is None:
        return rows
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return rows.to(dtype) * layer.input_scale.to(dtype) + layer.input_shift.to(dtype)


def grid_inputs(layer: KANLayer) -> Tensor:
    """Return inputs that the layer's map spreads evenly over its grid, shape ``(in, 513)``, float64."""
    scale, shift = input_map(layer)
    t = torch.linspace(*layer.basis.grid_range, _GRID_POINTS, dtype=torch.float64, device=scale.device)
    return (t - shift[:, None]) / scale[:, None]


def channel_edges(layer: KANLayer, coefficients: Tensor) -> Tensor:
    """Reorder ``(out, K, in / groups, *kernel)`` to ``(in, K, edges of the channel)``."""
    grouped = coefficients.flatten(3) if coefficients.dim() > 3 else coefficients.unsqueeze(3)
    out, num_basis, inputs, kernel = grouped.shape
    grouped = grouped.reshape(layer.groups, out // layer.groups, num_basis, inputs, kernel)
    return grouped.permute(0, 3, 2, 1, 4).reshape(layer.groups * inputs, num_basis, -1)


def layer_edges(layer: KANLayer, edges: Tensor) -> Tensor:
    """Undo `channel_edges`."""
    old = layer.coefficients.shape
    num_basis = edges.shape[1]
    grouped = edges.reshape(layer.groups, old[2], num_basis, old[0] // layer.groups, math.prod(old[3:]))
    return grouped.permute(0, 3, 2, 1, 4).reshape(old[0], num_basis, *old[2:])
