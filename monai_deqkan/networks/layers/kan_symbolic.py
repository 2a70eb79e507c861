"""Formulas for learned functions: which common function a curve looks like."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_deqkan._checks import check_finite, check_int, check_range, check_shape
from monai_deqkan.networks.layers.kan_channels import input_channels
from monai_deqkan.networks.layers.kan_importance import KANEdge, edge_values
from monai_deqkan.networks.layers.kan_layer import KANLayer

__all__ = ["SymbolicFit", "suggest_edge_symbolic", "suggest_symbolic"]

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "constant": torch.zeros_like,
    "x": lambda t: t,
    "x^2": torch.square,
    "x^3": lambda t: t**3,
    "|x|": torch.abs,
    "relu": F.relu,
    "step": lambda t: (t > 0).to(t.dtype),
    "1/x": torch.reciprocal,
    "sqrt": torch.sqrt,
    "log": torch.log,
    "exp": torch.exp,
    "tanh": torch.tanh,
    "gaussian": lambda t: torch.exp(-(t**2)),
    "silu": F.silu,
    "sin": torch.sin,
    "cos": torch.cos,
}


@dataclass(frozen=True)
class _Family:
    """Where to look for one function: arguments ``b (u - c)`` with the inputs ``u`` in ``[-1, 1]``."""

    name: str
    complexity: int
    scales: tuple[float, float, int] = (1.0, 1.0, 1)  # |b|: first, last, count; spaced by their logarithm
    places: tuple[float, float, int] = (0.0, 0.0, 1)  # c; for `beyond` the logarithm of its distance from the inputs
    both_signs: bool = False
    beyond: bool = False  # the argument must be positive for all inputs
    degree: float | None = None  # f(s t) = s^degree f(t), so that b can be made 1 or -1


_BEYOND = (math.log(1e-3), math.log(10.0), 25)
_FAMILIES = (
    _Family("x", 1),
    _Family("x^2", 2, places=(-3.0, 3.0, 49), degree=2),
    _Family("x^3", 3, places=(-3.0, 3.0, 49), degree=3),
    _Family("|x|", 2, places=(-1.0, 1.0, 65), degree=1),
    _Family("relu", 2, places=(-1.0, 1.0, 65), both_signs=True, degree=1),
    _Family("step", 2, places=(-1.0, 1.0, 129), degree=0),
    _Family("1/x", 2, places=_BEYOND, both_signs=True, beyond=True, degree=-1),
    _Family("sqrt", 2, places=_BEYOND, both_signs=True, beyond=True, degree=0.5),
    _Family("log", 2, places=_BEYOND, both_signs=True, beyond=True),
    _Family("exp", 2, scales=(0.2, 8.0, 33), both_signs=True),
    _Family("tanh", 3, scales=(0.3, 30.0, 25), places=(-1.5, 1.5, 25)),
    _Family("gaussian", 3, scales=(0.3, 12.0, 25), places=(-1.5, 1.5, 25)),
    _Family("silu", 3, scales=(0.5, 20.0, 17), places=(-1.5, 1.5, 25), both_signs=True),
    _Family("sin", 3, scales=(0.5, 25.0, 61), places=(-3.2, 3.2, 33)),
)
_STARTS = 3  # best grid points that are refined
_ZOOMS = 20
_OFFSETS = torch.linspace(-1.0, 1.0, 5, dtype=torch.float64)


@dataclass(frozen=True)
class SymbolicFit:
    """A formula ``a f(b x + c) + d``.

    Args:
        name: the function ``f``.
        a: factor.
        b: scale of the input.
        c: shift of the input.
        d: constant.
        r2: share of the weighted variance that it explains, at most 1.
        complexity: 0 for a constant, 1 for a line, 2 or 3 for the others.
    """

    name: str
    a: float
    b: float
    c: float
    d: float
    r2: float
    complexity: int

    def __call__(self, x: Tensor) -> Tensor:
        """Evaluate the formula."""
        return self.a * _FUNCTIONS[self.name](self.b * x + self.c) + self.d

    def __str__(self) -> str:
        """Write the formula, such as ``"2 sin(3 x + 0.5) - 1"``."""
        if self.name == "constant":
            return f"{self.d:.4g}"
        scale = {1.0: "", -1.0: "-"}.get(self.b, f"{self.b:.4g} ")
        inner = f"{scale}x{_signed(self.c)}"
        shape = {"x": "x", "x^2": f"({inner})^2", "x^3": f"({inner})^3", "|x|": f"|{inner}|", "1/x": f"/ ({inner})"}
        return f"{self.a:.4g} {shape.get(self.name, f'{self.name}({inner})')}{_signed(self.d)}"


def _signed(value: float) -> str:
    text = f"{abs(value):.4g}"
    return "" if abs(value) < 5e-5 else f" {'-' if value < 0 else '+'} {text}"


def suggest_symbolic(
    points: Tensor,
    values: Tensor,
    weights: Tensor | None = None,
    *,
    num_candidates: int = 5,
    complexity_weight: float = 0.25,
) -> list[SymbolicFit]:
    r"""Suggest formulas :math:`a\, f(b x + c) + d` for a curve, the best first.

    For each common function :math:`f` the best :math:`b, c` are searched for on a grid that covers the range of the
    points, and refined; :math:`a, d` follow by least squares. Functions: ``x``, ``x^2``, ``x^3``, ``|x|``, ``relu``,
    ``step``, ``1/x``, ``sqrt``, ``log``, ``exp``, ``tanh`` (the sigmoid is one), ``gaussian``, ``silu``, ``sin`` or
    ``cos``; those with a pole or an end have it outside of the points. The order is that of

    .. math:: \log_{10}(1 - R^2 + 10^{-5}) + \lambda \cdot \text{complexity}

    A suggestion is no proof: look at :math:`R^2`, and at how far the second one is behind.

    Args:
        points: inputs, shape ``(P,)``, at least 8 different ones.
        values: the curve there, shape ``(P,)``.
        weights: weight of each point, at least 0, shape ``(P,)``, such as how often the data were there.
        num_candidates: most formulas returned, one per function.
        complexity_weight: :math:`\lambda`: at 0.25 one unit more must make :math:`1 - R^2` 1.8 times smaller.

    Returns:
        Formulas; for a curve that does not vary, that constant only.

    Raises:
        ValueError: if shapes or values do not fit, or there are fewer than 8 different points of positive weight.
        TypeError: if something is of the wrong kind.

    Example:
        >>> x = torch.linspace(-2, 2, 100)
        >>> print(suggest_symbolic(x, 0.5 * torch.sin(3 * x) + 1)[0])
        0.5 sin(3 x) + 1

    Reference:
        Z. Liu et al., "KAN: Kolmogorov-Arnold networks", ICLR 2025, section 2.5.1, fit the same form by a grid search
        over :math:`b, c`; the list of functions, the refinement and the order are ours.
    """
    check_shape("points", points, ["P"])
    check_shape("values", values, [len(points)])
    check_int("num_candidates", num_candidates)
    check_range("complexity_weight", complexity_weight, 0.0)
    if weights is not None:
        check_shape("weights", weights, [len(points)])
    w = torch.ones_like(points) if weights is None else weights
    for name, value in (("points", points), ("values", values), ("weights", w)):
        check_finite(name, value)
    if bool((w < 0).any()):
        raise ValueError(f"`weights` must be at least 0; the smallest is {w.min().item():g}.")
    x, y, w = (t.detach().cpu().double()[(w > 0).cpu()] for t in (points, values, w))
    if len(x.unique()) < 8:
        raise ValueError(f"`points` must hold at least 8 different ones of positive weight; got {len(x.unique())}.")
    w = w / w.sum()
    mean = float(w @ y)
    if float(w @ (y - mean) ** 2) <= 1e-24 * float(w @ y**2):
        return [SymbolicFit("constant", 0.0, 0.0, 0.0, mean, 1.0, 0)]
    fits = [_fit(family, x, y, w) for family in _FAMILIES]
    fits.sort(key=lambda fit: math.log10(max(1.0 - fit.r2, 0.0) + 1e-5) + complexity_weight * fit.complexity)
    return fits[:num_candidates]


def suggest_edge_symbolic(
    layer: KANLayer, edge: KANEdge, inputs: Tensor | None = None, *, num_candidates: int = 5
) -> list[SymbolicFit]:
    """Suggest formulas for the learned function of one edge, in the unit of the layer's input.

    Args:
        layer: the layer.
        edge: a record of :func:`rank_edges` for it.
        inputs: what the layer was called with: the curve is looked at where these were, as often as they were there,
            the outermost 0.1 % left out. Without it, evenly between ``edge.low`` and ``edge.high``.
        num_candidates: most formulas returned.

    Returns:
        Formulas, the best first; empty where fewer than 8 different inputs were seen.

    Raises:
        ValueError: if ``inputs`` do not fit the layer.
    """
    if inputs is None:
        points = torch.linspace(edge.low, edge.high, 257, dtype=torch.float64)
    else:
        ordered = input_channels(layer, inputs)[edge.in_channel].cpu().sort().values
        last = len(ordered) - 1
        ranks = torch.linspace(math.floor(0.001 * last), math.ceil(0.999 * last), min(257, len(ordered)))
        points = ordered[ranks.round().long()]
    if len(points.unique()) < 8:
        return []
    return suggest_symbolic(points, edge_values(layer, edge, points).cpu(), num_candidates=num_candidates)


def _fit(family: _Family, x: Tensor, y: Tensor, w: Tensor) -> SymbolicFit:
    low, high = float(x.min()), float(x.max())
    middle, half = (low + high) / 2, (high - low) / 2
    b, c = _search(family, (x - middle) / half, y, w)
    # b (u - c) with u = (x - middle) / half
    b, c = b / half, -b * (middle / half + c)
    f = _FUNCTIONS[family.name](b * x + c)
    centered = f - w @ f
    a = float(w @ (centered * (y - w @ y))) / float(w @ centered**2)
    d = float(w @ y) - a * float(w @ f)
    r2 = 1.0 - float(w @ (a * f + d - y) ** 2) / float(w @ (y - w @ y) ** 2)
    return _simplified(family, a, b, c, d, r2, half)


def _search(family: _Family, u: Tensor, y: Tensor, w: Tensor) -> tuple[float, float]:
    """Return the best scale and place: on a grid, then on ever finer ones around its best points."""
    first, last, count = family.scales
    scales = torch.linspace(math.log(first), math.log(last), count, dtype=torch.float64)
    places = torch.linspace(*family.places[:2], family.places[2], dtype=torch.float64)
    steps = [(grid[1] - grid[0]) * _OFFSETS if len(grid) > 1 else torch.zeros(1).double() for grid in (scales, places)]
    best = (-math.inf, 1.0, 0.0)
    for sign in (1.0, -1.0) if family.both_signs else (1.0,):
        p, q = (t.flatten() for t in torch.meshgrid(scales, places, indexing="ij"))
        scores = _scores(family, sign, p, q, u, y, w)
        starts = scores.topk(min(_STARTS, len(scores))).indices
        p, q = p[starts], q[starts]
        shift_p, shift_q = (t.flatten() for t in torch.meshgrid(*steps, indexing="ij"))
        for zoom in range(_ZOOMS):
            near_p = p[:, None] + 0.6**zoom * shift_p  # (starts, points around each); the middle one is the start
            near_q = q[:, None] + 0.6**zoom * shift_q
            scores = _scores(family, sign, near_p.flatten(), near_q.flatten(), u, y, w).view(near_p.shape)
            top = scores.argmax(dim=1, keepdim=True)
            p, q = near_p.gather(1, top)[:, 0], near_q.gather(1, top)[:, 0]
        score, start = scores.amax(dim=1).max(dim=0)
        if float(score) > best[0]:
            scale, place = _argument(family, sign, p[start], q[start])
            best = (float(score), float(scale), float(place))
    return best[1], best[2]


def _argument(family: _Family, sign: float, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale ``b`` and place ``c`` of the argument ``b (u - c)`` from the numbers that are searched over."""
    return sign * p.exp(), -sign * (1.0 + q.exp()) if family.beyond else q


