"""What a segmentation network loses when a channel is replaced by its mean, or when edges are pruned."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from monai.metrics import DiceMetric
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm import tqdm

from monai_deqkan._checks import check_int
from monai_deqkan.networks.layers import KANLayer, prune_edges
from monai_deqkan.networks.layers.kan_compare import relative_change
from monai_deqkan.networks.layers.kan_inputs import evaluation_mode, kan_layers
from monai_deqkan.networks.layers.kan_prune import prunable_layers

_NUM_PROBES = 16  # random vectors by which channels are chosen

__all__ = ["ChannelSensitivity", "PruningCost", "SegmentationProbe"]


@dataclass(frozen=True)
class ChannelSensitivity:
    """What replacing one output channel of a layer by its mean costs.

    Attributes:
        layer: name of the layer in the network.
        channel: the output channel.
        dice_lost: mean Dice before minus after, over all images.
        logit_change: root mean square change of the logits over that of the logits.
    """

    layer: str
    channel: int
    dice_lost: float
    logit_change: float


@dataclass(frozen=True)
class PruningCost:
    """What pruning costs without further training.

    Attributes:
        amount: share of the edges that were set to zero.
        num_edges: edges left that are not zero.
        dice: mean Dice afterwards.
        logit_change: root mean square change of the logits over that of the logits.
    """

    amount: float
    num_edges: int
    dice: float
    logit_change: float


class SegmentationProbe:
    """Run a segmentation network, whole or with a part taken out, on a few images with reference masks.

    The network runs in evaluation mode, without gradients, and is left as it was.

    Args:
        network: returns logits ``(B, classes, *space)``, or ``(B, 1, *space)`` for one class against the background; of
            several outputs the first counts. Samples must not mix.
        batches: batches with ``image`` ``(B, C, *space)`` and ``label`` ``(B, 1, *space)``, the number of the class of
            each pixel, 0 for the background.
        inferer: called as ``inferer(images, network)``, such as MONAI's; ``network(images)`` by default.
        progress: whether to show bars.

    Raises:
        ValueError: if there is no batch, or shapes do not fit.
        TypeError: if ``network`` is no module.
    """

    def __init__(
        self,
        network: nn.Module,
        batches: Iterable[Any],
        *,
        inferer: Callable[[Tensor, nn.Module], Any] | None = None,
        progress: bool = False,
    ) -> None:
        if not isinstance(network, nn.Module):
            raise TypeError(f"`network` must be a torch.nn.Module; got {type(network).__name__}.")
        self.network = network
        self.inferer = inferer
        self.progress = progress
        device = next((p.device for p in network.parameters()), torch.device("cpu"))
        read = self._bar(batches, "read images", None)
        pairs = [(_plain(batch["image"]).to(device), _plain(torch.as_tensor(batch["label"]))) for batch in read]
        if not pairs:
            raise ValueError("`batches` holds no image. Check the folder of the data set.")
        self.images = [images for images, _ in pairs]
        self.labels = [labels for _, labels in pairs]
        for images, labels in pairs:
            if labels.shape != (len(images), 1, *images.shape[2:]):
                raise ValueError(
                    f"`label` must have shape ({len(images)}, 1, *space) of the image {tuple(images.shape)}, class "
                    f"numbers from 0; got {tuple(labels.shape)}."
                )

    @property
    def num_images(self) -> int:
        """Number of images."""
        return sum(map(len, self.images))

    def run(self, network: nn.Module, images: Tensor) -> Tensor:
        """Return the logits of one batch."""
        found = network(images) if self.inferer is None else self.inferer(images, network)
        while not isinstance(found, Tensor):
            found = next(iter(found.values())) if isinstance(found, dict) else found[0]
        return _plain(found)

    @torch.no_grad()
    def logits(self, network: nn.Module | None = None) -> list[Tensor]:
        """Return the logits of all batches, by default of the network as it is."""
        used = self.network if network is None else network
        with evaluation_mode(used):
            return [self.run(used, images).cpu() for images in self.images]

    def dice(self, logits: Sequence[Tensor]) -> float:
        """Return the mean Dice without background over images and classes, as the bundles' evaluation takes it."""
        classes = max(2, logits[0].shape[1])
        metric = DiceMetric(include_background=False, num_classes=classes)
        for found, labels in zip(logits, self.labels, strict=True):
            chosen = found.argmax(1, keepdim=True) if found.shape[1] > 1 else (found > 0).long()
            metric(y_pred=chosen, y=labels.long().cpu())
        return float(torch.as_tensor(metric.aggregate()))

    @torch.no_grad()
    def channel_sensitivity(self, num_channels: int = 8) -> list[ChannelSensitivity]:
        """Replace channels of the outputs of KAN layers by their mean over all images and positions, one at a time.

        In layers with more channels, those are chosen whose replacement changes the logits of the first image most, to
        first order (of volumes: its middle, at most 64 voxels along each axis). The head is left out: a KAN layer that
        nothing with weights follows.

        Args:
            num_channels: channels tried in each layer.

        Returns:
            Layer by layer in the order of their calls, the channels that cost the most Dice first.

        Raises:
            ValueError: if the network has no KAN layer.
        """
        check_int("num_channels", num_channels)
        before = self.logits()
        dice = self.dice(before)
        means = self._channel_means()
        chosen = self._screened(means, num_channels)
        bar = self._bar([(name, c) for name, rows in chosen.items() for c in rows], "channels")
        found: dict[str, list[ChannelSensitivity]] = {name: [] for name in means}
        for name, channel in bar:
            with _replaced(self.network.get_submodule(name), channel, float(means[name][channel])):
                after = self.logits()
            lost = dice - self.dice(after)
            found[name].append(ChannelSensitivity(name, channel, lost, relative_change(before, after)))
        return [row for rows in found.values() for row in sorted(rows, key=lambda row: (-row.dice_lost, row.channel))]

    def pruning_cost(self, amounts: Sequence[float] = (0.0, 0.25, 0.5, 0.75)) -> list[PruningCost]:
        """Prune copies of the network by :func:`~monai_deqkan.networks.layers.prune_edges`; nothing is trained.

        Args:
            amounts: shares of all edges, each in ``[0, 1)``.

        Returns:
            One record per amount; empty for a network whose only KAN layers are activations, which are not pruned.

        Raises:
            ValueError: if the network has no KAN layer, or an amount is out of its range.
        """
        if not prunable_layers(self.network):
            return []
        before = self.logits()
        called = self._called_layers()
        # A layer that inference leaves out, such as a head for deep supervision, has no inputs to be judged by.
        seen = all(name in called for name in kan_layers(self.network))
        found = []
        for amount in self._bar(amounts, "pruning"):
            pruned = copy.deepcopy(self.network)
            prune_edges(pruned, amount, inputs=[(self._middle(x),) for x in self.images] if seen else None)
            after = self.logits(pruned)
            change = relative_change(before, after)
            found.append(PruningCost(float(amount), live_edges(pruned), self.dice(after), change))
        return found

    def _bar(self, items: Iterable[Any], name: str, total: int | None = None) -> Any:
        return tqdm(items, desc=name, total=total, disable=not self.progress)

    def _middle(self, images: Tensor) -> Tensor:
        """Return images as they are, and of volumes the middle, at most 64 voxels along each axis."""
        if images.dim() < 5:
            return images
        for axis in range(2, images.dim()):
            size = images.shape[axis]
            images = images.narrow(axis, max(0, (size - 64) // 2), min(size, 64))
        return images

    def _called_layers(self) -> list[str]:
        """Return the names of the KAN layers that are called, in the order of their first calls."""
        called: list[str] = []
        handles = [
            layer.register_forward_pre_hook(lambda _, __, name=name: called.append(name))
            for name, layer in kan_layers(self.network).items()
        ]
        try:
            with torch.no_grad(), evaluation_mode(self.network):
                self.run(self.network, self._middle(self.images[0][:1]))
        finally:
            for handle in handles:
                handle.remove()
        return list(dict.fromkeys(called))

    def _channel_means(self) -> dict[str, Tensor]:
        """Return the mean of each output channel by layer, without the head."""
        layers = kan_layers(self.network)
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        called: dict[str, nn.Module] = {}

        def listen(name: str, layer: KANLayer) -> Any:
            def hook(_: nn.Module, __: Any, output: Tensor) -> None:
                rows = _plain(output).movedim(channel_axis(layer), -1).flatten(0, -2).double()
                sums[name] = sums.get(name, torch.zeros((), device=rows.device)) + rows.sum(0)
                counts[name] = counts.get(name, 0) + len(rows)

            return layer.register_forward_hook(hook)

        def note(module: nn.Module, _: Any, __: Any) -> None:
            called["last"] = module

        handles = [listen(name, layer) for name, layer in layers.items()]
        for module in self.network.modules():
            # A pruned layer's weights lie in its parametrization.
            if parametrize.is_parametrized(module) or any(True for _ in module.parameters(recurse=False)):
                handles.append(module.register_forward_hook(note))
        try:
            self.logits()
        finally:
            for handle in handles:
                handle.remove()
        return {name: sums[name] / counts[name] for name in sums if layers[name] is not called["last"]}

    def _screened(self, means: dict[str, Tensor], num_channels: int) -> dict[str, list[int]]:
        """Return the channels to try in each layer: those whose replacement changes the logits of one image most.

        To first order the change is that of the channel, a - mean, times the logits' Jacobian. The mean square of its
        product with random vectors estimates its squared norm for all channels of all layers at once.
        """
        chosen = {name: list(range(len(mean))) for name, mean in means.items()}
        wide = [name for name, mean in means.items() if len(mean) > num_channels]
        if not wide:
            return chosen
        outputs: list[tuple[str, Tensor]] = []
        handles = [
            self.network.get_submodule(name).register_forward_hook(
                lambda _, __, output, name=name: outputs.append((name, output))
            )
            for name in wide
        ]
        try:
            with torch.enable_grad(), evaluation_mode(self.network):
                image = self._middle(self.images[0][:1]).detach().clone().requires_grad_()
                logits = self.run(self.network, image)
        finally:
            for handle in handles:
                handle.remove()
        generator = torch.Generator().manual_seed(0)
        squares: dict[str, Tensor | float] = dict.fromkeys(wide, 0.0)
        for _ in self._bar(range(_NUM_PROBES), "choose channels"):
            probe = torch.randn(logits.shape, generator=generator).to(logits)
            found = torch.autograd.grad(
                logits, [output for _, output in outputs], probe, retain_graph=True, materialize_grads=True
            )
            products: dict[str, Tensor | float] = dict.fromkeys(wide, 0.0)
            for (name, output), gradient in zip(outputs, found, strict=True):
                axis = channel_axis(cast(KANLayer, self.network.get_submodule(name)))
                change = output.detach().movedim(axis, -1) - means[name].to(output)
                products[name] += (gradient.movedim(axis, -1) * change).flatten(0, -2).sum(dim=0)
            squares = {name: squares[name] + products[name] ** 2 for name in wide}
        for name, values in squares.items():
            order = torch.as_tensor(values).argsort(descending=True, stable=True)[:num_channels]
            chosen[name] = sorted(order.tolist())
        return chosen


def live_edges(network: nn.Module) -> int:
    """Return how many edges of a network, but for the functions of activations, are not zero."""
    kernels = [layer.weight.unflatten(1, (layer.num_features, -1)) for layer in prunable_layers(network).values()]
    return sum(int(kernel.ne(0).any(dim=1).sum()) for kernel in kernels)


def channel_axis(layer: KANLayer) -> int:
    """Return the axis of the channels in the output of a layer."""
    return -1 if layer.weight.dim() == 2 else 1


@contextmanager
def _replaced(layer: Any, channel: int, value: float) -> Iterator[None]:
    """Replace one channel of a layer's output by a number."""

    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        changed = output.clone()
        changed.select(channel_axis(layer), channel).fill_(value)
        return changed

    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _plain(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Tensor)  # no MetaTensor
