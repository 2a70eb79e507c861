"""How far the injection of an equilibrium may move before the predicted class can change."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from monai_deqkan.networks.blocks.deq_cell import KANCell, MLPCell
from monai_deqkan.networks.layers.deq import DEQLayer
from monai_deqkan.networks.layers.kan_inputs import evaluation_mode
from monai_deqkan.networks.nets.deqkan_classifier import DEQKANClassifier

__all__ = ["MarginBound", "margin_bound"]


@dataclass(frozen=True)
class MarginBound:
    r"""What is certified of each prediction, from the injection to the logits.

    The predicted class of the exact equilibrium is the same for every injection within ``radius`` of the image's own.
    Nothing is certified from the image to the injection: the convolutional features have no bound of their own.

    Attributes:
        predictions: predicted classes ``(B,)``.
        margins: how far the predicted class's logit is above the next one's, ``(B,)``.
        radius: certified Euclidean distance in the space of injections, ``(B,)``; 0 where nothing is certified.
        relative_radius: that over the norm of the injection, dimensionless, ``(B,)``.
        factor: certified contraction factor :math:`c` of the cell.
    """

    predictions: Tensor
    margins: Tensor
    radius: Tensor
    relative_radius: Tensor
    factor: float


@torch.no_grad()
def margin_bound(network: DEQKANClassifier, images: Tensor) -> MarginBound:
    r"""Certify the predictions of a DEQ-KAN classifier against changes of the injection.

    The cell, a :class:`~monai_deqkan.networks.blocks.KANCell` or :class:`~monai_deqkan.networks.blocks.MLPCell`, is
    ``z = p + K(z)`` with ``K`` of Lipschitz constant :math:`c < 1`. So it has one equilibrium for each injection, and
    :math:`\|z^*(p) - z^*(p')\| \le \|p - p'\| / (1 - c)`. With the head's rows :math:`w_i` and logits :math:`l_i` the
    class ``i`` stays the largest within

    .. math:: r = \frac{1 - c}{L_\mathrm{pool}} \min_{j \ne i} \frac{l_i - l_j}{\|w_i - w_j\|_2} - \|f(z) - z\|_2

    where the residual of the state ``z`` that was found pays for its distance from the equilibrium, and the Lipschitz
    constant of the pooling behind an equilibrium on a map of ``n`` places is 1 for the maximum, :math:`1 / \sqrt{n}`
    for the mean, and at most :math:`\sqrt{1 + 1 / n}` for both side by side (1 without a map). Runs in evaluation mode.
    Holds up to rounding; residuals below 1e-7 of the state mean no more in float32.

    Args:
        network: classifier that solves an equilibrium of one of the two cells above, with a linear head.
        images: shape ``(B, in_channels, *space)``.

    Returns:
        The bound of each image.

    Raises:
        TypeError: for another network, cell or head, or with ``num_steps``: the bound would not hold.

    Reference:
        Y. Tsuzuku, I. Sato and M. Sugiyama, "Lipschitz-margin training", NeurIPS 2018, for margins; C. Pabbaraju,
        E. Winston and J. Z. Kolter, "Estimating Lipschitz constants of monotone deep equilibrium models", ICLR 2021,
        for the :math:`1 / (1 - c)` of an equilibrium.
    """
    _check_parts(network)
    seen: list[tuple[Tensor, Tensor]] = []
    handle = network.equilibrium.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    try:
        with evaluation_mode(network):
            logits = network(images).as_subclass(Tensor)
    finally:
        handle.remove()
    x, z = (part.as_subclass(Tensor) for part in seen[0])
    cell = network.equilibrium.cell
    factor = float(cell.certified_contraction(x).factor)
    residual = (cell(z, x) - z).double().flatten(1).norm(dim=1)
    pooling = _pool_lipschitz(network.pool, z[0, 0].numel()) if network.on_map else 1.0
    weight, logits = network.head.weight.double(), logits.double()
    if logits.shape[1] == 1:  # one logit, of the second of two classes
        weight, logits = torch.cat([torch.zeros_like(weight), weight]), torch.cat([torch.zeros_like(logits), logits], 1)
    predictions = logits.argmax(1)
    rival = nn.functional.one_hot(predictions, logits.shape[1]) == 0
    gaps = logits.gather(1, predictions[:, None]) - logits  # (B, classes)
    distances = (weight[predictions][:, None] - weight).norm(dim=2)
    ratios = torch.where(rival, (gaps / distances).nan_to_num(nan=0.0, posinf=torch.inf), torch.inf)
    radius = ((1 - factor) / pooling * ratios.amin(1) - residual).clamp_min(0)
    margins = torch.where(rival, gaps, torch.inf).amin(1)
    return MarginBound(predictions, margins, radius, radius / x.double().flatten(1).norm(dim=1), factor)


def _pool_lipschitz(pool: str, places: int) -> float:
    """Return an upper bound of the Lipschitz constant of ``pool_space`` on maps of so many places."""
    return {"max": 1.0, "avg": 1 / math.sqrt(places), "both": math.sqrt(1 + 1 / places)}[pool]


def _check_parts(network: nn.Module) -> None:
    if not isinstance(network, DEQKANClassifier):
        raise TypeError(f"`network` must be a DEQKANClassifier; got {type(network).__name__}.")
    layer = network.equilibrium
    holds = isinstance(layer, DEQLayer) and isinstance(layer.cell, (KANCell, MLPCell))
    if not (holds and isinstance(network.head, nn.Linear)):
        raise TypeError(
            "The bound holds for a DEQLayer with a KANCell or MLPCell and a linear head after it; got "
            f"{type(layer).__name__}, {type(getattr(layer, 'cell', None)).__name__} and {type(network.head).__name__}."
        )
