"""DEQReconstructor: MRI reconstruction as the equilibrium of data consistency and a learned prior."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from monai.data import MetaTensor
from torch import Tensor, nn

from monai_deqkan._checks import check_choice, check_finite, check_int, check_spatial_dims, check_tensor
from monai_deqkan._complex import as_complex, complex_to_channels
from monai_deqkan.adjoints import Adjoint
from monai_deqkan.networks.blocks.data_consistency import Measurement
from monai_deqkan.networks.blocks.deq_cell import CertifiedMap, ReconstructionCell
from monai_deqkan.networks.blocks.reconstruction_cells import ConjugateGradientCell, GradientCell, ProximalCell
from monai_deqkan.networks.blocks.reweighted_cell import ReweightedCell
from monai_deqkan.networks.layers.deq import DEQLayer
from monai_deqkan.networks.nets.convex_ridge_denoiser import ConvexRidgeDenoiser
from monai_deqkan.networks.nets.dncnn import DnCNN
from monai_deqkan.networks.nets.unet_denoiser import UNetDenoiser
from monai_deqkan.networks.nets.weakly_convex_ridge_denoiser import WeaklyConvexRidgeDenoiser
from monai_deqkan.operators import MRIOperator, espirit_maps, estimate_sensitivity_maps, map_misfit
from monai_deqkan.operators.sensitivity import measures_center
from monai_deqkan.solvers import FixedPointSolver
from monai_deqkan.variational import cg_sense

__all__ = ["DEQReconstructor"]

_ESTIMATES: dict[str, Callable[..., Tensor]] = {"low_frequency": estimate_sensitivity_maps, "espirit": espirit_maps}


class Reconstructor(nn.Module, ABC):
    """What reconstruction networks share: coil maps, the reference image, scale; a subclass iterates a cell.

    Args:
        spatial_dims: as in :class:`DEQReconstructor`.
        num_cg_steps: as there.
        sensitivity: as there.
    """

    def __init__(self, spatial_dims: int, num_cg_steps: int, sensitivity: str | nn.Module) -> None:
        super().__init__()
        self.spatial_dims = check_spatial_dims(spatial_dims)
        self.num_cg_steps = check_int("num_cg_steps", num_cg_steps)
        self.sensitivity = sensitivity if isinstance(sensitivity, nn.Module) else None
        if isinstance(sensitivity, nn.Module):
            sensitivity.requires_grad_(False)
        else:
            self._estimate = _ESTIMATES[check_choice("sensitivity", sensitivity, _ESTIMATES)]

    needs_misfit = False  # whether its cell asks how far the coil maps are from the data

    @abstractmethod
    def find_image(self, inputs: tuple[Measurement, Tensor]) -> Tensor:
        """Iterate the cell on the measurement and the reference image; both are normalized."""

    def forward(self, kspace: Tensor, mask: Tensor | None = None, sensitivity_maps: Tensor | None = None) -> Tensor:
        """Reconstruct a batch.

        Args:
            kspace: measured k-space, zero where nothing was measured: complex ``(B, K, *space)`` or real
                ``(B, K, *space, 2)``, in any unit; worked on in the precision of the weights.
            mask: where it was measured, shape ``(B, K, *space)`` with any axis of size one; by default inferred from
                the columns of k-space that are not zero.
            sensitivity_maps: complex ``(B, K, *space)``, constants like the k-space: no gradient flows to them; by
                default estimated from the centre of k-space, as ``sensitivity`` says. ``(B, M, K, *space)`` for
                ``M`` map sets, each with an image of its own.

        Returns:
            The complex image as two channels ``(B, 2, *space)``: real part, imaginary part. With several map sets its
            magnitude is the root sum of squares of their images, its phase that of the first.

        Raises:
            TypeError: if ``kspace`` is no tensor.
            ValueError: if shapes do not fit or values are not finite.
        """
        meta = kspace if isinstance(kspace, MetaTensor) else None
        kspace = self._checked(kspace)
        mask, sensitivity_maps = (
            data.as_subclass(Tensor) if isinstance(data, MetaTensor) else data for data in (mask, sensitivity_maps)
        )
        with torch.no_grad(), torch.autocast(kspace.device.type, enabled=False):
            if sensitivity_maps is not None:
                sensitivity_maps = as_complex(check_tensor("sensitivity_maps", sensitivity_maps), "sensitivity_maps")
                # They would end as an image of zeros: a solve goes back to its last finite iterate.
                check_finite("sensitivity_maps", torch.view_as_real(sensitivity_maps), "Set them to zero there.")
                sensitivity_maps = sensitivity_maps.detach().to(kspace.dtype)
            else:
                sensitivity_maps = self._estimated_maps(kspace, mask)
            operator = MRIOperator.from_kspace(kspace, mask, sensitivity_maps, spatial_dims=self.spatial_dims)
            reference = complex_to_channels(cg_sense(kspace, operator=operator, max_iter=self.num_cg_steps))
            unit = brightness(reference)
            misfit = self._misfit(kspace, mask, sensitivity_maps) if self.needs_misfit else None
            measurement = Measurement.of(operator, kspace / unit.view(-1, *[1] * (kspace.ndim - 1)), misfit)
        image = self.find_image((measurement, reference / unit)) * unit
        if image.ndim > self.spatial_dims + 2:
            image = _joined(image)
        return image if meta is None else cast(Tensor, MetaTensor(image).copy_meta_from(meta))

    def _misfit(self, kspace: Tensor, mask: Tensor | None, maps: Tensor) -> Tensor:
        """Return the misfit of each sample's maps, ``(B,)``; zero where the centre is not measured."""
        if mask is not None:
            mask = (mask != 0).all(dim=1, keepdim=True)  # of all coils
        rows = measures_center(mask, kspace, self.spatial_dims)
        misfit = torch.zeros(len(kspace), dtype=kspace.real.dtype, device=kspace.device)
        if bool(rows.any()):
            maps = maps[rows] if len(maps) > 1 else maps
            mask = mask[rows] if mask is not None and len(mask) > 1 else mask
            found, rough = (
                map_misfit(kspace[rows], maps, mask, spatial_dims=self.spatial_dims, windowed=windowed)
                for windowed in (True, False)
            )
            # Maps that are made of the windowed centre explain it by construction. Others leave at most four times as
            # much of the centre without a window, seen on hearts and simulated brains: what is beyond counts.
            misfit[rows] = torch.maximum(found, rough - 3 * found)
        return misfit

    def _estimated_maps(self, kspace: Tensor, mask: Tensor | None) -> Tensor:
        if self.sensitivity is None:
            return self._estimate(kspace, mask, spatial_dims=self.spatial_dims)
        return cast(Tensor, self.sensitivity(kspace, mask)).detach().to(kspace.dtype)

    def _checked(self, kspace: Tensor) -> Tensor:
        kspace = as_complex(check_tensor("kspace", kspace).as_subclass(Tensor))
        if kspace.ndim != self.spatial_dims + 2 or 0 in kspace.shape:
            raise ValueError(
                f"`kspace` must have shape (B, K, {', '.join('DHW'[3 - self.spatial_dims :])}), complex, or with a "
                f"last axis of 2; got {tuple(kspace.shape)}. Single-coil data need a coil axis of size 1."
            )
        check_finite("kspace", torch.view_as_real(kspace), "Remove broken slices before reconstruction.")
        # In the precision of the weights: NumPy's transforms give complex128 to whoever does not ask.
        is_double = any(parameter.dtype == torch.float64 for parameter in self.parameters())
        return kspace.detach().to(torch.complex128 if is_double else torch.complex64)


