"""SensitivityNet: learned coil sensitivity maps from the fully sampled centre of k-space."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from monai.networks.nets import UNet
from torch import Tensor, nn
from torch.nn import functional as F

from monai_deqkan._checks import check_choice, check_int, check_spatial_dims, check_tensor
from monai_deqkan._complex import as_complex
from monai_deqkan.operators import espirit_maps, estimate_sensitivity_maps, infer_mask, low_frequency_images

__all__ = ["SensitivityNet"]

_ESTIMATES: dict[str, Callable[..., Tensor]] = {"espirit": espirit_maps, "low_frequency": estimate_sensitivity_maps}


class SensitivityNet(nn.Module):
    r"""Correct an estimate of coil sensitivity maps by a U-Net that all coils share.

    .. math:: S_k = \frac{S^0_k + \Delta_k}{\sqrt{\sum_j |S^0_j + \Delta_j|^2}}, \qquad
        \Delta_k = U(x_k, S^0_k, \textstyle\sqrt{\sum_j |x_j|^2})

    where :math:`x_k` are the images of the fully sampled centre, divided by their largest magnitude, and :math:`S^0`
    an estimate from it. The U-Net's last layer starts at zero, so an untrained network returns :math:`S^0`. The maps
    do not depend on the unit of k-space, :math:`\sum_k |S_k|^2 = 1` everywhere (equal maps where the estimate is zero
    and nothing is added), and any number of coils will do. Sensitivities are smooth, so the U-Net works on a coarse
    grid of the field of view and its correction is interpolated: its cost does not grow with the image.

    Args:
        spatial_dims: number of spatial dimensions, 2 or 3.
        channels: channels of the U-Net's levels; each level but the first halves the grid.
        start: the estimate :math:`S^0`: ``"espirit"`` (:func:`~monai_deqkan.operators.espirit_maps`) or
            ``"low_frequency"`` (:func:`~monai_deqkan.operators.estimate_sensitivity_maps`).
        grid_size: points of the coarse grid per axis, a multiple of ``2 ** (len(channels) - 1)`` and at least twice
            that; None is 48 in 2-D and 32 in 3-D.
        max_center_lines: upper limit of the central block, in lines per axis.

    Raises:
        ValueError: for a number or name out of range.

    Example:
        >>> network = SensitivityNet(spatial_dims=2, channels=(4, 8), grid_size=16)
        >>> maps = network(torch.randn(1, 4, 32, 32, dtype=torch.complex64))
        >>> torch.allclose(maps.abs().square().sum(1), torch.ones(1, 32, 32), atol=1e-5)
        True

    Reference:
        A. Sriram et al., "End-to-end variational networks for accelerated MRI reconstruction", MICCAI 2020, section
        3.2. Differences: a correction of an estimate in place of the maps themselves, and a coarse grid.
    """

    def __init__(
        self,
        spatial_dims: int,
        channels: Sequence[int] = (16, 32, 64, 96),
        *,
        start: str = "espirit",
        grid_size: int | None = None,
        max_center_lines: int = 24,
    ) -> None:
        super().__init__()
        self.spatial_dims = check_spatial_dims(spatial_dims)
        self.start = check_choice("start", start, _ESTIMATES)
        self.max_center_lines = check_int("max_center_lines", max_center_lines)
        self.grid_size = check_int("grid_size", (48 if spatial_dims == 2 else 32) if grid_size is None else grid_size)
        halvings = len(channels) - 1
        if halvings < 1:
            raise ValueError(f"`channels` must name at least two levels; got {tuple(channels)}.")
        if self.grid_size % 2**halvings or self.grid_size < 2 * 2**halvings:
            raise ValueError(
                f"`grid_size` must be a multiple of {2**halvings} and at least {2 * 2**halvings} for {len(channels)} "
                f"levels; got {self.grid_size}."
            )
        self.unet = UNet(
            spatial_dims,
            in_channels=5,
            out_channels=channels[0],
            channels=channels,
            strides=(2,) * halvings,
            num_res_units=1,
        )
        convolution = nn.Conv2d if spatial_dims == 2 else nn.Conv3d
        self.head = convolution(channels[0], 2, kernel_size=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward(self, kspace: Tensor, mask: Tensor | None = None) -> Tensor:
        """Estimate maps; gradients reach the parameters only.

        Args:
            kspace: zero where nothing was measured: complex ``(B, K, *space)`` or real ``(B, K, *space, 2)``.
            mask: bool or real, shape ``(B or 1, 1, 1, W)`` in 2-D and ``(B or 1, 1, 1, W, D)`` in 3-D; by default
                inferred from the lines of k-space that are not zero.

        Returns:
            Complex, dimensionless, shape ``(B, K, *space)``; ones for a single coil.

        Raises:
            ValueError: if zero frequency is not measured, or shapes disagree.
        """
        kspace = as_complex(check_tensor("kspace", kspace).as_subclass(Tensor)).detach()
        with torch.no_grad(), torch.autocast(kspace.device.type, enabled=False):
            if mask is None:
                mask = infer_mask(kspace, self.spatial_dims)
            mask = mask.as_subclass(Tensor)
            images = low_frequency_images(
                kspace, mask, max_center_lines=self.max_center_lines, spatial_dims=self.spatial_dims
            )
            start = _ESTIMATES[self.start](
                kspace, mask, max_center_lines=self.max_center_lines, spatial_dims=self.spatial_dims
            )
        return start if kspace.shape[1] == 1 else self.refine(start, images)

    def refine(self, start: Tensor, images: Tensor) -> Tensor:
        """Correct an estimate that is at hand, as a training on stored estimates does.

        Args:
            start: :math:`S^0`, complex, shape ``(B, K, *space)``.
            images: see :func:`~monai_deqkan.operators.low_frequency_images`, same shape.

        Returns:
            Complex, dimensionless, same shape.
        """
        batch, coils, *space = start.shape
        brightness = images.abs().square().sum(dim=1, keepdim=True).sqrt().expand_as(images.real)
        features = torch.stack((images.real, images.imag, start.real, start.imag, brightness), dim=2).flatten(0, 1)
        dtype = self.head.weight.dtype
        mode = "bilinear" if self.spatial_dims == 2 else "trilinear"
        coarse = F.interpolate(features.to(dtype), size=[self.grid_size] * self.spatial_dims, mode=mode)
        fine = F.interpolate(self.head(self.unet(coarse)), size=space, mode=mode).to(start.real.dtype)
        fine = fine.reshape(batch, coils, 2, *space)
        maps = start + torch.complex(fine[:, :, 0].contiguous(), fine[:, :, 1].contiguous())
        power = maps.abs().square().sum(dim=1, keepdim=True)
        empty = power < 1e-12
        equal = torch.full_like(maps, coils**-0.5)
        return torch.where(empty, equal, maps / torch.where(empty, torch.ones_like(power), power).sqrt())
