"""KAN layers whose functions are monotone or convex, whatever their trainable weights."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from monai_deqkan._checks import check_choice
from monai_deqkan.networks.layers.bspline import BSplineBasis
from monai_deqkan.networks.layers.kan_layer import KANLayer

__all__ = ["ShapeConstraint", "constrain_shape"]

LayerT = TypeVar("LayerT", bound=KANLayer)

# Each shape is a plain one, possibly turned upside down and run backwards.
_SHAPES = {
    "increasing": ("increasing", False, False),
    "decreasing": ("increasing", True, False),
    "convex": ("convex", False, False),
    "concave": ("convex", True, False),
    "increasing_convex": ("increasing_convex", False, False),
    "decreasing_concave": ("increasing_convex", True, False),
    "decreasing_convex": ("increasing_convex", False, True),
    "increasing_concave": ("increasing_convex", True, True),
}
_TINY = 1e-12  # stands for zero where the sign decides in which direction the absolute value has a gradient


class ShapeConstraint(nn.Module):
    r"""Parametrization of a packed KAN weight whose functions all have one shape; registered by `constrain_shape`.

    The trainable numbers are a function's first control point and its differences, first ones for monotone and second
    ones for convex functions; those that must not be negative enter by their absolute value, which, unlike a
    softplus, reaches zero and keeps its gradient there.

    Args:
        shape: see :func:`constrain_shape`.
        num_basis: number of control points of each function.
    """

    def __init__(self, shape: str, num_basis: int) -> None:
        super().__init__()
        self.shape = shape
        self.num_basis = num_basis
        self.kind, self._negated, self._reversed = _SHAPES[check_choice("shape", shape, _SHAPES)]
        self._num_free = {"increasing": 1, "convex": 2, "increasing_convex": 1}[self.kind]

    def forward(self, numbers: Tensor) -> Tensor:
        """Return the weight: sums of the differences, shape ``(out, K * in, *kernel)`` as the numbers."""
        rows = numbers.unflatten(1, (self.num_basis, -1))
        free, bound = rows[:, : self._num_free], rows[:, self._num_free :].abs()
        differences = torch.cat((free, bound), dim=1)
        if self.kind != "increasing":
            slopes = differences[:, 1:].cumsum(dim=1)
            differences = torch.cat((differences[:, :1], slopes), dim=1)
        return self._turned(differences.cumsum(dim=1)).flatten(1, 2)

    @torch.no_grad()
    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return numbers that give ``weight`` again where it has the shape.

        Elsewhere differences of the wrong sign become zero, and the mean of the function's control points stays.
        """
        control = self._turned(weight.unflatten(1, (self.num_basis, -1)))
        differences = control.diff(dim=1)
        if self.kind != "increasing":
            differences = torch.cat((differences[:, :1], differences.diff(dim=1)), dim=1)
        kept = self._num_free - 1
        bound = differences[:, kept:].clamp(min=_TINY)
        numbers = torch.cat((control[:, :1], differences[:, :kept], bound), dim=1)
        new = self._turned(self.forward(numbers.flatten(1, 2)).unflatten(1, (self.num_basis, -1)))
        numbers[:, 0] += control.mean(dim=1) - new.mean(dim=1)
        return numbers.flatten(1, 2)

    def check_input_scale(self, scale: Tensor) -> None:
        """Refuse an input map that turns the shape round; layers call it.

        Raises:
            ValueError: if a scale is negative and the shape has a direction.
        """
        if self.kind != "convex" and not bool((scale > 0).all()):
            raise ValueError(
                f"{self.shape!r} functions need an input map with positive scales; the smallest is "
                f"{scale.min().item():g}. Map with positive scales."
            )

    def _turned(self, control: Tensor) -> Tensor:
        control = control.flip(1) if self._reversed else control
        return -control if self._negated else control

    def extra_repr(self) -> str:
        """Show the shape."""
        return f"shape={self.shape!r}"


def constrain_shape(layer: LayerT, shape: str) -> LayerT:
    r"""Keep all functions of a layer monotone, convex, or both, in training too.

    A B-spline's derivative has the control points :math:`(c_k - c_{k-1}) / h` in the splines of one order less, which
    are not negative: control points that do not decrease give a function that does not, and control points with
    second differences of at least zero give a convex one. (The converse holds for orders 1 and 2 only: a few monotone
    functions of higher order are left out.) The layer's ``weight`` is computed from differences of the right sign; the
    trainable tensor is ``layer.parametrizations.weight.original``. A sum of monotone (convex) functions is monotone
    (convex), so the layer's output has that shape in each input. ``torch.nn.utils.parametrize.remove_parametrizations(
    layer, "weight")`` stores the present weight and ends the constraint.

    The layer's weight is kept where it has the shape already; elsewhere differences of the wrong sign become zero.
    Directions are those of the layer's input. The scales of its input map must be positive unless the shape is
    ``"convex"`` or ``"concave"``; ``layer.set_input_map`` refuses others.

    Args:
        layer: KAN layer with B-splines and without base term, as SiLU is neither monotone nor convex; changed in
            place. Its basis must go on beyond the grid in that shape: ``outside="clamp"`` or ``"linear"`` for
            monotone functions, ``outside="linear"`` for convex and concave ones.
        shape: ``"increasing"``, ``"decreasing"`` (both: or constant), ``"convex"``, ``"concave"``, or
            ``"increasing_convex"``, ``"increasing_concave"``, ``"decreasing_convex"``, ``"decreasing_concave"``.

    Returns:
        ``layer``.

    Raises:
        TypeError: if ``layer`` is no KAN layer, or its basis is no B-spline.
        ValueError: if ``shape`` is unknown, or the layer has a base term, another continuation, a parametrized weight
            or a negative scale.

    Example:
        >>> from monai_deqkan.networks.layers import KANLinear
        >>> layer = constrain_shape(KANLinear(1, 1, base_activation=None, outside="clamp"), "increasing")
        >>> x = torch.linspace(-9, 9, 50)[:, None]
        >>> bool((layer(x).diff(dim=0) >= -1e-6).all())
        True

    Reference:
        C. de Boor, "A Practical Guide to Splines", Springer 1978, chapter X, on the derivative of a B-spline sum.
    """
    kind = _SHAPES[check_choice("shape", shape, _SHAPES)][0]
    if not isinstance(layer, KANLayer):
        raise TypeError(f"`layer` must be a KAN layer such as KANLinear; got {type(layer).__name__}.")
    if not isinstance(layer.basis, BSplineBasis):
        raise TypeError(f"The basis of `layer` must be a BSplineBasis; got {type(layer.basis).__name__}.")
    if layer.has_base:
        raise ValueError(
            "`layer` must have no base term, as SiLU is neither monotone nor convex; got base_activation="
            f"{layer.base_activation!r}. Build it with base_activation=None."
        )
    wanted = ("clamp", "linear") if kind == "increasing" else ("linear",)
    if layer.basis.outside not in wanted:
        raise ValueError(
            f"{shape!r} functions must go on beyond the grid with outside={' or '.join(map(repr, wanted))}; "
            f"got {layer.basis.outside!r}. Build the layer with it."
        )
    if parametrize.is_parametrized(layer, "weight"):
        raise ValueError("The weight of `layer` is parametrized already. Constrain its shape first, then the rest.")
    constraint = ShapeConstraint(shape, layer.basis.num_basis)
    if layer.input_scale is not None:
        constraint.check_input_scale(layer.input_scale)
    parametrize.register_parametrization(layer, "weight", constraint)
    return layer