class DEQReconstructor(Reconstructor):
    r"""Reconstruct an image from undersampled k-space, as the equilibrium of physics and a learned prior.

    The reference image and start is a CG-SENSE reconstruction of few iterations. K-space may come in any unit: each
    sample is divided by the brightness of its reference image for the solve. Gradients are implicit: training memory
    does not grow with the number of steps. They reach the parameters only: none flows to the k-space or the
    sensitivity maps.

    ``form`` chooses the step whose equilibrium is found:

    - ``"contracting"``: :class:`~monai_deqkan.networks.blocks.ReconstructionCell`, a contraction for any sampling mask:
      its equilibrium exists, is unique, and the error of a solve is bounded. It needs a certified prior.
    - ``"cg"`` (DE-CG): :class:`~monai_deqkan.networks.blocks.ConjugateGradientCell`; without a certificate, or with one
      where ``contraction`` is given.
    - ``"prox"`` (DE-Prox) and ``"grad"`` (DE-Grad): :class:`~monai_deqkan.networks.blocks.ProximalCell` and
      :class:`~monai_deqkan.networks.blocks.GradientCell`; without a certificate.
    - ``"reweighted"`` (DE-IRLS): :class:`~monai_deqkan.networks.blocks.ReweightedCell`, whose equilibria are the
      stationary points of an explicit learned energy, which no step raises. It needs a prior with an energy.

    A form without a certificate takes any prior, but need not converge: whether it did is told per sample by a
    :class:`~monai_deqkan.solvers.SolveRecorder`.

    Args:
        spatial_dims: number of spatial dimensions, 2 or 3.
        prior: ``"ridge"`` for a :class:`ConvexRidgeDenoiser`, ``"complex_ridge"`` for its phase-invariant form (32
            kernels of size 7, six steps of the same functions), ``"dncnn"`` for a :class:`DnCNN` (with certified
            spectral normalization where the form needs it, else residual without one), ``"unet"`` for a
            :class:`UNetDenoiser`, ``"weakly_convex_ridge"`` for a :class:`WeaklyConvexRidgeDenoiser`, or a module on
            two channels. None takes ``"weakly_convex_ridge"`` for the form ``"reweighted"``, which needs an energy, and
            ``"ridge"`` for the others.
        form: ``"contracting"``, ``"cg"``, ``"prox"``, ``"grad"`` or ``"reweighted"``.
        num_layers: number of layers of a prior given by name (residual blocks per level of a U-Net, gradient steps of
            the weakly convex one as a denoiser); by default that network's own.
        features: number of channels of a prior given by name (one per level for a U-Net, one per set of kernels for the
            weakly convex one); by default that network's own.
        contraction: certified contraction factor of the step, dimensionless, in ``(0, 1)``; None takes 0.98 for
            ``"contracting"``, and no certificate for ``"cg"``. The other forms have none.
        weight: weight of the prior to start from, for the forms that learn one (``"cg"``, ``"grad"`` and
            ``"reweighted"``); by default their own.
        noise_level: noise level that a prior which asks for one is told at the start, in the unit of the normalized
            image; by default the form's own.
        num_cg_steps: iterations of the CG-SENSE reconstruction it starts from, at least 1.
        solver: fixed-point solver, by name, ``(name, settings)`` or object.
        adjoint: how gradients get through the solve, in the same three ways.
        sensitivity: how coil maps are estimated where none are given: ``"low_frequency"``
            (:func:`~monai_deqkan.operators.estimate_sensitivity_maps`), ``"espirit"``
            (:func:`~monai_deqkan.operators.espirit_maps`; slower, better at 8x), or a module called with k-space and
            mask, such as a trained :class:`SensitivityNet`: it is not trained along, its weights are set constant.

    Raises:
        ValueError: for a number or name out of range, or a prior without a certified constant where one is needed.

    Example:
        >>> network = DEQReconstructor(spatial_dims=2, num_layers=3, features=8)
        >>> network(torch.randn(1, 4, 32, 32, dtype=torch.complex64)).shape
        torch.Size([1, 2, 32, 32])

    Reference:
        D. Gilton, G. Ongie and R. Willett, "Deep equilibrium architectures for inverse problems in imaging", IEEE
        Trans. Comput. Imaging 7 (2021) 1123-1133. Differences: see the cells.
    """

    def __init__(
        self,
        spatial_dims: int,
        prior: str | nn.Module | CertifiedMap | None = None,
        *,
        form: str = "contracting",
        num_layers: int | None = None,
        features: int | Sequence[int] | None = None,
        contraction: float | None = None,
        weight: float | None = None,
        noise_level: float | None = None,
        num_cg_steps: int = 8,
        solver: str | tuple[str, dict[str, Any]] | FixedPointSolver = ("anderson", {"rtol": 1e-3}),
        adjoint: str | tuple[str, dict[str, Any]] | Adjoint = "implicit",
        sensitivity: str | nn.Module = "low_frequency",
    ) -> None:
        super().__init__(spatial_dims, num_cg_steps, sensitivity)
        self.form = form
        cell = reconstruction_cell(
            spatial_dims,
            prior,
            form=form,
            num_layers=num_layers,
            features=features,
            contraction=contraction,
            weight=weight,
            noise_level=noise_level,
        )
        self.needs_misfit = getattr(cell, "needs_misfit", False)
        self.equilibrium = DEQLayer(cell, solver, adjoint)

    def find_image(self, inputs: tuple[Measurement, Tensor]) -> Tensor:
        """Return the equilibrium."""
        return cast(Tensor, self.equilibrium(inputs))


