"""The forward model of Cartesian MRI."""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import copy
from typing import cast

import torch
from torch import Tensor

from monai_deqkan._checks import check_finite, check_spatial_dims, check_tensor
from monai_deqkan.operators.base import LinearOperator, take_rows
from monai_deqkan.operators.coils import CoilOperator, combine_coils, spread_to_coils
from monai_deqkan.operators.fourier import centering_weights
from monai_deqkan.operators.sampling import SamplingOperator, infer_mask
from monai_deqkan.operators.sensitivity import estimate_sensitivity_maps

__all__ = ["MRIOperator"]

# A quarter of the coils, on a CPU no more than fit its cache, goes through all steps before the next: little memory.
_GROUP_BYTES = 2**20


class MRIOperator(LinearOperator):
    r"""Map an image to its measured k-space: coils, Fourier transform, sampling.

    .. math:: A = M F S, \qquad A^H = S^H F^H M

    With several map sets (soft SENSE, for fields of view in which the object wraps around) an image has one part per
    set, ``(B, M, *space)``, and :math:`S` sums over them, see :class:`CoilOperator`.

    Args:
        mask: bool or real, shape ``(B, K, *space)``, where every axis may also have size one.
        sensitivity_maps: complex, shape ``(B or 1, K, *space)``, or ``(B or 1, M, K, *space)`` with map sets; None is a
            single coil with :math:`S = 1`.
        spatial_dims: number of spatial axes, 2 or 3.

    Raises:
        TypeError: if the mask is complex, or the maps are not.
        ValueError: if ranks or sizes do not fit, or the mask keeps nothing of a sample.

    Example:
        >>> operator = MRIOperator(torch.ones(1, 1, 1, 6), spatial_dims=2)
        >>> operator(torch.ones(3, 4, 6, dtype=torch.complex64)).shape
        torch.Size([3, 1, 4, 6])
    """

    def __init__(self, mask: Tensor, sensitivity_maps: Tensor | None = None, *, spatial_dims: int = 2) -> None:
        self.spatial_dims = check_spatial_dims(spatial_dims)
        self._axes = tuple(range(-self.spatial_dims, 0))
        rank = self.spatial_dims + 2
        if check_tensor("mask", mask).ndim != rank:
            raise ValueError(
                f"`mask` must have {rank} axes (B, K, *space) for {spatial_dims} spatial dimensions; got shape "
                f"{tuple(mask.shape)}. Add the missing axes with size 1."
            )
        if sensitivity_maps is None:
            sensitivity_maps = torch.ones((1,) * rank, dtype=torch.complex64, device=mask.device)
        if check_tensor("sensitivity_maps", sensitivity_maps).ndim not in (rank, rank + 1):
            raise ValueError(
                f"`sensitivity_maps` must have {rank} axes (B, K, *space) for {spatial_dims} spatial dimensions, or "
                f"{rank + 1} with map sets (B, M, K, *space); got shape {tuple(sensitivity_maps.shape)}. Add the "
                "missing axes with size 1."
            )
        self._sampling = SamplingOperator(mask)
        self._coils = CoilOperator(sensitivity_maps, spatial_dims=self.spatial_dims)
        batch, _, *rest = self._coils.sets.shape
        if any(m != n and 1 not in (m, n) for m, n in zip(mask.shape, (batch, *rest), strict=True)):
            raise ValueError(
                f"`mask` of shape {tuple(mask.shape)} and `sensitivity_maps` of shape {tuple(sensitivity_maps.shape)} "
                "must agree in batch, coils and space where neither has size 1. Crop or pad neither: take those of "
                "the same scan."
            )
        space = torch.broadcast_shapes(mask.shape[2:], tuple(rest[1:]))
        self._made_weights = centering_weights(space, sensitivity_maps.dtype, sensitivity_maps.device)
        self._diagonals: tuple[Tensor, Tensor] | None = None

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
            TypeError: if ``kspace`` is not complex.
            ValueError: if k-space is not finite, a sample of it is zero everywhere and no mask is given, or shapes
                disagree.
        """
        if not check_tensor("kspace", kspace).is_complex():
            raise TypeError(f"`kspace` must be complex; got {kspace.dtype}. Use `torch.view_as_complex`.")
        if kspace.ndim != check_spatial_dims(spatial_dims) + 2:
            raise ValueError(
                f"`kspace` must have shape (B, K, *space) with {spatial_dims} spatial axes; got {tuple(kspace.shape)}. "
                "Single-coil k-space needs a coil axis of size 1."
            )
        check_finite("kspace", kspace, "Remove broken samples before reconstruction.")
        if mask is None:
            mask = infer_mask(kspace, spatial_dims)
        if sensitivity_maps is None:
            sensitivity_maps = estimate_sensitivity_maps(kspace, mask, spatial_dims=spatial_dims)
        operator = cls(mask, sensitivity_maps, spatial_dims=spatial_dims)
        operator._check_kspace(kspace)
        return operator

    @property
    def mask(self) -> Tensor:
        """The sampling mask, bool."""
        return self._sampling.mask

    @property
    def sensitivity_maps(self) -> Tensor:
        """The coil sensitivity maps."""
        return self._coils.sensitivity_maps

    @property
    def has_sets(self) -> bool:
        """Whether there are several map sets, each with an image of its own."""
        return self._coils.has_sets

    @property
    def norm_bound(self) -> Tensor:
        """Upper bound of the operator norm per sample: that of the coils, see :attr:`CoilOperator.norm_bound`.

        Shape ``(B,)``, or ``(1,)`` for shared maps. It holds because sampling and the Fourier transform have norm one
        at most. At most one, up to rounding, for normalized maps.
        """
        return self._coils.norm_bound

    def forward(self, x: Tensor) -> Tensor:
        """Map an image to k-space ``(B, K, *space)``, zero where nothing is measured.

        Args:
            x: complex, shape ``(B, *space)``, or ``(B, M, *space)`` with map sets.
        """
        x = self._image(x)
        image_weights, kspace_weights = self._weights(x)
        # All coils at once: measured faster than a few at a time, since the whole stack is made anyway.
        return self._transform(x * image_weights, slice(None)).mul_(self.mask * kspace_weights)

    def adjoint(self, y: Tensor) -> Tensor:
        """Map k-space ``(B, K, *space)`` to the zero-filled SENSE combination, of the shape that ``forward`` takes."""
        self._check_kspace(y)
        image_weights, kspace_weights = self._weights(y)
        weights = self.mask * kspace_weights.conj()
        images = None
        for coils in self._groups(y):
            images = self._combine(y[:, coils] * _of_coils(weights, coils), coils, images)
        return self._finish(images, image_weights)

    def normal(self, x: Tensor) -> Tensor:
        r"""Return :math:`A^H A x`, without a stack of all coils: each group of coils goes there and back."""
        x = self._image(x)
        image_weights, _ = self._weights(x)
        x, weights = x * image_weights, self.mask.to(x.dtype) / math.prod(x.shape[2:])
        images = None
        for coils in self._groups(x):
            images = self._combine(self._transform(x, coils).mul_(_of_coils(weights, coils)), coils, images)
        return self._finish(images, image_weights)

    def take(self, rows: Tensor) -> MRIOperator:
        """Return the operator of some samples of the batch."""
        part = copy(self)
        part._sampling, part._coils = self._sampling.take(rows), self._coils.take(rows)
        if self._diagonals is not None:
            pixels, frequencies = self._diagonals
            part._diagonals = take_rows(pixels, rows), take_rows(frequencies, rows)
        return part

    def normal_diagonals(self) -> tuple[Tensor, Tensor]:
        r"""Return the diagonals of :math:`A^H A` among pixels and among frequencies.

        The one among frequencies, in the order of ``torch.fft``, is that of :math:`F A^H A F^H` with the plain
        orthonormal transform. Preconditioners are made of them. Found on the first call, then kept.

        Returns:
            Two real tensors ``(B or 1, *space)``, or ``(B or 1, M, *space)`` with map sets; at least zero.
        """
        if self._diagonals is None:
            self._diagonals = self._found_diagonals()
        return self._diagonals

    def _found_diagonals(self) -> tuple[Tensor, Tensor]:
        sets, space = self._coils.sets, self._made_weights[0].shape
        mask = torch.fft.ifftshift(self.mask.to(sets.real.dtype).expand(*self.mask.shape[:2], *space), dim=self._axes)
        pixels = frequencies = sets.real.new_zeros(())
        for coil in range(sets.shape[2]):  # one at a time: little memory
            maps = sets[:, :, coil].expand(*sets.shape[:2], *space)
            kept = _of_coils(mask, slice(coil, coil + 1))
            pixels = pixels + maps.abs().square() * kept.mean(dim=self._axes, keepdim=True)
            # How much of a frequency's power a coil moves to each other one, summed over those that are measured.
            power = (torch.fft.fftn(maps, dim=self._axes).abs() / math.prod(space)).square()
            spectra = torch.fft.fftn(kept, dim=self._axes) * torch.fft.fftn(power, dim=self._axes).conj()
            frequencies = frequencies + torch.fft.ifftn(spectra, dim=self._axes).real
        frequencies = frequencies.clamp_min(0.0)
        return (pixels, frequencies) if self.has_sets else (pixels.squeeze(1), frequencies.squeeze(1))

    def _image(self, x: Tensor) -> Tensor:
        """Return an image that was checked, with an axis of map sets."""
        self._coils.check_image(x)
        x = x if self._coils.has_sets else x.unsqueeze(1)
        self._sampling.check((x.shape[0], self._coils.sets.shape[2], *x.shape[2:]))
        return x

    def _check_kspace(self, y: Tensor) -> None:
        self._coils.check_coil_images(y)
        self._sampling.check(y.shape)

    def _weights(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights that centre the transform: those made in advance, if they fit."""
        image, kspace = self._made_weights
        if image.shape == data.shape[2:] and image.dtype == data.dtype and image.device == data.device:
            return image, kspace
        return centering_weights(data.shape[2:], data.dtype, data.device)

    def _groups(self, data: Tensor) -> Iterator[slice]:
        """Yield slices of coils that are worked on together; ``data`` is batch first, space last."""
        num_coils = self._coils.sets.shape[2]
        size = -(-num_coils // 4)
        if data.device.type == "cpu":
            image_bytes = data.shape[0] * math.prod(data.shape[2:]) * data.element_size()
            size = max(min(_GROUP_BYTES // max(image_bytes, 1), size), 1)
        for start in range(0, num_coils, size):
            yield slice(start, min(start + size, num_coils))

    def _transform(self, x: Tensor, coils: slice) -> Tensor:
        """Return the k-space of some coils, neither centred nor scaled."""
        return torch.fft.fftn(spread_to_coils(self._coils.sets[:, :, coils], x), dim=self._axes)

    def _combine(self, y: Tensor, coils: slice, onto: Tensor | None) -> Tensor:
        """Return the conjugate combined images ``(B, M, *space)`` with those of some coils added; overwrites ``y``.

        The conjugate of an inverse transform is the forward transform of the conjugate. Conjugating k-space costs a
        fifth of what conjugate maps do.
        """
        images = torch.fft.fftn(y.conj_physical_(), dim=self._axes)
        return combine_coils(self._coils.sets[:, :, coils], images, onto)

    def _finish(self, images: Tensor | None, image_weights: Tensor) -> Tensor:
        images = (cast(Tensor, images) * image_weights).conj_physical()
        return images if self._coils.has_sets else images.squeeze(1)


def _of_coils(weights: Tensor, coils: slice) -> Tensor:
    """Return the weights of some coils; one coil's serve all."""
    return weights if weights.shape[1] == 1 else weights[:, coils]
