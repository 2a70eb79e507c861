"""Parametrizations of a layer's weight: finding them, and taking them off without harm to copies of the layer."""

from __future__ import annotations

from typing import cast

from torch import nn
from torch.nn.utils import parametrize

__all__ = ["is_plain", "make_weight_plain", "weight_parametrizations"]


def is_plain(layer: nn.Module) -> bool:
    """Say whether the layer's weight is a parameter, not computed from others."""
    return "weight" in layer._parameters


def weight_parametrizations(layer: nn.Module) -> parametrize.ParametrizationList | None:
    """Return the parametrizations of a layer's ``weight``; ``None`` where it is plain."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    return cast(parametrize.ParametrizationList, cast(nn.ModuleDict, layer.parametrizations)["weight"])


def make_weight_plain(layer: nn.Module, *, keep_value: bool = True) -> None:
    """Store the value of a parametrized ``weight`` as a plain parameter, in place; a plain one stays as it is.

    Args:
        layer: layer with a ``weight``.
        keep_value: whether the parameter gets the value computed from the original, or stays the original.
    """
    if weight_parametrizations(layer) is None:
        return
    # torch (2.14) takes the property off the class, which deep copies of the layer share: they would lose their weight.
    shared = layer.__class__
    own = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
    layer.__class__ = type(shared.__name__, shared.__bases__, own)
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=keep_value)
