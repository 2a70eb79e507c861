"""Receive coils: an image as every coil sees it."""

from __future__ import annotations

from torch import Tensor

from monai_deqkan._checks import check_tensor
from monai_deqkan.operators.base import LinearOperator, take_rows

__all__ = ["CoilOperator"]


class CoilOperator(LinearOperator):
    r"""Weigh an image with every coil's sensitivity, :math:`x_k = S_k x`.

    The adjoint is the SENSE combination :math:`\sum_k \bar S_k x_k`.

    Args:
        sensitivity_maps: complex, dimensionless, shape ``(B, K, *space)``, or ``(1, K, *space)`` for all samples.
            Spatial axes may have size one.
    """

    def __init__(self, sensitivity_maps: Tensor) -> None:
        if not check_tensor("sensitivity_maps", sensitivity_maps).is_complex():
            raise TypeError(f"`sensitivity_maps` must be complex; got {sensitivity_maps.dtype}.")
        if sensitivity_maps.ndim < 3:
            raise ValueError(
                f"`sensitivity_maps` must have shape (B, K, *space); got {tuple(sensitivity_maps.shape)}. "
                "Add the batch or coil axis."
            )
        self.sensitivity_maps = sensitivity_maps

    def forward(self, x: Tensor) -> Tensor:
        """Turn an image ``(B, *space)`` into coil images ``(B, K, *space)``."""
        self._check(x, (x.shape[0], self.sensitivity_maps.shape[1], *x.shape[1:]))
        return self.sensitivity_maps.to(x.dtype) * x.unsqueeze(1)

    def adjoint(self, y: Tensor) -> Tensor:
        """Combine coil images ``(B, K, *space)`` to an image ``(B, *space)``."""
        self._check(y, tuple(y.shape))
        return (self.sensitivity_maps.to(y.dtype).conj() * y).sum(dim=1)

    def take(self, rows: Tensor) -> CoilOperator:
        """Return the operator of some samples of the batch."""
        return CoilOperator(take_rows(self.sensitivity_maps, rows))

    def _check(self, data: Tensor, shape: tuple[int, ...]) -> None:
        if not data.is_complex():
            raise TypeError(f"CoilOperator needs a complex tensor; got {data.dtype}. Use `torch.complex`.")
        maps = tuple(self.sensitivity_maps.shape)
        fits = (
            len(maps) == len(shape)
            and maps[1] == shape[1]
            and all(m in (1, n) for m, n in zip(maps, shape, strict=True))
        )
        if not fits:
            raise ValueError(
                f"`sensitivity_maps` of shape {maps} do not fit coil images of shape {shape}: "
                "batch, coils and space must agree."
            )
