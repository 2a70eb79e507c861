"""What the reconstructions share: the problem, its scale, its norm, and what a solve returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from monai_deqkan._checks import check_finite, check_int, check_range, check_tensor
from monai_deqkan.operators import LinearOperator, MRIOperator
from monai_deqkan.solvers import SolveStatistics, SolveStatus

__all__ = ["VariationalSolution"]


@dataclass(frozen=True)
class VariationalSolution:
    """A regularized reconstruction and how its solve went.

    Attributes:
        image: complex, in the unit of the k-space, shape ``(B, *space)``.
        objective: value of the minimized function at the image, shape ``(B,)``, in the squared unit of the k-space.
        stats: statistics per sample; ``residual`` and ``relative_residual`` are those of the optimality condition that
            the method states, ``evaluations`` are iterations.
    """

    image: Tensor
    objective: Tensor
    stats: SolveStatistics

    @property
    def converged(self) -> Tensor:
        """Whether each sample reached the tolerance, bool of shape ``(B,)``."""
        return self.stats.converged


@dataclass
class Problem:
    """A data term whose running samples can be taken out, and the number that makes weights dimensionless."""

    operator: LinearOperator
    target: Tensor  # A^H y, (B, *image)
    energy: Tensor  # |y|^2 / 2 per sample, float64
    weight: Tensor  # weight in the unit of A^H y, (B,)
    spatial_dims: int

    @classmethod
    def of(
        cls,
        kspace: Tensor,
        mask: Tensor | None,
        sensitivity_maps: Tensor | None,
        operator: LinearOperator | None,
        weight: float | Tensor,
    ) -> Problem:
        """Check the arguments that all methods share and put the problem together."""
        operator = operator_of(kspace, mask, sensitivity_maps, operator)
        target = operator.adjoint(kspace)
        size = target.shape[0]
        if isinstance(weight, Tensor):
            if weight.shape != (size,):
                raise ValueError(
                    f"`weight` must be a number or have shape ({size},), one per sample; got {tuple(weight.shape)}."
                )
            check_range("weight", float(weight.min()), 0.0)
            check_finite("weight", weight)
        else:
            weight = torch.full((size,), check_range("weight", weight, 0.0, open_high=True), dtype=torch.float64)
        energy = 0.5 * sample_norm(kspace) ** 2
        scale = target.abs().flatten(1).amax(dim=1)
        dims = getattr(operator, "spatial_dims", target.ndim - 1)
        return cls(operator, target, energy, weight.to(scale) * scale, dims)

    def take(self, rows: Tensor) -> Problem:
        """Return the problem of some samples."""
        return Problem(
            self.operator.take(rows), self.target[rows], self.energy[rows], self.weight[rows], self.spatial_dims
        )

    def data_term(self, x: Tensor, kspace: Tensor) -> Tensor:
        """Return half the squared misfit per sample, float64 ``(B,)``."""
        return 0.5 * sample_norm(self.operator.forward(x) - kspace) ** 2


class Progress:
    """Keeps what each sample of a batch came to while the running ones get fewer."""

    def __init__(self, start: Tensor, max_iter: int, rtol: float) -> None:
        self.max_iter = check_int("max_iter", max_iter, minimum=0)
        self.rtol = check_range("rtol", rtol, 0.0)
        size = start.shape[0]
        self.image = start.clone()
        self.rows = torch.arange(size, device=start.device)
        self.status = torch.full((size,), int(SolveStatus.MAX_ITER), device=start.device)
        self.evaluations = torch.zeros(size, dtype=torch.long, device=start.device)
        self.relative = torch.full((size,), float("nan"), dtype=torch.float64, device=start.device)
        self.residual = self.relative.clone()
        self.history: list[Tensor] = []

    @property
    def running(self) -> bool:
        """Whether another iteration is due."""
        return bool(self.rows.numel()) and len(self.history) < self.max_iter

    def update(self, x: Tensor, residual: Tensor, relative: Tensor) -> Tensor | None:
        """Note the iterates of the running samples; return which of them go on, or None where all do."""
        finite = relative.isfinite()
        good = self.rows[finite]
        self.image[good] = x[finite]
        self.relative[good], self.residual[good] = relative[finite], residual[finite]
        self.evaluations[self.rows] += 1
        row = torch.full_like(self.relative, float("nan"))
        row[self.rows] = relative
        self.history.append(row)
        done = relative <= self.rtol
        self.status[self.rows[done]] = int(SolveStatus.CONVERGED)
        self.status[self.rows[~finite]] = int(SolveStatus.NON_FINITE)
        keep = (~done & finite).nonzero().flatten()
        if len(keep) == len(self.rows):
            return None
        self.rows = self.rows[keep]
        return keep

    def statistics(self, on_failure: str, what: str) -> SolveStatistics:
        """Return the statistics, having told of samples that did not converge."""
        empty = self.relative.new_zeros((0, self.relative.shape[0]))
        history = torch.stack(self.history) if self.history else empty
        stats = SolveStatistics(self.status, self.evaluations, self.residual, self.relative, history)
        stats.report_failure(on_failure, what)
        return stats


def operator_of(
    kspace: Tensor, mask: Tensor | None, sensitivity_maps: Tensor | None, operator: LinearOperator | None
) -> LinearOperator:
    """Return the operator that is given, or that of mask and maps, having checked that k-space is finite."""
    check_tensor("kspace", kspace)
    if operator is None:
        return MRIOperator.from_kspace(kspace, mask, sensitivity_maps, spatial_dims=kspace.ndim - 2)
    if mask is not None or sensitivity_maps is not None:
        raise ValueError("Give either `operator`, or `mask` and `sensitivity_maps`; got both.")
    check_finite("kspace", kspace, "Remove broken samples before reconstruction.")
    return operator


def sample_norm(x: Tensor) -> Tensor:
    """Return the Euclidean norm of each sample, float64 ``(B,)``."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=torch.complex128 if x.is_complex() else torch.float64)


def like(values: Tensor, x: Tensor) -> Tensor:
    """Return one value per sample so that it multiplies ``x`` of shape ``(B, *)``."""
    return values.to(x.real.dtype if x.is_complex() else x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def normal_bound(operator: LinearOperator, like_image: Tensor, num_iter: int = 20) -> Tensor:
    """Return a bound of the largest eigenvalue of ``A^H A`` per sample, ``(B,)``.

    The operator's own ``norm_bound`` squared where it has one; else a power iteration, raised by a tenth.
    """
    bound = getattr(operator, "norm_bound", None)
    if bound is not None:
        return bound.square().expand(like_image.shape[0])
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(like_image.shape, generator=generator, dtype=like_image.dtype).to(like_image.device)
    for _ in range(num_iter):
        v = operator.normal(v / like(sample_norm(v).clamp_min(1e-30), v))
    return 1.1 * sample_norm(v)
