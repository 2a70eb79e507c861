"""Which edges of a KAN layer matter, and which of its inputs the output depends on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monai_deqkan._checks import check_finite, check_int, check_tensor
from monai_deqkan.networks.layers.kan_layer import KANLayer

__all__ = [
    "KANEdge",
    "edge_importance",
    "edge_values",
    "input_channels",
    "input_sensitivity",
    "rank_edges",
    "record_kan_inputs",
]

_CHUNK = 1 << 18  # input values worked on at a time: with nine features in float64 about 20 MB
_GRID_POINTS = 513


@dataclass(frozen=True)
class KANEdge:
    """One learned function of a layer, and how much it matters.

    Args:
        out_channel: output it adds to.
        in_channel: input it reads, counted over all groups.
        offset: its place in the kernel of a convolution; empty for a linear layer.
        importance: root mean square of its values, in the unit of the output.
        low: lower end of its inputs: their 0.1 % quantile, or the lower end of the grid where none were given.
        high: upper end likewise: the 99.9 % quantile.
    """

    out_channel: int
    in_channel: int
    offset: tuple[int, ...]
    importance: float
    low: float
    high: float

    def __str__(self) -> str:
        """Say where it is, such as ``"3 to 8 at (0, 2)"``."""
        return f"{self.in_channel} to {self.out_channel}" + (f" at {self.offset}" if self.offset else "")


def input_channels(layer: KANLayer, inputs: Tensor) -> Tensor:
    """Sort the inputs of a layer by channel, in float64.

    Args:
        layer: the layer.
        inputs: what it is called with: ``(*, in)`` for a linear layer, ``(B, in, *space)`` or ``(in, *space)`` for a
            convolution.

    Returns:
        Shape ``(in, N)``.

    Raises:
        TypeError: if ``layer`` is no KAN layer, or ``inputs`` no tensor.
        ValueError: if ``inputs`` do not fit the layer, are none, or are not finite.
    """
    channels, axes = _num_channels(layer), _kernel_axes(layer)
    shape = tuple(check_tensor("inputs", inputs).shape)
    axis = -1 if axes == 0 else -1 - axes
    if not (axes == 0 or axes + 1 <= len(shape) <= axes + 2) or len(shape) < -axis or shape[axis] != channels:
        expected = f"(*, {channels})" if axes == 0 else f"(B, {channels}, {axes} spatial axes)"
        raise ValueError(f"`inputs` must be what the layer is called with, of shape {expected}; got {shape}.")
    if inputs.numel() == 0:
        raise ValueError(f"`inputs` must hold at least one value per channel; got shape {shape}.")
    check_finite("inputs", inputs, "Leave these samples out.")
    return inputs.detach().as_subclass(Tensor).movedim(axis, 0).flatten(1).double()  # no MetaTensor


def _num_channels(layer: KANLayer) -> int:
    if not isinstance(layer, KANLayer):
        hint = " Give its `functions`." if isinstance(getattr(layer, "functions", None), KANLayer) else ""
        raise TypeError(f"`layer` must be a KAN layer such as KANLinear; got {type(layer).__name__}.{hint}")
    return layer.coefficients.shape[2] * layer.groups


def _kernel_axes(layer: KANLayer) -> int:
    return layer.coefficients.dim() - 3


def _grid_inputs(layer: KANLayer) -> Tensor:
    """Return inputs, (in, N), that the layer's input map spreads evenly over the grid."""
    channels = _num_channels(layer)
    low, high = layer.basis.grid_range
    t = torch.linspace(low, high, _GRID_POINTS, dtype=torch.float64, device=layer.weight.device)
    t = t.expand(channels, -1)
    if layer.input_scale is None or layer.input_shift is None:
        return t
    return (t - layer.input_shift.double()[:, None]) / layer.input_scale.double()[:, None]


def _features(layer: KANLayer, x: Tensor, channel: int | None = None) -> Tensor:
    """Return (in, F, N) of all channels' inputs (in, N), or (1, F, N) of one channel's (1, N)."""
    t = x
    if layer.input_scale is not None and layer.input_shift is not None:
        rows = slice(None) if channel is None else slice(channel, channel + 1)
        t = x * layer.input_scale.to(x)[rows, None] + layer.input_shift.to(x)[rows, None]
    values = layer.basis.values(t, dim=1)
    return torch.cat((F.silu(x).unsqueeze(1), values), dim=1) if layer.has_base else values


