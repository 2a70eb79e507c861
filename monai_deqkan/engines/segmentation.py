"""What the configurations of segmentation bundles call: losses by name, weights of classes of pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from monai_deqkan.networks.layers import KANLayer
from monai_deqkan.transforms import LoadMask

__all__ = ["choose_loss", "has_kan_layers", "mask_class_weights"]


def choose_loss(losses: Mapping[str, Any], name: str) -> Any:
    """Return one of several losses by its name.

    Raises:
        ValueError: if there is none of that name.

    Example:
        >>> choose_loss({"dice": torch.nn.MSELoss()}, "dice")
        MSELoss()
    """
    if name not in losses:
        raise ValueError(
            f"`loss_name` must be one of {', '.join(losses)}; got {name!r}. One of your own: "
            "--losses#own \"{'_target_': ...}\" --loss_name own."
        )
    return losses[name]


def has_kan_layers(network: nn.Module) -> bool:
    """Tell whether a network has KAN layers."""
    return any(isinstance(module, KANLayer) for module in network.modules())


def mask_class_weights(
    items: Sequence[Mapping[str, Any]], values: Sequence[int], spatial_dims: int = 2, key: str = "label"
) -> Tensor:
    r"""Return weights that give every class of pixels the same share of a loss.

    .. math:: w_c = \frac{n}{C\, n_c}

    with :math:`n_c` of all :math:`n` pixels of the masks in class :math:`c` of :math:`C`. All masks are read.

    Args:
        items: one dictionary per training image.
        values: pixel value of each class, sorted; see `monai_deqkan.data.mask_values`.
        spatial_dims: 2 or 3.
        key: key of the masks' paths.

    Returns:
        Weights of shape ``(C,)``, float32, dimensionless, mean 1 over the pixels.

    Raises:
        ValueError: if a class has no pixel.
    """
    load = LoadMask(values, spatial_dims)
    counts = torch.zeros(len(values), dtype=torch.int64)
    for item in items:
        counts += torch.bincount(load(item[key]).as_tensor().flatten(), minlength=len(values))
    if not bool(counts.all()):
        raise ValueError(
            f"Every class needs pixels in the training masks; got {counts.tolist()} for the values {list(values)}. "
            "Leave the value out, or take another loss."
        )
    return (counts.sum() / (len(values) * counts)).float()
