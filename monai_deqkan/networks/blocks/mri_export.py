"""The equilibrium reconstruction's physics in real arithmetic, for TorchScript, ``torch.export`` and ONNX.

Complex numbers are a last axis of two throughout, as exporters know few complex operations.
"""

# No postponed annotations here: torch.jit.script cannot read them on methods that it leaves out.

import torch
from torch import Tensor, nn

__all__ = [
    "ConjugateGradientCellForm",
    "GradientCellForm",
    "ProximalCellForm",
    "ReconstructionCellForm",
    "center_maps",
    "cg_start",
    "coil_images",
    "combine",
    "inferred_mask",
    "normal",
    "spectrum_mask",
]


def fourier(x: Tensor, spatial_dims: int, inverse: bool) -> Tensor:
    """Transform ``(*, *space, 2)`` without centring and without a factor: exporters specialize on that of "ortho"."""
    axes = [-1 - axis for axis in range(spatial_dims)]
    z = torch.view_as_complex(x.contiguous())
    z = torch.fft.ifftn(z, dim=axes, norm="forward") if inverse else torch.fft.fftn(z, dim=axes, norm="backward")
    return torch.view_as_real(z)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply complex numbers."""
    real = a[..., 0] * b[..., 0] - a[..., 1] * b[..., 1]
    return torch.stack((real, a[..., 0] * b[..., 1] + a[..., 1] * b[..., 0]), dim=-1)


def combine(maps: Tensor, coil_images: Tensor) -> Tensor:
    """Return the SENSE combination ``(B, *space, 2)`` of coil images ``(B, K, *space, 2)``."""
    real = maps[..., 0] * coil_images[..., 0] + maps[..., 1] * coil_images[..., 1]
    imaginary = maps[..., 0] * coil_images[..., 1] - maps[..., 1] * coil_images[..., 0]
    return torch.stack((real, imaginary), dim=-1).sum(dim=1)


def _rolled(x: Tensor, axis: int, start: int) -> Tensor:
    index = torch.cat((torch.arange(start, x.shape[axis], device=x.device), torch.arange(start, device=x.device)))
    return x.index_select(axis, index)


def coil_images(kspace: Tensor, spatial_dims: int) -> Tensor:
    """Return the centred orthonormal inverse transform of k-space ``(B, K, *space, 2)``."""
    size = 1
    for axis in range(2, 2 + spatial_dims):
        kspace = _rolled(kspace, axis, kspace.shape[axis] // 2)
        size = size * kspace.shape[axis]
    x = fourier(kspace, spatial_dims, True)
    for axis in range(2, 2 + spatial_dims):
        x = _rolled(x, axis, x.shape[axis] - x.shape[axis] // 2)
    return x / torch.full([], 1.0, dtype=x.dtype, device=x.device).mul(size).sqrt()


def inferred_mask(kspace: Tensor) -> Tensor:
    """Find the measured lines of k-space ``(B, K, *space, 2)``: ``(B, 1, 1, *phase encodings)``, 0 or 1."""
    found = kspace.abs().amax(dim=-1).amax(dim=1, keepdim=True).amax(dim=2, keepdim=True)
    return (found > 0).to(kspace.dtype)


def spectrum_mask(mask: Tensor, kspace: Tensor) -> Tensor:
    """Move zero frequency of a mask to index 0, over the number of pixels; a last axis of one is added.

    Shifts of the image commute with the circular convolution ``F^H M F``, so with such a mask the transforms in it need
    no centring.
    """
    size = 1
    for axis in range(2, mask.dim()):
        size = size * kspace.shape[axis]
        if mask.shape[axis] != 1:
            mask = _rolled(mask, axis, mask.shape[axis] // 2)
    return (mask / size)[..., None]


def normal(x: Tensor, maps: Tensor, spectrum: Tensor, spatial_dims: int) -> Tensor:
    """Apply ``A^H A`` to an image ``(B, *space, 2)``."""
    coils = fourier(product(maps, x[:, None]), spatial_dims, False) * spectrum
    return combine(maps, fourier(coils, spatial_dims, True))


def center_maps(kspace: Tensor, mask: Tensor, spatial_dims: int) -> Tensor:
    """Estimate coil maps as :func:`~monai_deqkan.operators.estimate_sensitivity_maps` does, NaN where that raises."""
    if kspace.shape[1] == 1:
        return torch.cat((torch.ones_like(kspace[..., :1]), torch.zeros_like(kspace[..., :1])), dim=-1)
    widths: list[Tensor] = []
    for axis in range(1, spatial_dims):
        line = mask[:, 0]
        for other in range(spatial_dims - 1, -1, -1):
            if other != axis:
                line = line.select(1 + other, 0 if line.shape[1 + other] == 1 else line.shape[1 + other] // 2)
        widths.append(_center_width(line.expand([-1, kspace.shape[2 + axis]])))
    widest = widths[0]
    for width in widths:
        widest = torch.maximum(widest, width)
    widths = [widest] + widths  # noqa: RUF005, TorchScript
    for axis, width in enumerate(widths):
        size = kspace.shape[2 + axis]
        shape = [1] * kspace.dim()
        shape[0], shape[2 + axis] = -1, size
        offset = (torch.arange(size, device=kspace.device) - size // 2).abs()
        reach = torch.div(width.clamp(max=24).clamp(max=size)[:, None] + 1, 2, rounding_mode="floor")
        window = torch.cos(torch.pi * offset.to(kspace.dtype) / (2 * reach).to(kspace.dtype)) * (offset < reach)
        kspace = kspace * window.view(shape)
    images = coil_images(kspace, spatial_dims)
    power = images.square().sum(dim=-1, keepdim=True)
    ones = [-1] + [1] * (kspace.dim() - 1)
    peak = power.flatten(1).amax(dim=1).sqrt().clamp_min(1e-38).view(ones)
    images = images / peak
    return images / images.square().sum(dim=-1, keepdim=True).sum(dim=1, keepdim=True).clamp_min(1e-14).sqrt()


def _center_width(line: Tensor) -> Tensor:
    """Return the width of the largest measured block around index ``n // 2`` of lines ``(B, n)``, int64."""
    center = line.shape[-1] // 2
    gaps = (line == 0).to(torch.int64)
    right = (gaps[:, center:].cumsum(dim=-1) == 0).to(torch.int64).sum(dim=-1)
    left = (gaps[:, :center].flip(-1).cumsum(dim=-1) == 0).to(torch.int64).sum(dim=-1)
    return torch.minimum(2 * left + 1, 2 * right)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    safe = torch.where(denominator == 0, torch.ones_like(denominator), denominator)
    return torch.where(denominator == 0, torch.zeros_like(numerator), numerator / safe)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a.to(torch.float64) * b.to(torch.float64)).flatten(1).sum(dim=1)


