"""Networks with an equilibrium in a form that TorchScript, ``torch.export`` and ONNX take."""

# No postponed annotations here: torch.jit.script cannot read them on methods that it leaves out.

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from monai_deqkan._checks import check_range
from monai_deqkan.networks.blocks.mri_export import (
    ConjugateGradientCellForm,
    GradientCellForm,
    ProximalCellForm,
    ReconstructionCellForm,
    center_maps,
    cg_start,
    coil_images,
    combine,
    inferred_mask,
    spectrum_mask,
)
from monai_deqkan.networks.blocks.reconstruction_cells import ConjugateGradientCell, GradientCell, ProximalCell
from monai_deqkan.networks.blocks.reweighted_cell import ReweightedCell
from monai_deqkan.networks.layers.deq import DEQLayer
from monai_deqkan.networks.layers.equilibrium_loop import EquilibriumLoop
from monai_deqkan.networks.layers.plain_weight import make_weight_plain
from monai_deqkan.networks.nets.convex_ridge_denoiser import ConvexRidgeDenoiser, limited
from monai_deqkan.networks.nets.deq_reconstructor import DEQReconstructor, brightness
from monai_deqkan.networks.nets.deqkan_classifier import DEQKANClassifier, pool_space
from monai_deqkan.networks.nets.unet_denoiser import UNetDenoiser
from monai_deqkan.solvers import solve_budget

__all__ = ["export_error", "prepare_for_export"]


def prepare_for_export(
    network: nn.Module,
    *,
    rtol: float = 1e-6,
    max_iter: int = 200,
    history_size: int = 6,
    return_residual: bool = False,
) -> nn.Module:
    """Return a copy of a network for inference that ``torch.jit.script``, ``torch.export`` and ONNX take.

    Every equilibrium is solved in the copy by Anderson acceleration with the settings given here, whatever solver the
    network has: the equilibrium is the same. The copy computes in the network's dtype, needs no gradient and has plain
    weights. Samples end on their own; a batch takes as many steps as its slowest sample. It cannot warn about a solve
    that failed, and checks shapes but not values: have it return the residual, and look at it.

    Every form of a reconstructor is taken, with a prior of one's own if that can be exported itself; conjugate
    gradients are unrolled to their most iterations. Besides the networks of this package it takes any whose
    :class:`~monai_deqkan.networks.layers.DEQLayer` are called with one tensor; the rest of such a network must be
    exportable by itself.

    Args:
        network: :class:`~monai_deqkan.networks.nets.DEQKANClassifier`,
            :class:`~monai_deqkan.networks.nets.DEQReconstructor`, or a network that holds ``DEQLayer``, such as a
            :class:`~monai_deqkan.networks.nets.HybridKANUNet` with an equilibrium; stays as it is.
        rtol: tolerance of the solves, relative, dimensionless.
        max_iter: most evaluations of the cell in one solve, at least 1.
        history_size: number of differences that Anderson's method keeps, at least 1.
        return_residual: whether the copy returns ``(output, residual)`` with the relative residual of each sample
            ``(B,)``, float64; only for the two networks named.

    Returns:
        The copy, in eval mode. That of a ``DEQReconstructor`` takes k-space (and maps) as real ``(B, K, *space, 2)``,
        under TorchScript as complex too, and returns what the network does.

    Raises:
        TypeError: if ``network`` holds no equilibrium, or a cell with a start or a state of its own.
        ValueError: for a setting out of range.

    Example:
        >>> import torch
        >>> from monai_deqkan.networks.nets import DEQKANClassifier
        >>> network = DEQKANClassifier(spatial_dims=2, in_channels=1, out_channels=2).eval()
        >>> image = torch.rand(2, 1, 32, 32)
        >>> export_error(network, prepare_for_export(network), image) < 1e-4
        True
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"`network` must be a torch.nn.Module; got {type(network).__name__}.")
    settings = {"rtol": rtol, "max_iter": max_iter, "history_size": history_size}
    plain = copy.deepcopy(network).eval().requires_grad_(False)
    for module in plain.modules():
        if parametrize.is_parametrized(module, "weight"):
            make_weight_plain(module)
    form: nn.Module
    if type(plain) is DEQKANClassifier:
        form = (_SolvedClassifier if return_residual else _Classifier)(plain, settings)
    elif type(plain) is DEQReconstructor:
        form = (_SolvedReconstructor if return_residual else _Reconstructor)(plain, network, settings)
    elif return_residual:
        raise TypeError(
            f"`return_residual` needs a DEQKANClassifier or a DEQReconstructor; got {type(network).__name__}. Leave it "
            "out, and compare by `export_error`."
        )
    else:
        form = _with_loops(plain, settings)
    return form.eval().requires_grad_(False)


@torch.no_grad()
def export_error(network: nn.Module, exported: Callable[..., Any], *inputs: Tensor, rtol: float = 1e-6) -> float:
    """Compare an exported network with the network itself, its equilibria solved to ``rtol``.

    Args:
        network: the network, in eval mode.
        exported: its exported form, or any function on the same inputs, such as a call of onnxruntime.
        inputs: inputs of both.
        rtol: tolerance of the network's own solves.

    Returns:
        Largest absolute difference of the outputs over the largest absolute output, dimensionless.

    Raises:
        ConvergenceError: if the network itself does not reach ``rtol`` in 1000 evaluations.
    """
    check_range("rtol", rtol, 0.0)
    with solve_budget(rtol=rtol, max_iter=1000, on_failure="raise"):
        expected = network(*inputs)
    found = exported(*inputs)
    found = torch.as_tensor(found[0] if isinstance(found, (tuple, list)) else found)
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny))


class _OneInjection(nn.Module):
    """A cell ``cell(z, x)`` with one tensor ``x``, as the loop calls it."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, z: Tensor, data: list[Tensor]) -> Tensor:
        return self.cell(z, data[0])


