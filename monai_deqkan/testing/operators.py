"""Conformance check of linear operators, for this package's and for anyone's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from monai_deqkan.operators import LinearOperator

__all__ = ["check_operator"]


def check_operator(
    build: Callable[[torch.dtype], LinearOperator],
    input_shape: Sequence[int],
    *,
    dtypes: Sequence[torch.dtype] = (torch.complex64, torch.complex128),
    seed: int = 0,
) -> None:
    r"""Check that an operator is linear, has the right adjoint and gradient, and can be restricted to some samples.

    Per dtype: :math:`\langle A x, y\rangle = \langle x, A^H y\rangle`; linearity over complex numbers; outputs keep the
    dtype; ``.H`` and ``normal`` agree with ``forward`` and ``adjoint``; the gradient of :math:`\mathrm{Re}\langle A x,
    y\rangle` is :math:`A^H y`; ``take(rows)`` on some samples equals these rows of the whole. Where the operator has a
    ``norm_bound``, shape ``(B or 1,)``, power iterations find no sample's norm above it.

    Args:
        build: returns the operator for a complex dtype, with per-sample data of at least that precision.
        input_shape: shape ``(B, *)`` of an input, with at least two samples.
        dtypes: complex dtypes to check.
        seed: seed of the random inputs.

    Raises:
        AssertionError: if the operator fails; the message says which property, at which dtype, and by how much.
        ValueError: if ``input_shape`` has fewer than two samples.

    Example:
        >>> from monai_deqkan.operators import FourierOperator
        >>> check_operator(lambda dtype: FourierOperator(2), (2, 4, 5))
    """
    if len(input_shape) < 2 or input_shape[0] < 2:
        raise ValueError(f"`input_shape` must be (B, *) with at least two samples; got {tuple(input_shape)}.")
    for dtype in dtypes:
        operator = build(dtype)
        generator = torch.Generator().manual_seed(seed)
        x, other = (torch.randn(*input_shape, generator=generator, dtype=dtype) for _ in range(2))
        image = operator(x)
        y = torch.randn(image.shape, generator=generator, dtype=dtype)
        back = operator.adjoint(y)
        for name, result in (("A x", image), ("A^H y", back)):
            if result.dtype != dtype:
                raise AssertionError(f"{name} must keep the dtype {dtype}; got {result.dtype}.")
        tolerance = 200 * torch.finfo(dtype).eps
        for name, got, expected in _properties(operator, x, other, y):
            if got.dtype != expected.dtype or got.shape != expected.shape:
                raise AssertionError(
                    f"{name} ({dtype}): expected {expected.dtype} of shape {tuple(expected.shape)}; got {got.dtype} of "
                    f"shape {tuple(got.shape)}."
                )
            scale = max(float(expected.abs().max()), 1.0) if expected.ndim else float(x.norm() * y.norm())
            error = float((got - expected).abs().max()) / scale
            if not error <= tolerance:
                raise AssertionError(f"{name} ({dtype}): relative error {error:.3g} exceeds {tolerance:.3g}.")
        bound = getattr(operator, "norm_bound", None)
        if bound is not None:
            excess = float((_norm(operator, x) / bound.to(torch.float64)).max()) - 1
            if not excess <= tolerance:
                raise AssertionError(f"norm_bound ({dtype}): the norm exceeds it by a share of {excess:.3g}.")


def _norm(operator: LinearOperator, x: Tensor) -> Tensor:
    """Return a lower bound of each sample's operator norm, by power iterations from ``x``."""
    for _ in range(10):
        x = operator.normal(x)
        x = x / x.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))
    return operator(x).flatten(1).norm(dim=1).double()


def _properties(operator: LinearOperator, x: Tensor, other: Tensor, y: Tensor) -> list[tuple[str, Tensor, Tensor]]:
    """Return ``(name, got, expected)`` for each property; scalars are inner products."""
    image, back = operator(x), operator.adjoint(y)
    factor = 0.5 - 2j
    leaf = x.clone().requires_grad_()
    loss = (operator(leaf).conj() * y).sum().real
    (gradient,) = torch.autograd.grad(loss, leaf)
    properties = [
        ("<A x, y> = <x, A^H y>", torch.vdot(image.flatten(), y.flatten()), torch.vdot(x.flatten(), back.flatten())),
        ("linearity", operator(x + factor * other), image + factor * operator(other)),
        ("A.H(y) = A^H y", operator.H(y), back),
        ("A.H.H(x) = A x", operator.H.H(x), image),
        ("normal(x) = A^H A x", operator.normal(x), operator.adjoint(image)),
        ("gradient = adjoint", gradient, back),
    ]
    last = x.shape[0] - 1
    reversed_rows = torch.arange(last, -1, -1)
    some = torch.arange(x.shape[0]) == last
    for rows in (torch.tensor([last]), reversed_rows, some):
        part = operator.take(rows)
        properties.append(("take(rows) forward", part(x[rows]), image[rows]))
        properties.append(("take(rows) adjoint", part.adjoint(y[rows]), back[rows]))
    return properties
