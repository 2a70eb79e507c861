"""Which of a network's first filters look like edge, line, spot or smoothing filters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from monai_deqkan._checks import check_finite, check_range
from monai_deqkan.networks.layers import InputStatistics, KANLayer, LowRankKANConv1d, LowRankKANConv2d, LowRankKANConv3d
from monai_deqkan.networks.layers.kan_channels import input_channels
from monai_deqkan.networks.layers.kan_importance import channel_features
from monai_deqkan.networks.layers.kan_inputs import evaluation_mode, recorded_samples

__all__ = ["FirstLayerFilters", "KernelLabel", "classify_kernels", "first_layer_filters"]

_LOW_RANK = (LowRankKANConv1d, LowRankKANConv2d, LowRankKANConv3d)
_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NUM_RANDOM = 1000  # kernels of random numbers that tell what share of labels is chance
_DETECTORS = ("edge", "line", "spot")


@dataclass(frozen=True)
class KernelLabel:
    """What a kernel looks like.

    Attributes:
        label: ``"edge"``, ``"line"``, ``"spot"``, ``"smoothing"``, ``"pass-through"`` (one pixel only), ``"other"``, or
            ``"zero"`` for a kernel without weights.
        score: absolute correlation with the best template, in [0, 1]; given for ``"other"`` too.
        nearest: the kind of the best template.
        direction: unit vector across the edge or line, one number per spatial axis; empty for the other kinds.
    """

    label: str
    score: float
    nearest: str
    direction: tuple[float, ...]


@dataclass(frozen=True)
class FirstLayerFilters:
    """The filters of the first layer that looks at neighboring pixels.

    Attributes:
        layer: its name in the network.
        is_kan: whether it is a KAN layer; else ``kernels`` are its weights as they are.
        kernels: effective linear kernels, shape ``(out, in / groups, *kernel)``, float64.
        patterns: the spatial pattern of each filter, shape ``(out, *kernel)``: the kernel itself for one input channel,
            else the leading singular vector over the input channels, times its singular value.
        linear_share: for each filter of a KAN convolution, how much of the variance of its functions over the inputs
            their straight lines explain, shape ``(out,)``; ``None`` for other layers.
        labels: what each pattern looks like.
        detectors: number of patterns labelled as an edge, a line or a spot.
        chance: share of kernels of random numbers, of the same size, that get the label of an edge, line or spot.
    """

    layer: str
    is_kan: bool
    kernels: Tensor
    patterns: Tensor
    linear_share: Tensor | None
    labels: tuple[KernelLabel, ...]
    detectors: int
    chance: float


def classify_kernels(kernels: Tensor, threshold: float = 0.8) -> tuple[KernelLabel, ...]:
    r"""Compare kernels with templates by correlation, and label those that are near one.

    Templates, with the coordinate :math:`u` across, the distance :math:`v` along, :math:`r^2 = u^2 + v^2` from the
    kernel's center, :math:`d` axes, and :math:`\sigma = k / 4`, :math:`\tau = k / 2` for a kernel of size :math:`k`:

    - edge: :math:`u\, e^{-u^2 / 2 \sigma^2 - v^2 / 2 \tau^2}`, at the best of many directions;
    - line: :math:`(1 - u^2 / \sigma^2)\, e^{-u^2 / 2 \sigma^2 - v^2 / 2 \tau^2}`, likewise, shifted to a sum of zero;
    - spot: :math:`(1 - r^2 / d \sigma^2)\, e^{-r^2 / 2 \sigma^2}`, shifted likewise, or the center against the mean of
      its neighbors, those at corners left out or in;
    - smoothing: :math:`e^{-r^2 / 2 \sigma^2}` or a constant;
    - pass-through: one at the center.

    The correlation is the cosine :math:`|\langle a, b \rangle| / \|a\| \|b\|`.

    Args:
        kernels: shape ``(N, *kernel)``, one to three spatial axes, at least one longer than 1.
        threshold: lowest correlation for a label, in (0, 1].

    Returns:
        One label per kernel.

    Raises:
        ValueError: if shape, values or threshold are out of range.
        TypeError: if ``kernels`` is no tensor.

    Example:
        >>> sobel = torch.tensor([[[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]])
        >>> label = classify_kernels(sobel)[0]
        >>> label.label, round(label.score, 2), label.direction
        ('edge', 0.97, (0.0, 1.0))
    """
    check_finite("kernels", kernels)
    check_range("threshold", threshold, 0.0, 1.0, open_low=True)
    size = tuple(kernels.shape[1:])
    if not 1 <= len(size) <= 3 or max(size) < 2:
        raise ValueError(
            f"`kernels` must have shape (N, *kernel) with one to three axes, not all of length 1; got "
            f"{tuple(kernels.shape)}. A kernel of one element has no pattern."
        )
    names, directions, templates = _templates(size)
    flat = kernels.detach().cpu().double().flatten(1)
    norms = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    scores = ((flat / norms.clamp(min=1e-300)) @ templates.T).abs()
    found = []
    for row, norm in zip(scores, norms[:, 0].tolist(), strict=True):
        best = int(row.argmax())
        score = min(float(row[best]), 1.0)
        label = "zero" if norm == 0 else (names[best] if score >= threshold else "other")
        found.append(KernelLabel(label, score, names[best], directions[best]))
    return tuple(found)


def first_layer_filters(
    network: nn.Module,
    images: Iterable[Tensor],
    *,
    forward: Callable[[nn.Module, Tensor], Any] | None = None,
    threshold: float = 0.8,
    max_samples: int = 4096,
) -> FirstLayerFilters | None:
    r"""Return the effective linear kernels of the first convolution that a network applies, and what they look like.

    The kernel of a KAN convolution has in each place the slope of the straight line that is nearest, by least squares
    over the inputs seen, to the function :math:`F` there:
    :math:`a = \operatorname{cov}(F(x), x) / \operatorname{var}(x)`.
    What lines leave out, `linear_share` tells. Where a normalization comes first, it sees the normalized image.

    Args:
        network: the network; runs in evaluation mode.
        images: batches ``(B, C, *space)`` on its device.
        forward: called as ``forward(network, batch)``; ``network(batch)`` by default.
        threshold: lowest correlation for a label; see :func:`classify_kernels`.
        max_samples: inputs that the lines are fitted to.

    Returns:
        The filters; ``None`` if no convolution with more than one element was called.

    Raises:
        ValueError: if the inputs of the layer are not finite.
    """
    run = forward if forward is not None else (lambda called, batch: called(batch))
    batches = list(images)
    name = _first_convolution(network, batches[:1], run)
    if name is None:
        return None
    layer: Any = network.get_submodule(name)
    share = None
    if isinstance(layer, _PLAIN):
        kernels = layer.weight.detach().double().cpu()
    else:
        functions = layer.functions if isinstance(layer, _LOW_RANK) else layer
        with torch.no_grad(), evaluation_mode(network), InputStatistics(functions, max_samples) as statistics:
            for batch in batches:
                run(network, batch)
        kernels, share = _linear_part(functions, recorded_samples(statistics)[""])
        if isinstance(layer, _LOW_RANK):
            kernels, share = _composed(layer, kernels), None
    patterns = _patterns(kernels)
    labels = classify_kernels(patterns, threshold)
    chance = _chance(tuple(patterns.shape[1:]), threshold)
    detectors = _count_detectors(labels)
    return FirstLayerFilters(name, not isinstance(layer, _PLAIN), kernels, patterns, share, labels, detectors, chance)


def _count_detectors(labels: Iterable[KernelLabel]) -> int:
    return sum(label.label in _DETECTORS for label in labels)


def _chance(size: tuple[int, ...], threshold: float) -> float:
    """Return the share of normally distributed kernels that look like an edge, a line or a spot."""
    noise = torch.randn(_NUM_RANDOM, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return _count_detectors(classify_kernels(noise, threshold)) / _NUM_RANDOM


def _first_convolution(
    network: nn.Module, batches: list[Tensor], run: Callable[[nn.Module, Tensor], Any]
) -> str | None:
    called: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda _, __, name=name: called.append(name))
        for name, module in network.named_modules()
        if _is_convolution(module) and math.prod(module.kernel_size) > 1
    ]
    try:
        with torch.no_grad(), evaluation_mode(network):
            for batch in batches:
                run(network, batch)
    finally:
        for handle in handles:
            handle.remove()
    return called[0] if called else None


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, (*_PLAIN, *_LOW_RANK)) or (isinstance(module, KANLayer) and module.weight.dim() > 2)


@torch.no_grad()
def _linear_part(layer: KANLayer, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the slopes of the best lines ``(out, in / groups, *kernel)``, and the share of variance they explain."""
    x = input_channels(layer, inputs)  # (in, N)
    features = channel_features(layer, x)  # (in, F, N)
    x = x - x.mean(1, keepdim=True)
    features = features - features.mean(2, keepdim=True)
    variance = x.square().mean(1)  # (in,)
    slopes = (features @ x[..., None])[..., 0] / x.shape[1] / variance.clamp(min=1e-300)[:, None]  # (in, F)
    moments = features @ features.mT / x.shape[1]  # (in, F, F)
    weight = layer._unpacked().double()
    grouped = weight.flatten(3).unflatten(0, (layer.groups, -1))  # (G, out / G, F, in / G, K)
    per_group = (layer.groups, -1)
    kernels = torch.einsum("gif,gofik->goik", slopes.unflatten(0, per_group), grouped)
    linear = (kernels.square() * variance.unflatten(0, per_group)[:, None, :, None]).sum((2, 3)).flatten()
    total = (torch.einsum("gifh,gohik->gofik", moments.unflatten(0, per_group), grouped) * grouped).sum((2, 3, 4))
    share = linear / total.flatten().clamp(min=1e-300)
    shape = (weight.shape[0], *weight.shape[2:])
    return kernels.reshape(shape).cpu(), share.clamp(0.0, 1.0).cpu()


@torch.no_grad()
def _composed(layer: Any, slopes: Tensor) -> Tensor:
    """Return the kernels of a layer of low rank from those of its functions, ``(rank, in, 1, ...)``."""
    spatial: Tensor = slopes.flatten(1)  # (rank, in)
    for part in layer.spatial:
        factor = part.weight.double().cpu().flatten(1)  # (rank, k): the other axes have length 1
        spatial = spatial[..., None] * factor.reshape(len(factor), *[1] * (spatial.dim() - 1), -1)
    return torch.einsum("or,ri...->oi...", layer.project.weight.double().cpu().flatten(1), spatial)


def _patterns(kernels: Tensor) -> Tensor:
    """Return the leading spatial pattern of each filter; for one input channel the filter itself."""
    if kernels.shape[1] == 1:
        return kernels[:, 0]
    u, s, vh = torch.linalg.svd(kernels.flatten(2), full_matrices=False)  # (out, in, K)
    first = u[:, :, 0]
    sign = first.gather(1, first.abs().argmax(1, keepdim=True)).sign()
    return (sign * s[:, :1] * vh[:, 0]).unflatten(1, kernels.shape[2:])


def _templates(size: tuple[int, ...]) -> tuple[list[str], list[tuple[float, ...]], Tensor]:
    """Return names, directions and unit templates ``(T, elements)`` for kernels of a size."""
    axes = [torch.arange(n, dtype=torch.float64) - (n - 1) / 2 for n in size]
    grid = torch.stack([t.flatten() for t in torch.meshgrid(*axes, indexing="ij")], dim=1)  # (elements, d)
    square = grid.square().sum(1)
    sigma, tau = max(size) / 4, max(size) / 2
    names, directions, rows = [], [], []

    def add(name: str, direction: tuple[float, ...], template: Tensor) -> None:
        norm = torch.linalg.vector_norm(template)
        if float(norm) > 1e-9:  # a direction along which the kernel has one element only gives nothing
            names.append(name)
            directions.append(direction)
            rows.append(template / norm)

    round_window = torch.exp(-square / (2 * sigma**2))
    spot = (1 - square / (len(size) * sigma**2)) * round_window
    add("smoothing", (), torch.ones_like(square))
    add("smoothing", (), round_window)
    center = square == square.min()
    add("pass-through", (), center.double())
    add("spot", (), spot - spot.mean())
    for reach in (1, len(size)):  # the center against its neighbors, those at the corners left out or in
        ring = (square <= square.min() + reach) & ~center
        add("spot", (), center / center.sum() - ring / ring.sum().clamp(min=1))
    for direction in _directions(len(size)):
        across = grid @ direction
        window = torch.exp(-across.square() / (2 * sigma**2) - (square - across.square()) / (2 * tau**2))
        line = (1 - across.square() / sigma**2) * window
        place = tuple(round(value, 4) + 0.0 for value in direction.tolist())
        add("edge", place, across * window)
        add("line", place, line - line.mean())
    return names, directions, torch.stack(rows)


def _directions(num_axes: int) -> Tensor:
    """Return unit vectors that cover all directions but for their sign."""
    if num_axes == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if num_axes == 2:
        angle = torch.arange(48, dtype=torch.float64) * math.pi / 48
        return torch.stack((angle.sin(), angle.cos()), dim=1)
    # A spiral on the half sphere, its points at equal heights and the golden angle apart; and the axes.
    count = 300
    height = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    turn = torch.arange(count, dtype=torch.float64) * math.pi * (3 - math.sqrt(5))
    radius = (1 - height.square()).sqrt()
    spiral = torch.stack((height, radius * turn.sin(), radius * turn.cos()), dim=1)
    return torch.cat((torch.eye(3, dtype=torch.float64), spiral))
