"""Weights with a certified Lipschitz constant, and weights held fixed during a solve."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm

from monai_deqkan._checks import check_range
from monai_deqkan.networks.layers.kan_norm import KANNorm, operator_norm
from monai_deqkan.networks.layers.operator_norm import OperatorNorm, Peak
from monai_deqkan.networks.layers.plain_weight import make_weight_plain

__all__ = [
    "CertifiedSpectralNorm",
    "certified_spectral_norm",
    "frozen_weights",
    "normalize_lipschitz_",
    "remove_spectral_norm",
]

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class CertifiedSpectralNorm(nn.Module):
    r"""Scale the weight of a layer to a certified Lipschitz constant: ``bound * weight / L(weight)``.

    Register it by :func:`certified_spectral_norm`. A weight of zeros stays zero. The search for :math:`L` is repeated
    only when the weight, or the basis or input map of a KAN layer, has changed: these are read from the layer each
    time. Without gradients an unchanged weight then costs one comparison and one scaling.

    Args:
        layer: ``nn.Linear``, ``nn.Conv1d/2d/3d``, ``KANLinear`` or ``KANConv1d/2d/3d`` whose weight will be given.
        bound: largest Lipschitz constant, dimensionless, positive. The true one lies below by the slack of
            :func:`linear_norm_bound`, :func:`conv_norm_bound` or :func:`kan_lipschitz_bound`, and of the padding.

    Raises:
        TypeError: if ``layer`` is of another kind.
        ValueError: if ``bound`` is not positive.
    """

    def __init__(self, layer: nn.Module, bound: float = 1.0) -> None:
        super().__init__()
        self.bound = _check_bound(bound)
        operator_norm(layer)
        self._layer = (layer,)  # in a tuple, so that it is no submodule
        self._memo: tuple[Tensor, OperatorNorm, Tensor | None, Peak] | None = None

    def forward(self, weight: Tensor) -> Tensor:
        """Return ``bound * weight / L(weight)``, with the shape and dtype of ``weight``."""
        norm = operator_norm(self._layer[0])
        peak = self._find_peak(norm, weight)
        if peak.bound == 0:
            return weight * self.bound
        if torch.is_grad_enabled() and weight.requires_grad:
            return weight * (self.bound / norm.at(weight, peak))
        return weight * (self.bound / peak.bound)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Take an assigned weight as it is; the norm is applied on reading."""
        return weight

    def extra_repr(self) -> str:
        """Show the bound."""
        return f"bound={self.bound:g}"

    def _find_peak(self, norm: OperatorNorm, weight: Tensor) -> Peak:
        # Copies, not the tensors' version counters: assignments through `.data` do not count.
        scale = norm.input_scale if isinstance(norm, KANNorm) else None
        if self._memo is not None:
            known, known_norm, known_scale, peak = self._memo
            if known_norm == norm and _equal(known, weight) and _equal(known_scale, scale):
                return peak
        with torch.no_grad():  # activation checkpointing must find the same graph whether the search is repeated or not
            peak = norm.find_peak(weight)
        self._memo = (weight.detach().clone(), norm, None if scale is None else scale.clone(), peak)
        return peak


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def _check_bound(bound: float) -> float:
    return check_range("bound", bound, 0, math.inf, open_low=True, open_high=True)


def certified_spectral_norm(module: ModuleT, bound: float = 1.0) -> ModuleT:
    r"""Keep the Lipschitz constant of a layer at or below ``bound``, whatever its trainable weight.

    The layer's ``weight`` becomes ``bound * weight / L(weight)`` with the certified norm :math:`L` of
    :func:`linear_norm_bound`, :func:`conv_norm_bound` or :func:`kan_lipschitz_bound`; the trainable tensor is
    ``module.parametrizations.weight.original``. The bias stays free, as it has no influence. Strided convolutions
    keep the bound of the unstrided one; padding that repeats elements ("reflect", "replicate", wide "circular") is
    counted with the norm of the repetition, for every image size. The basis and input map of a KAN layer may change
    afterwards: the bound follows.

    Args:
        module: ``nn.Linear``, ``nn.Conv1d/2d/3d``, ``KANLinear`` or ``KANConv1d/2d/3d``; changed in place.
        bound: largest Lipschitz constant, dimensionless, positive.

    Returns:
        ``module``.

    Raises:
        TypeError: if ``module`` is of another kind.
        ValueError: if it has a certified norm already, or ``bound`` is not positive.

    Example:
        >>> layer = certified_spectral_norm(nn.Linear(3, 2), bound=0.5)
        >>> f"{float(torch.linalg.matrix_norm(layer.weight.detach(), ord=2)):.4f}"
        '0.5000'
    """
    if _has_norm(module, CertifiedSpectralNorm):
        raise ValueError("The layer has a certified norm already. Call `remove_spectral_norm` on it first.")
    parametrize.register_parametrization(module, "weight", CertifiedSpectralNorm(module, bound))
    return module


def keeps_certified_norm(module: nn.Module) -> bool:
    """Return whether the certified norm is the last thing that happens to a layer's weight: then its bound holds."""
    steps = getattr(module, "parametrizations", {})
    return "weight" in steps and isinstance(steps["weight"][-1], CertifiedSpectralNorm)


@torch.no_grad()
def normalize_lipschitz_(module: ModuleT, bound: float = 1.0) -> ModuleT:
    """Scale the weight of a layer once, in place, so that its certified Lipschitz constant is ``bound``.

    Later changes of the weight are free; :func:`certified_spectral_norm` keeps the bound during training.

    Args:
        module: ``nn.Linear``, ``nn.Conv1d/2d/3d``, ``KANLinear`` or ``KANConv1d/2d/3d`` with a plain weight.
        bound: Lipschitz constant afterwards, dimensionless, positive. A weight of zeros stays zero.

    Returns:
        ``module``.

    Raises:
        TypeError: if ``module`` is of another kind.
        ValueError: if its weight is parametrized or not finite, or ``bound`` is not positive.

    Example:
        >>> layer = normalize_lipschitz_(nn.Linear(3, 2), bound=0.5)
        >>> f"{float(torch.linalg.matrix_norm(layer.weight.detach(), ord=2)):.4f}"
        '0.5000'
    """
    _check_bound(bound)
    norm = operator_norm(module)
    if parametrize.is_parametrized(module, "weight"):
        raise ValueError("`normalize_lipschitz_` needs a plain weight; it is parametrized. Remove that first.")
    weight = module.weight
    if not isinstance(weight, Tensor) or not bool(torch.isfinite(weight).all()):
        raise ValueError("`module.weight` must be finite to be normalized; got NaN or infinity. Initialize it anew.")
    found = norm.find_peak(weight).bound
    if found > 0:
        weight.mul_(bound / found)
    return module


def remove_spectral_norm(module: ModuleT) -> ModuleT:
    """Store the normalized weights as plain parameters in a layer or in all layers of a network, in place.

    The outputs stay the same, those of evaluation where torch's own spectral norm is removed. Needed before export,
    scripting and pickling. Other parametrizations of the same weights are stored along with it.

    Args:
        module: layer or network; parts without a certified norm or torch's
            ``torch.nn.utils.parametrizations.spectral_norm`` stay as they are.

    Returns:
        ``module``.
    """
    for part in module.modules():
        if _has_norm(part, (CertifiedSpectralNorm, _SpectralNorm)):
            cast(nn.ModuleDict, part.parametrizations).eval()  # in training torch's iterates once more
            make_weight_plain(part)
    return module


_FROZEN: ContextVar[Mapping[int, Tensor]] = ContextVar("frozen_weights", default={})  # noqa: B039 (never written to)


class _FreezableParametrizationList(parametrize.ParametrizationList):
    """A list of parametrizations that looks for a frozen value before it computes one."""

    def forward(self) -> Tensor:
        frozen = _FROZEN.get().get(id(self))
        return super().forward() if frozen is None else frozen


@contextmanager
def frozen_weights(module: nn.Module) -> Iterator[None]:
    """Compute every parametrized weight of a module once and use these very tensors within the ``with`` block.

    A solver may then evaluate the module many times without gradients and, at the end, once with gradients, all with
    the same weights: they are computed on entry, in the grad mode that holds there. Also right for parametrizations
    that change with every reading, such as torch's spectral norm in training. Changes of the trainable tensors show
    after the block.

    Nested blocks reuse the outer weights, unless these were computed without gradients and gradients are wanted now.
    The block holds for the thread (or asynchronous task) that entered it and for these modules, not for copies.

    Args:
        module: module whose own and descendants' parametrized tensors of any kind are frozen.

    Yields:
        Nothing.

    Example:
        >>> layer = certified_spectral_norm(nn.Linear(3, 2))
        >>> with frozen_weights(layer):
        ...     layer.weight is layer.weight
        True
    """
    outer = _FROZEN.get()
    frozen = dict(outer)
    for part in module.modules():
        if not isinstance(part, parametrize.ParametrizationList):
            continue
        # `torch.nn.utils.parametrize.cached` would do it with one cache for all modules and threads.
        if type(part) is parametrize.ParametrizationList:
            part.__class__ = _FreezableParametrizationList
        known = frozen.pop(id(part), None)
        wants_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in part.parameters())
        if known is None or (wants_gradient and not known.requires_grad):
            known = parametrize.ParametrizationList.forward(part)
        frozen[id(part)] = known
    token = _FROZEN.set(frozen)
    try:
        yield
    finally:
        _FROZEN.reset(token)


def _has_norm(module: nn.Module, kinds: type[nn.Module] | tuple[type[nn.Module], ...]) -> bool:
    lists = getattr(module, "parametrizations", {})
    return "weight" in lists and any(isinstance(norm, kinds) for norm in lists["weight"])