def reconstruction_cell(
    spatial_dims: int,
    prior: str | nn.Module | CertifiedMap | None,
    *,
    form: str,
    num_layers: int | None,
    features: int | Sequence[int] | None,
    contraction: float | None,
    weight: float | None = None,
    noise_level: float | None = None,
) -> ReconstructionCell | ProximalCell | GradientCell | ConjugateGradientCell | ReweightedCell:
    """Return a new cell; arguments as in :class:`DEQReconstructor`."""
    check_choice("form", form, ("contracting", "cg", "prox", "grad", "reweighted"))
    if contraction is not None and form not in ("contracting", "cg"):
        raise ValueError(
            f"The form {form!r} has no certificate. Leave `contraction` out, or take 'contracting' or 'cg'."
        )
    for name, value, forms in (
        ("weight", weight, ("cg", "grad", "reweighted")),
        ("noise_level", noise_level, ("cg", "prox", "grad")),
    ):
        if value is not None and form not in forms:
            raise ValueError(f"The form {form!r} has no `{name}`; leave it out, or take one of {', '.join(forms)}.")
    if prior is None:
        prior = "weakly_convex_ridge" if form == "reweighted" else "ridge"
    chosen: Any = prior
    if isinstance(prior, str):
        certified = form == "contracting" or contraction is not None
        chosen = _prior(prior, spatial_dims, num_layers, features, certified, tells_level=form != "contracting")
    elif num_layers is not None or features is not None:
        raise ValueError("`num_layers` and `features` shape a prior given by name; leave them out with a module.")
    if form == "contracting":
        return ReconstructionCell(chosen, contraction=0.98 if contraction is None else contraction)
    start: dict[str, Any] = {
        name: value for name, value in (("weight", weight), ("noise_level", noise_level)) if value is not None
    }
    if form == "reweighted":
        return ReweightedCell(chosen, **start)
    if form == "cg":
        return ConjugateGradientCell(chosen, contraction=contraction, **start)
    return ProximalCell(chosen, **start) if form == "prox" else GradientCell(chosen, **start)


