"""Penalties that keep the functions of KAN layers few, smooth and small."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from monai_deqkan._checks import check_loss_and_network, check_range

__all__ = ["KANL2Loss", "KANPenalty", "KANSmoothnessLoss", "KANSparsityLoss", "RegularizedLoss"]

_EPS = 1e-6  # size of an edge's weights below which its magnitude is quadratic, so that its gradient is finite at zero
_POINTS = 1025  # of the quadrature


class KANPenalty(nn.Module, ABC):
    """Base class: the mean over a network's KAN layers of a value that does not depend on the layer's size."""

    def forward(self, network: nn.Module) -> Tensor:
        """Return the penalty.

        Args:
            network: a network with KAN layers, or one such layer. They are known by what they offer: ``basis``,
                ``has_base``, ``coefficients`` of shape ``(out, K, in, *kernel)`` and ``base_weight``.

        Returns:
            Scalar, differentiable by the layers' weights, at least 0, and 0 where all of these are 0.

        Raises:
            ValueError: if there is no KAN layer.
        """
        layers = [part for part in network.modules() if _is_kan_layer(part)]
        if not layers:
            raise ValueError(
                f"`network` must have KAN layers, such as KANLinear; {type(network).__name__} has none. "
                "Leave the penalty out, or build the network with KAN layers."
            )
        values: list[Tensor] = []
        for layer in layers:
            device = next(layer.parameters()).device
            with torch.autocast(device.type, enabled=False):  # trainers call losses under autocast
                values.append(self.layer_penalty(layer))
        return torch.stack([value.to(values[0].device) for value in values]).mean()

    @abstractmethod
    def layer_penalty(self, layer: Any) -> Tensor:
        """Return the penalty of one KAN layer, a scalar."""


def _is_kan_layer(module: nn.Module) -> bool:
    # By its parts, not by its class: losses do not know networks. The class is asked, as reading the weight of a
    # parametrized layer computes it.
    return all(hasattr(type(module), name) for name in ("coefficients", "base_weight", "edge_functions"))


def _wide(weight: Tensor) -> Tensor:
    """Return a weight of half precision in float32: the squares of small ones would be zero, of large ones infinite."""
    return weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight


class KANSparsityLoss(KANPenalty):
    r"""Penalize the magnitudes of edges, so that few remain, and the entropy of their distribution.

    .. math:: m_e = \sqrt{\operatorname{mean}_f w_{ef}^2}, \qquad
        L = \lambda_1 \operatorname{mean}_e m_e
        - \frac{\lambda_2}{\log E} \sum_e p_e \log p_e, \qquad p_e = \frac{m_e}{\sum_{e'} m_{e'}}

    for each layer of :math:`E` edges, each with its weights :math:`w_{ef}`: one per function of the basis, and the
    base term's. As the magnitude is a root of a sum of squares, whole edges go to zero, not single coefficients
    ("group lasso"). The entropy lies between 0 (one edge is left) and 1 (all are alike), and is blind to scale.

    Args:
        l1: :math:`\lambda_1`, in units of one by weight.
        entropy: :math:`\lambda_2`, dimensionless.

    Raises:
        ValueError: if a weight is negative.

    Example:
        >>> from monai_deqkan.networks.layers import KANLinear
        >>> layer = KANLinear(2, 1, base_activation=None)
        >>> _ = layer.weight.data.copy_(torch.tensor([0.5, 0.0] * 8))  # the second edge is zero
        >>> round(KANSparsityLoss(entropy=0.0)(layer).item(), 4), KANSparsityLoss(l1=0.0)(layer).item() < 1e-4
        (0.25, True)

    Reference:
        Z. Liu et al., "KAN: Kolmogorov-Arnold networks", ICLR 2025, equations (2.17) to (2.20). They take the mean
        absolute value of each edge's activations over a batch, sum over edges, and do not normalize the entropy; ours
        is a function of the weights alone, and has means in place of sums, so that one setting suits all layer sizes.
    """

    def __init__(self, l1: float = 1.0, entropy: float = 1.0) -> None:
        super().__init__()
        self.l1 = check_range("l1", l1, 0.0, math.inf, open_high=True)
        self.entropy = check_range("entropy", entropy, 0.0, math.inf, open_high=True)

    def layer_penalty(self, layer: Any) -> Tensor:
        """Return the penalty of one layer."""
        coefficients, base_weight = _wide(layer.coefficients), layer.base_weight
        squares = coefficients.square().sum(dim=1)
        count = coefficients.shape[1]
        if base_weight is not None:
            squares = squares + _wide(base_weight).square()
            count += 1
        squares = squares / count
        # sqrt(s + eps^2) - eps, written without a difference: zero at zero, and with a gradient of zero there.
        magnitude = squares / ((squares + _EPS**2).sqrt() + _EPS)
        penalty = self.l1 * magnitude.mean()
        if magnitude.numel() > 1 and self.entropy > 0:
            share = magnitude / (magnitude.sum() + _EPS * magnitude.numel())
            surprise = -torch.log(share + _EPS / magnitude.numel())
            penalty = penalty + self.entropy * (share * surprise).sum() / math.log(magnitude.numel())
        return penalty

    def extra_repr(self) -> str:
        """Show the weights."""
        return f"l1={self.l1:g}, entropy={self.entropy:g}"


class KANSmoothnessLoss(KANPenalty):
    r"""Penalize the curvature of the learned functions, base terms left out.

    B-splines: the mean square of the second differences of neighboring control points ("P-splines"),

    .. math:: L = \operatorname{mean}_{e,k} (c_{e,k+1} - 2 c_{ek} + c_{e,k-1})^2,

    zero for straight lines. With knot step :math:`h` it is about the mean of :math:`(h^2 f'')^2`. That one, over the
    basis's ``grid_range`` with :math:`h` its length by the number of functions, is what other bases get, from
    finite differences of their derivatives at 1025 points.

    Args:
        weight: factor, in units of one by squared weight.

    Raises:
        ValueError: if the weight is negative.

    Reference:
        P. H. C. Eilers, B. D. Marx, "Flexible smoothing with B-splines and penalties", Statist. Sci. 11 (1996)
        89-121, section 3; here a mean in place of the sum.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = check_range("weight", weight, 0.0, math.inf, open_high=True)

    def layer_penalty(self, layer: Any) -> Tensor:
        """Return the penalty of one layer."""
        coefficients = _wide(layer.coefficients)
        if hasattr(layer.basis, "spline_order"):
            second = coefficients.diff(n=2, dim=1)
            return self.weight * (second.square().mean() if second.numel() else coefficients.sum() * 0.0)
        curvature = _curvature(layer.basis).to(coefficients)
        flat = coefficients.transpose(0, 1).flatten(1)  # (K, edges)
        return self.weight * (flat * (curvature @ flat)).sum(dim=0).mean()

    def extra_repr(self) -> str:
        """Show the weight."""
        return f"weight={self.weight:g}"


