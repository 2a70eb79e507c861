"""What the KAN layers of a network receive: quantiles, extremes, the share outside the grid, and a sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from monai_deqkan._checks import check_int
from monai_deqkan.networks.layers.kan_channels import grid_coordinates, input_rows, num_channels
from monai_deqkan.networks.layers.kan_layer import KANLayer

__all__ = [
    "InputStatistics",
    "LayerInputs",
    "column_quantiles",
    "evaluation_mode",
    "kan_layers",
    "record_inputs",
    "record_kan_inputs",
    "recorded_samples",
]


def kan_layers(network: nn.Module) -> dict[str, KANLayer]:
    """Return the KAN layers of a network by their names, each once; the network itself under ``""``.

    Raises:
        TypeError: if ``network`` is no module.
        ValueError: if it has none.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"`network` must be a torch.nn.Module; got {type(network).__name__}.")
    layers = {name: module for name, module in network.named_modules() if isinstance(module, KANLayer)}
    if not layers:
        raise ValueError(
            f"`network` must hold KAN layers; {type(network).__name__} has none. Build it with KANLinear, "
            "KANConv1d/2d/3d or KANActivation."
        )
    return layers


def column_quantiles(rows: Tensor, q: Sequence[float] | Tensor) -> Tensor:
    """Return quantiles of the finite values of each column, as ``torch.quantile`` interpolates them.

    Args:
        rows: values, shape ``(N, C)``.
        q: probabilities, ``Q`` of them.

    Returns:
        Shape ``(Q, C)``, float64; NaN for a column without a finite value.
    """
    rows = rows.double()
    finite = rows.isfinite()
    count = finite.sum(0)
    ordered = torch.where(finite, rows, torch.inf).sort(0).values
    position = torch.as_tensor(q, dtype=torch.float64, device=rows.device)[:, None] * (count - 1).clamp(min=0)
    lower = position.floor()
    upper = torch.minimum(lower + 1.0, (count - 1).clamp(min=0).double())
    below, above = ordered.gather(0, lower.long()), ordered.gather(0, upper.long())
    share = position - lower
    return torch.where(count > 0, below * (1.0 - share) + above * share, torch.nan)


