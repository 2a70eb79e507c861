"""What is guaranteed, and what is observed, of an equilibrium: its certificate."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from monai_deqkan._checks import check_choice, check_int
from monai_deqkan.networks.blocks.deq_cell import CertifiedCell, ContractionBound
from monai_deqkan.networks.layers.deq import DEQLayer
from monai_deqkan.networks.layers.kan_inputs import evaluation_mode
from monai_deqkan.networks.layers.lipschitz import frozen_weights
from monai_deqkan.solvers import (
    AndersonSolver,
    FixedPointSolver,
    Solution,
    SolveStatistics,
    SolveStatus,
    jacobian_norm,
    spectral_radius,
)
from monai_deqkan.solvers.solution import State, state_parts
from monai_deqkan.solvers.spectral import random_like, state_norm

__all__ = ["Certificate", "CertificateError", "ContractionWarning", "certify", "check_contraction"]

_ROUNDING = 1e-4  # by how much, relatively, an observed factor may exceed the certified one
_DISTANCES = (0.1, 1.0, 10.0)  # of the points compared from the equilibrium and each other, in units of its norm
_DIRECTIONS = 4  # tried at each distance


class CertificateError(RuntimeError):
    """A cell spreads two points further than it certifies; see ``certificate``.

    Args:
        message: what was certified and what was observed.
        certificate: the contradicted certificate.
    """

    def __init__(self, message: str, certificate: Certificate) -> None:
        super().__init__(message)
        self.certificate = certificate


class ContractionWarning(UserWarning):
    """A cell does not contract where it was looked at, or breaks its certificate."""


@dataclass(frozen=True)
class Certificate:
    r"""How far an equilibrium can be trusted: what is certified of its cell, and what was observed.

    ``factor`` is an upper bound of the cell's Lipschitz constant, proven for every state under ``assumptions``. Where
    it lies below one, there is one equilibrium, every start leads to it, and :meth:`error_bound` holds. The observed
    numbers are lower bounds of the same constant, one entry per sample, and prove nothing; but one above ``factor``
    proves that an assumption fails. Make it by :func:`certify`.

    Attributes:
        cell: class name of the cell.
        factor: certified contraction factor in the Euclidean norm of a sample's state; infinite where there is none.
        assumptions: what the factor rests on, in plain sentences.
        violations: what was found to contradict the factor; empty where nothing was.
        spectral_radius: that of the Jacobian at the returned state, estimated by power iteration.
        jacobian_norm: largest singular value of the Jacobian there, estimated from below by power iteration.
        observed_factor: largest :math:`\|f(a) - f(b)\| / \|a - b\|` of pairs of points around it.
        status: how each sample's solve ended, in the words of :class:`~monai_deqkan.solvers.SolveStatus`.
        evaluations: number of evaluations that each solve took.
        residual: root mean square of ``f(z) - z``, in the unit of the state; NaN where nothing was evaluated.
        relative_residual: the same over the root mean square of ``f(z)``.
    """

    cell: str
    factor: float
    assumptions: tuple[str, ...]
    violations: tuple[str, ...]
    spectral_radius: tuple[float, ...]
    jacobian_norm: tuple[float, ...]
    observed_factor: tuple[float, ...]
    status: tuple[str, ...]
    evaluations: tuple[int, ...]
    residual: tuple[float, ...]
    relative_residual: tuple[float, ...]

    @property
    def is_certified(self) -> bool:
        """Whether the cell is certified to contract, and nothing observed contradicts it."""
        return self.factor < 1 and not self.violations

    @property
    def largest_observed(self) -> float:
        """Largest of all observed numbers: a lower bound of the cell's Lipschitz constant, up to rounding."""
        return _max((*self.spectral_radius, *self.jacobian_norm, *self.observed_factor))

    def error_bound(self, solution: Solution | SolveStatistics, *, norm: str = "rms") -> Tensor:
        r"""Return how far each sample's state can be from its equilibrium.

        .. math:: \|z - z^*\| \le \frac{\|f(z) - z\|}{1 - c}, \qquad c = \mathtt{factor}

        for the state ``z`` that was returned. (One more evaluation would give ``f(z)``, which is nearer by a factor
        :math:`c`.) It holds for every solve with this cell, its present weights and data within the assumptions, up to
        the rounding of ``f``: residuals near the precision of the state, 1e-7 of it in float32, say no more.

        Args:
            solution: a solution, or its statistics, such as a :class:`~monai_deqkan.solvers.SolveRecorder` holds.
            norm: ``"rms"`` (root mean square over the state, in its unit), ``"euclidean"`` (root of the sum of squares;
                needs the solution), or ``"relative"`` (that of the difference over that of ``f(z)``, dimensionless).

        Returns:
            Bounds, float64 ``(B,)``; infinite where nothing is certified or nothing was evaluated.

        Raises:
            ValueError: for an unknown norm.
            TypeError: if ``norm`` is ``"euclidean"`` and only statistics are given.
        """
        check_choice("norm", norm, ("rms", "euclidean", "relative"))
        stats = solution.stats if isinstance(solution, Solution) else solution
        residual = (stats.relative_residual if norm == "relative" else stats.residual).double()
        if norm == "euclidean":
            if not isinstance(solution, Solution):
                raise TypeError("The Euclidean norm needs the size of the state. Pass the Solution, or take 'rms'.")
            residual = residual * math.sqrt(sum(part[0].numel() for part in state_parts(solution.z) if len(part)))
        if not self.is_certified:
            return torch.full_like(residual, math.inf)
        return torch.nan_to_num(residual / (1 - self.factor), nan=math.inf, posinf=math.inf)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields in types that JSON has; numbers that are not finite become None."""
        return {
            name: [_plain(item) for item in value] if isinstance(value, tuple) else _plain(value)
            for name, value in {**asdict(self), "is_certified": self.is_certified}.items()
        }

    def __str__(self) -> str:
        """Tell it in a few lines of plain English."""
        count = len(self.status)
        if self.is_certified:
            verdict = f"contracts by a factor of {self.factor:.4g} or better: one equilibrium, reached from any start"
            times = 1 / (1 - self.factor)
            bound = f"at most {times:.4g} times the residual: relative, {times * self._worst_residual:.2g} or less"
        else:
            verdict = "no guarantee" if math.isinf(self.factor) else f"no guarantee: the bound is {self.factor:.4g}"
            bound = "unknown, as no contraction is certified"
        solved = self.status.count(SolveStatus.CONVERGED.name)
        lines = [
            f"{self.cell}, {count} sample{'s' * (count != 1)}",
            f"  certified:  {verdict}",
            *(f"    - {sentence}" for sentence in self.assumptions),
            f"  observed:   Jacobian norm {_largest(self.jacobian_norm)}, spectral radius "
            f"{_largest(self.spectral_radius)}, |f(a) - f(b)| / |a - b| up to {_largest(self.observed_factor)}",
            f"  solved:     {solved} of {count}, in up to {max(self.evaluations, default=0)} evaluations, to a "
            f"relative residual of {self._worst_residual:.2g} or less",
            f"  error:      {bound}",
            *(f"  CONTRADICTED: {sentence}" for sentence in self.violations),
        ]
        return "\n".join(lines)

    @property
    def _worst_residual(self) -> float:
        return max((math.inf if math.isnan(value) else value for value in self.relative_residual), default=0.0)


def certify(
    module: nn.Module,
    *inputs: Any,
    solver: str | tuple[str, dict[str, Any]] | FixedPointSolver | None = None,
    num_iter: int = 20,
    on_violation: str = "raise",
) -> Certificate:
    """Solve one batch and tell how far its equilibria can be trusted.

    Runs in evaluation mode, without autocast; modes are put back afterwards. Costs the solve and about
    ``4 * num_iter`` evaluations of the cell.

    Args:
        module: a cell ``cell(z, x)``, a :class:`~monai_deqkan.networks.layers.DEQLayer`, or a network that holds one
            and solves it once per call. A cell with a method ``certified_contraction(x)``
            (:class:`~monai_deqkan.networks.blocks.CertifiedCell`) gets a certificate, others are observed only.
        inputs: what the module is called with: ``x`` and, if wanted, a start ``z0``; of a network, its arguments.
        solver: how to solve; by default the layer's own solver, for a cell Anderson's method to a relative 1e-5.
        num_iter: products with the Jacobian of each power iteration, at least 2.
        on_violation: what to do when an observed number exceeds the certified factor: ``"raise"``, ``"warn"`` or
            ``"ignore"`` (``violations`` has it in any case).

    Returns:
        The certificate.

    Raises:
        TypeError: if ``module`` is no module.
        ValueError: if a network solves no or several equilibria, or a setting is out of range.
        CertificateError: if an observed number exceeds the certified factor.

    Example:
        >>> from monai_deqkan.networks.blocks import KANCell
        >>> certificate = certify(KANCell(4, contraction=0.5), torch.ones(2, 4))
        >>> f"{certificate.factor:.3f}", certificate.is_certified
        ('0.500', True)
    """
    check_int("num_iter", num_iter, minimum=2)
    check_choice("on_violation", on_violation, ("raise", "warn", "ignore"))
    if not isinstance(module, nn.Module):
        raise TypeError(f"`module` must be a torch.nn.Module; got {type(module).__name__}. Wrap a function in one.")
    with evaluation_mode(module), torch.no_grad():
        layer, arguments = _layer_and_arguments(module, inputs, solver)
        solution, x = _solve(layer, arguments)
        certificate = _examine(layer.cell, solution, x, num_iter)
    if certificate.violations and on_violation != "ignore":
        message = (
            f"{certificate.violations[0]} An assumption fails: were weights changed after they were normalized, or "
            f"does the cell compute another function than it certifies?\n{certificate}"
        )
        if on_violation == "raise":
            raise CertificateError(message, certificate)
        warnings.warn(message, ContractionWarning, stacklevel=2)
    return certificate


def check_contraction(
    module: nn.Module, *inputs: Any, solver: str | tuple[str, dict[str, Any]] | FixedPointSolver | None = None
) -> Certificate:
    """Warn if a cell, layer or network does not contract; meant for the time before training.

    Silent where contraction is certified, or where no number observed on this batch reaches one.

    Args:
        module: see :func:`certify`.
        inputs: see :func:`certify`.
        solver: see :func:`certify`.

    Returns:
        The certificate.

    Example:
        >>> from monai_deqkan.networks.blocks import KANCell
        >>> check_contraction(KANCell(4), torch.ones(2, 4)).is_certified
        True
    """
    certificate = certify(module, *inputs, solver=solver, on_violation="warn")
    if certificate.violations or certificate.is_certified or certificate.largest_observed < 1:
        return certificate
    radius = _max(certificate.spectral_radius)
    consequence = (
        "plain iteration moves away from the equilibrium"
        if not radius < 1
        else "iteration may converge from this start but need not from another"
    )
    warnings.warn(
        f"{certificate.cell} does not contract: spectral radius {radius:.3g}, Jacobian norm "
        f"{_largest(certificate.jacobian_norm)} at the state reached, |f(a) - f(b)| / |a - b| up to "
        f"{_largest(certificate.observed_factor)} around it; {consequence}. Use a cell that contracts by construction "
        "(KANCell, ReconstructionCell), normalize its layers with `certified_spectral_norm`, scale its output down, "
        "train with JacobianRegularizedLoss, or solve with BroydenSolver and watch the status.",
        ContractionWarning,
        stacklevel=2,
    )
    return certificate


def _examine(cell: nn.Module, solution: Solution, x: Any, num_iter: int) -> Certificate:
    bound = (
        cell.certified_contraction(x)
        if isinstance(cell, CertifiedCell)
        else ContractionBound(math.inf, ("Observed only: the cell has no method `certified_contraction`.",))
    )
    z = solution.z
    with torch.autocast(state_parts(z)[0].device.type, enabled=False), frozen_weights(cell):
        observed = {
            "spectral_radius": spectral_radius(cell, z, x, num_iter=num_iter),
            "jacobian_norm": jacobian_norm(cell, z, x, num_iter=num_iter),
            "observed_factor": _observed_factor(cell, z, x),
        }
    found = {name: tuple(values.tolist()) for name, values in observed.items()}
    violations = [
        f"The observed {name.replace('_', ' ')} {_largest(values)} exceeds the certified factor {bound.factor:.6g}."
        for name, values in found.items()
        if any(value > bound.factor * (1 + _ROUNDING) for value in values)
    ]
    stats = solution.stats
    return Certificate(
        cell=type(cell).__name__,
        factor=bound.factor,
        assumptions=(*bound.assumptions, *_mode_assumptions(cell)),
        violations=tuple(violations),
        **found,
        status=tuple(SolveStatus(value).name for value in stats.status.tolist()),
        evaluations=tuple(stats.evaluations.tolist()),
        residual=tuple(stats.residual.tolist()),
        relative_residual=tuple(stats.relative_residual.tolist()),
    )


def _mode_assumptions(cell: nn.Module) -> tuple[str, ...]:
    """Name parts of a cell whose function differs between training and evaluation, or couples samples."""
    kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    names = sorted({type(part).__name__ for part in cell.modules() if isinstance(part, kinds)})
    if not names:
        return ("The cell has no batch statistics and no dropout, so it is the same in training and evaluation.",)
    return (f"The cell holds {', '.join(names)}: all of this is about evaluation mode only.",)


def _observed_factor(f: Callable[..., State], z: State, x: Any) -> Tensor:
    """Return the largest ratio of distances after and before ``f``, over pairs near and far: float64 ``(B,)``."""
    parts = state_parts(z)
    generator = torch.Generator(parts[0].device).manual_seed(0)
    unit = state_norm(parts)
    unit = torch.where(unit > 0, unit, torch.ones_like(unit))
    largest = torch.zeros_like(unit)

    def image(point: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        state = point[0] if isinstance(z, Tensor) else point
        return state_parts(f(state) if x is None else f(state, x))

    for distance in _DISTANCES:
        a = _moved(parts, random_like(parts, generator), distance * unit)
        fa, direction = image(a), random_like(parts, generator)
        for _ in range(_DIRECTIONS):
            b = _moved(a, direction, distance * unit)
            # A difference of images points where f stretches most, as in power iteration.
            direction = tuple(p - q for p, q in zip(image(b), fa, strict=True))
            ratio = state_norm(direction) / state_norm(tuple(p - q for p, q in zip(b, a, strict=True)))
            largest = torch.fmax(largest, ratio)
    return largest


def _moved(start: tuple[Tensor, ...], direction: tuple[Tensor, ...], length: Tensor) -> tuple[Tensor, ...]:
    norm = state_norm(direction)
    factor = length / torch.where(norm > 0, norm, torch.ones_like(norm))
    return tuple(
        p + d * factor.to(p.real.dtype).view(-1, *[1] * (p.ndim - 1)) for p, d in zip(start, direction, strict=True)
    )


def _layer_and_arguments(
    module: nn.Module, inputs: tuple[Any, ...], solver: str | tuple[str, dict[str, Any]] | FixedPointSolver | None
) -> tuple[DEQLayer, tuple[Any, ...]]:
    """Return the layer to look at, and what it is called with."""
    layers = [part for part in module.modules() if isinstance(part, DEQLayer)]
    if not layers:
        return DEQLayer(module, AndersonSolver(rtol=1e-5, on_failure="ignore") if solver is None else solver), inputs
    if not isinstance(module, DEQLayer):
        calls: list[tuple[DEQLayer, tuple[Any, ...]]] = []

        def note(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if isinstance(part, DEQLayer):
                calls.append((part, _x_and_start(*args, **kwargs)))

        handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
        try:
            module(*inputs)
        finally:
            for handle in handles:
                handle.remove()
        if len(calls) != 1:
            raise ValueError(
                f"A network must solve one equilibrium per call to be certified; {type(module).__name__} solved "
                f"{len(calls)}. Certify its layers one by one: `certify(network.layer, x)`."
            )
        module, inputs = calls[0]
    layer = module if isinstance(module, DEQLayer) else layers[0]
    return (layer if solver is None else DEQLayer(layer.cell, solver).eval()), inputs


def _x_and_start(x: Any, z0: State | None = None) -> tuple[Any, State | None]:
    """Return the arguments of a ``DEQLayer``, however they were given, in their order."""
    return x, z0


def _solve(layer: DEQLayer, arguments: tuple[Any, ...]) -> tuple[Solution, Any]:
    """Return the solution, and the per-sample data as the cell sees them."""
    seen: list[Any] = []

    def note(cell: nn.Module, args: tuple[Any, ...]) -> None:
        if not seen:  # the first evaluation is the one of the whole batch
            seen.extend(args[1:] or (None,))

    handle = layer.cell.register_forward_pre_hook(note)
    try:
        solution = layer.solve(*arguments)
    finally:
        handle.remove()
    return solution, seen[0] if seen else arguments[0]


def _largest(values: tuple[float, ...]) -> str:
    return f"{_max(values):.4g}"


def _max(values: tuple[float, ...]) -> float:
    """Return the largest value: NaN where one is, 0 where there is none."""
    return math.nan if any(map(math.isnan, values)) else max(values, default=0.0)


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
