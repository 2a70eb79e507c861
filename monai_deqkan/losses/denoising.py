"""A loss for denoisers that are trained at many noise levels at once."""

from __future__ import annotations

import math

from torch import Tensor, nn

from monai_deqkan._checks import check_choice, check_range, check_shape, check_tensor

__all__ = ["DenoisingLoss"]

_LEAST_SHARE = 1e-4  # of the noise: an image that is met exactly has a finite loss


class DenoisingLoss(nn.Module):
    r"""Mean error of denoised images, with weights that let all noise levels count alike.

    .. math:: L = \frac1B \sum_b \Big(\frac{\sigma_0}{\sigma_b}\Big)^{p q}\, \operatorname{mean} |\hat x_b - x_b|^p

    The root mean square error of published denoisers grows with about the square root of the noise level: without
    weights the highest levels decide. With ``"log_mse"`` it is how much of the noise is left, in nepers of its power,

    .. math:: L = \frac1B \sum_b \log\Big(\frac{\operatorname{mean} |\hat x_b - x_b|^2}{\sigma_b^2} + 10^{-4}\Big),

    so all levels and images, easy and hard ones, count alike.

    Args:
        error: ``"l1"`` (:math:`p = 1`) or ``"mse"`` (:math:`p = 2`), of real and imaginary part; or ``"log_mse"``.
        exponent: :math:`q`, dimensionless; 0 weights nothing. Without influence on ``"log_mse"``.
        unit_level: noise level :math:`\sigma_0` whose weight is 1, in the unit of the noise levels.

    Raises:
        ValueError: for an unknown error, or a number out of range.

    Example:
        >>> import torch
        >>> clean, level = torch.zeros(2, 2, 4, 4), torch.tensor([0.05, 0.2])
        >>> DenoisingLoss()(torch.ones(2, 2, 4, 4), (clean, level)).item()
        0.75
    """

    def __init__(self, error: str = "l1", *, exponent: float = 0.5, unit_level: float = 0.05) -> None:
        super().__init__()
        self.error = check_choice("error", error, ("l1", "mse", "log_mse"))
        self.power = 1 if error == "l1" else 2
        self.exponent = check_range("exponent", exponent, 0.0, math.inf, open_high=True)
        self.unit_level = check_range("unit_level", unit_level, 0.0, open_low=True)

    def forward(self, prediction: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        """Return the loss, a scalar.

        Args:
            prediction: denoised images ``(B, C, *space)``.
            target: clean images of the same shape and unit, and the noise level of each sample, ``(B,)``.

        Raises:
            ValueError: if shapes do not fit.
        """
        clean, level = target
        check_shape("prediction", check_tensor("prediction", prediction), tuple(clean.shape))
        check_shape("target[1]", check_tensor("target[1]", level), (len(clean),))
        errors = (prediction - clean).abs().pow(self.power).flatten(1).mean(dim=1)
        if self.error == "log_mse":
            return (errors / level.to(errors).square() + _LEAST_SHARE).log().mean()
        weights = (self.unit_level / level).pow(self.exponent * self.power)
        return (weights.to(errors) * errors).mean()

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"error={self.error!r}, exponent={self.exponent:g}"
