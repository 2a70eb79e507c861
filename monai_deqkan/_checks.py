"""Argument checks whose messages say what was expected, what came, and what to do."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "check_choice",
    "check_empty_folder",
    "check_finite",
    "check_folder",
    "check_int",
    "check_loss_and_network",
    "check_range",
    "check_shape",
    "check_spatial_dims",
    "check_tensor",
    "did_you_mean",
]


def _advice(text: str) -> str:
    return f" {text}" if text else ""


def check_tensor(name: str, value: Any, advice: str = "") -> Tensor:
    """Return ``value`` if it is a tensor.

    Raises:
        TypeError: otherwise.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a torch.Tensor; got {type(value).__name__}.{_advice(advice)}")
    return value


def check_loss_and_network(loss: Any, network: Any) -> None:
    """Check the two arguments of a loss that adds a term about the network to another loss.

    Raises:
        TypeError: if the loss cannot be called, or the network is no module.
    """
    if not callable(loss):
        raise TypeError(f"`loss` must be callable with (prediction, target); got {type(loss).__name__}.")
    if not isinstance(network, nn.Module):
        raise TypeError(f"`network` must be the torch.nn.Module being trained; got {type(network).__name__}.")


def check_shape(name: str, value: Tensor, axes: Sequence[str | int], advice: str = "") -> None:
    """Check the rank and the fixed sizes of a tensor.

    Args:
        name: what the caller calls the tensor.
        value: the tensor.
        axes: one entry per axis: its size, or a letter where any size of at least one will do.
        advice: a sentence on what to do.

    Raises:
        TypeError: if ``value`` is not a tensor.
        ValueError: if rank or sizes differ.
    """
    shape = tuple(check_tensor(name, value).shape)
    fits = len(shape) == len(axes) and all(
        size == axis if isinstance(axis, int) else size > 0 for size, axis in zip(shape, axes, strict=True)
    )
    if not fits:
        expected = ", ".join(str(axis) for axis in axes)
        raise ValueError(f"`{name}` must have shape ({expected}); got {shape}.{_advice(advice)}")


def check_image(name: str, value: Tensor, channels: int, spatial_dims: int) -> None:
    """Check that a network's input is ``(B, channels, *space)`` of real floating-point numbers.

    Raises:
        TypeError: if it is no tensor, or of another kind.
        ValueError: if rank or channels differ.
    """
    check_shape(name, value, ("B", channels, "H", "W", "D")[: spatial_dims + 2])
    if not value.is_floating_point():
        raise TypeError(f"`{name}` must hold floating-point numbers; got {value.dtype}. Scale the image, `.float()`.")


def check_same_shape(first_name: str, first: Any, second_name: str, second: Any) -> None:
    """Raise an error unless two values are tensors of one shape."""
    if check_tensor(first_name, first).shape != check_tensor(second_name, second).shape:
        raise ValueError(
            f"`{first_name}` and `{second_name}` must have one shape; got {tuple(first.shape)} and "
            f"{tuple(second.shape)}."
        )


def check_noise_level(noise_level: Any, image: Tensor, told: bool) -> Tensor | None:
    """Return the noise level that a denoiser of ``(B, C, *space)`` is told as ``(B or 1, 1, *ones)``; None if blind.

    Raises:
        ValueError: if the level is missing, or given to a blind denoiser, or there is not one for each sample.
    """
    if (noise_level is None) == told:
        raise ValueError(
            "This network must be told the `noise_level` of its input."
            if told
            else "This network is blind: leave `noise_level` out, or build it with `blind=False`."
        )
    if noise_level is None:
        return None
    level = torch.as_tensor(noise_level, dtype=image.dtype, device=image.device)
    if level.numel() not in (1, len(image)):
        raise ValueError(
            f"`noise_level` must be one number, or have shape ({len(image)},), one per sample; got "
            f"{tuple(level.shape)}."
        )
    return level.reshape(-1, *[1] * (image.ndim - 1))


def check_finite(name: str, value: Tensor, advice: str = "") -> None:
    """Check that no element is NaN or infinite.

    Raises:
        ValueError: if one is; the message counts them.
    """
    finite = torch.isfinite(value)
    if not bool(finite.all()):
        count = int((~finite).sum())
        raise ValueError(
            f"`{name}` must be finite; {count} of {value.numel()} values are NaN or infinite.{_advice(advice)}"
        )


def check_int(name: str, value: Any, minimum: int = 1) -> int:
    """Return ``value`` if it is an integer of at least ``minimum``.

    Raises:
        TypeError: if it is no integer.
        ValueError: if it is too small.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer; got {value!r}.")
    if value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}; got {value}.")
    return value


def check_range(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> float:
    """Return ``value`` as a float if it lies between ``low`` and ``high``.

    Raises:
        TypeError: if it is no real number.
        ValueError: if it is NaN or outside the interval.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number; got {value!r}.")
    above = value > low if open_low else value >= low
    below = value < high if open_high else value <= high
    if not (above and below):
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
        raise ValueError(f"`{name}` must lie in {interval}; got {value}.")
    return float(value)


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> Any:
    """Return ``value`` if it is one of ``choices``.

    Raises:
        ValueError: otherwise; the message lists the choices and the likeliest one.
    """
    options = list(choices)
    if value not in options:
        hint = did_you_mean(value, options)
        raise ValueError(f"`{name}` must be one of {', '.join(map(str, options))}; got {value!r}.{hint}")
    return value


def did_you_mean(value: Any, options: Iterable[Any]) -> str:
    """Return a sentence, with a space before it, that suggests the likeliest option; empty where none is near."""
    close = difflib.get_close_matches(str(value), [str(option) for option in options], n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


def check_spatial_dims(value: Any, allowed: Sequence[int] = (2, 3)) -> int:
    """Return ``value`` if it is a supported number of spatial dimensions.

    Raises:
        ValueError: otherwise.
    """
    return int(check_choice("spatial_dims", value, allowed))


def check_folder(path: str | Path, what: str) -> Path:
    """Return ``path`` if it is an existing folder.

    Args:
        path: the folder.
        what: what it should hold, for the message, such as ``"the data set"``.

    Raises:
        FileNotFoundError: if nothing is there.
        NotADirectoryError: if it is a file.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        raise FileNotFoundError(f"The folder for {what} does not exist: {folder}. Check the path.")
    if not folder.is_dir():
        raise NotADirectoryError(f"The path for {what} must be a folder; it is a file: {folder}.")
    return folder


def check_empty_folder(path: str | Path, what: str) -> Path:
    """Return ``path`` if it can take new files without touching old ones: absent, or an empty folder.

    Raises:
        FileExistsError: if it holds something.
        NotADirectoryError: if it is a file.
    """
    folder = Path(path).expanduser()
    if folder.exists():
        check_folder(folder, what)
        if any(folder.iterdir()):
            raise FileExistsError(
                f"The folder for {what} already holds files: {folder}. Nothing was written; "
                "name a new folder, or move the old one away."
            )
    for parent in folder.parents:
        if parent.exists():
            check_folder(parent, f"{what} would lie in")
            break
    return folder