def _scores(family: _Family, sign: float, p: Tensor, q: Tensor, u: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """Return the share of the variance of ``y`` that the best ``a f + d`` explains; -1 where there is none."""
    b, c = _argument(family, sign, p, q)
    f = _FUNCTIONS[family.name](b[:, None] * (u - c[:, None]))  # (G, P)
    f = f - (f @ w)[:, None]
    size, covariance = f**2 @ w, f @ (w * (y - w @ y))
    score = covariance**2 / (size * float(w @ (y - w @ y) ** 2))
    return torch.where(score.isfinite() & (size > 1e-20), score, -1.0)


def _simplified(family: _Family, a: float, b: float, c: float, d: float, r2: float, half: float) -> SymbolicFit:
    """Return the fit with numbers that are easy to read, where the function allows several."""
    name = family.name
    if name == "x":
        a, b, c, d = a * b, 1.0, 0.0, d + a * c
    elif family.degree is not None:  # b is +-1 / half here
        a, b, c = a * half**-family.degree, math.copysign(1.0, b), c * half
    elif name == "log":
        b, c, d = math.copysign(1.0, b), c * half, d - a * math.log(half)
    elif name == "exp" and abs(c) < 50:
        a, c = a * math.exp(c), 0.0
    elif name == "sin":  # a phase as near to zero as sine or cosine of either sign allow
        turns = {("sin", 1.0): 0.0, ("cos", 1.0): -math.pi / 2, ("sin", -1.0): math.pi, ("cos", -1.0): math.pi / 2}
        phases = {key: math.remainder(c + turn, 2 * math.pi) for key, turn in turns.items()}
        (name, sign), c = min(phases.items(), key=lambda item: abs(item[1]))
        a = sign * a
    return SymbolicFit(name, a, b, c, d, min(r2, 1.0), family.complexity)
