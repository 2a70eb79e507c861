"""Certified Lipschitz bounds of KAN layers, and the certified norm of any layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from monai_deqkan._checks import check_tensor
from monai_deqkan.networks.layers.basis import Basis
from monai_deqkan.networks.layers.kan_activation import KANActivation
from monai_deqkan.networks.layers.kan_layer import KANLayer
from monai_deqkan.networks.layers.operator_norm import (
    OperatorNorm,
    Peak,
    find_peak,
    grid_sizes,
    norm_at,
    padding_gain,
    root_of_largest_eigenvalue,
    rounding,
    wide_dtype,
)
from monai_deqkan.networks.layers.slope_hull import slope_frame

__all__ = ["SILU_MAX_SLOPE", "KANNorm", "kan_lipschitz_bound", "operator_norm"]

SILU_MAX_SLOPE = 1.09984  # rounded up from 1.0998393
_RIDGE = 1e-6  # keeps the coefficients' second moment invertible; costs about as much of the bound


@dataclass(frozen=True)
class KANPeak(Peak):
    """The certified bound of a KAN layer, and how it was found.

    Args:
        base: where the base part is largest; ``None`` where one part is missing.
        spline: where the part of the basis is.
    """

    base: Peak | None = None
    spline: Peak | None = None


@dataclass(frozen=True)
class KANNorm(OperatorNorm):
    """The certified Lipschitz constant of one KAN layer, from its packed weight ``(out, F * in, *kernel)``.

    Args:
        groups: number of blocked connections.
        sizes: frequencies on each kernel axis, none for a linear layer.
        gain: bound of the norm of the padding.
        basis: the functions.
        has_base: whether feature 0 is the base term SiLU.
        input_scale: factor between the input and the basis, shape ``(in,)``, or ``None``.
    """

    basis: Basis
    has_base: bool
    input_scale: Tensor | None = field(compare=False)

    def find_peak(self, weight: Tensor) -> KANPeak:
        """Search for the certified norm, with base term and basis balanced by their own norms."""
        if not bool(torch.isfinite(weight).all()):
            return KANPeak(float("nan"))
        with torch.no_grad():
            base, spline = self._parts(weight)
            if base.dim() == 2 and 0 < base.shape[0] <= base.shape[1] and bool(base.any()) and bool(spline.any()):
                return self._find_matrix_peak(base, spline, weight)
            at_base, at_spline = self._search(base, weight), self._search(spline, weight)
            if not (at_base.bound and at_spline.bound):
                peak = max(at_base, at_spline, key=lambda peak: peak.bound)
                return KANPeak(peak.bound * self.gain, peak.group, peak.frequency, peak.vector)
            peak = self._search(_joined(base, spline, at_spline.bound / at_base.bound), weight)
        return KANPeak(peak.bound * self.gain, peak.group, peak.frequency, peak.vector, at_base, at_spline)

    def _find_matrix_peak(self, base: Tensor, spline: Tensor, weight: Tensor) -> KANPeak:
        """Search for the norm of a linear layer: both parts and what they are joined to share their Gram matrices."""
        scale = float(weight.abs().amax())
        grams = [part @ part.mT for part in (base / scale, spline / scale)]
        margin = scale * rounding(spline, weight.dtype, torch.float64)
        at_base, at_spline = (Peak(norm * margin, 0, (), v) for norm, v in map(root_of_largest_eigenvalue, grams))
        r = at_spline.bound / at_base.bound
        norm, vector = root_of_largest_eigenvalue((1 + r) * grams[0] + (1 + 1 / r) * grams[1])
        return KANPeak(norm * margin * self.gain, 0, (), vector, at_base, at_spline)

    def at(self, weight: Tensor, peak: Peak) -> Tensor:
        """Return the certified norm found, as a differentiable scalar."""
        if not isinstance(peak, KANPeak) or not 0 < peak.bound < float("inf"):
            return super().at(weight, peak)
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return weight.new_tensor(peak.bound)
        base, spline = self._parts(weight)
        if peak.base is None or peak.spline is None:
            part = base if bool(base.any()) else spline
            return norm_at(part, self.groups, peak).to(weight.dtype)
        norms = [norm_at(part, self.groups, at) for part, at in ((base, peak.base), (spline, peak.spline))]
        joined = _joined(base, spline, norms[1] / norms[0])
        return norm_at(joined, self.groups, peak).to(weight.dtype)

    def _search(self, part: Tensor, weight: Tensor) -> Peak:
        return find_peak(part, self.groups, self.sizes, weight.dtype)

    def _parts(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return two maps, shape ``(out, * in, *kernel)``, whose norms bound the constants of base term and basis."""
        if weight.device.type == "mps":
            weight = weight.cpu()  # it has no double precision
        wide = weight.to(wide_dtype(weight)).unflatten(1, (self.basis.num_basis + int(self.has_base), -1))
        base = wide[:, : int(self.has_base)].flatten(1, 2) * SILU_MAX_SLOPE
        coefficients = wide[:, int(self.has_base) :]  # (out, K, in, *kernel)
        if self.input_scale is not None:
            scale = self.input_scale.to(wide).view(self.groups, 1, 1, -1, *[1] * (wide.dim() - 3))
            coefficients = (coefficients.unflatten(0, (self.groups, -1)) * scale).flatten(0, 1)
        return base, self._slope_parts(coefficients).flatten(1, 2)

    def _slope_parts(self, coefficients: Tensor) -> Tensor:
        frame = slope_frame(self.basis)
        if frame is None:
            return self.basis.slope_coefficients(coefficients, 1) * self.basis.slope_gain
        flat, mixing = coefficients.flatten(2), frame.mixing.to(coefficients)  # (out, K, others), (K, K)
        moment = mixing @ torch.einsum("oki,oli->kl", flat, flat) @ mixing
        mean = moment.diagonal().mean()
        if not bool(mean > 0):
            return coefficients
        root = _square_root(moment / mean + _RIDGE * torch.eye(len(moment), dtype=flat.dtype, device=flat.device))
        points = frame.points.to(flat)
        gain = ((points @ root) * points).sum(1).amax().sqrt()
        even = torch.linalg.solve_triangular(torch.linalg.cholesky(root), mixing, upper=False) * gain
        return (even @ flat).view_as(coefficients)


