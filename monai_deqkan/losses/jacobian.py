"""A penalty that keeps equilibria stable: the size of the Jacobian where they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from monai_deqkan._checks import check_int, check_loss_and_network, check_range
from monai_deqkan.solvers.solution import State, at_least_float32, state_parts

__all__ = ["JacobianLoss", "JacobianRegularizedLoss"]


class JacobianLoss(nn.Module):
    r"""Estimate how far a cell is from contracting: the mean square of its Jacobian's entries, times the dimension.

    .. math:: \frac{\|J\|_F^2}{N} = \frac1N\, E_v \|J^H v\|^2, \qquad J = \frac{\partial f}{\partial z}(z^*, x)

    for states of :math:`N` numbers and :math:`v` of unit covariance, averaged over the batch. It is the mean of the
    squared singular values, so it does not grow with the state, and is 1 for the identity.

    The gradient reaches the cell's parameters and ``x``, and through ``z`` all that the equilibrium depends on, if
    ``z`` is the output of a :class:`~monai_deqkan.networks.layers.DEQLayer`; its backward solve is the one that the
    rest of the loss needs anyway.

    With ``power_iterations`` it looks at the direction that grows most instead, and leaves all others alone:

    .. math:: \max(\|J^H v\| - b, 0)^2, \qquad v \leftarrow J^H v / \|J^H v\|

    with the bound :math:`b` on the growth, averaged over the batch. The mean of squares wants the Jacobian of a
    denoiser to be small everywhere, also where an image must be kept: it blurs. This one only keeps the iteration from
    diverging.

    Args:
        num_probes: number of random vectors :math:`v` per call, from torch's global generator; one is enough for
            training.
        power_iterations: steps of power iteration on each of them, 0 for none.
        bound: :math:`b`, dimensionless, from which on growth is penalized; only with ``power_iterations``.

    Raises:
        ValueError: if ``num_probes`` is not positive, or another number is out of range.

    Example:
        >>> loss = JacobianLoss()
        >>> f"{loss(lambda z, x: 0.5 * z + x, torch.zeros(8, 1000), torch.ones(8, 1000)):.2f}"
        '0.25'

    Reference:
        S. Bai, V. Koltun and J. Z. Kolter, "Stabilizing equilibrium models by Jacobian regularization", ICML 2021.
        They hold :math:`z^*` fixed: pass ``z.detach()`` for that. A penalty on the largest singular value:
        J.-C. Pesquet et al., "Learning maximally monotone operators for image recovery", SIAM J. Imaging Sci. 14
        (2021). Here it is power iteration on :math:`J^H` alone, which finds the largest eigenvalue.
    """

    def __init__(self, num_probes: int = 1, *, power_iterations: int = 0, bound: float = 0.9) -> None:
        super().__init__()
        self.num_probes = check_int("num_probes", num_probes)
        self.power_iterations = check_int("power_iterations", power_iterations, minimum=0)
        self.bound = check_range("bound", bound, 0.0)

    def forward(self, cell: Callable[..., State], z: State, x: Any = None) -> Tensor:
        """Return the estimate at a state.

        Args:
            cell: map ``cell(z, x)`` (``cell(z)`` where ``x`` is None) that treats samples independently and can be
                differentiated twice.
            z: state, real or complex, a tensor ``(B, *)`` or a tuple of such tensors.
            x: per-sample data of the cell.

        Returns:
            Scalar, dimensionless, not negative, differentiable.
        """
        device = state_parts(z)[0].device
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):  # trainers call losses under autocast
            leaves = tuple(part if part.requires_grad else part.detach().requires_grad_() for part in state_parts(z))
            point = leaves[0] if isinstance(z, Tensor) else leaves
            values = state_parts(cell(point) if x is None else cell(point, x))
            images = [image for image in values if image.requires_grad]
            numel = sum(leaf.numel() for leaf in leaves)
            if not images or numel == 0:
                return torch.zeros((), dtype=leaves[0].real.dtype, device=device)
            total: Tensor | float = 0.0
            for _ in range(self.num_probes):
                probes = [torch.randn_like(image) for image in images]
                for _ in range(self.power_iterations):
                    with torch.no_grad():
                        probes = _unit(probes)
                    probes = _products(images, leaves, probes, differentiable=False)
                if self.power_iterations:
                    with torch.no_grad():
                        probes = _unit(probes)
                products = _products(images, leaves, probes, differentiable=True)
                if self.power_iterations:
                    growth = _squares(products).sqrt()
                    total = total + (growth - self.bound).clamp_min(0).square().mean() / self.num_probes
                else:
                    total = total + _squares(products).sum() / (numel * self.num_probes)
            result = torch.as_tensor(total, device=device)
        return result

    def extra_repr(self) -> str:
        """Show the number of probes."""
        shown = f"num_probes={self.num_probes}"
        if self.power_iterations:
            shown += f", power_iterations={self.power_iterations}, bound={self.bound:g}"
        return shown


def _products(
    images: list[Tensor], leaves: tuple[Tensor, ...], probes: list[Tensor], *, differentiable: bool
) -> list[Tensor]:
    """Return ``J^H v``."""
    found = torch.autograd.grad(
        images,
        leaves,
        probes,
        create_graph=differentiable,
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return list(found)


def _squares(parts: list[Tensor]) -> Tensor:
    """Return each sample's sum of squares, ``(B,)``."""
    real = [torch.view_as_real(part) if part.is_complex() else part for part in parts]
    return torch.stack([part.flatten(1).square().sum(dim=1) for part in real]).sum(dim=0)