@lru_cache(maxsize=64)
def _curvature(basis: Any) -> Tensor:
    """Return the mean over the grid of h^4 B_k'' B_l'', shape (K, K), float64."""
    low, high = basis.grid_range
    with torch.no_grad():
        slopes = basis.derivative(torch.linspace(low, high, _POINTS, dtype=torch.float64))  # (K, P)
    step = (high - low) / (_POINTS - 1)
    second = slopes.diff(dim=1) * (((high - low) / basis.num_basis) ** 2 / step)
    return second @ second.t() / second.shape[1]


class KANL2Loss(KANPenalty):
    r"""Penalize the mean square of the coefficients: :math:`\lambda \operatorname{mean}_{e,k} c_{ek}^2`.

    Unlike an optimizer's weight decay it leaves base weights, biases and all other layers alone.

    Args:
        weight: :math:`\lambda`, in units of one by squared weight.

    Raises:
        ValueError: if the weight is negative.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = check_range("weight", weight, 0.0, math.inf, open_high=True)

    def layer_penalty(self, layer: Any) -> Tensor:
        """Return the penalty of one layer."""
        return self.weight * _wide(layer.coefficients).square().mean()

    def extra_repr(self) -> str:
        """Show the weight."""
        return f"weight={self.weight:g}"


class RegularizedLoss(nn.Module):
    """Add penalties of a network's KAN layers to any loss; in a MONAI configuration by ``_target_`` alone.

    Penalties of weight zero are not computed. The network is not made a part of the loss: ``parameters()`` and the
    state dict are the loss's own.

    Args:
        loss: called with all arguments, such as ``(prediction, target)``; returns a scalar.
        network: the network being trained, ``"@network_def"`` in a bundle.
        sparsity: weight of the edges' magnitudes, see `KANSparsityLoss`.
        entropy: weight of their entropy.
        smoothness: weight of `KANSmoothnessLoss`.
        l2: weight of `KANL2Loss`.

    Raises:
        TypeError: if ``loss`` cannot be called, or ``network`` is no module.
        ValueError: if a weight is negative, or one is positive and the network has no KAN layer.

    Example:
        >>> from monai_deqkan.networks.layers import KANLinear
        >>> network = KANLinear(2, 1)
        >>> loss = RegularizedLoss(nn.MSELoss(), network, smoothness=1e-3)
        >>> loss(network(torch.zeros(4, 2)), torch.zeros(4, 1)).requires_grad
        True
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        network: nn.Module,
        *,
        sparsity: float = 0.0,
        entropy: float = 0.0,
        smoothness: float = 0.0,
        l2: float = 0.0,
    ) -> None:
        super().__init__()
        check_loss_and_network(loss, network)
        for name, weight in (("sparsity", sparsity), ("entropy", entropy), ("smoothness", smoothness), ("l2", l2)):
            check_range(name, weight, 0.0, math.inf, open_high=True)
        self.loss = loss
        self._network = (network,)  # a tuple hides it from nn.Module
        penalties: dict[str, tuple[float, KANPenalty]] = {
            "sparsity": (sparsity + entropy, KANSparsityLoss(sparsity, entropy)),
            "smoothness": (smoothness, KANSmoothnessLoss(smoothness)),
            "l2": (l2, KANL2Loss(l2)),
        }
        self.penalties = nn.ModuleDict({name: penalty for name, (weight, penalty) in penalties.items() if weight > 0})
        with torch.no_grad():
            for penalty in self.penalties.values():
                penalty(network)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss of the arguments, plus the penalties of the network as it is now."""
        total = self.loss(*args, **kwargs)
        for penalty in self.penalties.values():
            total = total + penalty(self._network[0]).to(total.device)
        return total