def _joined(base: Tensor, spline: Tensor, r: float | Tensor) -> Tensor:
    """Put both parts side by side, each times its share: |a + b|^2 <= (1 + r) |a|^2 + (1 + 1 / r) |b|^2.

    The ratio of the norms is the best ``r`` for parts that share their singular vectors; others lowered the bounds of
    random, smooth and trained weights by 0.5 % at most.
    """
    return torch.cat((base * (1 + r) ** 0.5, spline * (1 + 1 / r) ** 0.5), dim=1)


class _SquareRoot(torch.autograd.Function):
    """Square root of a positive definite matrix, with a gradient that equal eigenvalues do not spoil."""

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(matrix)
        roots = values.clamp_min(torch.finfo(values.dtype).tiny).sqrt()
        return (vectors * roots) @ vectors.mT, vectors, roots

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        vectors, roots = ctx.saved_tensors
        inner = (vectors.mT @ grads[0] @ vectors) / (roots[:, None] + roots)
        return vectors @ inner @ vectors.mT


def _square_root(matrix: Tensor) -> Tensor:
    return _SquareRoot.apply(matrix)[0]


def operator_norm(layer: nn.Module) -> OperatorNorm:
    """Return the certified norm that suits a layer, with its present basis and input map.

    Args:
        layer: ``nn.Linear``, ``nn.Conv1d/2d/3d``, ``KANLinear`` or ``KANConv1d/2d/3d``.

    Raises:
        TypeError: if ``layer`` is of another kind.
    """
    if not isinstance(layer, (KANLayer, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        raise TypeError(
            "A certified norm needs nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d or a KAN layer; got "
            f"{type(layer).__name__}. Replace a transposed convolution by interpolation and a convolution."
        )
    kernel = torch.Size(getattr(layer, "kernel_size", ()))
    groups, sizes = int(getattr(layer, "groups", 1)), grid_sizes(kernel, None)
    gain = padding_gain(layer) if kernel else 1.0
    if not isinstance(layer, KANLayer):
        return OperatorNorm(groups, sizes, gain)
    return KANNorm(groups, sizes, gain, layer.basis, layer.has_base, layer.input_scale)


def kan_lipschitz_bound(layer: nn.Module) -> Tensor:
    r"""Return an upper bound of the :math:`\ell_2` Lipschitz constant of a KAN layer, on all inputs.

    Column :math:`i` of the Jacobian of :math:`y = \sum_i w_i s(x_i) + C_i B(a_i x_i + b_i)` is
    :math:`w_i s'(x_i) + a_i C_i B'(t_i)`. A positive definite :math:`H` and an invertible :math:`M`, both of the size
    of the basis, give :math:`vv^T \preceq g^2 H^{-1}` for all :math:`v = M^{-1} B'(t)`, with
    :math:`g^2 = \max_t v^T H v`, so

    .. math:: L \le \sigma \|(w_i)_i\|_2 + g\, \|(a_i\, C_i M H^{-1/2})_i\|_2, \qquad \sigma = \max s' = 1.0998.

    Here :math:`M` spreads the slopes of the basis evenly, and :math:`H` is the root of the second moment of
    :math:`a_i C_i M` over all edges, which makes the bound follow the smoothness of the functions. It does not grow
    with the width. :math:`g` is a maximum over points whose convex hull holds the curve :math:`B'`, so nothing is
    missed between samples. The two norms are then joined in one matrix, which is tighter than their sum. For
    convolutions the norms are those of :func:`conv_norm_bound`, for every image size; paddings that repeat elements
    multiply the bound by the norm of the repetition.

    For a basis that `slope_hull` does not know, ``slope_coefficients`` and ``slope_gain`` of the basis take the place
    of :math:`M H^{-1/2}` and :math:`g`.

    Args:
        layer: ``KANLinear``, ``KANConv1d/2d/3d`` or ``KANActivation``.

    Returns:
        Scalar tensor, differentiable (once) with respect to the layer's weight.

    Raises:
        TypeError: if ``layer`` is of another kind.

    Example:
        >>> import torch
        >>> from monai_deqkan.networks.layers import KANLinear
        >>> layer = KANLinear(4, 4)
        >>> x, y = torch.randn(2, 100, 4)
        >>> stretch = (layer(x) - layer(y)).norm(dim=1) / (x - y).norm(dim=1)
        >>> bool(stretch.max() <= kan_lipschitz_bound(layer))
        True
    """
    if isinstance(layer, KANActivation):
        layer = layer.functions
    norm = operator_norm(layer)
    if not isinstance(norm, KANNorm):
        raise TypeError(f"`layer` must be KANLinear, KANConv or KANActivation; got {type(layer).__name__}.")
    weight = check_tensor("layer.weight", layer.weight)
    return norm.at(weight, norm.find_peak(weight))