class _Layer(nn.Module):
    """A ``DEQLayer`` on one tensor that starts from zero."""

    def __init__(self, layer: DEQLayer, settings: dict[str, Any]) -> None:
        super().__init__()
        if hasattr(layer.cell, "initial_state"):
            raise TypeError(
                f"`prepare_for_export` needs cells on one tensor that start from zero; {type(layer.cell).__name__} has "
                "a method `initial_state`. Leave it out of the network that you export."
            )
        self.loop = EquilibriumLoop(_OneInjection(layer.cell), **settings)

    def forward(self, x: Tensor) -> Tensor:
        return self.loop(torch.zeros_like(x), [x])[0]


def _with_loops(network: nn.Module, settings: dict[str, Any]) -> nn.Module:
    if isinstance(network, DEQLayer):
        return _Layer(network, settings)
    # A layer may stand under several names, and keeps them all.
    named = [(name, part) for name, part in network.named_modules(remove_duplicate=False) if isinstance(part, DEQLayer)]
    if not named:
        raise TypeError(
            f"`network` must hold a DEQLayer; {type(network).__name__} has none. Export it as it is, after "
            "`remove_spectral_norm`."
        )
    forms = {layer: _Layer(layer, settings) for _, layer in named}
    for name, layer in named:
        network.set_submodule(name, forms[layer])
    return network


class _Classifier(nn.Module):
    def __init__(self, network: DEQKANClassifier, settings: dict[str, Any]) -> None:
        super().__init__()
        if network.steps is not None:
            raise TypeError(
                "`prepare_for_export` is for equilibria; a DEQKANClassifier with `num_steps` has none. Export it as it "
                "is, after `remove_spectral_norm`."
            )
        self.in_channels, self.rank, self.pool = network.in_channels, network.spatial_dims + 2, network.pool
        self.on_map = network.on_map
        self.backbone, self.projection = network.backbone, network.projection
        self.injection_norm, self.head = network.injection_norm, network.head
        self.loop = EquilibriumLoop(_OneInjection(network.equilibrium.cell), **settings)

    def solve(self, image: Tensor) -> tuple[Tensor, Tensor]:
        if image.dim() != self.rank or image.shape[1] != self.in_channels:
            raise ValueError(f"`image` must have {self.rank} axes (B, C, *space) with {self.in_channels} channels.")
        maps = self.backbone(image)
        if not self.on_map:
            maps = pool_space(maps, self.pool)
        x = self.injection_norm(self.projection(maps))
        z, residual = self.loop(torch.zeros_like(x), [x])
        if self.on_map:
            z = pool_space(z, self.pool)
        return self.head(z), residual

    def forward(self, image: Tensor) -> Tensor:
        return self.solve(image)[0]


