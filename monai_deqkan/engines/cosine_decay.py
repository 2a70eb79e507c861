"""A learning rate that falls on a cosine, also when a training is resumed for more epochs."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from monai_deqkan._checks import check_int, check_range

__all__ = ["CosineDecay"]


class CosineDecay(LRScheduler):
    r"""Let the learning rate fall on half a cosine.

    .. math:: \eta_t = \eta_0 \left(a + (1 - a) \frac{1 + \cos(\pi t / T)}{2}\right)

    Difference from torch's ``CosineAnnealingLR``: the length :math:`T` and the start :math:`\eta_0` are settings, not
    state. A training resumed with other ones goes on at its epoch on the new curve, where torch's goes on with the old
    length, and rises again after its end.

    Args:
        optimizer: the optimizer, whose learning rates are :math:`\eta_0`.
        num_epochs: length :math:`T`, in calls of ``step``; beyond it the learning rate stays.
        final_factor: last learning rate over the first, :math:`a`, dimensionless, in ``[0, 1]``.

    Raises:
        TypeError: if an argument is of a wrong kind.
        ValueError: if an argument lies outside its range.

    Reference:
        I. Loshchilov, F. Hutter, "SGDR: stochastic gradient descent with warm restarts", ICLR 2017, eq. 5, without
        restarts.
    """

    def __init__(self, optimizer: Optimizer, num_epochs: int, final_factor: float = 0.02) -> None:
        self.num_epochs = check_int("num_epochs", num_epochs)
        self.final_factor = check_range("final_factor", final_factor, 0, 1)
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        """Return the learning rates of the present epoch, one per parameter group."""
        fall = (1 + math.cos(math.pi * min(self.last_epoch / self.num_epochs, 1))) / 2
        return [base * (self.final_factor + (1 - self.final_factor) * fall) for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch; the curve is a setting."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to the epoch of a state and set the optimizer's learning rates; load the optimizer's own state before."""
        self.last_epoch = int(state_dict["last_epoch"])
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate
