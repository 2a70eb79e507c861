"""How far a network's result is from its equilibrium: what is proven of it, and what is estimated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from monai_deqkan.networks.blocks.deq_cell import CertifiedCell
from monai_deqkan.networks.layers.deq import DEQLayer
from monai_deqkan.networks.layers.lipschitz import frozen_weights
from monai_deqkan.solvers import SolveRecorder, SolveStatistics, solve_budget
from monai_deqkan.solvers.solution import State, at_least_float32, state_parts
from monai_deqkan.solvers.spectral import state_norm

__all__ = ["EquilibriumError", "EquilibriumProbe"]

_TIGHTER = 0.1


@dataclass(frozen=True)
class EquilibriumError:
    """How far each sample's state can be from its equilibrium, relative to the state, dimensionless.

    Attributes:
        certified_factor: proven contraction factor of the cell with these data; infinite where nothing is proven.
        error_bound: relative residual over one minus that factor, float64 ``(B,)``: proven up to rounding, see
            :meth:`~monai_deqkan.networks.Certificate.error_bound`, and up to what solves inside the cell leave, see
            its assumptions; infinite where the factor is not below one.
        estimated_error: see :meth:`EquilibriumProbe.errors`; not proven. Float64 ``(B,)``; NaN where not asked for.
    """

    certified_factor: float
    error_bound: Tensor
    estimated_error: Tensor


class EquilibriumProbe:
    """A ``with`` block that notes the equilibrium that a network solves in it, to tell afterwards how far off it is.

    Args:
        network: network with :class:`~monai_deqkan.networks.layers.DEQLayer`, called once in the block.

    Example:
        >>> from monai_deqkan.networks.blocks import KANCell
        >>> layer = DEQLayer(KANCell(4, contraction=0.5), ("anderson", {"rtol": 1e-3}))
        >>> with torch.no_grad(), EquilibriumProbe(layer) as probe:
        ...     z = layer(torch.ones(2, 4))
        >>> error = probe.errors(estimate=True)
        >>> bool((error.estimated_error <= error.error_bound).all())
        True
    """

    def __init__(self, network: nn.Module) -> None:
        self._layers = [part for part in network.modules() if isinstance(part, DEQLayer)]
        self._calls: list[tuple[DEQLayer, Any, State, list[SolveStatistics]]] = []
        self._open: list[SolveRecorder] = []
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> EquilibriumProbe:
        self.close()
        self._calls = []
        for layer in self._layers:
            self._handles.append(layer.register_forward_pre_hook(self._start))
            # Called after an exception, too: no recorder stays open.
            self._handles.append(layer.register_forward_hook(self._note, with_kwargs=True, always_call=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop noting, as at the end of the block."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _start(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        self._open.append(SolveRecorder().__enter__())

    def _note(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], z: State | None) -> None:
        recorder = self._open.pop()
        recorder.__exit__(None, None, None)
        if z is not None and isinstance(layer, DEQLayer):
            stats = [record.stats for record in recorder.records if record.kind == "forward"]
            self._calls.append((layer, args[0] if args else kwargs["x"], z, stats))

    @torch.no_grad()
    def errors(self, *, estimate: bool = False) -> EquilibriumError | None:
        r"""Return the errors of the noted equilibrium; None unless the block solved exactly one.

        The estimate goes on from the state :math:`z` to a tenth of its residual (in a batch, of the smallest one), with
        the layer's own solver and limit of evaluations. If the error falls as the residual :math:`r` does,

        .. math:: \|z - z^*\| \approx \frac{\|z - z'\|}{1 - r' / r},

        where :math:`z'` is the state with the smaller residual. Unlike the bound it can be too small. It is infinite
        where no smaller residual was reached.

        Args:
            estimate: whether to make the estimate, which takes up to as many evaluations as the solver's limit.
        """
        if len(self._calls) != 1 or len(self._calls[0][3]) != 1:
            return None
        layer, x, z, (stats,) = self._calls[0]
        residual = stats.relative_residual.double()
        factor = _certified_factor(layer, at_least_float32(x))
        bound = torch.full_like(residual, math.inf)
        if factor < 1:
            bound = torch.nan_to_num(residual / (1 - factor), nan=math.inf, posinf=math.inf)
        estimated = torch.full_like(residual, math.nan)
        if estimate:
            estimated = _estimated_error(layer, x, z, stats)
        return EquilibriumError(factor, bound, estimated)


def _certified_factor(layer: DEQLayer, x: Any) -> float:
    if not isinstance(layer.cell, CertifiedCell):
        return math.inf
    with frozen_weights(layer.cell):
        return layer.cell.certified_contraction(x).factor


def _estimated_error(layer: DEQLayer, x: Any, z: State, stats: SolveStatistics) -> Tensor:
    residual = stats.relative_residual.double()
    reached = residual[residual.isfinite() & (residual > 0)]
    if not len(reached):
        return torch.where(residual == 0, 0.0, math.inf)
    with solve_budget(rtol=_TIGHTER * float(reached.min()), on_failure="ignore"):
        closer = layer.solve(x, z)
    size = state_norm(state_parts(at_least_float32(z)))
    moved = state_norm(
        tuple(a - b for a, b in zip(state_parts(at_least_float32(z)), state_parts(closer.z), strict=True))
    )
    share = closer.stats.residual.double() / stats.residual.double()
    estimated = moved / size / (1 - share)
    return torch.where(residual == 0, 0.0, torch.where((share < 1) & estimated.isfinite(), estimated, math.inf))
