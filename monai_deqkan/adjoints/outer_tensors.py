"""Which tensors from outside does a cell use, besides its arguments? Gradients have to find the way to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

__all__ = ["Edges", "outer_gradients", "outer_tensors", "watched"]

Edges = dict[tuple[Node, int], Tensor]


def watched(cell: Callable[..., Any], edges: Edges) -> Callable[..., Any]:
    """Return the cell, which notes on its first call the computed tensors that want a gradient and are used inside.

    To be called without gradients: what the cell computes itself then wants none. The first call runs uncompiled.
    """
    if torch.compiler.is_compiling():
        return cell
    waiting = [True]

    def call(*arguments: Any) -> Any:
        if not waiting:
            return cell(*arguments)
        waiting.clear()
        _note(arguments, edges)
        with torch.compiler.set_stance("force_eager"), _Watch(edges):
            return cell(*arguments)

    return call


class _Watch(TorchFunctionMode):
    def __init__(self, edges: Edges) -> None:
        super().__init__()
        self.edges = edges

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _note((args, kwargs), self.edges)
        return func(*args, **(kwargs or {}))


def _note(values: Any, edges: Edges) -> None:
    for tensor in _tensors(values):
        if tensor.grad_fn is not None:
            edges[tensor.grad_fn, tensor.output_nr] = tensor


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(tuple(values.values()))


def outer_tensors(images: Sequence[Tensor], leaves: Sequence[Tensor], edges: Edges) -> tuple[Tensor, ...]:
    """Return what the images were computed from: trainable leaves (but not ``leaves``), and tensors noted before."""
    own = {id(leaf) for leaf in leaves}
    found = _reached([tuple(get_gradient_edge(image))[:2] for image in images if image.requires_grad], edges)
    return tuple(tensor for tensor in found.values() if id(tensor) not in own)


def _reached(start: Sequence[Any], edges: Edges, *, stop: bool = True) -> Edges:
    """Walk from some edges to leaves and to the noted tensors, and there stop or go on."""
    stack, seen = list(start), set()
    found: Edges = {}
    while stack:
        node, index = stack.pop()
        if node is None or (node, index) in seen:
            continue
        seen.add((node, index))
        if (node, index) in edges:
            found[node, index] = edges[node, index]
            if stop:
                continue
        variable = getattr(node, "variable", None)
        if variable is not None:
            found[node, index] = variable
        if (node, None) not in seen:
            seen.add((node, None))
            stack.extend(node.next_functions)
    return found


def outer_gradients(
    images: Sequence[Tensor], outer: Sequence[Tensor], gradients: Sequence[Tensor]
) -> list[Tensor | None]:
    """Return vector-Jacobian products with respect to tensors some of which may have been computed from others.

    Each tensor counts as an independent variable here, while autograd would add to a tensor's gradient what reaches it
    through another one. Hooks of the tensors do not run: they will when the gradients are handed on.
    """
    with _SilencedHooks(outer):
        found = list(_grad(images, outer, gradients))
        edges: Edges = {tuple(get_gradient_edge(tensor))[:2]: tensor for tensor in outer}  # type: ignore[misc]
        index = {id(tensor): position for position, tensor in enumerate(outer)}
        behind = []
        for position, tensor in enumerate(outer):
            parents = () if tensor.grad_fn is None else tensor.grad_fn.next_functions
            history = _reached(parents, edges, stop=False)
            behind.append((position, [index[id(other)] for other in history.values() if id(other) in index]))
        # What has most others behind it comes first: nothing reaches it through those that follow.
        for position, others in sorted(behind, key=lambda entry: -len(entry[1])):
            part = found[position]
            if part is None or not others:
                continue
            passed = _grad([outer[position]], [outer[other] for other in others], [part])
            for other, share in zip(others, passed, strict=True):
                held = found[other]
                if share is not None and held is not None:
                    found[other] = held - share
    return found


def _grad(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], gradients: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(outputs, inputs, gradients, create_graph=True, allow_unused=True)


class _SilencedHooks:
    """A ``with`` block that leaves no trace on some tensors: their hooks do nothing, retained gradients stay."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        # One dictionary for each tensor, which autograd shares.
        self.registers = [tensor._backward_hooks for tensor in tensors if tensor._backward_hooks]
        self.retained = [(tensor, tensor.grad) for tensor in tensors if tensor.retains_grad]

    def __enter__(self) -> None:
        self.hooks = [dict(register) for register in self.registers]
        for register in self.registers:
            register.clear()

    def __exit__(self, *error: object) -> None:
        for register, hooks in zip(self.registers, self.hooks, strict=True):
            register.update(hooks)
        for tensor, gradient in self.retained:
            tensor.grad = gradient