class _SolvedClassifier(_Classifier):
    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self.solve(image)


class _Ridge(nn.Module):
    """A `ConvexRidgeDenoiser` of plain convolutions, its thresholds, step sizes and noise level in their weights."""

    def __init__(self, denoiser: ConvexRidgeDenoiser, noise_level: float = 1.0) -> None:
        super().__init__()
        thresholds = F.softplus(denoiser.raw_threshold) * noise_level
        steps = 2 * torch.sigmoid(denoiser.raw_step_size)
        transposed = nn.ConvTranspose2d if denoiser.spatial_dims == 2 else nn.ConvTranspose3d
        self.num_repeats, self.phase_invariant = denoiser.num_repeats, denoiser.phase_invariant
        self.layers = nn.ModuleList()
        for layer, threshold, step in zip(denoiser.analysis, thresholds, steps, strict=True):
            scale = threshold.view(-1, *[1] * (denoiser.spatial_dims + 1))
            analysis: Any = copy.deepcopy(layer)
            synthesis = transposed(
                analysis.out_channels, analysis.in_channels, analysis.kernel_size, padding=analysis.padding, bias=False
            )
            kernel = analysis.weight.detach()
            analysis.weight = nn.Parameter(kernel / scale)
            synthesis.weight = nn.Parameter(step * scale * kernel)
            self.layers.append(_RidgeLayer(analysis, synthesis, denoiser.phase_invariant))

    def forward(self, image: Tensor) -> Tensor:
        x = image.flatten(0, 1).unsqueeze(1) if self.phase_invariant else image
        for _ in range(self.num_repeats):
            for layer in self.layers:
                x = layer(x)
        return x.reshape(image.shape)


class _RidgeLayer(nn.Module):
    def __init__(self, analysis: nn.Module, synthesis: nn.Module, phase_invariant: bool) -> None:
        super().__init__()
        self.analysis, self.synthesis, self.phase_invariant = analysis, synthesis, phase_invariant

    def forward(self, x: Tensor) -> Tensor:
        response = self.analysis(x)
        change: Tensor = self.synthesis(limited(response) if self.phase_invariant else F.hardtanh(response))
        return x - change


class _UNet(nn.Module):
    """A `UNetDenoiser` that is told one noise level."""

    def __init__(self, denoiser: UNetDenoiser, noise_level: float) -> None:
        super().__init__()
        self.denoiser, self.noise_level, self.told = denoiser, noise_level, denoiser.takes_noise_level

    def forward(self, image: Tensor) -> Tensor:
        x = image
        if self.told:
            x = torch.cat((x, torch.full_like(x[:, :1], self.noise_level)), dim=1)
        return image - self.denoiser.predict_noise(x)


def _exportable_prior(prior: Any, noise_level: Tensor | None) -> nn.Module:
    if isinstance(prior, UNetDenoiser):
        return _UNet(prior, 0.0 if noise_level is None else float(noise_level))
    if isinstance(prior, ConvexRidgeDenoiser):
        return _Ridge(prior, 1.0 if noise_level is None else float(noise_level))
    if noise_level is not None:
        raise TypeError(
            f"`prepare_for_export` cannot tell a {type(prior).__name__} its noise level. Export a network with a "
            "UNetDenoiser or a ConvexRidgeDenoiser, or a prior that is not told the level."
        )
    return prior


