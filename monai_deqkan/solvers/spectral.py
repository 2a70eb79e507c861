"""How a map spreads differences around a point: power iterations and random probes, by automatic differentiation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from monai_deqkan._checks import check_int
from monai_deqkan.solvers.solution import State, state_parts

__all__ = ["jacobian_frobenius_norm", "jacobian_norm", "random_like", "spectral_radius", "state_norm"]

_Product = Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]


def spectral_radius(
    f: Callable[..., State], z: State, x: Any = None, *, num_iter: int = 50, generator: torch.Generator | None = None
) -> Tensor:
    r"""Estimate the spectral radius of the Jacobian :math:`J = \partial f / \partial z` at a point, per sample.

    Growth of a random vector under repeated products with :math:`J^H` (same spectral radius as :math:`J`), by its
    geometric mean over the second half of the products, which also serves complex pairs of eigenvalues.

    Args:
        f: map that treats samples independently, called as ``f(z)`` or, with per-sample data, ``f(z, x)``.
        z: point, a real or complex tensor ``(B, *)`` or a tuple of such tensors.
        x: per-sample data handed on to ``f``, or None.
        num_iter: products with the Jacobian; at least 2.
        generator: of the random start; by default one with a fixed seed, so that results repeat.

    Returns:
        Estimates, float64 ``(B,)``, dimensionless. No bound: below or above the truth while unconverged.

    Raises:
        ValueError: if ``num_iter`` is below 2.

    Reference:
        R. von Mises and H. Pollaczek-Geiringer, "Praktische Verfahren der Gleichungsaufloesung", ZAMM 9 (1929) 58-77.
    """
    check_int("num_iter", num_iter, minimum=2)
    transposed, _ = _products(f, z, x)
    v, _ = _unit(random_like(z, generator))
    growth = []
    for _ in range(num_iter):
        v, norm = _unit(transposed(v))
        growth.append(norm)
    tail = torch.stack(growth[num_iter // 2 :])
    return torch.where((tail == 0).any(0), torch.zeros_like(tail[0]), tail.clamp_min(1e-300).log().mean(0).exp())


def jacobian_norm(
    f: Callable[..., State], z: State, x: Any = None, *, num_iter: int = 20, generator: torch.Generator | None = None
) -> Tensor:
    r"""Estimate the largest singular value of the Jacobian :math:`\partial f / \partial z` at a point, per sample.

    Power iteration on :math:`J^H J`. The estimate grows towards the truth from below.

    Args:
        f: see :func:`spectral_radius`; its double backward must exist.
        z: see :func:`spectral_radius`.
        x: see :func:`spectral_radius`.
        num_iter: pairs of products with :math:`J` and :math:`J^H`.
        generator: see :func:`spectral_radius`.

    Returns:
        Lower bounds of the norm, float64 ``(B,)``, dimensionless.

    Raises:
        ValueError: if ``num_iter`` is not positive.
    """
    check_int("num_iter", num_iter)
    transposed, forward = _products(f, z, x)
    v, _ = _unit(random_like(z, generator))
    norm = torch.zeros(0)
    for _ in range(num_iter):
        u, norm = _unit(forward(v))
        v, _ = _unit(transposed(u))
    return norm


def jacobian_frobenius_norm(
    f: Callable[..., State], z: State, x: Any = None, *, num_probes: int = 1, generator: torch.Generator | None = None
) -> Tensor:
    r"""Estimate the Frobenius norm of the Jacobian :math:`\partial f / \partial z` at a point, per sample.

    :math:`\|J\|_F^2 = E\,\|J^H v\|^2` over random ``v`` of unit covariance.

    Args:
        f: see :func:`spectral_radius`.
        z: see :func:`spectral_radius`.
        x: see :func:`spectral_radius`.
        num_probes: number of random vectors.
        generator: see :func:`spectral_radius`.

    Returns:
        Estimates, float64 ``(B,)``, dimensionless.

    Raises:
        ValueError: if ``num_probes`` is not positive.

    Reference:
        M. F. Hutchinson, "A stochastic estimator of the trace of the influence matrix for Laplacian smoothing splines",
        Commun. Stat. Simul. Comput. 19 (1990) 433-450, with normal instead of binary probes.
    """
    check_int("num_probes", num_probes)
    transposed, _ = _products(f, z, x)
    generator = _generator(z, generator)
    squares = [state_norm(transposed(random_like(z, generator))) ** 2 for _ in range(num_probes)]
    return torch.stack(squares).mean(0).sqrt()


def _products(f: Callable[..., State], z: State, x: Any) -> tuple[_Product, _Product]:
    """Return the products with the adjoint Jacobian and with the Jacobian, on the graph of one evaluation."""
    with torch.enable_grad():
        leaves = tuple(part.detach().requires_grad_() for part in state_parts(z))
        point = leaves[0] if isinstance(z, Tensor) else leaves
        images = state_parts(f(point) if x is None else f(point, x))
    depends = any(image.requires_grad for image in images)

    def transposed(u: tuple[Tensor, ...], keep: bool = False) -> tuple[Tensor, ...]:
        if not depends:
            return tuple(torch.zeros_like(leaf) for leaf in leaves)
        wanted = [(image, part) for image, part in zip(images, u, strict=True) if image.requires_grad]
        return torch.autograd.grad(
            [image for image, _ in wanted],
            leaves,
            [part for _, part in wanted],
            retain_graph=True,
            create_graph=keep,
            allow_unused=True,
            materialize_grads=True,
        )

    def forward(v: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # The product with the adjoint is linear in u, so its adjoint is the product with the Jacobian itself.
        with torch.enable_grad():
            u = tuple(torch.zeros_like(image, requires_grad=True) for image in images)
            products = transposed(u, keep=True)
            pairs = [(product, part) for product, part in zip(products, v, strict=True) if product.requires_grad]
            if not pairs:
                return tuple(torch.zeros_like(image) for image in images)
            found, given = zip(*pairs, strict=True)
            return torch.autograd.grad(found, u, given, allow_unused=True, materialize_grads=True)

    return transposed, forward


def _generator(z: State, generator: torch.Generator | None) -> torch.Generator:
    return torch.Generator(state_parts(z)[0].device).manual_seed(0) if generator is None else generator


def random_like(z: State, generator: torch.Generator | None) -> tuple[Tensor, ...]:
    """Return normal numbers of a state's shapes, as a tuple."""
    generator = _generator(z, generator)
    return tuple(torch.randn(p.shape, dtype=p.dtype, device=p.device, generator=generator) for p in state_parts(z))


def state_norm(parts: tuple[Tensor, ...]) -> Tensor:
    """Return each sample's Euclidean norm over all tensors of a state, without gradient: float64 ``(B,)``."""
    squares = [torch.linalg.vector_norm(p.detach().flatten(1).abs(), dim=1, dtype=torch.float64) ** 2 for p in parts]
    return torch.stack(squares).sum(0).sqrt()


def _unit(parts: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return each sample's vector at norm one (zeros stay zeros) and the norms before."""
    norm = state_norm(parts)
    scale = torch.where(norm > 0, norm, torch.ones_like(norm))
    unit = tuple(p.detach() / scale.to(p.real.dtype).view(-1, *[1] * (p.ndim - 1)) for p in parts)
    return unit, norm
