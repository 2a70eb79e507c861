"""Pruned input channels of KAN layers taken out, so that nothing is computed for them."""

# No postponed annotations here: networks with these layers are scripted.

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from monai_deqkan.networks.layers.kan_conv import KAN_CONVOLUTIONS
from monai_deqkan.networks.layers.kan_layer import KANLayer
from monai_deqkan.networks.layers.kan_linear import KANLinear
from monai_deqkan.networks.layers.kan_prune import KANMask, prunable_layers
from monai_deqkan.networks.layers.plain_weight import weight_parametrizations

__all__ = ["ChannelSubset", "remove_pruned_channels"]


class ChannelSubset(nn.Module):
    """Apply a layer to some channels of the input; put in by :func:`remove_pruned_channels`.

    Args:
        layer: layer of as many input channels as are taken.
        channels: which, in the layer's order, int64, shape ``(C,)``.
        axis: axis of the channels: 1, or -1 for linear layers.
    """

    channels: Tensor

    def __init__(self, layer: nn.Module, channels: Tensor, axis: int) -> None:
        super().__init__()
        self.layer = layer
        self.axis = axis
        self.register_buffer("channels", channels)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        return self.layer(x.index_select(self.axis, self.channels))


@torch.no_grad()
def remove_pruned_channels(network: nn.Module) -> nn.Module:
    """Return a copy that computes nothing for input channels of KAN layers whose edges are all zero.

    ``prune_edges(network, amount, scope="layer", granularity="input")`` makes such channels. Outputs stay the same up
    to rounding; time, memory and weights fall with the share of channels that go. A layer with all inputs pruned keeps
    one. Single edges pruned in the channels that stay remain zero in further training. Layers with ``groups`` stay as
    they are, as does `KANActivation`. State dicts no longer fit the dense network.

    Args:
        network: network or layer.

    Returns:
        A copy, each smaller layer inside a `ChannelSubset`.

    Raises:
        ValueError: if the weight of a layer to shrink has another parametrization than pruning.

    Example:
        >>> from monai_deqkan.networks.layers import KANConv2d, prune_edges
        >>> layer = KANConv2d(8, 4, 3)
        >>> report = prune_edges(layer, 0.5, granularity="input")
        >>> remove_pruned_channels(layer).layer.in_channels
        4
    """
    network = copy.deepcopy(network)
    for name, layer in prunable_layers(network).items():
        if layer.groups != 1 or not isinstance(layer, (KANLinear, *KAN_CONVOLUTIONS.values())):
            continue
        live = layer.weight.unflatten(1, (layer.num_features, -1)).ne(0).movedim(2, 0).flatten(1).any(1)
        if bool(live.all()):
            continue
        live[0] |= ~live.any()
        subset = ChannelSubset(
            _shrunk(name, layer, live), live.nonzero()[:, 0], -1 if isinstance(layer, KANLinear) else 1
        )
        subset.train(layer.training)
        if not name:
            return subset
        parent, _, last = name.rpartition(".")
        setattr(network.get_submodule(parent), last, subset)
    return network


def _shrunk(name: str, layer: Any, live: Tensor) -> KANLayer:
    """Return a KAN convolution or linear layer of the live input channels."""
    steps = weight_parametrizations(layer)
    if steps is not None and not all(isinstance(step, KANMask) for step in steps):
        raise ValueError(
            f"The weight of {name or 'the layer'} has a parametrization that its channels cannot be taken from; got "
            f"{[type(step).__name__ for step in steps]}. Remove it first (torch.nn.utils.parametrize)."
        )
    weight, bias = layer.weight.detach(), layer.bias
    count = int(live.sum())
    options = {
        "bias": bias is not None,
        "basis": layer.basis,
        "base_activation": layer.base_activation,
        "init": layer.init,
        "device": weight.device,
        "dtype": weight.dtype,
    }
    small: Any
    if isinstance(layer, KANLinear):
        small = KANLinear(count, layer.out_features, **options)
    else:
        small = KAN_CONVOLUTIONS[layer.spatial_dims](
            count,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            padding_mode=layer.padding_mode,
            **options,
        )

    def columns(packed: Tensor) -> Tensor:
        return packed.unflatten(1, (layer.num_features, -1))[:, :, live].flatten(1, 2)

    small.weight.copy_(columns(weight))
    if small.bias is not None and bias is not None:
        small.bias.copy_(bias)
    if layer.input_scale is not None and layer.input_shift is not None:
        small.set_input_map(layer.input_scale[live], layer.input_shift[live])
    small.weight.requires_grad_(layer.weight.requires_grad if steps is None else steps.original.requires_grad)
    for mask in [step.mask for step in steps or () if isinstance(step, KANMask)]:
        parametrize.register_parametrization(small, "weight", KANMask(columns(mask)))
    shrunk: KANLayer = small
    return shrunk