def _unit(parts: list[Tensor]) -> list[Tensor]:
    length = _squares(parts).sqrt()
    length = torch.where(length > 0, length, torch.ones_like(length))
    return [part / length.view(-1, *[1] * (part.ndim - 1)) for part in parts]


class JacobianRegularizedLoss(nn.Module):
    """Add :class:`JacobianLoss` at a network's equilibria to any loss; in a MONAI configuration by ``_target_`` alone.

    The network is called as always. Hooks on its equilibrium layers hand the states of its last call to this loss,
    which holds them until it is called; nothing is left on the network but the hooks, which ``remove`` takes away.
    Copies of the network, pickled ones too, feed no loss. Remove the hooks before scripting.

    Args:
        loss: called with all arguments, such as ``(prediction, target)``; returns a scalar.
        network: the network being trained, ``"@network_def"`` in a bundle. Its equilibrium layers are known by what
            they have: ``cell``, ``solver`` and ``adjoint``.
        weight: factor of the penalty, dimensionless, at least 0.
        num_probes: see :class:`JacobianLoss`.
        power_iterations: see :class:`JacobianLoss`.
        bound: see :class:`JacobianLoss`.

    Raises:
        TypeError: if ``loss`` cannot be called, or ``network`` is no module.
        ValueError: if ``weight`` is negative, or the network has no equilibrium layer.

    Example:
        >>> from monai_deqkan.networks.blocks import KANCell
        >>> from monai_deqkan.networks.layers import DEQLayer
        >>> network = DEQLayer(KANCell(3))
        >>> loss = JacobianRegularizedLoss(nn.MSELoss(), network, weight=0.1)
        >>> loss(network(torch.ones(2, 3)), torch.zeros(2, 3)).requires_grad
        True
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        network: nn.Module,
        *,
        weight: float = 1.0,
        num_probes: int = 1,
        power_iterations: int = 0,
        bound: float = 0.9,
    ) -> None:
        super().__init__()
        check_loss_and_network(loss, network)
        layers = [part for part in network.modules() if _is_equilibrium(part)]
        if not layers:
            raise ValueError(
                f"`network` must have an equilibrium layer, such as DEQLayer; {type(network).__name__} has none. "
                "Use the plain loss."
            )
        self.loss = loss
        self.weight = check_range("weight", weight, 0.0, math.inf, open_high=True)
        self.penalty = JacobianLoss(num_probes, power_iterations=power_iterations, bound=bound)
        self._found = _Equilibria()
        self._handles = [network.register_forward_pre_hook(self._found.start)]
        self._handles += [layer.register_forward_hook(self._found.add, with_kwargs=True) for layer in layers]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss of the arguments, plus the penalty at the equilibria of the network's last call.

        Raises:
            RuntimeError: if gradients are wanted and the network was not called with gradients since the last time.
        """
        total = self.loss(*args, **kwargs)
        found = self._found.take()
        if not torch.is_grad_enabled() or self.weight == 0:
            return total
        if not found:
            raise RuntimeError(
                "The network was not called, with gradients, since this loss was last called. Call it anew for each "
                "loss, outside of activation checkpointing, and give this loss the network that is trained."
            )
        penalties = [self.penalty(cell, z, x).to(total.device) for cell, z, x in found]
        return total + self.weight * torch.stack(penalties).mean()

    def remove(self) -> None:
        """Take the hooks off the network; this loss can then only be called without gradients."""
        for handle in self._handles:
            handle.remove()

    def extra_repr(self) -> str:
        """Show the weight."""
        return f"weight={self.weight:g}"


class _Equilibria:
    """The equilibria of a network's last call with gradients; copies are empty and stay so."""

    def __init__(self, listens: bool = True) -> None:
        self._listens = listens
        self._found: list[tuple[nn.Module, State, Any]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (False,)

    def start(self, network: nn.Module, args: Any) -> None:
        """Forget the call before."""
        self._found.clear()

    def add(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], z: State) -> None:
        """Keep one equilibrium."""
        if self._listens and torch.is_grad_enabled() and not torch.jit.is_tracing():
            x = at_least_float32(args[0] if args else kwargs["x"])
            self._found.append((layer.cell, z, x))

    def take(self) -> list[tuple[nn.Module, State, Any]]:
        """Hand the equilibria over."""
        found, self._found = self._found, []
        return found


def _is_equilibrium(module: nn.Module) -> bool:
    # By its parts, not by its class: losses do not know networks.
    return all(hasattr(module, name) for name in ("cell", "solver", "adjoint"))
