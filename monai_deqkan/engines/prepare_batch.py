"""From a batch of k-space to the arguments of a reconstruction network."""

from __future__ import annotations

from typing import Any

import torch
from monai.engines import PrepareBatch
from torch import Tensor

from monai_deqkan._checks import check_tensor

__all__ = ["PrepareBatchKspace"]


class PrepareBatchKspace(PrepareBatch):
    """Prepare a batch for MONAI's supervised engines and a network ``forward(kspace, mask, sensitivity_maps)``.

    The batch has ``kspace`` ``(B, K, *space)`` complex, and may have ``mask``, ``sensitivity_maps`` and the target
    ``image`` ``(B, 2, *space)``; what is absent is left to the network.
    """

    def __call__(
        self,
        batchdata: dict[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, tuple[()], dict[str, Tensor]]:
        """Move to ``device``; further ``kwargs`` go to :meth:`torch.Tensor.to`, as in MONAI.

        Raises:
            KeyError: if the batch has no ``kspace``.
        """
        if "kspace" not in batchdata:
            raise KeyError(f"A batch for reconstruction needs the key 'kspace'; got {sorted(map(str, batchdata))}.")

        def moved(key: str) -> Tensor:
            return check_tensor(key, batchdata[key]).to(device=device, non_blocking=non_blocking, **kwargs)

        extra = {key: moved(key) for key in ("mask", "sensitivity_maps") if batchdata.get(key) is not None}
        target = moved("image") if batchdata.get("image") is not None else None
        return moved("kspace"), target, (), extra
