"""What all KAN layers share: one packed weight, its initialization, an exchangeable basis, and an input map."""

# No postponed annotations here: torch.jit.script cannot read them on methods that it leaves out.

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monai_deqkan._checks import check_choice, check_finite, check_shape
from monai_deqkan.networks.layers.basis import Basis, needs_float32
from monai_deqkan.networks.layers.kan_features import Contraction, FeatureMap, contract_features
from monai_deqkan.networks.layers.kan_variance import variance_draw
from monai_deqkan.networks.layers.plain_weight import is_plain

__all__ = ["KANLayer", "check_weight_dtype"]


def check_weight_dtype(dtype: Any) -> None:
    """Check the ``dtype`` argument of a layer; ``None`` is the default one.

    Raises:
        TypeError: if it is no real floating-point dtype.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(
            f"`dtype` must be a real floating-point torch.dtype; got {dtype!r}. Give real and imaginary part of "
            "complex data as two channels."
        )


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
        draw = variance_draw(self.basis, self.has_base)
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
            ValueError: if a shape or value is wrong, only one is given, or `constrain_shape` does not allow a negative
                scale.
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
        for step in self._weight_steps():
            getattr(step, "check_input_scale", lambda scale: None)(new_scale)
        self.input_scale, self.input_shift = new_scale, new_shift

    def _weight_steps(self) -> list[nn.Module]:
        """Return the parametrizations of the weight."""
        steps: Any = getattr(self, "parametrizations", {})
        return list(steps["weight"]) if "weight" in steps else []

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

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Note beside the version what the shape of the packed weight does not tell."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            note = destination._metadata.setdefault(prefix[:-1], {})
            note["num_features"], note["has_base"] = self.num_features, self.has_base

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
        if isinstance(saved, Tensor) and is_plain(self):
            if local_metadata.get("has_base", self.has_base) != self.has_base:
                error_msgs.append(
                    f"{prefix}weight was saved {'without' if self.has_base else 'with'} a base term; this layer has "
                    f"{'one' if self.has_base else 'none'}. Build it with the `base_activation` of the saved one."
                )
            try:
                self._fit_basis_to(saved.shape, local_metadata.get("num_features"))
            except (TypeError, ValueError) as error:
                error_msgs.append(f"{prefix}weight has another number of basis functions: {error}")
        note = self._size_note(state_dict, prefix, local_metadata.get("num_features"))
        if note:
            error_msgs.append(note)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _size_note(self, state_dict: dict[str, Any], prefix: str, num_features: int | None) -> str:
        """Say what to do where a parametrized weight was saved with another number of basis functions."""
        key = prefix + "parametrizations.weight.original"
        saved, own = state_dict.get(key), getattr(getattr(self, "parametrizations", {}), "weight", None)
        if not isinstance(saved, Tensor) or own is None or saved.dim() != self.weight.dim():
            return ""
        columns = self.weight.shape[1] // self.num_features
        found = saved.shape[1] // columns if num_features is None else num_features
        if saved.shape[1] != found * columns or found == self.num_features:
            return ""
        num_basis = found - int(self.has_base)
        try:
            grid_size = getattr(self.basis.resized(num_basis), "grid_size", None)
        except (TypeError, ValueError):
            grid_size = None
        advice = "a layer with as many"
        if grid_size is not None:
            advice = f"one with grid_size={grid_size} (built so, or by extend_grid(layer, grid_size={grid_size}))"
        return (
            f"{key} was saved with {num_basis} basis functions; this layer has {self.basis.num_basis}, and a "
            f"parametrized weight cannot change its size. Load into {advice}, and prune, certify or "
            "quantize that first."
        )

    def _fit_basis_to(self, shape: torch.Size, num_features: int | None) -> None:
        """Resize the basis so that a weight of this shape can be loaded; leave it where that alone would not do.

        Where ``num_features`` of the saved layer are not known, those of other inputs can pass for more functions.
        """
        weight = self.weight
        columns = weight.shape[1] // self.num_features
        fits_else = len(shape) == weight.dim() and shape[0] == weight.shape[0] and shape[2:] == weight.shape[2:]
        if not fits_else or shape == weight.shape or shape[1] % columns:
            return
        if num_features is not None and shape[1] != num_features * columns:
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
        if needs_float32(x):
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
        return contract_features(x, self.weight, bias, self._feature_map(offsets), contraction, self._output_dtype(x))

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
