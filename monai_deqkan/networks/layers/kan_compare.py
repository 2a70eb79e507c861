"""How far a change of a network moves its output and those of its KAN layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from monai_deqkan.networks.layers.kan_inputs import evaluation_mode, kan_layers
from monai_deqkan.networks.layers.kan_layer import KANLayer

__all__ = [
    "Batches",
    "LayerCall",
    "OutputChanges",
    "compare_outputs",
    "list_batches",
    "record_calls",
    "relative_change",
]

Batches: TypeAlias = Tensor | Iterable[Tensor | tuple[Any, ...]]


@dataclass(frozen=True)
class LayerCall:
    """First input and output of a layer."""

    input: Tensor
    output: Tensor


@dataclass(frozen=True)
class OutputChanges:
    """Root mean square changes of outputs, relative to the root mean square of the outputs before.

    Args:
        network: change of the network's output over all batches.
        layers: change of each layer's output by name, on the inputs that the layer had before the change, so that
            changes of earlier layers do not count.
    """

    network: float
    layers: Mapping[str, float]

    def __str__(self) -> str:
        """Show one line per layer, the network's last."""
        width = max(map(len, [*self.layers, "network"]))
        lines = [
            f"{name:<{width}}  {change:9.3%}" for name, change in [*self.layers.items(), ("network", self.network)]
        ]
        return "\n".join([f"{'layer':<{width}}  {'change':>9}", *lines])


def compare_outputs(network: nn.Module, other: nn.Module, inputs: Batches) -> OutputChanges:
    """Measure how far the outputs of a changed network are from the original's, in whole and per KAN layer.

    Args:
        network: the original.
        other: its pruned, quantized, tabulated or otherwise changed form, with modules of the same names.
        inputs: one batch, or several; a batch is a tensor, or a tuple of arguments. Both networks run in eval mode.

    Returns:
        Relative changes; per layer on the first batch only.

    Raises:
        ValueError: if there is no batch, or no KAN layer.
        AttributeError: if ``other`` lacks a module that ``network`` has.

    Example:
        >>> from monai_deqkan.networks.layers import KANLinear, quantize_kan
        >>> _ = torch.manual_seed(0)
        >>> network = nn.Sequential(KANLinear(4, 8), KANLinear(8, 2))
        >>> changes = compare_outputs(network, quantize_kan(network), torch.randn(64, 4))
        >>> max(changes.layers.values()) < 0.01
        True
    """
    batches = list_batches(inputs)
    calls, before = record_calls(network, kan_layers(network), batches)
    _, after = record_calls(other, {}, batches)
    with torch.no_grad(), evaluation_mode(other):
        layers = {
            name: relative_change([call.output], [other.get_submodule(name)(call.input)])
            for name, call in calls.items()
        }
    return OutputChanges(relative_change(before, after), layers)


def list_batches(inputs: Batches) -> list[tuple[Any, ...]]:
    """Return the argument tuples of all batches.

    Raises:
        ValueError: if there is none.
    """
    batches = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    if not batches:
        raise ValueError("`inputs` must be a batch or a sequence of batches; got an empty one.")
    return [batch if isinstance(batch, tuple) else (batch,) for batch in batches]


@torch.no_grad()
def record_calls(
    network: nn.Module, layers: Mapping[str, KANLayer], batches: Iterable[tuple[Any, ...]]
) -> tuple[dict[str, LayerCall], list[Tensor]]:
    """Run a network in eval mode, and return the first call of each layer that was called, and all outputs."""
    calls: dict[str, LayerCall] = {}
    outputs: list[Tensor] = []

    def listen(name: str, layer: KANLayer) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            calls.setdefault(name, LayerCall(args[0], output))

        return layer.register_forward_hook(hook)

    handles = [listen(name, layer) for name, layer in layers.items()]
    try:
        with evaluation_mode(network):
            for batch in batches:
                outputs += _tensors(network(*batch))
    finally:
        for handle in handles:
            handle.remove()
    return calls, outputs


def relative_change(before: list[Tensor], after: list[Tensor]) -> float:
    """Return the root mean square of the difference, relative to the one before; zero if nothing changed."""
    pairs = list(zip(before, after, strict=True))
    difference = sum(float((a - b).abs().double().square().sum()) for b, a in pairs)
    size = sum(float(b.abs().double().square().sum()) for b in before)
    if difference == 0:
        return 0.0
    return float("inf") if size == 0 else (difference / size) ** 0.5


def _tensors(output: Any) -> list[Tensor]:
    """Return the tensors of a network's output, which may be nested."""
    if isinstance(output, Tensor):
        return [torch.as_tensor(output)]
    if isinstance(output, Mapping):
        return [tensor for part in output.values() for tensor in _tensors(part)]
    if isinstance(output, (list, tuple)):
        return [tensor for part in output for tensor in _tensors(part)]
    return []
