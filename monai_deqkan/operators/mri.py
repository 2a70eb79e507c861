"""The forward model of Cartesian MRI."""

from __future__ import annotations

import torch
from torch import Tensor

from monai_deqkan._checks import check_spatial_dims, check_tensor
from monai_deqkan.operators.base import LinearOperator
from monai_deqkan.operators.coils import CoilOperator
from monai_deqkan.operators.fourier import FourierOperator
from monai_deqkan.operators.sampling import SamplingOperator, infer_mask
from monai_deqkan.operators.sensitivity import estimate_sensitivity_maps

__all__ = ["MRIOperator"]


class MRIOperator(LinearOperator):
    r"""Map an image to its measured k-space: coils, Fourier transform, sampling.

    .. math:: A = M F S, \qquad A^H = S^H F^H M

    Args:
        mask: bool or real, shape ``(B, K, *space)``, where every axis may also have size one.
        sensitivity_maps: complex, shape ``(B or 1, K, *space)``; None is a single coil with :math:`S = 1`.
        spatial_dims: number of spatial axes, 2 or 3.

    Example:
        >>> operator = MRIOperator(torch.ones(1, 1, 1, 6), spatial_dims=2)
        >>> operator(torch.ones(3, 4, 6, dtype=torch.complex64)).shape
        torch.Size([3, 1, 4, 6])
    """

    def __init__(self, mask: Tensor, sensitivity_maps: Tensor | None = None, *, spatial_dims: int = 2) -> None:
        self.spatial_dims = check_spatial_dims(spatial_dims)
        rank = self.spatial_dims + 2
        if sensitivity_maps is None:
            dtype, device = torch.complex64, check_tensor("mask", mask).device
            sensitivity_maps = torch.ones((1,) * rank, dtype=dtype, device=device)
        for name, value in (("mask", mask), ("sensitivity_maps", sensitivity_maps)):
            if check_tensor(name, value).ndim != rank:
                raise ValueError(
                    f"`{name}` must have {rank} axes (B, K, *space) for {spatial_dims} spatial dimensions; got shape "
                    f"{tuple(value.shape)}. Add the missing axes with size 1."
                )
        self._sampling = SamplingOperator(mask)
        self._fourier = FourierOperator(self.spatial_dims)
        self._coils = CoilOperator(sensitivity_maps)

    @classmethod
    def from_kspace(
        cls,
        kspace: Tensor,
        mask: Tensor | None = None,
        sensitivity_maps: Tensor | None = None,
        *,
        spatial_dims: int = 2,
    ) -> MRIOperator:
        """Build the operator of measured k-space; what is not given is found from it.

        Args:
            kspace: complex, zero where nothing was measured, shape ``(B, K, *space)``.
            mask: as for the class; None infers it, see :func:`infer_mask`.
            sensitivity_maps: as for the class; None estimates them, see :func:`estimate_sensitivity_maps`.
            spatial_dims: number of spatial axes, 2 or 3.

        Raises:
            ValueError: if a sample is zero everywhere and no mask is given, or shapes disagree.
        """
        if mask is None:
            mask = infer_mask(kspace, spatial_dims)
        if sensitivity_maps is None:
            sensitivity_maps = estimate_sensitivity_maps(kspace, mask, spatial_dims=spatial_dims)
        return cls(mask, sensitivity_maps, spatial_dims=spatial_dims)

    @property
    def mask(self) -> Tensor:
        """The sampling mask, bool."""
        return self._sampling.mask

    @property
    def sensitivity_maps(self) -> Tensor:
        """The coil sensitivity maps."""
        return self._coils.sensitivity_maps

    @property
    def norm_bound(self) -> Tensor:
        r"""Upper bound of the operator norm per sample, :math:`\sqrt{\max \sum_k |S_k|^2}`.

        Shape ``(B,)``, or ``(1,)`` for shared maps. It holds because sampling and the Fourier transform have norm one
        at most. At most one, up to rounding, for normalized maps.
        """
        return self.sensitivity_maps.abs().square().sum(dim=1).flatten(1).amax(dim=1).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        """Map an image ``(B, *space)`` to k-space ``(B, K, *space)``, zero where nothing is measured."""
        return self._sampling.forward(self._fourier.forward(self._coils.forward(x)))

    def adjoint(self, y: Tensor) -> Tensor:
        """Map k-space ``(B, K, *space)`` to an image ``(B, *space)``: the zero-filled SENSE combination."""
        return self._coils.adjoint(self._fourier.adjoint(self._sampling.adjoint(y)))

    def take(self, rows: Tensor) -> MRIOperator:
        """Return the operator of some samples of the batch."""
        mask, maps = self._sampling.take(rows).mask, self._coils.take(rows).sensitivity_maps
        return MRIOperator(mask, maps, spatial_dims=self.spatial_dims)
