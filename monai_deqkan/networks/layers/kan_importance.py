"""Which edges of a KAN layer matter, and which of its inputs the output depends on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monai_deqkan._checks import check_finite, check_int, check_tensor
from monai_deqkan.networks.layers.kan_channels import grid_inputs, input_channels, input_map
from monai_deqkan.networks.layers.kan_inputs import evaluation_mode
from monai_deqkan.networks.layers.kan_layer import KANLayer

__all__ = [
    "KANEdge",
    "channel_features",
    "edge_importance",
    "edge_values",
    "input_sensitivity",
    "rank_edges",
]

_CHUNK = 1 << 18  # input values worked on at a time: with nine features in float64 about 20 MB


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


def channel_features(layer: KANLayer, x: Tensor, channel: int | None = None) -> Tensor:
    """Return the features ``(in, F, N)`` of all channels' inputs ``(in, N)``, or ``(1, F, N)`` of one channel's."""
    scale, shift = input_map(layer).to(x)[..., None]
    if channel is not None:
        scale, shift = scale[channel], shift[channel]
    values = layer.basis.values(x * scale + shift, dim=1)
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
    x = (input_channels(layer, inputs) if inputs is not None else grid_inputs(layer)).to(layer.weight.device)
    moments = torch.zeros((), dtype=torch.float64, device=x.device)
    for part in x.split(max(1, _CHUNK // len(x)), dim=1):
        features = channel_features(layer, part)
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
    x = input_channels(layer, inputs) if inputs is not None else grid_inputs(layer)
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
    return weight @ channel_features(layer, points.to(weight)[None], edge.in_channel)[0]


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
    is_linear = isinstance(network, nn.Linear) or (isinstance(network, KANLayer) and network.weight.dim() == 2)
    axis = -1 if is_linear else 1
    generator = torch.Generator().manual_seed(seed)
    x = inputs.detach().as_subclass(Tensor).clone().requires_grad_()
    with evaluation_mode(network), torch.enable_grad():
        y = network(x)
        num_samples = 1 if y.numel() == y.shape[0] else num_samples
        total = torch.zeros(x.shape[axis], dtype=torch.float64, device=x.device)
        for _ in range(num_samples):
            # Independent random signs: the mean square of the projected derivative is the sum of squares.
            signs = torch.randint(0, 2, y.shape, generator=generator).mul(2).sub(1).to(y)
            (slope,) = torch.autograd.grad(y, x, signs, retain_graph=True)
            total += slope.double().movedim(axis, 0).flatten(1).square().mean(dim=1)
    return (total / num_samples).sqrt()
