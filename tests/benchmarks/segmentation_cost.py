"""What a segmentation network costs: multiply-adds, memory, time of inference. Shared by the benchmarks beside it."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from bench_deqkan_training import peak_mib
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from monai_deqkan.networks.layers.basis import Basis

__all__ = ["basis_multiply_adds", "inference_ms", "interleaved_ms", "multiply_adds", "peak_mib"]

_POINTS = 64
_PRODUCTS = ("mul", "div", "pow", "exp", "sin", "cos", "sigmoid", "tanh", "addcmul")


class _ProductCounter(TorchDispatchMode):
    """Count the elements that elementwise products and functions give."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__.rstrip("_") in _PRODUCTS and isinstance(result, Tensor):
            self.count += result.numel()
        return result


def basis_multiply_adds(basis: Basis) -> float:
    """Return the products per input element that all functions of a basis take; a sum goes with each, uncounted."""
    with torch.no_grad(), _ProductCounter() as counter:
        basis.values(torch.linspace(*basis.grid_range, _POINTS), dim=0)
    return counter.count / _POINTS


def multiply_adds(network: nn.Module, shape: Sequence[int]) -> int:
    """Count the multiply-adds of one inference on zeros of ``shape``, batch axis included.

    Convolutions and matrix products count wherever they are computed, in autograd functions too, and as often as they
    are: the steps of an equilibrium all count. So do the products in the functions of KAN layers. Normalization,
    pooling, interpolation and ordinary activations do not, as is the custom.
    """
    costs: dict[Basis, float] = {}
    products = 0.0

    def add(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal products
        basis = module.basis
        costs.setdefault(basis, basis_multiply_adds(basis))
        products += inputs[0].numel() * (costs[basis] + 2 * bool(getattr(module, "has_base", False)))

    x = torch.zeros(*shape, device=next(network.parameters()).device)
    was_training = network.training
    with contextlib.ExitStack() as stack:
        for module in network.modules():
            if isinstance(getattr(module, "basis", None), Basis) and hasattr(module, "weight"):
                stack.callback(module.register_forward_pre_hook(add).remove)
        counter = stack.enter_context(FlopCounterMode(display=False))
        stack.enter_context(torch.no_grad())
        network.eval()(x)
    network.train(was_training)
    return counter.get_total_flops() // 2 + round(products)


def inference_ms(network: nn.Module, shape: Sequence[int], repeats: int = 7) -> float:
    """Return the median time per image, in ms, of inference on noise of ``shape`` whose first axis is the batch."""
    was_training = network.training
    network.eval()
    x = torch.randn(*shape, device=next(network.parameters()).device)

    def step() -> None:
        with torch.no_grad():
            network(x)

    times = interleaved_ms({"": step}, repeats, x.device.type)[""]
    network.train(was_training)
    return statistics.median(times) / shape[0]


def interleaved_ms(steps: dict[str, Callable[[], None]], repeats: int, device: str = "cpu") -> dict[str, list[float]]:
    """Return the times of each step in ms, the steps taking turns, after one turn that does not count.

    On one CPU thread it is the process's own time, which other work on the machine disturbs less than the clock's.
    """
    on_gpu = device.startswith("cuda")
    clock = time.process_time if not on_gpu and torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            if on_gpu:
                torch.cuda.synchronize()
            started = clock()
            step()
            if on_gpu:
                torch.cuda.synchronize()
            if repeat:
                times[name].append(1e3 * (clock() - started))
    return times
