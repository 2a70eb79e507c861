"""Gradients of bounded norm in MONAI's trainers."""

from __future__ import annotations

import math

import torch
from ignite.engine import Engine
from monai.engines.utils import IterationEvents
from torch.optim import Optimizer

from monai_deqkan._checks import check_range

__all__ = ["GradientClipper"]


class GradientClipper:
    """Clip the norm of all gradients together between the backward pass and the optimizer's step.

    Attach it to a trainer that fires ``IterationEvents.BACKWARD_COMPLETED``, as MONAI's ``SupervisedTrainer`` does. In
    mixed precision the gradients are unscaled before. A gradient with NaN or infinity stays as it is: the scaler skips
    that step; without mixed precision it is taken. Not for gradients accumulated over several backward passes.

    Args:
        optimizer: the trainer's optimizer; its parameters' gradients are clipped.
        max_norm: largest Euclidean norm, positive.

    Raises:
        ValueError: if ``max_norm`` is not positive.

    Example:
        >>> engine = Engine(lambda engine, batch: None)
        >>> engine.register_events(*IterationEvents)
        >>> GradientClipper(torch.optim.SGD([torch.zeros(1)], lr=0.1), max_norm=2.0).attach(engine)
    """

    def __init__(self, optimizer: Optimizer, max_norm: float = 2.0) -> None:
        self.optimizer = optimizer
        self.max_norm = check_range("max_norm", max_norm, 0.0, math.inf, open_low=True)

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Clip the gradients of the present step."""
        scaler = getattr(engine, "scaler", None)
        if scaler is not None and scaler.is_enabled():
            scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if bool(torch.isfinite(norm)):
            torch.nn.utils.clip_grads_with_norm_(parameters, self.max_norm, norm)