def cg_start(b: Tensor, maps: Tensor, spectrum: Tensor, spatial_dims: int, num_steps: int) -> Tensor:
    """Do the steps of :func:`~monai_deqkan.variational.cg_sense` on ``A^H A x = b``, ``(B, *space, 2)``."""
    return cg_solve(b, maps, spectrum, spatial_dims, torch.zeros_like(b[:, :1]).flatten(1)[:, 0], num_steps, 1e-6)


def cg_solve(
    b: Tensor, maps: Tensor, spectrum: Tensor, spatial_dims: int, shift: Tensor, num_steps: int, rtol: float
) -> Tensor:
    """Do conjugate gradient steps on ``(A^H A + shift) x = b``, ``(B, *space, 2)``, with a shift ``(B or 1,)``.

    Of the iterates the one of the smallest residual is returned, as by :func:`~monai_deqkan.solvers.solve_linear`; a
    sample whose residual has fallen to ``rtol`` takes no more steps.
    """
    wide = [-1] + [1] * (b.dim() - 1)
    x, best_x, residual, direction = torch.zeros_like(b), torch.zeros_like(b), b, b
    start = _dot(b, b)
    squared, best = start, start
    for _ in range(num_steps):
        runs = squared > rtol * rtol * start
        image = normal(direction, maps, spectrum, spatial_dims) + shift.view(wide) * direction
        alpha = _ratio(squared, _dot(direction, image)) * runs
        x = x + alpha.to(b.dtype).view(wide) * direction
        residual = residual - alpha.to(b.dtype).view(wide) * image
        new = _dot(residual, residual)
        direction = residual + _ratio(new, squared).to(b.dtype).view(wide) * direction
        best_x = torch.where((new < best).view(wide), x, best_x)
        best = torch.minimum(new, best)
        squared = new
    return best_x


