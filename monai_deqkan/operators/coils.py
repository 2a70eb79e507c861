"""Receive coils: an image as every coil sees it."""

from __future__ import annotations

import torch
from torch import Tensor

from monai_deqkan._checks import check_tensor
from monai_deqkan.operators.base import LinearOperator, take_rows

__all__ = ["CoilOperator", "combine_coils", "combine_map_sets", "spread_to_coils"]


class CoilOperator(LinearOperator):
    r"""Weigh an image with every coil's sensitivity, :math:`x_k = S_k x`.

    The adjoint is the SENSE combination :math:`\sum_k \bar S_k x_k`. With several map sets (soft SENSE) there is one
    image per set, :math:`x_k = \sum_m S_{mk} x_m`.

    Args:
        sensitivity_maps: complex, dimensionless, shape ``(B, K, *space)`` or, with map sets, ``(B, M, K, *space)``; a
            batch axis of size one serves all samples. Spatial axes may have size one.
        spatial_dims: number of spatial axes; None means that there are no map sets.

    Reference:
        M. Uecker et al., "ESPIRiT - an eigenvalue approach to autocalibrating parallel MRI: where SENSE meets GRAPPA",
        Magn. Reson. Med. 71 (2014) 990-1001 (soft SENSE).
    """

    def __init__(self, sensitivity_maps: Tensor, *, spatial_dims: int | None = None) -> None:
        if not check_tensor("sensitivity_maps", sensitivity_maps).is_complex():
            raise TypeError(f"`sensitivity_maps` must be complex; got {sensitivity_maps.dtype}.")
        rank = sensitivity_maps.ndim
        fits = rank >= 3 if spatial_dims is None else rank in (spatial_dims + 2, spatial_dims + 3)
        if not fits:
            axes = "" if spatial_dims is None else f" or (B, M, K, *space) with {spatial_dims} axes of space"
            raise ValueError(
                f"`sensitivity_maps` must have shape (B, K, *space){axes}; got {tuple(sensitivity_maps.shape)}. "
                "Add the batch or coil axis."
            )
        self.spatial_dims = spatial_dims
        self.has_sets = spatial_dims is not None and rank == spatial_dims + 3
        self.sensitivity_maps = sensitivity_maps

    @property
    def sets(self) -> Tensor:
        """The maps with an axis of map sets, ``(B, M, K, *space)``."""
        return self.sensitivity_maps if self.has_sets else self.sensitivity_maps.unsqueeze(1)

    @property
    def norm_bound(self) -> Tensor:
        r"""Upper bound of the operator norm per sample, shape ``(B,)``, or ``(1,)`` for shared maps.

        With one set it is the norm, :math:`\sqrt{\max \sum_k |S_k|^2}`. With several it is the largest over all pixels
        of the bound :math:`\min(\mathrm{tr}\, G, \|G\|_\infty)` of the Gram matrix :math:`G_{ml} = \sum_k \bar S_{mk}
        S_{lk}`: one for sets that are normalized together, and for orthogonal sets that are normalized one by one.
        """
        sets = self.sets
        gram = torch.stack([combine_coils(sets.conj(), sets[:, m]) for m in range(sets.shape[1])], dim=1).abs()
        trace = gram.diagonal(dim1=1, dim2=2).sum(dim=-1)
        bound = torch.minimum(trace, gram.sum(dim=2).amax(dim=1))
        return bound.flatten(1).amax(dim=1).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        """Turn an image ``(B, *space)``, or ``(B, M, *space)`` with map sets, into coil images ``(B, K, *space)``."""
        self.check_image(x)
        return spread_to_coils(self.sets, x if self.has_sets else x.unsqueeze(1))

    def adjoint(self, y: Tensor) -> Tensor:
        """Combine coil images ``(B, K, *space)`` to an image ``(B, *space)``, or ``(B, M, *space)`` with map sets."""
        self.check_coil_images(y)
        images = combine_coils(self.sets.conj(), y)
        return images if self.has_sets else images.squeeze(1)

    def take(self, rows: Tensor) -> CoilOperator:
        """Return the operator of some samples of the batch."""
        return CoilOperator(take_rows(self.sensitivity_maps, rows), spatial_dims=self.spatial_dims)

    def check_image(self, x: Tensor) -> None:
        """Raise an error if an image does not fit the maps."""
        batch, num_sets, _, *space = self.sets.shape
        self._check(x, "an image", (batch, num_sets, *space) if self.has_sets else (batch, *space), self.has_sets)

    def check_coil_images(self, y: Tensor) -> None:
        """Raise an error if coil images do not fit the maps."""
        batch, _, *rest = self.sets.shape
        self._check(y, "coil images", (batch, *rest), True)

    def _check(self, data: Tensor, what: str, sizes: tuple[int, ...], second_is_exact: bool) -> None:
        if not check_tensor("data", data).is_complex():
            raise TypeError(f"CoilOperator needs a complex tensor; got {data.dtype}. Use `torch.complex`.")
        shape = tuple(data.shape)
        fits = len(sizes) == len(shape) and all(m in (1, n) for m, n in zip(sizes, shape, strict=True))
        if not fits or (second_is_exact and sizes[1] != shape[1]):
            raise ValueError(
                f"`sensitivity_maps` of shape {tuple(self.sensitivity_maps.shape)} do not fit {what} of shape {shape}: "
                "batch, map sets, coils and space must agree."
            )


def spread_to_coils(sets: Tensor, images: Tensor) -> Tensor:
    """Return ``sum_m S_mk x_m`` for maps ``(B, M, K, *space)`` and images ``(B, M, *space)``: ``(B, K, *space)``."""
    first, *others = ((sets[:, m].to(images.dtype), images[:, m].unsqueeze(1)) for m in range(sets.shape[1]))
    coils = first[0] * first[1]
    for maps, image in others:
        coils = torch.addcmul(coils, maps, image)
    return coils


def combine_coils(sets: Tensor, coils: Tensor, onto: Tensor | None = None) -> Tensor:
    """Return ``sum_k S_mk y_k`` for maps ``(B, M, K, *space)`` and coil images ``(B, K, *space)``: ``(B, M, *space)``.

    Args:
        sets: the maps, or their conjugates for the SENSE combination.
        coils: coil images.
        onto: images to add the result to.
    """
    images = []
    for m in range(sets.shape[1]):
        maps = sets[:, m].to(coils.dtype)
        total = None if onto is None else onto[:, m]
        if coils.shape[1] == 1:
            one, image = maps.squeeze(1), coils.squeeze(1)
            images.append(one * image if total is None else torch.addcmul(total, one, image))
        else:
            combined = (maps * coils).sum(dim=1)
            images.append(combined if total is None else total + combined)
    return images[0].unsqueeze(1) if len(images) == 1 else torch.stack(images, dim=1)


def combine_map_sets(images: Tensor) -> Tensor:
    r"""Combine the images of several map sets to one: their root sum of squares, with the phase of their sum.

    Args:
        images: complex, shape ``(B, M, *space)``, any unit.

    Returns:
        Complex, in the same unit, shape ``(B, *space)``. Where one set alone has signal, it is that set's image.

    Raises:
        TypeError: if ``images`` is not complex.

    Example:
        >>> combine_map_sets(torch.tensor([[[3 + 0j], [4j]]])).abs()
        tensor([[5.]])
    """
    if not check_tensor("images", images).is_complex():
        raise TypeError(f"`images` must be complex; got {images.dtype}.")
    return torch.polar(torch.linalg.vector_norm(images, dim=1), images.sum(dim=1).angle())
