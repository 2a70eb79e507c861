"""The interface of a linear forward model, its adjoint and its compositions."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

__all__ = ["AdjointOperator", "ComposedOperator", "LinearOperator", "take_rows"]


def take_rows(data: Tensor, rows: Tensor) -> Tensor:
    """Restrict per-sample data to some rows of the batch; data of batch size one are shared and stay whole.

    Args:
        data: shape ``(B, *)`` or ``(1, *)``.
        rows: indices of the samples to keep, shape ``(R,)``, or a boolean mask of shape ``(B,)``.

    Returns:
        Shape ``(R, *)`` or ``(1, *)``.
    """
    return data if data.shape[0] == 1 else data[rows]


class LinearOperator(ABC):
    r"""A linear map :math:`A` between complex tensors that treats the samples of a batch independently.

    A subclass gives :meth:`forward`, :meth:`adjoint` and :meth:`take`. What it holds (masks, maps) is fixed when it is
    built; no call changes it, though one may keep what it found. Operators compose with ``@``, as matrices do.

    Example:
        >>> import torch
        >>> from monai_deqkan.operators import FourierOperator
        >>> fourier = FourierOperator(spatial_dims=2)
        >>> x = torch.randn(1, 4, 5, dtype=torch.complex128)
        >>> torch.allclose(fourier.H(fourier(x)), x)
        True
    """

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        r"""Return :math:`A x`, for ``x`` of shape ``(B, *)``."""

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        r"""Return :math:`A^H y`, for ``y`` of shape ``(B, *)``."""

    @abstractmethod
    def take(self, rows: Tensor) -> LinearOperator:
        """Return the operator of some samples of the batch only.

        Args:
            rows: indices of the samples to keep, shape ``(R,)``, or a boolean mask of shape ``(B,)``.
        """

    def normal(self, x: Tensor) -> Tensor:
        r"""Return :math:`A^H A x`."""
        return self.adjoint(self.forward(x))

    @property
    def H(self) -> LinearOperator:  # noqa: N802
        r"""The adjoint :math:`A^H` as an operator."""
        return AdjointOperator(self)

    def __call__(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.forward(x)

    def __matmul__(self, other: LinearOperator) -> LinearOperator:
        if not isinstance(other, LinearOperator):
            return NotImplemented
        return ComposedOperator(self, other)


class AdjointOperator(LinearOperator):
    """The adjoint of an operator; obtained as ``operator.H``.

    Args:
        operator: the operator to take the adjoint of.
    """

    def __init__(self, operator: LinearOperator) -> None:
        self.operator = operator

    def forward(self, x: Tensor) -> Tensor:
        """Apply the adjoint of the wrapped operator."""
        return self.operator.adjoint(x)

    def adjoint(self, y: Tensor) -> Tensor:
        """Apply the wrapped operator."""
        return self.operator.forward(y)

    def take(self, rows: Tensor) -> LinearOperator:
        """Return the adjoint of the operator of some samples."""
        return self.operator.take(rows).H

    @property
    def H(self) -> LinearOperator:  # noqa: N802
        """The wrapped operator."""
        return self.operator


class ComposedOperator(LinearOperator):
    """One operator after another; obtained as ``outer @ inner``.

    Args:
        outer: the operator applied last.
        inner: the operator applied first.
    """

    def __init__(self, outer: LinearOperator, inner: LinearOperator) -> None:
        self.outer = outer
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Apply the inner, then the outer operator."""
        return self.outer.forward(self.inner.forward(x))

    def adjoint(self, y: Tensor) -> Tensor:
        """Apply the outer, then the inner adjoint."""
        return self.inner.adjoint(self.outer.adjoint(y))

    def take(self, rows: Tensor) -> LinearOperator:
        """Return the composition for some samples."""
        return ComposedOperator(self.outer.take(rows), self.inner.take(rows))
