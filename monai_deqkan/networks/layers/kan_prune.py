"""Pruning of KAN layers: the least important functions become zero, and stay zero in further training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from monai_deqkan._checks import check_choice, check_finite, check_range
from monai_deqkan.networks.layers.kan_activation import KANActivation
from monai_deqkan.networks.layers.kan_channels import grid_inputs, input_channels
from monai_deqkan.networks.layers.kan_compare import Batches, list_batches, record_calls, relative_change
from monai_deqkan.networks.layers.kan_importance import channel_features, edge_importance
from monai_deqkan.networks.layers.kan_inputs import kan_layers, record_inputs, recorded_samples
from monai_deqkan.networks.layers.kan_layer import KANLayer
from monai_deqkan.networks.layers.plain_weight import make_weight_plain, weight_parametrizations

__all__ = ["KANMask", "PruningRecord", "PruningReport", "make_pruning_permanent", "prune_basis", "prune_edges"]

_CHUNK = 4096  # inputs per channel worked on at a time


class KANMask(nn.Module):
    """Parametrization that holds part of a KAN layer's weight at zero; registered by :func:`prune_edges`.

    Args:
        mask: what is kept, boolean, of the weight's shape.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with zeros where something was pruned."""
        return weight * self.mask

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Take an assigned weight as it is; the mask is applied on reading."""
        return weight


@dataclass(frozen=True)
class PruningRecord:
    """What pruning did to one layer.

    Args:
        layer: its name in the network.
        num_units: number of units that it was built with; what a unit is, the granularity says.
        num_before: units left before.
        num_after: units left now.
        output_change: root mean square change of its output on the inputs that it had before, relative to the output
            before; ``None`` without inputs.
    """

    layer: str
    num_units: int
    num_before: int
    num_after: int
    output_change: float | None

    @property
    def share_kept(self) -> float:
        """Share of the units that are left."""
        return self.num_after / self.num_units


@dataclass(frozen=True)
class PruningReport:
    """Table of what pruning did; ``print`` it.

    Args:
        records: one per layer.
        output_change: relative root mean square change of the network's output; ``None`` without inputs.
    """

    records: tuple[PruningRecord, ...]
    output_change: float | None

    def __str__(self) -> str:
        """Show one line per layer, and the sums last."""
        units, before, after = (
            sum(getattr(record, name) for record in self.records) for name in ("num_units", "num_before", "num_after")
        )
        rows = [*self.records, PruningRecord("all", units, before, after, self.output_change)]
        width = max(len(row.layer) for row in rows)
        head = f"{'layer':<{width}}  {'units':>9}  {'before':>9}  {'after':>9}  {'kept':>7}  {'change':>8}"
        return "\n".join([head, *(_line(row, width) for row in rows)])


def _line(row: PruningRecord, width: int) -> str:
    change = "-" if row.output_change is None else f"{row.output_change:.2%}"
    counts = f"{row.num_units:>9}  {row.num_before:>9}  {row.num_after:>9}"
    return f"{row.layer:<{width}}  {counts}  {row.share_kept:>7.1%}  {change:>8}"


def prune_edges(
    network: nn.Module,
    amount: float = 0.5,
    *,
    inputs: Batches | None = None,
    scope: str = "global",
    granularity: str = "edge",
) -> PruningReport:
    r"""Set the least important edges of all KAN layers to zero, in place; they stay zero in further training.

    The importance of an edge is the root mean square of its function over the inputs of its channel,
    :math:`I` of :func:`edge_importance`. Where edges of several layers compete, each layer's are divided by
    :math:`\sqrt{\sum I^2 / n_{out}}`, the output's root mean square if edges were uncorrelated; else layers with small
    outputs would vanish. Functions of `KANActivation` are left alone: each is its channel's only one.

    Every layer's weight becomes ``KANMask(original)``, so an optimizer goes on with the same parameters; a certified
    norm is applied after the mask. ``amount=0`` only puts the masks in, which is how a checkpoint of a network in
    pruning is loaded into a fresh one. Before scripting, export or a checkpoint that any network of this kind can load,
    call :func:`make_pruning_permanent`.

    Args:
        network: network or layer.
        amount: share of all units that are zero afterwards, those pruned before among them, in ``[0, 1)``.
        inputs: one batch, or several, that show what the layers see; a batch is a tensor, or a tuple of arguments.
            Without them the inputs are taken as spread evenly over each basis's range.
        scope: ``"global"``: least important ones of the network; ``"layer"``: the same share of each layer.
        granularity: unit that goes or stays: ``"edge"``, the function of one kernel element between two channels;
            ``"kernel"``, all of these functions between two channels (the same thing in a linear layer); or
            ``"input"``, all functions of an input channel (with groups, of one in each), which
            `remove_pruned_channels` then takes out for speed.

    Returns:
        What went from where, and the changes of the outputs on ``inputs``.

    Raises:
        ValueError: if an option is out of its range, the network has no KAN layer to prune, a weight is not
            finite, or a layer was not called.

    Example:
        >>> from monai_deqkan.networks.layers import KANLinear
        >>> layer = KANLinear(4, 4)
        >>> report = prune_edges(layer, 0.25)
        >>> report.records[0].num_after, int((layer.weight == 0).sum()) // layer.num_features
        (12, 4)

    Reference:
        Z. Liu et al., "KAN: Kolmogorov-Arnold networks", ICLR 2025, section 2.5, prunes nodes by the mean absolute
        value of their edges' functions.
    """
    check_choice("granularity", granularity, ("edge", "kernel", "input"))

    def squares(layer: KANLayer, seen: Tensor | None) -> Tensor:
        found = edge_importance(layer, seen).square().unsqueeze(1)  # (out, 1, in / groups, *kernel)
        if granularity == "edge":
            return found
        return _mean_over(found, *([0] if granularity == "input" else []), *range(3, found.dim()))

    return _prune(network, amount, inputs, scope, squares, 0)


def prune_basis(
    network: nn.Module,
    amount: float = 0.5,
    *,
    inputs: Batches | None = None,
    scope: str = "global",
    granularity: str = "edge",
) -> PruningReport:
    r"""Set the least important basis functions in all KAN layers to zero; else as :func:`prune_edges`.

    The importance of a basis function on an edge is its root mean square contribution, :math:`|c_k|\,
    \sqrt{E_t[B_k(t)^2]}`. Base terms stay.

    Args:
        network: network or layer.
        amount: share of all units that are zero afterwards, in ``[0, 1)``.
        inputs: one batch, or several, that show what the layers see.
        scope: ``"global"`` or ``"layer"``.
        granularity: unit that goes or stays: ``"edge"``, one basis function on one edge; ``"kernel"``, one on all
            kernel elements between two channels; ``"layer"``, one on all edges of a layer.

    Returns:
        What went from where, and the changes of the outputs on ``inputs``.

    Raises:
        ValueError: as :func:`prune_edges`.
    """
    check_choice("granularity", granularity, ("edge", "kernel", "layer"))

    def squares(layer: KANLayer, seen: Tensor | None) -> Tensor:
        found = _term_squares(layer, seen)  # (out, K, in / groups, *kernel)
        if granularity == "edge":
            return found
        if granularity == "kernel":
            return _mean_over(found, *range(3, found.dim()))
        return _mean_over(found, 0, *range(2, found.dim()))

    return _prune(network, amount, inputs, scope, squares, 1)


def make_pruning_permanent(network: nn.Module) -> nn.Module:
    """Store pruned weights as plain parameters, zeros included, in place; other parametrizations stay.

    Outputs stay the same. State dicts then fit networks that were never pruned; further training fills the zeros.

    Args:
        network: network or layer.

    Returns:
        ``network``.
    """
    for layer in kan_layers(network).values():
        steps = weight_parametrizations(layer)
        mask = _find_mask(layer)
        if steps is None or mask is None:
            continue
        if len(steps) == 1:
            make_weight_plain(layer)
            continue
        with torch.no_grad():
            steps.original.mul_(mask.mask)
        del steps[list(steps).index(mask)]
    return network


def _prune(
    network: nn.Module,
    amount: float,
    inputs: Batches | None,
    scope: str,
    squares: Callable[[KANLayer, Tensor | None], Tensor],
    first: int,
) -> PruningReport:
    """Prune by the mean squares of the units, in ``(out, units of F, in / groups, *kernel)``.

    ``first`` is 0 if units are whole edges, 1 if they are basis functions, which do not take the base term along.
    """
    check_range("amount", amount, 0, 1, open_high=True)
    check_choice("scope", scope, ("global", "layer"))
    layers = prunable_layers(network)
    if not layers:
        raise ValueError("`network` must hold a KANLinear or KANConv1d/2d/3d; it has none.")
    for name, layer in layers.items():  # NaN would rank as the most important
        check_finite(f"{name}.weight".lstrip("."), layer.weight, "Reload the layer; pruning cannot rank it.")
    batches = [] if inputs is None else list_batches(inputs)
    calls, before = record_calls(network, layers, batches)
    seen = recorded_samples(record_inputs(network, batches, lambda called, arguments: called(*arguments)))
    missed = [name for name in layers if name not in seen]
    if batches and missed:
        raise ValueError(f"`inputs` must reach all KAN layers; not called: {', '.join(missed)}. Leave `inputs` out.")
    importance: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    for name, layer in layers.items():
        x = seen.get(name)
        found = squares(layer, x).cpu()
        size = edge_importance(layer, x).square().sum().cpu() / layer.weight.shape[0]
        importance[name] = found / size.clamp(min=torch.finfo(torch.float64).tiny)
        kept[name] = _kept_units(layer, found.shape, first)
    chosen = _choose(importance, kept, amount, together=scope == "global")
    for name, layer in layers.items():
        _apply(layer, chosen[name], first)
    changes: dict[str, float | None] = dict.fromkeys(layers)
    change = None
    if batches:
        change = relative_change(before, record_calls(network, {}, batches)[1])
        with torch.no_grad():
            changes |= {name: relative_change([c.output], [layers[name](c.input)]) for name, c in calls.items()}
    records = (
        PruningRecord(name, chosen[name].numel(), int(kept[name].sum()), int(chosen[name].sum()), changes[name])
        for name in layers
    )
    return PruningReport(tuple(records), change)


def prunable_layers(network: nn.Module) -> dict[str, KANLayer]:
    """Return the KAN layers that have edges to prune, by name: all but the functions of activations.

    Raises:
        ValueError: if the network has no KAN layer.
    """
    inside = {id(part.functions) for part in network.modules() if isinstance(part, KANActivation)}
    return {name: layer for name, layer in kan_layers(network).items() if id(layer) not in inside}


def _mean_over(units: Tensor, *axes: int) -> Tensor:
    """Return the mean over axes, which stay with size 1; over none for the kernel of a linear layer."""
    return units.mean(axes, keepdim=True) if axes else units


@torch.no_grad()
def _term_squares(layer: KANLayer, seen: Tensor | None) -> Tensor:
    """Return the mean square of each basis function's contribution, ``(out, K, in / groups, *kernel)``."""
    x = grid_inputs(layer) if seen is None else input_channels(layer, seen)
    coefficients = layer.coefficients.double()
    sums = sum(channel_features(layer, part).square().sum(dim=2) for part in x.split(_CHUNK, dim=1))  # (in, F)
    means = torch.as_tensor(sums)[:, int(layer.has_base) :] / x.shape[1]
    means = means.unflatten(0, (layer.groups, -1)).mT  # (G, K, in / G)
    means = means.repeat_interleave(coefficients.shape[0] // layer.groups, dim=0)
    return coefficients.square() * means.reshape(*coefficients.shape[:3], *[1] * (coefficients.dim() - 3))


def _choose(
    importance: dict[str, Tensor], kept: dict[str, Tensor], amount: float, *, together: bool
) -> dict[str, Tensor]:
    """Return the units to keep; those pruned before go first, ties by position."""
    names = [list(importance)] if together else [[name] for name in importance]
    chosen: dict[str, Tensor] = {}
    for group in names:
        ranks = torch.cat([importance[name].flatten().where(kept[name].flatten(), -1.0) for name in group])
        count = round(amount * len(ranks))
        keep = torch.ones(len(ranks), dtype=torch.bool)
        keep[ranks.argsort(stable=True)[:count]] = False
        parts = keep.split([importance[name].numel() for name in group])
        chosen |= {name: part.view_as(kept[name]) & kept[name] for name, part in zip(group, parts, strict=True)}
    return chosen


def _find_mask(layer: KANLayer) -> KANMask | None:
    steps = weight_parametrizations(layer)
    return None if steps is None else next((step for step in steps if isinstance(step, KANMask)), None)


def _kept_units(layer: KANLayer, shape: torch.Size, first: int) -> Tensor:
    """Return which units of the given broadcast shape have something left."""
    mask = _find_mask(layer)
    if mask is None:
        return torch.ones(shape, dtype=torch.bool)
    left = mask.mask.cpu().unflatten(1, (layer.num_features, -1))
    if first:
        left = left[:, int(layer.has_base) :]
    for axis, size in enumerate(shape):
        if size == 1:
            left = left.any(dim=axis, keepdim=True)
    return left


def _apply(layer: KANLayer, keep: Tensor, first: int) -> None:
    """Take units out of the mask, which is put first among the parametrizations if it is new."""
    mask = _find_mask(layer)
    if mask is None:
        mask = KANMask(torch.ones(layer.weight.shape, dtype=torch.bool, device=layer.weight.device))
        steps = weight_parametrizations(layer)
        if steps is None:
            parametrize.register_parametrization(layer, "weight", mask)
        else:  # a certified norm must see the masked weight: zeros can raise the norm of a matrix
            steps.insert(0, mask)
    parts = mask.mask.unflatten(1, (layer.num_features, -1))
    if first:
        parts = parts[:, int(layer.has_base) :]
    parts &= keep.to(parts.device)