@torch.no_grad()
def edge_importance(layer: KANLayer, inputs: Tensor | None = None) -> Tensor:
    r"""Measure how large the function on each edge is: the root mean square of its values.

    .. math:: I_{oi\delta} = \sqrt{\operatorname{mean}_x F_{oi\delta}(x)^2}
        = \sqrt{w_{oi\delta}^\top M_i\, w_{oi\delta}}, \qquad M_i = \operatorname{mean}_x b(x)\, b(x)^\top

    with the features :math:`b` (base term, then basis) and their weights :math:`w`: each input is visited once, not
    once per edge. Removing an edge changes the output by this much in the mean square.

    Args:
        layer: the layer.
        inputs: what it was called with: ``(*, in)``, or ``(B, in, *space)`` for a convolution, whose padding is
            left out. Without it, the inputs are spread evenly over the grid.

    Returns:
        Importance in the unit of the output: float64, shape ``(out, in)``, or ``(out, in / groups, *kernel)``.

    Raises:
        TypeError: if ``layer`` is no KAN layer.
        ValueError: if ``inputs`` do not fit the layer or are not finite.

    Reference:
        Z. Liu et al., "KAN: Kolmogorov-Arnold networks", ICLR 2025, equation (2.17), take the mean of absolute
        values over a batch; the root mean square needs only second moments.
    """
    x = (input_channels(layer, inputs) if inputs is not None else _grid_inputs(layer)).to(layer.weight.device)
    moments = torch.zeros((), dtype=torch.float64, device=x.device)
    for part in x.split(max(1, _CHUNK // len(x)), dim=1):
        features = _features(layer, part)
        moments = moments + features @ features.transpose(1, 2)  # (in, F, F)
    groups = layer.groups
    moments = (moments / x.shape[1]).unflatten(0, (groups, -1))
    weight = layer._unpacked().double()  # (out, F, in / groups, *kernel)
    grouped = weight.flatten(3).unflatten(0, (groups, -1)) if weight.dim() > 3 else weight[None, ..., None]
    squares = (torch.einsum("gifh,gohik->gofik", moments, grouped) * grouped).sum(dim=2).clamp(min=0.0)
    return squares.sqrt().reshape(weight.shape[0], *weight.shape[2:])


def rank_edges(layer: KANLayer, inputs: Tensor | None = None, num_edges: int | None = None) -> list[KANEdge]:
    """List the edges of a layer, the most important first.

    Args:
        layer: the layer.
        inputs: what it was called with; see :func:`edge_importance`.
        num_edges: how many to list; all by default.

    Returns:
        Records; equal ones in the order of the weight.

    Raises:
        TypeError: if ``layer`` is no KAN layer, or ``num_edges`` no integer.
        ValueError: if ``inputs`` do not fit the layer or are not finite.

    Example:
        >>> from monai_deqkan.networks.layers import KANLinear
        >>> layer = KANLinear(2, 1, base_activation=None)
        >>> _ = layer.weight.data.copy_(torch.tensor([1.0, 3.0] * 8))  # two constant functions
        >>> [(edge.in_channel, round(edge.importance, 3)) for edge in rank_edges(layer)]
        [(1, 3.0), (0, 1.0)]
    """
    importance = edge_importance(layer, inputs)
    count = importance.numel() if num_edges is None else min(check_int("num_edges", num_edges), importance.numel())
    order = importance.flatten().argsort(descending=True, stable=True)[:count]
    x = input_channels(layer, inputs) if inputs is not None else _grid_inputs(layer)
    lows, highs = (end.tolist() for end in _range_of(x))
    per_group = importance.shape[1]
    outs_per_group = len(importance) // layer.groups
    edges = []
    for index, value in zip(order.tolist(), importance.flatten()[order].tolist(), strict=True):
        out, channel, *offset = (int(i) for i in torch.unravel_index(torch.tensor(index), importance.shape))
        channel += out // outs_per_group * per_group
        edges.append(KANEdge(out, channel, tuple(offset), value, lows[channel], highs[channel]))
    return edges


def _range_of(x: Tensor) -> tuple[Tensor, Tensor]:
    ordered = x.sort(dim=1).values
    last = ordered.shape[1] - 1
    return ordered[:, math.floor(0.001 * last)], ordered[:, math.ceil(0.999 * last)]


@torch.no_grad()
def edge_values(layer: KANLayer, edge: KANEdge, points: Tensor) -> Tensor:
    """Evaluate the learned function of one edge; unlike ``layer.edge_functions`` without all the others.

    Args:
        layer: the layer.
        edge: a record of :func:`rank_edges` for it.
        points: inputs, shape ``(P,)``, in the unit of the layer's input.

    Returns:
        Shape ``(P,)``, float64.
    """
    column = edge.in_channel % layer.coefficients.shape[2]
    weight = layer._unpacked()[edge.out_channel, :, column]
    for index in edge.offset:
        weight = weight[:, index]
    weight = weight.double()
    return weight @ _features(layer, points.to(weight)[None], edge.in_channel)[0]


@torch.no_grad()
def record_kan_inputs(network: nn.Module, *inputs: Tensor, max_values: int = 4096) -> dict[str, Tensor]:
    """Run a network once and return what its KAN layers were called with.

    The network runs in evaluation mode and is put back into its mode afterwards. A layer that is called several
    times, such as one inside an equilibrium, gives the inputs of all calls.

    Args:
        network: the network, or one KAN layer.
        inputs: its arguments.
        max_values: most values per channel that are kept of each call, evenly spread over it.

    Returns:
        For each KAN layer that was called, by its name in the network (empty for the network itself): inputs for
        :func:`edge_importance`, ``(N, in)`` for a linear layer, ``(N, in, 1, ...)`` for a convolution.

    Raises:
        ValueError: if no KAN layer was called, or inputs of one are not finite.
    """
    check_int("max_values", max_values)
    found: dict[str, list[Tensor]] = {}

    def recorder(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            values = input_channels(cast(KANLayer, layer), arguments[0])
            kept = torch.linspace(0, values.shape[1] - 1, min(values.shape[1], max_values), device=values.device)
            found.setdefault(name, []).append(values[:, kept.round().long()].t())

        return record

    layers = {name: part for name, part in network.named_modules() if isinstance(part, KANLayer)}
    modes = [(part, part.training) for part in network.modules()]
    hooks = [layer.register_forward_pre_hook(recorder(name)) for name, layer in layers.items()]
    try:
        network.eval()(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for part, mode in modes:
            part.training = mode
    if not found:
        raise ValueError(f"`network` must call at least one KAN layer; {type(network).__name__} called none.")
    return {
        name: (rows := torch.cat(parts)).reshape(*rows.shape, *[1] * _kernel_axes(layers[name]))
        for name, parts in found.items()
    }


def input_sensitivity(network: nn.Module, inputs: Tensor, *, num_samples: int = 8, seed: int = 0) -> Tensor:
    r"""Measure how much the output depends on each input channel: the RMS of the derivatives by it.

    .. math:: s_c = \sqrt{\operatorname{mean}_{b, p} \sum_q \Big(\frac{\partial y_{bq}}{\partial x_{bcp}}\Big)^2}

    over all outputs :math:`q` of a sample and all positions :math:`p` of the channel. The sum over outputs is
    estimated by random projections (Hutchinson), each one backward pass; for one output per sample it is exact.

    Args:
        network: network or layer, called in evaluation mode; its samples must not mix.
        inputs: ``(B, C, *)``; the last axis is the channel for a linear KAN layer and for ``nn.Linear``.
        num_samples: number of projections; the relative error of :math:`s_c` falls with its root.
        seed: seed of the projections.

    Returns:
        :math:`s_c`, in units of output by input, shape ``(C,)``, float64.

    Raises:
        ValueError: if ``inputs`` has less than two axes, or is not finite.
        TypeError: if ``inputs`` is no tensor.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, -4.0]]))
        >>> input_sensitivity(layer, torch.zeros(5, 2))
        tensor([3., 4.], dtype=torch.float64)
    """
    if check_tensor("inputs", inputs).dim() < 2:
        raise ValueError(f"`inputs` must have shape (B, C, *); got {tuple(inputs.shape)}. Add the missing axis.")
    check_finite("inputs", inputs)
    check_int("num_samples", num_samples)
    is_linear = isinstance(network, nn.Linear) or (isinstance(network, KANLayer) and _kernel_axes(network) == 0)
    axis = -1 if is_linear else 1
    generator = torch.Generator().manual_seed(seed)
    modes = [(part, part.training) for part in network.modules()]
    x = inputs.detach().as_subclass(Tensor).clone().requires_grad_()
    try:
        with torch.enable_grad():
            y = network.eval()(x)
            exact = y.numel() == y.shape[0]
            total = torch.zeros(x.shape[axis], dtype=torch.float64, device=x.device)
            for _ in range(1 if exact else num_samples):
                # Independent random signs: the mean square of the projected derivative is the sum of squares.
                signs = torch.randint(0, 2, y.shape, generator=generator).mul(2).sub(1).to(y)
                (slope,) = torch.autograd.grad(y, x, signs, retain_graph=True)
                total += slope.double().movedim(axis, 0).flatten(1).square().mean(dim=1)
    finally:
        for part, mode in modes:
            part.training = mode
    return (total / (1 if exact else num_samples)).sqrt()
