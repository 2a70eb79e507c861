"""Norms and inner products of long rows: in float64, or as good as that in a fraction of the time."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["inner_products", "row_norms"]

_LONG, _CHUNK = 1 << 14, 256
_SMALL, _LARGE = 1e-12, 1e15  # no square of entries of vectors between these norms leaves float32's range and matters


def row_norms(*matrices: Tensor) -> Tensor:
    """Return the Euclidean norms of the rows of ``n`` matrices ``(B, N)``, detached, float64 ``(n, B)``.

    On a CPU long float32 rows are summed over chunks of 256 entries in float32 and over the chunks in float64, unless
    the squares might leave float32's range: in two fifths of the time, with a relative error below 1e-7.
    """
    if _long(matrices[0]) and matrices[0].device.type == "cpu":
        norms = torch.linalg.vector_norm(
            torch.stack([_chunk_norms(rows.detach()) for rows in matrices]), dim=2, dtype=torch.float64
        )
        if _in_range(norms, _SMALL, _LARGE):
            return norms
    return torch.stack([torch.linalg.vector_norm(rows.detach(), dim=1, dtype=torch.float64) for rows in matrices])


def _chunk_norms(rows: Tensor) -> Tensor:
    whole = rows.shape[1] - rows.shape[1] % _CHUNK
    norms = torch.linalg.vector_norm(rows[:, :whole].unflatten(1, (-1, _CHUNK)), dim=2)
    if whole == rows.shape[1]:
        return norms
    return torch.cat((norms, torch.linalg.vector_norm(rows[:, whole:], dim=1, keepdim=True)), dim=1)


def inner_products(vectors: Tensor, rows: Tensor) -> Tensor:
    """Return the inner products of ``(B, n, N)`` with ``(B, m, N)``, float64 ``(B, n, m)``.

    Long float32 rows are summed over chunks as in :func:`row_norms`: on a CPU in a fifth of the time, with errors of
    5e-10 of the product of the norms (N = 200 000), where plain float32 sums have 1e-8.
    """
    if _long(rows):
        whole = rows.shape[2] - rows.shape[2] % _CHUNK
        left, right = (part[..., :whole].unflatten(2, (-1, _CHUNK)).transpose(1, 2) for part in (vectors, rows))
        # Sample by sample: (N / chunk, m, chunk) is a view, with the samples in front it would be a copy.
        pairs = zip(left.unbind(), right.unbind(), strict=True)
        sums = torch.stack([torch.bmm(a, b.mT).sum(0, dtype=torch.float64) for a, b in pairs])
        if whole < rows.shape[2]:
            sums = sums + vectors[..., whole:].double() @ rows[..., whole:].double().mT
        if _in_range(sums.detach().abs().amax(dim=2), _SMALL**2, _LARGE**2):
            return sums
    return vectors.double() @ rows.double().mT


def _long(rows: Tensor) -> bool:
    return rows.dtype == torch.float32 and rows.shape[-1] >= _LONG and rows.shape[0] > 0


def _in_range(sizes: Tensor, low: float, high: float) -> bool:
    smallest, largest = sizes.aminmax()  # both NaN if any is
    return low < float(smallest) and float(largest) < high