def _prior(
    name: str,
    spatial_dims: int,
    num_layers: int | None,
    features: int | Sequence[int] | None,
    certified: bool,
    *,
    tells_level: bool,
) -> nn.Module:
    check_choice("prior", name, ("ridge", "complex_ridge", "weakly_convex_ridge", "dncnn", "unet"))
    chosen: dict[str, Any] = {}
    if features is not None:
        chosen["features"] = features
    if num_layers is not None:
        chosen[{"unet": "num_blocks", "weakly_convex_ridge": "num_steps"}.get(name, "num_layers")] = num_layers
    if name == "unet":
        return UNetDenoiser(spatial_dims, 2, **chosen)
    if name == "weakly_convex_ridge":
        return WeaklyConvexRidgeDenoiser(spatial_dims, **chosen)
    if name == "ridge":
        return ConvexRidgeDenoiser(spatial_dims, 2, **chosen)
    if name == "complex_ridge":
        chosen = {"num_layers": 1, "features": 32, **chosen}
        settings: dict[str, Any] = {"kernel_size": 7, "num_repeats": 6, "phase_invariant": True}
        if tells_level:
            settings |= {"blind": False, "threshold": 0.03}  # of the noise level
        return ConvexRidgeDenoiser(spatial_dims, 2, **settings, **chosen)
    kind: dict[str, Any] = {"residual": False, "spectral_norm": "certified"} if certified else {"residual": True}
    return DnCNN(spatial_dims, 2, 2, **kind, **chosen)


def _joined(image: Tensor) -> Tensor:
    """Join the images of map sets ``(B, 2, M, *space)``: root sum of squares, phase of the first set."""
    first = image[:, :, 0]
    power, own = image.square().sum(dim=(1, 2)).unsqueeze(1), first.square().sum(dim=1, keepdim=True)
    # Square roots of zero are left out, as their gradient is infinite.
    magnitude = torch.where(power > 0, power.where(power > 0, 1.0).sqrt(), 0.0)
    real = torch.tensor([1.0, 0.0], dtype=image.dtype, device=image.device).view(2, *[1] * (first.ndim - 2))
    return magnitude * torch.where(own > 0, first / own.where(own > 0, 1.0).sqrt(), real)


def brightness(image: Tensor) -> Tensor:
    """Return the root mean square of a complex image, weighted by its own power: ``(B, 1, *ones)``.

    Unlike the plain one it hardly depends on how much empty background there is. One for an empty image.
    """
    # Relative to the largest value, so that fourth powers stay inside float32's range whatever the unit.
    peak = image.abs().flatten(1).amax(dim=1)
    peak = torch.where(peak > 0, peak, torch.ones_like(peak))
    power = (image.flatten(2) / peak[:, None, None]).square().sum(dim=1)
    mean = power.square().sum(dim=1) / power.sum(dim=1).clamp_min(1e-37)
    unit = torch.where(mean > 0, mean.sqrt(), torch.ones_like(mean)) * peak
    return unit.view([-1] + [1] * (image.dim() - 1))