class LayerInputs:
    """What one KAN layer received: running counts over all values, and a random sample of bounded size.

    Args:
        layer: the layer.
        max_samples: rows kept at most.
        generator: source of the random choice.

    Attributes:
        samples: kept inputs, shape ``(N, in)``, NaN and infinities included.
        count: number of values per channel that were seen.
        minimum: smallest finite value per channel, shape ``(in,)``; ``inf`` where there is none.
        maximum: largest one; ``-inf`` where there is none.
        non_finite: number of NaN and infinite values per channel.
    """

    def __init__(self, layer: KANLayer, max_samples: int, generator: torch.Generator) -> None:
        self.layer = layer
        self.max_samples = max_samples
        self.count = 0
        self._generator = generator
        channels = num_channels(layer)
        device = layer.weight.device
        self.minimum = torch.full((channels,), torch.inf, dtype=torch.float64, device=device)
        self.maximum = torch.full((channels,), -torch.inf, dtype=torch.float64, device=device)
        self.non_finite = torch.zeros(channels, dtype=torch.int64, device=device)
        self._below = torch.zeros_like(self.non_finite)
        self._above = torch.zeros_like(self.non_finite)
        self.samples = torch.empty((0, channels), device=device)
        self._keys = torch.empty(0)

    @property
    def below(self) -> Tensor:
        """Share of each channel's finite values below the grid as it was when they came, shape ``(in,)``."""
        return self._below / (self.count - self.non_finite).clamp(min=1)

    @property
    def above(self) -> Tensor:
        """Share above the grid."""
        return self._above / (self.count - self.non_finite).clamp(min=1)

    @property
    def outside(self) -> float:
        """Share of all finite values that fell outside the grid."""
        finite = (self.count - self.non_finite).sum().clamp(min=1)
        return float((self._below + self._above).sum() / finite)

    def quantiles(self, q: Sequence[float] | Tensor) -> Tensor:
        """Return quantiles of the kept finite values, shape ``(Q, in)``; see `column_quantiles`."""
        return column_quantiles(self.samples, q)

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Count one input of the layer and keep a share of it."""
        rows = input_rows(self.layer, x)
        if not len(rows):
            return
        finite = rows.isfinite()
        low, high = self.layer.basis.grid_range
        t = grid_coordinates(self.layer, rows)
        self.count += len(rows)
        self.non_finite += (~finite).sum(0)
        self._below += (finite & (t < low)).sum(0)
        self._above += (finite & (t > high)).sum(0)
        infinite = rows.new_tensor(torch.inf)
        self.minimum = torch.minimum(self.minimum, torch.where(finite, rows, infinite).amin(0).double())
        self.maximum = torch.maximum(self.maximum, torch.where(finite, rows, -infinite).amax(0).double())
        self._keep(rows)

    def _keep(self, rows: Tensor) -> None:
        # The rows with the smallest of independent random keys are a uniform sample of all rows seen.
        keys = torch.rand(len(rows), generator=self._generator)
        if len(rows) > self.max_samples:
            keys, index = keys.topk(self.max_samples, largest=False, sorted=False)
            rows = rows[index.to(rows.device)]
        wide = torch.promote_types(rows.dtype, torch.float32)
        self.samples = torch.cat((self.samples.to(wide), rows.to(wide)))
        self._keys = torch.cat((self._keys, keys))
        if len(self._keys) > self.max_samples:
            self._keys, index = self._keys.topk(self.max_samples, largest=False, sorted=False)
            self.samples = self.samples[index.to(self.samples.device)]


class InputStatistics:
    """Record what each KAN layer of a network receives while data run through it.

    A ``with`` block, or `start` and `stop`. Counts and extremes are of all values; quantiles and samples come from a
    random choice of ``max_samples`` rows per layer, the same in every run, so that memory stays bounded: ``4 *
    max_samples * in`` bytes per layer. Inputs of a convolution are counted before padding, one row per voxel.

    Args:
        network: a network with KAN layers anywhere in it, or such a layer.
        max_samples: rows kept per layer.
        seed: seed of the random choice.

    Attributes:
        layers: a `LayerInputs` for each KAN layer that received something, by the layer's name in the network.

    Raises:
        ValueError: if the network has no KAN layer.
        TypeError: if it is no module.

    Example:
        >>> from monai_deqkan.networks.layers import KANLinear
        >>> layer = KANLinear(2, 1)
        >>> with InputStatistics(layer) as statistics:
        ...     _ = layer(torch.tensor([[0.0, 1.0], [2.0, 4.0]]))
        >>> statistics.layers[""].above  # the default grid ends at 3
        tensor([0.0000, 0.5000])
    """

    def __init__(self, network: nn.Module, max_samples: int = 8192, seed: int = 0) -> None:
        self.network = network
        self.max_samples = check_int("max_samples", max_samples)
        self.layers: dict[str, LayerInputs] = {}
        self._generator = torch.Generator().manual_seed(seed)
        self._hooks: list[RemovableHandle] = []
        self._names = {layer: name for name, layer in kan_layers(network).items()}

    def start(self) -> None:
        """Begin to record; once more does no harm."""
        if not self._hooks:
            self._hooks = [layer.register_forward_pre_hook(self._record) for layer in self._names]

    def stop(self) -> None:
        """End recording and leave no hook behind."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> InputStatistics:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _record(self, layer: Any, args: tuple[Tensor, ...]) -> None:
        name = self._names[layer]
        if name not in self.layers:
            self.layers[name] = LayerInputs(layer, self.max_samples, self._generator)
        self.layers[name].add(args[0])


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode, and afterwards each of its modules back into its own mode."""
    # MONAI's `eval_mode` puts all parts of a training network back to training, frozen ones too, and stops gradients.
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def record_inputs(
    network: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None = None,
    max_samples: int = 8192,
) -> InputStatistics:
    """Run a network over batches, in evaluation mode and without gradients, and return what its KAN layers received.

    Args:
        network: the network.
        batches: what it is run on.
        forward: called as ``forward(network, batch)``; ``network(batch)`` by default.
        max_samples: rows kept per layer.

    Raises:
        ValueError: if the network has no KAN layer.
        TypeError: if it is no module.
    """
    with evaluation_mode(network), InputStatistics(network, max_samples) as statistics:
        for batch in batches:
            network(batch) if forward is None else forward(network, batch)
    return statistics


def recorded_samples(statistics: InputStatistics) -> dict[str, Tensor]:
    """Return the samples of each layer in a shape that the layer takes, ``(N, in)`` or ``(N, in, 1, ...)``, float64.

    Raises:
        ValueError: if a layer received NaN or infinities.
    """
    found: dict[str, Tensor] = {}
    for name, inputs in statistics.layers.items():
        if bool(inputs.non_finite.any()):
            raise ValueError(
                f"The inputs of the KAN layer '{name}' must be finite; {int(inputs.non_finite.sum())} of them were "
                "not. Leave the samples out that give these."
            )
        kernel_axes = inputs.layer.weight.dim() - 2
        found[name] = inputs.samples.double().reshape(*inputs.samples.shape, *[1] * kernel_axes)
    return found


def record_kan_inputs(network: nn.Module, *inputs: Tensor, max_values: int = 4096) -> dict[str, Tensor]:
    """Run a network once and return what its KAN layers were called with.

    The network runs in evaluation mode and is put back into its mode afterwards. A layer that is called several
    times, such as one inside an equilibrium, gives the inputs of all calls. `InputStatistics` does it for many batches.

    Args:
        network: the network, or one KAN layer.
        inputs: its arguments.
        max_values: most values per channel that are kept: all, or a random choice that is the same in every run.

    Returns:
        For each KAN layer that was called, by its name in the network (empty for the network itself): inputs for
        :func:`edge_importance`, ``(N, in)`` for a linear layer, ``(N, in, 1, ...)`` for a convolution.

    Raises:
        ValueError: if no KAN layer was called, or inputs of one are not finite.
        TypeError: if ``network`` is no module.
    """
    check_int("max_values", max_values)
    statistics = record_inputs(network, [inputs], lambda called, arguments: called(*arguments), max_values)
    if not statistics.layers:
        raise ValueError(f"`network` must call at least one KAN layer; {type(network).__name__} called none.")
    return recorded_samples(statistics)