class _Reconstructor(nn.Module):
    def __init__(self, plain: DEQReconstructor, network: nn.Module, settings: dict[str, Any]) -> None:
        super().__init__()
        if isinstance(plain.get_submodule("equilibrium.cell"), ReweightedCell):
            raise TypeError(
                "`prepare_for_export` does not know the reweighted form. Run it in Python, or export a network of the "
                "form 'contracting', 'cg', 'prox' or 'grad'."
            )
        # The numbers are those of the normalized prior: a bound of its plain weights may differ by rounding.
        cell: Any = network.get_submodule("equilibrium.cell")
        self.spatial_dims, self.num_cg_steps = plain.spatial_dims, plain.num_cg_steps
        prior: Any = plain.get_submodule("equilibrium.cell.prior")
        prior = _exportable_prior(prior, getattr(cell, "noise_level", None))
        # What the cell takes of the curvature: its part, or as many times it.
        self.divides = not isinstance(cell, ConjugateGradientCell)
        self.step_size = float(cell.step_size if self.divides else cell.weight)
        form: nn.Module
        if isinstance(cell, ConjugateGradientCell):
            rtol, max_iter = cell.cg_limits(cell.raw_weight.dtype)
            tolerance = max(rtol, 10 * torch.finfo(cell.raw_weight.dtype).eps)
            form = ConjugateGradientCellForm(prior, float(cell.step_weight), tolerance, max_iter, self.spatial_dims)
        elif isinstance(cell, ProximalCell):
            form = ProximalCellForm(prior, float(cell.relaxation), self.spatial_dims)
        elif isinstance(cell, GradientCell):
            form = GradientCellForm(prior, float(cell.step_size * cell.weight), self.spatial_dims)
        else:
            form = ReconstructionCellForm(prior, float(cell.relaxation), float(cell.weight), self.spatial_dims)
        self.loop = EquilibriumLoop(form, **settings)

    def solve(self, kspace: Tensor, mask: Tensor | None, sensitivity_maps: Tensor | None) -> tuple[Tensor, Tensor]:
        dims = self.spatial_dims
        y = torch.view_as_real(kspace) if torch.is_complex(kspace) else kspace
        if y.dim() != dims + 3 or y.shape[-1] != 2:
            raise ValueError(f"`kspace` must have {dims} axes of space, (B, K, *space, 2): real and imaginary part.")
        measured = inferred_mask(y) if mask is None else (mask != 0).to(y.dtype)
        if measured.dim() != dims + 2:
            raise ValueError(f"`mask` must have {dims + 2} axes (B, K, *space); give those of size one too.")
        if sensitivity_maps is None:
            maps = center_maps(y, measured, dims)
        else:
            given = sensitivity_maps
            maps = (torch.view_as_real(given) if torch.is_complex(given) else given).to(y.dtype)
        # Inside the loop the exporter does not tell a batch of one from others: nothing may broadcast there.
        maps = maps.expand([y.shape[0]] + list(maps.shape[1:]))  # noqa: RUF005, TorchScript
        spectrum = spectrum_mask(measured, y)
        spectrum = spectrum.expand([y.shape[0]] + list(spectrum.shape[1:]))  # noqa: RUF005, TorchScript
        b = combine(maps, coil_images(y * measured[..., None], dims))
        reference = cg_start(b, maps, spectrum, dims, self.num_cg_steps).movedim(-1, 1)
        unit = brightness(reference)
        curvature = maps.square().sum(dim=-1).sum(dim=1).flatten(1).amax(dim=1).clamp_min(1e-38)
        scale = self.step_size / curvature if self.divides else self.step_size * curvature
        data = [maps, spectrum, b / unit.movedim(1, -1), scale, reference / unit]
        z, residual = self.loop(data[4], data)
        return z * unit, residual

    def forward(self, kspace: Tensor, mask: Tensor | None = None, sensitivity_maps: Tensor | None = None) -> Tensor:
        return self.solve(kspace, mask, sensitivity_maps)[0]


class _SolvedReconstructor(_Reconstructor):
    def forward(  # type: ignore[override]
        self, kspace: Tensor, mask: Tensor | None = None, sensitivity_maps: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.solve(kspace, mask, sensitivity_maps)
