"""A loss for complex images that treats magnitude and phase alike."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.loss import _Loss

from monai_deqkan._checks import check_choice, check_range, check_same_shape
from monai_deqkan._complex import channels_to_complex

__all__ = ["PerpendicularLoss", "perpendicular_distance"]


def perpendicular_distance(prediction: Tensor, target: Tensor, eps: float = 1e-2) -> Tensor:
    r"""Return how far a complex target lies off the direction of the complex prediction, per pixel.

    With :math:`\varphi` the angle between prediction :math:`\hat y` and target :math:`y`,

    .. math::
        P = \frac{|\hat y|}{\sqrt{|\hat y|^2 + \epsilon^2}}\, |y| \cdot
            \begin{cases} |\sin \varphi| & \text{if } |\varphi| \le 90° \\
                           2 - |\sin \varphi| & \text{otherwise.} \end{cases}

    It grows with the angle from 0 at equal phase to twice its value at a right angle at opposite phase. The first
    factor is near 1 where :math:`|\hat y| \gg \epsilon`: there :math:`P` is the distance of the target from the line
    through zero and the prediction, up to a right angle. Where :math:`|\hat y| \ll \epsilon` it fades to zero, as the
    prediction has no phase there; with :math:`\epsilon > 0`, :math:`P` is continuous everywhere.

    Args:
        prediction: complex, any shape and unit.
        target: complex, same shape and unit.
        eps: :math:`\epsilon` in the same unit, about the noise level; keeps the gradient bounded where the prediction
            is near zero. With 0 a prediction of zero gives NaN.

    Returns:
        Real, same shape and unit.
    """
    cross = prediction.real * target.imag - prediction.imag * target.real
    dot = prediction.real * target.real + prediction.imag * target.imag
    softened = (prediction.real.square() + prediction.imag.square() + eps**2).sqrt()
    distance = cross.abs() / softened
    return torch.where(dot < 0, 2 * target.abs() * prediction.abs() / softened - distance, distance)


class PerpendicularLoss(_Loss):
    r"""Sum of a phase term, :func:`perpendicular_distance`, and a loss of the magnitudes.

    .. math:: L = P(\hat y, y) + w\, \big||\hat y| - |y|\big|^p, \qquad p = 1\text{ or }2

    Args:
        magnitude_loss: ``"l1"`` or ``"l2"``.
        magnitude_weight: :math:`w`, in the unit that makes both terms equal (dimensionless for ``"l1"``).
        eps: see :func:`perpendicular_distance`; images are expected with a maximum of about 1.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over pixels.

    Example:
        >>> loss = PerpendicularLoss(eps=0.0)
        >>> y = torch.tensor([[[1.0]], [[0.0]]]).reshape(1, 2, 1, 1)
        >>> loss(y, y).item(), loss(-y, y).item()
        (0.0, 2.0)

    Reference:
        M. L. Terpstra, M. Maspero, A. Sbrizzi, C. A. T. van den Berg, ":math:`\perp`-loss: a symmetric loss function
        for magnetic resonance imaging reconstruction and image registration with deep learning", Med. Image Anal. 80
        (2022) 102509. Ours tells the branch by the sign of the dot product, and softens the division.
    """

    def __init__(
        self,
        magnitude_loss: str = "l1",
        *,
        magnitude_weight: float = 1.0,
        eps: float = 1e-2,
        reduction: str = "mean",
    ) -> None:
        super().__init__(reduction=check_choice("reduction", reduction, ("mean", "sum", "none")))
        self.power = {"l1": 1, "l2": 2}[check_choice("magnitude_loss", magnitude_loss, ("l1", "l2"))]
        self.magnitude_weight = check_range("magnitude_weight", magnitude_weight, 0.0)
        self.eps = check_range("eps", eps, 0.0)

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the loss.

        Args:
            prediction: complex ``(B, *space)``, or as two channels ``(B, 2, *space)``; bfloat16, which has no
                complex form, is taken as float32.
            target: the same, in the same unit.

        Returns:
            A scalar, or ``(B, *space)`` without reduction.

        Raises:
            ValueError: if the shapes differ, or real images do not have two channels.
        """
        check_same_shape("prediction", prediction, "target", target)
        first, second = (x if x.is_complex() else channels_to_complex(x) for x in (prediction, target))
        # The gradient of a complex abs at zero is zero in torch, that of a square root of squares is NaN.
        magnitude = (first.abs() - second.abs()).abs() ** self.power
        loss = perpendicular_distance(first, second, self.eps) + self.magnitude_weight * magnitude
        if self.reduction == "none":
            return loss
        return loss.mean() if self.reduction == "mean" else loss.sum()
