"""The solve of an equilibrium in the few operations that TorchScript, ``torch.export`` and ONNX share."""

# No postponed annotations here: torch.jit.script cannot read them on methods that it leaves out.

import torch
from torch import Tensor, nn
from torch._higher_order_ops.while_loop import while_loop

from monai_deqkan._checks import check_int, check_range

__all__ = ["EquilibriumLoop"]


class EquilibriumLoop(nn.Module):
    r"""Find :math:`z = f(z, x)` by Anderson acceleration, as part of an exported network.

    One loop for all targets: a ``while`` in TorchScript and in eager execution, the ``while_loop`` operator under
    ``torch.export``, which is a ``Loop`` in ONNX. It ends when every sample has reached the tolerance; samples that
    have, or that are no longer finite, stay as they are. It keeps its own settings, cannot warn, and has no gradient:
    look at the residual it returns.

    Args:
        cell: module ``cell(z, data) -> z'`` on a state ``(B, *)`` and a list of tensors.
        rtol: a sample stops when ``rms(f(z) - z) <= rtol * rms(f(z))``, dimensionless.
        max_iter: most evaluations of ``cell``, at least 1.
        history_size: number of differences kept, at least 1.

    Raises:
        ValueError: if a setting lies outside its range.

    Reference:
        H. F. Walker and P. Ni, "Anderson acceleration for fixed-point iterations", SIAM J. Numer. Anal. 49 (2011)
        1715-1735; see :class:`~monai_deqkan.solvers.AndersonSolver`, which drops finished samples from the batch and
        restarts from the best iterate, where this one goes on with a plain step.
    """

    def __init__(self, cell: nn.Module, *, rtol: float = 1e-6, max_iter: int = 200, history_size: int = 6) -> None:
        super().__init__()
        self.cell = cell
        self.rtol = check_range("rtol", rtol, 0.0)
        self.max_iter = check_int("max_iter", max_iter)
        self.history_size = check_int("history_size", history_size)

    def forward(self, z0: Tensor, data: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Solve.

        Args:
            z0: start ``(B, *)``, real, float32 or float64.
            data: what the cell takes besides the state.

        Returns:
            The best iterate ``(B, *)``, and its relative residual ``(B,)``, float64: infinite where nothing was finite.
        """
        state = self._start(z0)
        if not torch.jit.is_scripting():  # noqa: SIM102
            if torch.compiler.is_exporting():  # in a block of its own, that TorchScript leaves out
                return self._exported(state, data)
        while bool(self._goes_on(state)):
            state = self._step(state, data)
        return state[1], state[2]

    @torch.jit.unused
    def _exported(self, state: list[Tensor], data: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Let the exporter record one step."""

        def goes_on(*state: Tensor) -> Tensor:
            return self._goes_on(list(state))

        def step(*state: Tensor) -> tuple[Tensor, ...]:
            return tuple(self._step(list(state), data))

        end = while_loop(goes_on, step, tuple(state))
        return end[1], end[2]

    def _start(self, z0: Tensor) -> list[Tensor]:
        z0 = z0.contiguous()  # as the iterates are: a while_loop wants the same strides after each step
        size, m = z0.shape[0], self.history_size
        rows = z0.flatten(1)
        history = torch.zeros([size, m, rows.shape[1]], dtype=z0.dtype, device=z0.device)
        return [
            torch.zeros([], dtype=torch.int64, device=z0.device),  # evaluations
            z0.clone(),  # best iterate
            torch.full([size], float("inf"), dtype=torch.float64, device=z0.device),  # its relative residual
            torch.ones([size], dtype=torch.bool, device=z0.device),  # whether a sample runs
            z0.clone(),  # iterate
            torch.zeros_like(rows),  # previous f(z)
            torch.zeros_like(rows),  # previous residual f(z) - z
            history,  # differences of f(z), newest last
            torch.zeros_like(history),  # differences of residuals
            torch.zeros([size, m, m], dtype=torch.float64, device=z0.device),  # their inner products
        ]

    def _goes_on(self, state: list[Tensor]) -> Tensor:
        return (state[0] < self.max_iter) & state[3].any()

    def _step(self, state: list[Tensor], data: list[Tensor]) -> list[Tensor]:
        count, best_z, best, runs, z, old_f, old_g, delta_f, delta_g, gram = state
        f = self.cell(z, data).flatten(1)
        g = f - z.flatten(1)
        residual = _norm(g) / _norm(f).clamp_min(1e-300)
        better = runs & (residual < best)
        wide = [-1] + [1] * (z.dim() - 1)
        best_z = torch.where(better.view(wide), z, best_z)
        grown = residual > 10.0 * best  # such a sample forgets its history and takes a plain step
        best = torch.where(better, residual, best)
        runs = runs & (residual > self.rtol) & (residual < float("inf"))

        first = count == 0
        delta_f = torch.cat((delta_f[:, 1:], torch.where(first, torch.zeros_like(f), f - old_f)[:, None]), dim=1)
        delta_g = torch.cat((delta_g[:, 1:], torch.where(first, torch.zeros_like(g), g - old_g)[:, None]), dim=1)
        keep = ~grown[:, None, None]
        delta_f = torch.where(keep, delta_f, torch.zeros_like(delta_f))
        delta_g = torch.where(keep, delta_g, torch.zeros_like(delta_g))
        gram = torch.where(keep, gram, torch.zeros_like(gram))
        products = torch.matmul(
            delta_g.to(torch.float64), torch.stack((delta_g[:, -1], g), dim=2).to(torch.float64)
        )  # (B, m, 2)
        gram = torch.cat((gram[:, 1:, 1:], products[:, :-1, :1]), dim=2)
        gram = torch.cat((gram, products[:, :, 0][:, None]), dim=1)
        gamma = _least_squares(gram, products[:, :, 1]).to(z.dtype)
        z_next = f - (gamma[:, :, None] * delta_f).sum(dim=1)
        z = torch.where(runs.view(wide), z_next.view(z.shape), z)
        return [count + 1, best_z, best, runs, z, f, g, delta_f, delta_g, gram]


def _norm(rows: Tensor) -> Tensor:
    return rows.to(torch.float64).square().sum(dim=1).sqrt()


def _least_squares(gram: Tensor, right: Tensor, regularization: float = 1e-10) -> Tensor:
    """Solve the scaled and regularized normal equations ``(B, m, m)``; empty rows get the weight zero.

    Gauss-Jordan elimination without a choice of pivots, which a positive definite matrix does not need: exporters have
    no operator for a linear solve.
    """
    size = gram.shape[1]
    eye = torch.eye(size, dtype=gram.dtype, device=gram.device)
    diagonal = (gram * eye).sum(dim=2)
    used = diagonal > 0
    scale = torch.where(used, diagonal, torch.ones_like(diagonal)).rsqrt()
    shift = torch.where(used, torch.full_like(diagonal, regularization), torch.ones_like(diagonal))
    matrix = gram * scale[:, :, None] * scale[:, None, :] + eye * shift[:, None, :]
    table = torch.cat((matrix, (right * scale)[:, :, None]), dim=2)  # (B, m, m + 1)
    for k in range(size):
        row = table[:, k] / table[:, k, k][:, None]
        # In row k itself the pivot less one, which leaves the scaled row.
        table = table - (table[:, :, k] - eye[k])[:, :, None] * row[:, None]
    gamma = table[:, :, size] * scale
    usable = torch.isfinite(gamma).all(dim=1)
    return torch.where(usable[:, None], gamma, torch.zeros_like(gamma))
