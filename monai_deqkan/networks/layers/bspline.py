"""B-splines on uniform knots."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from monai_deqkan._checks import check_choice, check_int
from monai_deqkan.networks.layers.basis import (
    BASES,
    GridBasis,
    blocks,
    check_grid_range,
    distance_from_centers,
    needs_float32,
)

__all__ = ["BSplineBasis"]

# By order: largest slope of a spline per knot step, and largest sum of the squares of the splines of one order less
# at one point, both rounded up.
_MAX_SLOPE = {1: 1.0, 2: 1.0, 3: 0.6666667, 4: 0.5454238, 5: 0.4600335}
_MAX_SQUARE_SUM = {1: 1.0, 2: 1.0000001, 3: 0.5937501, 4: 0.5000001, 5: 0.4371067}


def _bsplines(u: Tensor, dim: int, count: int, order: float) -> Tensor:
    """Return the centered cardinal B-splines of ``u`` in knot steps."""
    a = distance_from_centers(u, dim, count)
    # The hat has a kink in its center; elsewhere the second derivative there must be that of both sides, which abs,
    # with slope 0 at 0, would lose.
    p = (0.5 * (order + 1.0) - (a.abs() if order == 1.0 else torch.where(a < 0.0, -a, a))).clamp(min=0.0)
    q = (p - 1.0).clamp(min=0.0)
    if order == 1.0:
        return p
    if order == 2.0:
        return (p * p - 3.0 * (q * q)) / 2.0
    if order == 3.0:
        return (p * p * p - 4.0 * (q * q * q)) / 6.0
    r = (q - 1.0).clamp(min=0.0)
    p2, q2, r2 = p * p, q * q, r * r
    if order == 4.0:
        return (p2 * p2 - 5.0 * (q2 * q2) + 10.0 * (r2 * r2)) / 24.0
    return (p * (p2 * p2) - 6.0 * (q * (q2 * q2)) + 15.0 * (r * (r2 * r2))) / 120.0


def _bspline_slopes(u: Tensor, dim: int, count: int, order: float) -> Tensor:
    """Return the derivatives of `_bsplines`; 0 in the hats' kinks."""
    a = distance_from_centers(u, dim, count)
    if order == 1.0:
        return -torch.sign(a) * (a.abs() < 1.0)
    p = (0.5 * (order + 1.0) - torch.where(a < 0.0, -a, a)).clamp(min=0.0)
    q = (p - 1.0).clamp(min=0.0)
    if order == 2.0:
        slope = p - 3.0 * q
    elif order == 3.0:
        slope = 0.5 * (p * p - 4.0 * (q * q))
    else:
        r = (q - 1.0).clamp(min=0.0)
        p2, q2, r2 = p * p, q * q, r * r
        if order == 4.0:
            slope = (p * p2 - 5.0 * (q * q2) + 10.0 * (r * r2)) / 6.0
        else:
            slope = (p2 * p2 - 6.0 * (q2 * q2) + 15.0 * (r2 * r2)) / 24.0
    return torch.where(a < 0.0, slope, -slope)


