"""A learning rate that rises before any other schedule begins."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from monai_deqkan._checks import check_int

__all__ = ["GradualWarmup"]


class GradualWarmup(LRScheduler):
    r"""Let the learning rate rise linearly, then hand over to another schedule.

    .. math::
        \eta_t = \eta_0 \frac{t + 1}{N + 1} \quad (t < N), \qquad \eta_t = \eta^\mathrm{after}_{t - N} \quad (t \ge N)

    Differences from torch's ``SequentialLR`` of ``LinearLR`` and another: the length :math:`N` is a setting, not state,
    so that a training resumed with another one goes on, and ``after`` from the step where it stood; the state nests
    that of ``after``; and no step has a learning rate of zero, with which the first epoch would be lost.

    Args:
        optimizer: the optimizer, whose learning rates are :math:`\eta_0`.
        num_epochs: length :math:`N` of the rise, in calls of ``step`` (epochs or iterations); 0 for none.
        after: the schedule that follows, made for the same optimizer; by default the learning rate stays.

    Raises:
        TypeError: if an argument is of a wrong kind, or ``after`` waits for a metric.
        ValueError: if ``num_epochs`` is negative, or ``after`` belongs to another optimizer.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> schedule = GradualWarmup(optimizer, 3, torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.1))
        >>> rates = []
        >>> for _ in range(6):
        ...     rates.append(round(optimizer.param_groups[0]["lr"], 2))
        ...     optimizer.step()
        ...     schedule.step()
        >>> rates
        [0.25, 0.5, 0.75, 1.0, 1.0, 0.1]

    Reference:
        P. Goyal et al., "Accurate, large minibatch SGD: training ImageNet in 1 hour", arXiv:1706.02677, section 2.2.
    """

    def __init__(self, optimizer: Optimizer, num_epochs: int, after: LRScheduler | None = None) -> None:
        self.num_epochs = check_int("num_epochs", num_epochs, minimum=0)
        if after is not None and (not isinstance(after, LRScheduler) or isinstance(after, ReduceLROnPlateau)):
            raise TypeError(
                f"`after` must be a torch LRScheduler that steps without a metric; got {type(after).__name__}."
            )
        if after is not None and after.optimizer is not optimizer:
            raise ValueError("`after` must be made for the same optimizer as the warm-up. Pass it that one.")
        self.after = after
        self._start = [group["lr"] for group in optimizer.param_groups]
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        """Return the learning rates of the present step, one per parameter group."""
        if self.last_epoch < self.num_epochs:
            return [base * (self.last_epoch + 1) / (self.num_epochs + 1) for base in self.base_lrs]
        return [group["lr"] for group in self.optimizer.param_groups]

    def step(self, epoch: int | None = None) -> None:
        """Go one step on.

        Raises:
            ValueError: if ``epoch`` is given.
        """
        if epoch is not None:
            raise ValueError("`step` takes no epoch. Load a state with `load_state_dict` to go elsewhere.")
        passed = self.last_epoch + 1 - self.num_epochs  # steps of `after` that will have been made
        if passed == 0:
            self._set(self._after_rates())
        elif passed > 0 and self.after is not None:
            self.after.step()
        super().step()

    def state_dict(self) -> dict[str, Any]:
        """Return the step, and the state of ``after``."""
        return {"last_epoch": self.last_epoch, "after": None if self.after is None else self.after.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to the step of a state and set the optimizer's learning rates; load the optimizer's own state before."""
        self.last_epoch = int(state_dict["last_epoch"])
        if self.after is not None:
            self.after.load_state_dict(state_dict["after"])
        if self.last_epoch < self.num_epochs:
            self._set(self.get_lr())
        else:
            self._set(self._after_rates())
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _after_rates(self) -> list[Any]:
        """Return the learning rates where ``after`` stands: its first ones, unless a resumed training came further."""
        return self._start if self.after is None else self.after.get_last_lr()

    def _set(self, rates: list[Any]) -> None:
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
