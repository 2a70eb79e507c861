"""What all KAN layers share: features, one packed weight, initialization, and a gradient that recomputes features."""

# No postponed annotations here: torch.jit.script cannot read them on methods that it leaves out.

import functools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from monai_deqkan._checks import check_choice, check_finite, check_shape
from monai_deqkan.networks.layers.basis import Basis

__all__ = ["Contraction", "FeatureMap", "KANLayer"]


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """What a layer computes from its input before it contracts: the base term if there is one, then the basis.

    Args:
        basis: the functions.
        has_base: whether feature 0 is SiLU.
        offsets: one number per basis function that is subtracted from it, or nothing.
        scale: what the basis sees is ``scale * x + shift``; shape ``(G, C)`` for ``G`` groups, ``None`` for 1.
        shift: likewise, ``None`` for 0; both or none.
    """

    basis: Basis
    has_base: bool
    offsets: tuple[float, ...] = ()
    scale: Tensor | None = None
    shift: Tensor | None = None

    def fill(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the features of ``x`` ``(N, C, *)`` as ``(N, F, C, *)`` in ``dtype``, outside of autograd."""
        base = int(self.has_base)
        features = x.new_empty((x.shape[0], base + self.basis.num_basis, *x.shape[1:]), dtype=dtype)
        if base:
            features[:, 0].copy_(F.silu(x))
        self.basis.fill(_flat(self.mapped(x)), features[:, base:].flatten(2))
        for k, offset in enumerate(self.offsets):
            if offset != 0.0:
                features[:, base + k].sub_(offset)
        return features

    def pull_back(self, x: Tensor, grad: Tensor) -> Tensor:
        """Turn the gradient with respect to the features into the one with respect to ``x``."""
        base = int(self.has_base)
        result = self.basis.pull_back(_flat(self.mapped(x)), grad[:, base:].flatten(2)).view(x.shape)
        if self.scale is not None:
            result = _per_channel(result, self.scale)
        if base:
            result += torch.ops.aten.silu_backward(grad[:, 0].to(x.dtype), x)
        return result

    def plain(self, x: Tensor) -> Tensor:
        """Return the features by differentiable operations."""
        values = self.basis.values(self.mapped(x), dim=1).to(x.dtype)
        if self.offsets:
            shape = (1, -1, *[1] * (x.dim() - 1))
            values = values - torch.tensor(self.offsets, dtype=x.dtype, device=x.device).view(shape)
        return torch.cat((F.silu(x).unsqueeze(1), values), dim=1) if self.has_base else values

    def mapped(self, x: Tensor) -> Tensor:
        """Return what the basis sees; for half precision in float32."""
        return x if self.scale is None else _per_channel(x, self.scale, self.shift)


def _per_channel(x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    """Map ``x`` ``(B * G, C, *)`` by numbers of shape ``(G, C)``."""
    groups = scale.shape[0]
    shape = (*scale.shape, *[1] * (x.dim() - 2))
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    y = wide.unflatten(0, (x.shape[0] // groups, groups)) * scale.to(wide.dtype).view(shape)
    if shift is not None:
        y = y + shift.to(wide.dtype).view(shape)
    return y.flatten(0, 1)


def _flat(x: Tensor) -> Tensor:
    return x.contiguous().view(x.shape[0], math.prod(x.shape[1:]))


class Contraction(ABC):
    """The linear map from features ``(N, F, C, *)`` to the output, with the packed weight; immutable."""

    @abstractmethod
    def forward(self, features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Contract."""

    @abstractmethod
    def grad_weight(self, features: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient with respect to ``weight``; its values are not used."""

    @abstractmethod
    def grad_features(self, shape: torch.Size, weight: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient with respect to features of the given shape."""

    @abstractmethod
    def grad_bias(self, grad: Tensor) -> Tensor:
        """Return the gradient with respect to the bias."""


class _Recomputed(torch.autograd.Function):
    """Features and contraction as one node that keeps the input, not the features: an F-th of the memory."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        features: FeatureMap,
        contraction: Contraction,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.parts = features, contraction, dtype
        with torch.autocast(x.device.type, enabled=False):
            return contraction.forward(features.fill(x, dtype), weight.to(dtype), _cast(bias, dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight, bias = ctx.saved_tensors
        features, contraction, dtype = ctx.parts
        needs = ctx.needs_input_grad[:3]
        result: list[Tensor | None] = [None, None, None]
        with torch.autocast(x.device.type, enabled=False):
            if torch.is_grad_enabled():  # somebody will differentiate this gradient
                plain = contraction.forward(features.plain(x).to(dtype), weight.to(dtype), _cast(bias, dtype))
                wanted = [t for t, need in zip((x, weight, bias), needs, strict=True) if need]
                found = iter(torch.autograd.grad(plain, wanted, grad, create_graph=True))
                return (*(next(found) if need else None for need in needs), None, None, None)
            grad = grad.to(dtype)
            shape = torch.Size((x.shape[0], features.basis.num_basis + int(features.has_base), *x.shape[1:]))
            if needs[1]:
                result[1] = contraction.grad_weight(features.fill(x, dtype), weight.to(dtype), grad).to(weight.dtype)
            if needs[0]:
                result[0] = features.pull_back(x, contraction.grad_features(shape, weight.to(dtype), grad)).to(x.dtype)
            if needs[2]:
                result[2] = contraction.grad_bias(grad).to(bias.dtype)
        return (*result, None, None, None)


def _cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)


def _recomputed(
    x: Tensor, weight: Tensor, bias: Tensor | None, features: FeatureMap, contraction: Contraction, dtype: torch.dtype
) -> Tensor:
    """Apply the node; a tensor subclass such as MONAI's MetaTensor keeps its class and metadata."""
    if has_torch_function((x, weight)):
        return handle_torch_function(_recomputed, (x, weight), x, weight, bias, features, contraction, dtype)
    return _Recomputed.apply(x, weight, bias, features, contraction, dtype)


class KANLayer(nn.Module):
    r"""Base class of the layers whose every weight is a function of one variable.

    A subclass makes ``weight`` of shape ``(out, F * in, *kernel)`` with the :math:`F` features in the outer place:
    SiLU first, if there is a base term, then the :math:`K` functions of the basis. It computes by `_contract` where
    operations must be ordinary ones, and by `_evaluate` elsewhere.

    Args:
        basis: the functions.
        base_activation: ``"silu"`` or ``None`` for no base term.
        init: how `reset_parameters` draws: ``"variance"``, ``"identity"`` or ``"zero_spline"``.

    Attributes:
        basis: the functions, a settings object.
        base_activation: name of the base term's function, or ``None``.
        input_scale: buffer of shape ``(in,)``, or ``None`` for ones: the basis sees
            ``input_scale * x + input_shift``, the base term sees ``x``. Set both by `set_input_map`.
        input_shift: buffer of shape ``(in,)``, or ``None`` for zeros.

    Raises:
        ValueError: if ``base_activation`` or ``init`` is unknown, or they do not go together.
    """

    weight: Tensor
    bias: Tensor | None
    input_scale: Tensor | None
    input_shift: Tensor | None
    groups: int = 1
    __jit_unused_properties__: ClassVar[list[str]] = ["num_features", "coefficients", "base_weight"]

    def __init__(self, basis: Basis, base_activation: str | None, init: str = "variance") -> None:
        super().__init__()
        self.base_activation = check_choice("base_activation", base_activation, ("silu", None))
        self.init = check_choice("init", init, ("variance", "identity", "zero_spline"))
        if init == "zero_spline" and base_activation is None:
            raise ValueError("`init='zero_spline'` needs a base term; got base_activation=None. Choose another `init`.")
        self.basis = basis
        self.basis_values = basis.module()
        self.has_base = base_activation is not None
        self.register_buffer("input_scale", None)
        self.register_buffer("input_shift", None)

    @property
    def num_features(self) -> int:
        """Number of features per input channel: ``num_basis``, and one more with a base term."""
        return self.basis.num_basis + int(self.has_base)

    @property
    def coefficients(self) -> Tensor:
        """Coefficients of the basis, a view of ``weight`` of shape ``(out, K, in, *kernel)``."""
        return self._unpacked()[:, int(self.has_base) :]

    @property
    def base_weight(self) -> Tensor | None:
        """Weights of the base term, a view of ``weight`` of shape ``(out, in, *kernel)``; ``None`` without one."""
        return self._unpacked()[:, 0] if self.has_base else None

    def _unpacked(self) -> Tensor:
        weight = self.weight
        return weight.unflatten(1, (self.num_features, weight.shape[1] // self.num_features))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        r"""Draw new weights as ``init`` says; zero the bias. An input map stays, and the basis sees what it gives.

        ``"variance"``: with independent weights of mean zero the output has mean square 1 for inputs from
        :math:`N(0, 1)`, :math:`n\,(\sigma_b^2\, E[\mathrm{silu}^2] + \sigma_c^2 \sum_k E[B_k^2]) = 1` with :math:`n`
        inputs times kernel elements. The shares of base term and basis follow from the same for the gradient, with
        :math:`\mathrm{silu}'` and :math:`B_k'`. Where no shares do that (fine grids, high degrees, no base term), the
        basis gets one half, or all, and its coefficients are drawn correlated, with covariance
        :math:`(1 + \lambda D)^{-1}`, :math:`D_{kl} = E[B_k' B_l']`, for smoother functions, or with
        :math:`E[B_k B_l]` in its place for steeper ones, such that the gradient's mean square is kept again.
        All expectations are computed numerically; where hardly any of :math:`N(0, 1)` lies on the grid, inputs are
        taken as uniform on it. The gradient is kept up to fan-out over fan-in, which cancels over a network.

        ``"identity"``: each output is its matching input, at the kernel's center for a convolution, as well as the
        basis can give it on the grid; the base weights are zero, and all other functions are a hundredth of
        ``"variance"``. ``"zero_spline"``: coefficients are zero, and the base term alone keeps the mean square.

        Note:
            Mean squares over 10 ``KANLinear(64, 64)`` from :math:`N(0, 1)`, output / gradient at the input, mean of 5
            seeds (printed by ``pytest -s tests/networks/layers/test_kan_layer.py -k depth_of``): 0.93 / 0.88,
            without a base term 0.92 / 0.97; ``"chebyshev"`` 0.86 / 1.08 and 1.06 / 0.71, ``"fourier"`` 0.97 / 0.82 and
            1.14 / 0.84, ``"gaussian"`` 0.90 / 1.37 and 0.82 / 0.96, ``"mexican_hat"`` 0.93 / 0.95 and 0.84 / 1.13.
            Steeper bases scatter more about 1.
        """
        draw = _variance_draw(self.basis, self.has_base)
        unit = 1.0 / math.sqrt(self._unpacked()[0, 0].numel())
        if self.init == "zero_spline":
            self.coefficients.zero_()
        else:
            small = 0.01 if self.init == "identity" else 1.0
            coefficients = self.coefficients
            noise = torch.empty_like(coefficients).normal_(std=small * unit)
            coefficients.copy_(torch.einsum("kl,ol...->ok...", draw.coefficients.to(noise), noise))
        if self.base_weight is not None:
            std = {"variance": draw.base, "identity": 0.0, "zero_spline": draw.base_alone}[self.init]
            self.base_weight.normal_(std=std * unit)
        if self.init == "identity":
            self._write_identity()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _write_identity(self) -> None:
        coefficients = self.coefficients
        out, inputs = coefficients.shape[0] // self.groups, coefficients.shape[2]
        t = torch.linspace(*self.basis.grid_range, 401, dtype=torch.float64, device="cpu")
        targets = t[:, None].expand(-1, self.groups * inputs)
        if self.input_scale is not None and self.input_shift is not None:
            targets = (targets - self.input_shift.double().cpu()) / self.input_scale.double().cpu()
        columns = self.basis.fit(t, targets).to(coefficients)  # (K, in)
        center: tuple[Any, ...] = (slice(None), *((size - 1) // 2 for size in coefficients.shape[3:]))
        for group in range(self.groups):
            for j in range(min(out, inputs)):
                coefficients[group * out + j, :, j][center] = columns[:, group * inputs + j]

    def edge_functions(self, points: Tensor) -> Tensor:
        """Evaluate the learned function on each edge, bias left out, for plots and analysis.

        Args:
            points: inputs, shape ``(P,)``.

        Returns:
            Shape ``(P, out, in)`` for a linear layer, ``(P, out, in / groups, *kernel)`` for a convolution.

        Raises:
            ValueError: if ``points`` has not one axis.
        """
        if points.dim() != 1:
            raise ValueError(f"`points` must have shape (P,); got {tuple(points.shape)}. Flatten it.")
        weight = self._unpacked()
        if self.input_scale is None:
            features = FeatureMap(self.basis, self.has_base).plain(points[:, None])[..., 0]  # (P, F)
            return torch.tensordot(features, weight, dims=([1], [1]))
        x = points[:, None, None].expand(-1, self.groups, weight.shape[2])
        features = self._feature_map().plain(x.flatten(0, 1))
        features = features.view(len(points), self.groups, self.num_features, weight.shape[2])
        grouped = weight.unflatten(0, (self.groups, weight.shape[0] // self.groups))
        return torch.einsum("pgfi,gofi...->pgoi...", features, grouped).flatten(1, 2)

    @torch.no_grad()
    def set_input_map(self, scale: Tensor | None, shift: Tensor | None) -> None:
        r"""Set the affine map :math:`t_i = s_i x_i + b_i` between the input and the basis; the base term is not mapped.

        Args:
            scale: :math:`s`, nonzero, shape ``(in,)``: all input channels in their order; ``None`` for no map.
            shift: :math:`b`, of that shape; ``None`` exactly where ``scale`` is.

        Raises:
            ValueError: if a shape or value is wrong, or only one is given.
            TypeError: if one is no tensor.
        """
        if scale is None and shift is None:
            self.input_scale = self.input_shift = None
            return
        if scale is None or shift is None:
            raise ValueError(
                "`scale` and `shift` must both be tensors or both None; got one of them. Give ones or zeros."
            )
        inputs = self.groups * self._unpacked().shape[2]
        for name, value in (("scale", scale), ("shift", shift)):
            check_shape(name, value, (inputs,), "Give one number per input channel.")
            check_finite(name, value)
        weight = self.weight
        new_scale, new_shift = (value.detach().clone().to(weight) for value in (scale, shift))
        if not bool((new_scale != 0).all() & new_scale.isfinite().all() & new_shift.isfinite().all()):
            raise ValueError(
                f"`scale` must be nonzero and, like `shift`, finite in {weight.dtype}; got {scale.tolist()}. "
                "Use a scale of 1 for constant channels."
            )
        self.input_scale, self.input_shift = new_scale, new_shift

    @torch.no_grad()
    def set_basis(self, basis: Basis, coefficients: Tensor) -> None:
        """Exchange the basis and its coefficients in place; base weights, bias and input map stay.

        ``weight`` stays the same parameter object, so an optimizer keeps it; where its shape changes its gradient is
        dropped, and the optimizer's state for it must be dropped by the caller.

        Args:
            basis: the new functions.
            coefficients: their coefficients, shape ``(out, basis.num_basis, in / groups, *kernel)``.

        Raises:
            TypeError: if ``basis`` or ``coefficients`` is of another kind.
            ValueError: if the shape does not fit, a value is not finite, or the weight is parametrized.
        """
        if not isinstance(basis, Basis):
            raise TypeError(f"`basis` must be a Basis; got {type(basis).__name__}.")
        if "weight" not in self._parameters:
            raise ValueError(
                "The basis of a layer whose weight is parametrized cannot be exchanged. Remove the parametrization "
                "(torch.nn.utils.parametrize.remove_parametrizations) first."
            )
        old = self._unpacked()
        check_shape("coefficients", coefficients, (old.shape[0], basis.num_basis, *old.shape[2:]))
        check_finite("coefficients", coefficients)
        weight = torch.cat((old[:, : int(self.has_base)], coefficients.to(old)), dim=1).flatten(1, 2)
        self._replace_basis(basis, weight)

    def _replace_basis(self, basis: Basis, weight: Tensor) -> None:
        parameter = self.weight
        if weight.shape != parameter.shape:
            parameter.grad = None
            # An old graph that is still alive, say of the last loss, holds the node that accumulates gradients of the
            # old shape, and new graphs would share it. A change of dtype, there and back, makes autograd forget it.
            parameter.data = weight.new_empty(
                0, dtype=torch.float32 if weight.dtype == torch.float64 else torch.float64
            )
        parameter.data = weight
        self.basis = basis
        self.basis_values = basis.module()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Make the buffers and the number of basis functions fit what is loaded."""
        names = ("input_scale", "input_shift")
        if any(prefix + name in state_dict for name in names):
            if self.input_scale is None:
                columns = self.groups * self._unpacked().shape[2]
                self.input_scale, self.input_shift = self.weight.new_ones(columns), self.weight.new_zeros(columns)
        elif any(key.startswith(prefix) for key in state_dict):
            self.input_scale = self.input_shift = None
        saved = state_dict.get(prefix + "weight")
        if isinstance(saved, Tensor) and "weight" in self._parameters:
            try:
                self._fit_basis_to(saved.shape)
            except (TypeError, ValueError) as error:
                error_msgs.append(f"{prefix}weight has another number of basis functions: {error}")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _fit_basis_to(self, shape: torch.Size) -> None:
        """Resize the basis so that a weight of this shape can be loaded; leave it where that alone would not do."""
        weight = self.weight
        columns = weight.shape[1] // self.num_features
        fits_else = len(shape) == weight.dim() and shape[0] == weight.shape[0] and shape[2:] == weight.shape[2:]
        if not fits_else or shape == weight.shape or shape[1] % columns:
            return
        num_basis = shape[1] // columns - int(self.has_base)
        self._replace_basis(self.basis.resized(num_basis), weight.new_empty(shape))

    def _plain_features(self, x: Tensor, t: Tensor) -> Tensor:
        """Return ``(N, F, C, *)`` from ``x`` and the mapped ``t`` ``(N, C, *)`` by operations that can be scripted."""
        values = self.basis_values(t)
        return torch.cat((F.silu(x).unsqueeze(1), values.to(x.dtype)), dim=1) if self.has_base else values.to(x.dtype)

    def _mapped(self, x: Tensor) -> Tensor:
        """Return what the basis sees of ``x`` ``(B, in, *)``, for half precision in float32; can be scripted."""
        scale, shift = self.input_scale, self.input_shift
        if scale is None or shift is None:
            return x
        if x.dtype == torch.float16 or x.dtype == torch.bfloat16:
            x = x.float()
        shape = [1, -1] + [1] * (x.dim() - 2)
        return x * scale.to(x.dtype).reshape(shape) + shift.to(x.dtype).reshape(shape)

    @torch.jit.unused
    def _feature_map(self, offsets: tuple[float, ...] = ()) -> FeatureMap:
        scale, shift = self.input_scale, self.input_shift
        if scale is None or shift is None:
            return FeatureMap(self.basis, self.has_base, offsets)
        return FeatureMap(self.basis, self.has_base, offsets, scale.view(self.groups, -1), shift.view(self.groups, -1))

    @torch.jit.unused
    def _must_be_plain(self) -> bool:
        if self.input_scale is not None and self.input_scale.requires_grad:
            return True
        return torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()

    def _evaluate(
        self, x: Tensor, bias: Tensor | None, contraction: Contraction, offsets: tuple[float, ...] = ()
    ) -> Tensor:
        """Compute the layer with features that are not kept for the gradient."""
        return _recomputed(x, self.weight, bias, self._feature_map(offsets), contraction, self._output_dtype(x))

    def _output_dtype(self, x: Tensor) -> torch.dtype:
        dtype = self.weight.dtype
        device_type = x.device.type
        if torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
            return torch.get_autocast_dtype(device_type)
        if x.dtype != dtype:
            raise TypeError(
                f"The input must have the weight's dtype {dtype}; got {x.dtype}. Convert one, or use autocast."
            )
        return dtype


@dataclass(frozen=True)
class _Draw:
    """What ``"variance"`` draws from, for one input.

    Args:
        base: standard deviation of the base weight.
        base_alone: the same where there is only a base term.
        coefficients: symmetric matrix ``(K, K)`` that independent normal numbers are multiplied by.
    """

    base: float
    base_alone: float
    coefficients: Tensor


@functools.lru_cache(maxsize=64)
def _variance_draw(basis: Basis, has_base: bool) -> _Draw:
    """Choose shares and covariance that keep the mean squares of outputs and gradients, see `reset_parameters`."""
    x = torch.linspace(-6.0, 6.0, 1201, dtype=torch.float64, device="cpu")
    density = torch.exp(-0.5 * x**2)
    density /= density.sum()
    sigmoid = torch.sigmoid(x)
    base = float((F.silu(x) ** 2 * density).sum())
    steepness = float(((sigmoid * (1 + x * (1 - sigmoid))) ** 2 * density).sum()) / base
    gram, slopes = _second_moments(basis, x, density)
    roughness = float(slopes.trace() / gram.trace())
    share, target = 1.0, 1.0
    if has_base and roughness < 1.0:
        share = (steepness - 1.0) / (steepness - roughness)
    elif has_base:
        share, target = 0.5, 2.0 - steepness
    root = torch.eye(basis.num_basis, dtype=torch.float64, device="cpu")
    if roughness > target:
        root = _damped(slopes, gram, slopes, target)
    elif not has_base:
        root = _damped(gram, gram, slopes, target)
    power = float((root @ gram @ root).trace())
    return _Draw(math.sqrt((1.0 - share) / base), math.sqrt(1.0 / base), root * math.sqrt(share / power))


def _second_moments(basis: Basis, x: Tensor, density: Tensor) -> tuple[Tensor, Tensor]:
    """Return E[B_k B_l] and E[B_k' B_l'] for N(0, 1) or, where these are too small, uniformly on the grid."""
    grid = torch.linspace(*basis.grid_range, 1201, dtype=torch.float64, device="cpu")
    on_grid = basis.values(grid)
    values = basis.values(x)
    if float((values**2 * density).sum()) <= 0.05 * float((on_grid**2).sum(0).mean()):
        x, values, density = grid, on_grid, torch.full_like(grid, 1.0 / len(grid))
    slopes = basis.derivative(x)
    return (values * density) @ values.t(), (slopes * density) @ slopes.t()


def _damped(matrix: Tensor, gram: Tensor, slopes: Tensor, target: float) -> Tensor:
    """Return (1 + lambda A)^(-1/2) whose functions have the target ratio of E[f'^2] to E[f^2], or the nearest.

    The matrix A is E[B_k' B_l'] where that ratio has to fall, E[B_k B_l] where it has to rise.
    """
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp(min=0.0)
    upper, lower = ((vectors.t() @ moments @ vectors).diagonal() for moments in (slopes, gram))
    wanted = float(upper.sum() / lower.sum()) > target
    low, high = -40.0, 40.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        shrink = 1.0 / (1.0 + math.exp(middle) * values)
        go_on = (float((upper * shrink).sum() / (lower * shrink).sum()) > target) == wanted
        low, high = (middle, high) if go_on else (low, middle)
    return (vectors * (1.0 / (1.0 + math.exp(high) * values)).sqrt()) @ vectors.t()