@BASES.register("bspline")
@dataclass(frozen=True)
class BSplineBasis(GridBasis):
    r"""B-splines on uniform knots, in closed form.

    With the distance :math:`a` of :math:`x` from the center of a spline in knot steps, :math:`n` the order, and
    :math:`p_j = \max(\tfrac{n+1}{2} - |a| - j, 0)`,

    .. math:: B(x) = \frac{1}{n!} \sum_{j=0}^{\lfloor n/2 \rfloor} (-1)^j \binom{n+1}{j}\, p_j^n,

    for cubic splines :math:`\tfrac16 (p_0^3 - 4 p_1^3)`. The splines sum to 1 on ``grid_range``. By default they fade
    **outside the grid**, and are zero from ``spline_order`` steps on: there only the layer's base term is left. Scale
    or normalize the inputs so that most lie on the grid, or choose a continuation.

    Args:
        grid_size: number of equal intervals that ``grid_range`` is cut into.
        spline_order: polynomial degree of the pieces, 1 to 5.
        grid_range: first and last knot of the grid, in the unit of the input.
        outside: ``"zero"`` lets the splines fade outside the grid; ``"clamp"`` keeps the value at its nearer end;
            ``"linear"`` goes on along the tangent there.

    Raises:
        ValueError: if a setting is out of its range.

    Example:
        >>> BSplineBasis(grid_size=2, spline_order=1, grid_range=(-1.0, 1.0)).values(torch.tensor([-1.0, 0.25]))
        tensor([[1.0000, 0.0000],
                [0.0000, 0.7500],
                [0.0000, 0.2500]])

    Reference:
        C. de Boor, "A Practical Guide to Splines", Springer 1978, chapter IX. Equal to his recursion on uniform knots
        that go on beyond the grid; the closed form of the centered splines replaces it.
    """

    grid_size: int = 5
    spline_order: int = 3
    grid_range: tuple[float, float] = (-3.0, 3.0)
    outside: str = "zero"

    _raw = staticmethod(_bsplines)
    _raw_slopes = staticmethod(_bspline_slopes)

    def __post_init__(self) -> None:
        check_int("grid_size", self.grid_size)
        check_choice("spline_order", check_int("spline_order", self.spline_order), (1, 2, 3, 4, 5))
        check_choice("outside", self.outside, ("zero", "clamp", "linear"))
        object.__setattr__(self, "grid_range", check_grid_range(self.grid_range))

    @property
    def num_basis(self) -> int:
        """Number of splines, ``grid_size + spline_order``."""
        return self.grid_size + self.spline_order

    @property
    def step(self) -> float:
        """Distance of neighboring knots, in the unit of the input."""
        return (self.grid_range[1] - self.grid_range[0]) / self.grid_size

    @property
    def _unit(self) -> float:
        return self.step

    @property
    def _bound(self) -> float:
        return 0.5 * self.grid_size

    @property
    def _tangent_bound(self) -> float:
        # Hats have a kink in the last knot, and one tangent from there to the knot before it.
        return self._bound - 0.5 if self.spline_order == 1 else self._bound

    @property
    def _parameter(self) -> float:
        return float(self.spline_order)

    def lipschitz_constants(self) -> Tensor:
        """Return the largest slope of a spline, for each."""
        return torch.full((self.num_basis,), _MAX_SLOPE[self.spline_order] / self.step, dtype=torch.float64)

    def slope_coefficients(self, c: Tensor, dim: int) -> Tensor:
        """Return the coefficients of the splines of one order less: differences over the knot step.

        They are ``num_basis + 1``, with ``c`` going on as zeros; ``num_basis - 1`` with a continuation, where the grid
        is all that counts.
        """
        if self.outside == "zero":
            zero = torch.zeros_like(c.narrow(dim, 0, 1))
            c = torch.cat((zero, c, zero), dim)
        return c.diff(dim=dim) / self.step

    @property
    def slope_gain(self) -> float:
        """Root of the largest sum of squares of the splines of one order less, dimensionless."""
        return math.sqrt(_MAX_SQUARE_SUM[self.spline_order])

    def resized(self, num_basis: int) -> BSplineBasis:
        """Return splines on ``num_basis - spline_order`` intervals."""
        check_int("num_basis", num_basis, self.spline_order + 1)
        return replace(self, grid_size=num_basis - self.spline_order)

    def refined(self, factor: int = 2) -> BSplineBasis:
        """Return splines on ``factor`` times as many intervals; on the grid they span all that these do."""
        return replace(self, grid_size=self.grid_size * check_int("factor", factor))

    def fill(self, x: Tensor, out: Tensor) -> None:
        """Write the values, on a CPU by blocks that stay in its cache and all splines at once: few calls."""
        if x.device.type != "cpu":
            super().fill(x, out)
            return
        order = self.spline_order
        scale = math.factorial(order) ** (-1 / order)  # takes the formula's factor into the distance
        dtype = torch.float32 if needs_float32(x) else x.dtype
        centers = self._centers(dtype, scale)
        end_slopes = self._end_slopes(dtype) if self.outside == "linear" else None
        for rows, columns in blocks(x, self.num_basis):
            u = self._scaled(x[rows, columns], scale)
            excess = self._clamp_(u, scale)
            target = out[rows, :, columns]
            values = target if target.dtype == dtype else torch.empty(target.shape, dtype=dtype)
            torch.sub(u.unsqueeze(1), centers, out=values)
            self._alternating_powers_(values.abs_(), scale, order)
            if excess is not None and end_slopes is not None:
                low, high = end_slopes
                values.addcmul_(excess.clamp(max=0.0).unsqueeze(1), low)
                values.addcmul_(excess.clamp(min=0.0).unsqueeze(1), high)
            if values is not target:
                target.copy_(values.clamp_(-65504.0, 65504.0) if target.dtype == torch.float16 else values)

    def pull_back(self, x: Tensor, grad: Tensor) -> Tensor:
        """Pull the gradient back, on a CPU by blocks that stay in its cache and all splines at once."""
        if x.device.type != "cpu":
            return super().pull_back(x, grad)
        order = self.spline_order
        scale = math.factorial(order - 1) ** (-1 / max(order - 1, 1))
        centers = self._centers(torch.float32 if needs_float32(x) else x.dtype, scale)
        result = torch.empty_like(x)
        for rows, columns in blocks(x, self.num_basis):
            u = self._scaled(x[rows, columns], scale)
            excess = self._clamp_(u, scale)
            if self.outside == "linear":
                u.clamp_(-self._tangent_bound * scale, self._tangent_bound * scale)
            a = u.unsqueeze(1) - centers
            slopes = self._alternating_powers_(a.abs(), scale, order - 1)  # falling with the distance, so not negative
            if order == 1:
                slopes.sign_().mul_(a.sign_())  # 0 in the kink
            else:
                slopes.copysign_(a)
            total = slopes.mul_(grad[rows, :, columns]).sum(1)
            if excess is not None and self.outside == "clamp":
                total.mul_(excess == 0.0)
            torch.mul(total, -1.0 / self.step, out=result[rows, columns])
        return result

    def _centers(self, dtype: torch.dtype, scale: float) -> Tensor:
        """Return the centers of the splines, times ``scale`` in knot steps from the middle of the grid, ``(K, 1)``."""
        k = torch.arange(self.num_basis, dtype=torch.float64, device="cpu")
        return ((k - 0.5 * (self.num_basis - 1)) * scale).to(dtype).unsqueeze(1)

    def _end_slopes(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the slopes of each spline at the ends of the grid, per knot step, ``(K, 1)`` each."""
        ends = torch.tensor([-self._tangent_bound, self._tangent_bound], dtype=torch.float64, device="cpu")
        low, high = _bspline_slopes(ends, 0, self.num_basis, self._parameter).to(dtype).split(1, dim=1)
        return low, high

    def _scaled(self, x: Tensor, scale: float) -> Tensor:
        wide = x.float() if needs_float32(x) else x
        return torch.sub(wide, self._middle).mul_(scale / self.step)

    def _clamp_(self, u: Tensor, scale: float) -> Tensor | None:
        """Clamp ``u`` to the grid where that is the rule, and return by how many knot steps it was outside."""
        bound = self._bound * scale
        if self.outside == "zero" or not u.numel() or float(u.abs().max()) <= bound:
            return None
        outer = u.clamp(-1e34 * scale, 1e34 * scale)  # as in _scaled of basis.py
        return outer.sub_(u.clamp_(-bound, bound)).mul_(1.0 / scale)

    def _alternating_powers_(self, a: Tensor, scale: float, power: int) -> Tensor:
        r"""Turn distances times ``scale`` into :math:`\sum_j (-1)^j \binom{n+1}{j} p_j^{power}`, in place."""
        order = self.spline_order
        reach = a.new_tensor(0.5 * (order + 1) * scale)
        parts = [torch.sub(reach, a.clamp_(max=reach.item()), out=a)]
        for _ in range(order // 2):
            parts.append((parts[-1] - scale).clamp_(min=0.0))
        for part in parts:
            if power == 3:
                part.pow_(3)
            elif power == 5:
                part.mul_((part * part).square_())
            else:  # 0 and 1 stay as they are
                for _ in range(power // 2):
                    part.mul_(part)
        for part, factor in zip(parts[1:], (-(order + 1), order * (order + 1) // 2), strict=False):
            a.add_(part, alpha=factor)
        return a
