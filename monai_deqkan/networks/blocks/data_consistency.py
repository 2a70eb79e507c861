"""Steps that pull an image towards its measured k-space."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from monai_deqkan._complex import channels_to_complex, complex_to_channels
from monai_deqkan.operators import LinearOperator, MRIOperator

__all__ = ["Measurement", "gradient_step"]


@dataclass(frozen=True)
class Measurement:
    r"""What the data-consistency steps of one batch need, computed once.

    Attributes:
        operator: forward model :math:`A` of an image ``(B, *space)``, complex.
        back_projection: :math:`A^H y`, complex, shape ``(B, *space)``.
        curvature: upper bound :math:`L` of :math:`\|A^H A\|`, shape ``(B,)``.
    """

    operator: LinearOperator
    back_projection: Tensor
    curvature: Tensor

    @classmethod
    def of(cls, operator: MRIOperator, kspace: Tensor) -> Measurement:
        """Build the measurement of a batch from its k-space, complex ``(B, K, *space)``."""
        bound = operator.norm_bound.square()
        curvature = bound.clamp_min(torch.finfo(bound.dtype).tiny).expand(kspace.shape[0])
        return cls(operator, operator.adjoint(kspace), curvature)

    def take(self, rows: Tensor) -> Measurement:
        """Return the measurement of some samples of the batch."""
        return Measurement(self.operator.take(rows), self.back_projection[rows], self.curvature[rows])


def gradient_step(image: Tensor, measurement: Measurement, step_size: Tensor | float) -> Tensor:
    r"""Descend on :math:`\tfrac12 \|A x - y\|^2`.

    .. math:: x \mapsto x - \frac{s}{L}\, (A^H A x - A^H y)

    Nonexpansive for :math:`0 \le s \le 2`, for any mask: the eigenvalues of :math:`I - (s / L) A^H A` lie in
    :math:`[1 - s, 1]`.

    Args:
        image: two channels ``(B, 2, *space)``.
        measurement: the batch's measurement.
        step_size: :math:`s`, dimensionless.

    Returns:
        Two channels ``(B, 2, *space)``.
    """
    x = channels_to_complex(image)
    gradient = measurement.operator.normal(x) - measurement.back_projection
    scale = (step_size / measurement.curvature).to(image.dtype).view(-1, *[1] * (x.ndim - 1))
    return complex_to_channels(x - scale * gradient)