def descend(z: Tensor, data: list[Tensor], spatial_dims: int) -> Tensor:
    """Do the step of :func:`~monai_deqkan.networks.blocks.gradient_step`; arguments as of a form's ``forward``."""
    maps, spectrum, back_projection, scale, _ = data
    gradient = normal(z.movedim(1, -1), maps, spectrum, spatial_dims) - back_projection
    return z - scale.view([-1] + [1] * (z.dim() - 1)) * gradient.movedim(-1, 1)


class ReconstructionCellForm(nn.Module):
    """A :class:`~monai_deqkan.networks.blocks.ReconstructionCell` in real arithmetic.

    Args:
        prior: the prior, scriptable.
        relaxation: value of the cell's relaxation.
        weight: value of the cell's weight.
        spatial_dims: number of spatial dimensions.
    """

    def __init__(self, prior: nn.Module, relaxation: float, weight: float, spatial_dims: int) -> None:
        super().__init__()
        self.prior = prior
        self.relaxation = relaxation
        self.weight = weight
        self.spatial_dims = spatial_dims

    def forward(self, z: Tensor, data: list[Tensor]) -> Tensor:
        """Return the next image ``(B, 2, *space)``.

        Args:
            z: image as two channels.
            data: maps, mask of the spectrum, back projection ``(B, *space, 2)``, step over curvature ``(B or 1,)``, and
                the reference image as two channels.
        """
        v = descend(z, data, self.spatial_dims)
        step = v + self.relaxation * (self.prior(v) - v)
        return data[4] + self.weight * (step - data[4])


class ProximalCellForm(nn.Module):
    """A :class:`~monai_deqkan.networks.blocks.ProximalCell` in real arithmetic; arguments as for the form above.

    Args:
        prior: the prior, scriptable, with its noise level inside.
        relaxation: value of the cell's relaxation.
        spatial_dims: number of spatial dimensions.
    """

    def __init__(self, prior: nn.Module, relaxation: float, spatial_dims: int) -> None:
        super().__init__()
        self.prior = prior
        self.relaxation = relaxation
        self.spatial_dims = spatial_dims

    def forward(self, z: Tensor, data: list[Tensor]) -> Tensor:
        """Return the next image; arguments as in :meth:`ReconstructionCellForm.forward`."""
        return z + self.relaxation * (self.prior(descend(z, data, self.spatial_dims)) - z)


class GradientCellForm(nn.Module):
    """A :class:`~monai_deqkan.networks.blocks.GradientCell` in real arithmetic.

    Args:
        prior: the prior, scriptable, with its noise level inside.
        pull: value of the cell's step size times its weight.
        spatial_dims: number of spatial dimensions.
    """

    def __init__(self, prior: nn.Module, pull: float, spatial_dims: int) -> None:
        super().__init__()
        self.prior = prior
        self.pull = pull
        self.spatial_dims = spatial_dims

    def forward(self, z: Tensor, data: list[Tensor]) -> Tensor:
        """Return the next image; arguments as in :meth:`ReconstructionCellForm.forward`."""
        return descend(z, data, self.spatial_dims) - self.pull * (z - self.prior(z))


class ConjugateGradientCellForm(nn.Module):
    """A :class:`~monai_deqkan.networks.blocks.ConjugateGradientCell` in real arithmetic, all its iterations unrolled.

    Args:
        prior: the prior, scriptable, with its noise level inside.
        weight: value of the cell's weight against the reference image, one without a certificate.
        rtol: relative tolerance of the conjugate gradients.
        max_iter: number of their iterations.
        spatial_dims: number of spatial dimensions.
    """

    def __init__(self, prior: nn.Module, weight: float, rtol: float, max_iter: int, spatial_dims: int) -> None:
        super().__init__()
        self.prior = prior
        self.weight = weight
        self.rtol = rtol
        self.max_iter = max_iter
        self.spatial_dims = spatial_dims

    def forward(self, z: Tensor, data: list[Tensor]) -> Tensor:
        """Return the next image.

        Args:
            z: image as two channels.
            data: as in :meth:`ReconstructionCellForm.forward`, but for the shift ``(B or 1,)`` of the equation in place
                of the step.
        """
        maps, spectrum, back_projection, shift, reference = data
        clean = self.prior(z)
        change = back_projection - normal(clean.movedim(1, -1), maps, spectrum, self.spatial_dims)
        change = cg_solve(change, maps, spectrum, self.spatial_dims, shift, self.max_iter, self.rtol)
        return reference + self.weight * (clean + change.movedim(-1, 1) - reference)
