"""A sum of named losses for complex images, by weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from monai.losses import SSIMLoss
from torch import Tensor, nn

from monai_deqkan._checks import check_choice, check_range, check_same_shape, did_you_mean
from monai_deqkan._complex import channels_to_complex
from monai_deqkan.losses.perpendicular import perpendicular_distance
from monai_deqkan.operators import FourierOperator
from monai_deqkan.solvers.solution import at_least_float32

__all__ = ["ReconstructionLoss"]


class ReconstructionLoss(nn.Module):
    r"""Sum named losses of a complex image, each times its weight, in the image or in k-space.

    With prediction :math:`\hat y` and target :math:`y`, means over all pixels of the batch of

    ==================  ==============================================================================
    ``perpendicular``   :func:`perpendicular_distance`, the phase term alone
    ``magnitude``       :math:`\big| |\hat y| - |y| \big|`
    ``l1``              :math:`|\hat y - y|`
    ``mse``             :math:`|\hat y - y|^2`
    ``ssim``            one minus MONAI's SSIM of the magnitudes over the target's maximum (1 if it is empty)
    ==================  ==============================================================================

    ``{"perpendicular": 1, "magnitude": 1}`` equals :class:`PerpendicularLoss`. In k-space (centred, orthonormal Fourier
    transform over all axes of space) ``mse`` is the same as in the image.

    Args:
        weights: weight by name, not negative, one positive at least.
        domain: ``"image"`` or ``"kspace"``: where all terms but ``ssim`` are taken; that is always of images.
        eps: see :func:`perpendicular_distance`; images are expected with a maximum of about 1.

    Raises:
        ValueError: for an unknown name or domain, or weights of which none is positive.
        TypeError: if the weights are no mapping.

    Example:
        >>> loss = ReconstructionLoss({"l1": 1.0, "mse": 0.5})
        >>> loss(torch.zeros(1, 2, 4, 4), torch.full((1, 2, 4, 4), 2**0.5)).item()
        4.0
    """

    terms: ClassVar[tuple[str, ...]] = ("perpendicular", "magnitude", "l1", "mse", "ssim")

    def __init__(self, weights: Mapping[str, float] | None = None, *, domain: str = "image", eps: float = 1e-2) -> None:
        super().__init__()
        chosen = {"perpendicular": 1.0, "magnitude": 1.0} if weights is None else weights
        if not isinstance(chosen, Mapping):
            raise TypeError(f"`weights` must map names of losses to numbers; got {type(chosen).__name__}.")
        for name in chosen:
            if name not in self.terms:
                raise ValueError(
                    f"`weights` may name {', '.join(self.terms)}; got {name!r}.{did_you_mean(name, self.terms)}"
                )
        found = {name: check_range(f"weights[{name!r}]", chosen[name], 0.0) for name in chosen}
        self.weights = {name: weight for name, weight in found.items() if weight > 0}
        if not self.weights or not all(map(math.isfinite, self.weights.values())):
            raise ValueError(f"`weights` must be finite, and one of them positive; got {dict(chosen)}.")
        self.domain = check_choice("domain", domain, ("image", "kspace"))
        self.eps = check_range("eps", eps, 0.0)

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the loss, a scalar.

        Args:
            prediction: complex ``(B, *space)``, or as two channels ``(B, 2, *space)``, two or three axes of space.
            target: the same, in the same unit.

        Raises:
            ValueError: if the shapes differ, or real images do not have two channels.
        """
        check_same_shape("prediction", prediction, "target", target)
        plain = (at_least_float32(x.as_subclass(Tensor)) for x in (prediction, target))
        images = tuple(x if x.is_complex() else channels_to_complex(x) for x in plain)
        first, second = images
        if self.domain == "kspace":
            transform = FourierOperator(first.ndim - 1)
            first, second = transform(first), transform(second)
        total = torch.zeros((), dtype=first.real.dtype, device=first.device)
        # Trainers call losses under autocast: the variances of SSIM are differences that half precision loses.
        with torch.autocast(first.device.type, enabled=False):
            for name, weight in self.weights.items():
                term = _ssim_loss(*images) if name == "ssim" else self._term(name, first, second)
                total = total + weight * term
        return total

    def _term(self, name: str, prediction: Tensor, target: Tensor) -> Tensor:
        if name == "perpendicular":
            return perpendicular_distance(prediction, target, self.eps).mean()
        # The gradient of a complex abs at zero is zero in torch, that of a square root of squares is NaN.
        if name == "magnitude":
            return (prediction.abs() - target.abs()).abs().mean()
        error = prediction - target
        if name == "l1":
            return error.abs().mean()
        return (error.real.square() + error.imag.square()).mean()

    def extra_repr(self) -> str:
        """Show weights and domain."""
        return f"weights={self.weights}, domain={self.domain!r}"


def _ssim_loss(prediction: Tensor, target: Tensor) -> Tensor:
    first, second = prediction.abs(), target.abs()
    peak = second.flatten(1).amax(dim=1)
    scale = torch.where(peak > 0, peak, 1.0).view(-1, *[1] * (second.ndim - 1))
    loss: Tensor = SSIMLoss(spatial_dims=first.ndim - 1)((first / scale)[:, None], (second / scale)[:, None])
    return loss
