"""What the bundles' configurations call: where a bundle is, where a training goes on, what a model is for."""

from __future__ import annotations

import ast
import json
import logging
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from monai.networks import nets as monai_nets

from monai_deqkan._checks import check_empty_folder
from monai_deqkan.networks import nets

__all__ = [
    "check_output_folder",
    "find_bundle_root",
    "free_folder",
    "latest_checkpoint",
    "load_task",
    "load_weights",
    "network_class",
    "start_training",
    "training_folder",
]

_MANIFEST = "training_images.csv"  # of published weights
_LOGGER = logging.getLogger(__name__)


def find_bundle_root() -> str:
    """Return the folder of the bundle that the command line names by ``--config_file``, else the current folder.

    So a bundle can be run from anywhere, without ``--bundle_root``. The log says which one was found.
    """
    arguments = sys.argv[1:]
    for position, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name.lstrip("-").replace("-", "_") != "config_file":
            continue
        if not value and position + 1 < len(arguments):
            value = arguments[position + 1]
        folder = Path(_first_path(value)).parent
        if folder.name == "configs":
            _LOGGER.info("The bundle's folder, from the command line: %s", folder.parent.absolute())
            return str(folder.parent)
    return "."


def _first_path(value: str) -> str:
    """Return the first of the configuration files that one command-line argument lists."""
    try:
        files = ast.literal_eval(value.strip())
    except (SyntaxError, ValueError):
        return re.split(r"[,\]]", value.strip(" ["))[0].strip(" '\"")
    first = files[0] if isinstance(files, (list, tuple)) and files else files
    return first if isinstance(first, str) else ""


def free_folder(path: str | os.PathLike[str]) -> str:
    """Return ``path`` if it is absent or empty, else the first of ``path_2``, ``path_3``, ... that is.

    The default output of a bundle: a second run does not touch the results of the first.
    """
    return training_folder(path)


def training_folder(path: str | os.PathLike[str], resume: bool = False) -> str:
    """Return the default folder of a training's logs: a free one, or that of the training that goes on.

    Args:
        path: folder of the first training; later ones have ``path_2``, ``path_3``, ...
        resume: whether the latest training goes on.
    """
    number = 1
    while _in_use(_numbered(path, number)):
        number += 1
    return str(_numbered(path, max(number - 1, 1) if resume else number))


def check_output_folder(path: str | os.PathLike[str], resume: bool = False) -> None:
    """Refuse an output folder that already holds something, before any work is done.

    Args:
        path: the folder.
        resume: whether a training goes on; then its folder may hold the files of its earlier epochs.

    Raises:
        FileExistsError: if it does.
    """
    if not resume:
        check_empty_folder(Path(path), "the output (`output_dir`)")


def start_training(
    ckpt_dir: str | os.PathLike[str],
    resume: bool = False,
    *,
    ready: Any = None,
    task: Mapping[str, Any] | None = None,
) -> None:
    """Prepare the folder for a training's models; a new training moves those of an earlier one aside.

    With them goes the list of their training images, ``training_images.csv``.

    Args:
        ckpt_dir: folder for models and checkpoints.
        resume: whether the training in that folder goes on; then nothing is moved.
        ready: what the training cannot do without, such as its data sets: where it is an argument it has been made
            before anything is moved.
        task: what the training is for, as its ``model.json`` tells it; a training that goes on must have the task that
            it began with. None leaves that unchecked.

    Raises:
        ValueError: if a training goes on with another task: other classes, sizes or settings of the network.
    """
    folder = Path(ckpt_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if resume and task is not None and (folder / "model.json").is_file():
        _check_same_task(folder / "model.json", task)
    earlier = [p for p in folder.iterdir() if p.is_file() and (p.suffix in (".pt", ".json") or p.name == _MANIFEST)]
    if resume or not earlier:
        return
    kept = Path(free_folder(folder / "previous"))
    kept.mkdir(parents=True)
    for path in earlier:
        path.rename(kept / path.name)
    _LOGGER.info(
        "An earlier training's files were moved to %s. Until this one saves its first model, at the end of an epoch, "
        "there is none in %s: move them back if you stop before.",
        kept,
        folder,
    )


def _check_same_task(path: Path, task: Mapping[str, Any]) -> None:
    begun, now = load_task(path), json.loads(json.dumps(task))
    # The threshold is chosen after a training.
    differing = [name for name in now if name in begun and name != "threshold" and begun[name] != now[name]]
    if not differing:
        return
    found = "; ".join(f"{name} was {json.dumps(begun[name])}, now it is {json.dumps(now[name])}" for name in differing)
    raise ValueError(
        f"The training in {path.parent} began with other settings: {found}. Give the same settings as at its start "
        "together with --resume True, or start a new one with --resume False."
    )


def latest_checkpoint(ckpt_dir: str | os.PathLike[str]) -> str:
    """Return the newest checkpoint from which a training can go on, passing over files cut short by a kill.

    Raises:
        FileNotFoundError: if there is none that can be read.
    """
    paths = sorted(Path(ckpt_dir).glob("checkpoint_epoch=*.pt"), key=_epoch, reverse=True)
    for path in paths:
        try:
            torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            _LOGGER.warning("Passing over a checkpoint that cannot be read: %s (%s).", path, error)
        else:
            return str(path)
    moved = max(Path(ckpt_dir).glob("previous*"), key=lambda path: path.stat().st_mtime, default=None)
    where = f" The models of the training before are in {moved}: move them back to use them." if moved else ""
    raise FileNotFoundError(
        f"No readable checkpoint `checkpoint_epoch=*.pt` in {ckpt_dir}. Start a new training with --resume False."
        f"{where}"
    )


def load_task(
    path: str | os.PathLike[str], default: Mapping[str, Any] | None = None, *, kind: str | None = None
) -> dict[str, Any]:
    """Return what a model is for (class names, threshold, preprocessing), from the ``model.json`` beside its weights.

    Args:
        path: that file.
        default: the task of a model without the file, told by a warning; without a default the file must be there.
        kind: what the file's ``task`` must be if it tells, such as ``"reconstruction"``; None takes any.

    Raises:
        FileNotFoundError: if the file is absent and there is no default.
        ValueError: if the file is no JSON object, or describes a model for another task.
    """
    file = Path(path)
    if not file.is_file():
        if default is None:
            raise FileNotFoundError(
                f"No trained model at {file.with_suffix('.pt')}. Run the bundle's train.json first."
            )
        _LOGGER.warning("There is no %s: the model is taken for what the bundle was made for, %s.", file, dict(default))
        return _Task(file, default)
    try:
        task = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"The model's description cannot be read: {file} ({error}). Train anew.") from error
    if not isinstance(task, dict):
        raise ValueError(f"The model's description must be a JSON object: {file}.")
    if kind is not None and task.get("task", kind) != kind:
        raise ValueError(
            f"The model described by {file} is for {task['task']}, this configuration for {kind}. Set `ckpt_dir` to "
            f"the folder of a {kind} model."
        )
    return _Task(file, {**(default or {}), **task})


class _Task(dict[str, Any]):
    """What a model is for; asking for what the file does not tell is an error that names the file."""

    def __init__(self, file: Path, content: Mapping[str, Any]) -> None:
        super().__init__(content)
        self.file = file

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"The model's description {self.file} lacks {key!r}. Train anew, or restore the file.")


def say_where(output_dir: str | os.PathLike[str]) -> None:
    """Log where a run's results are, as its last line."""
    _LOGGER.info("The results are in %s.", Path(output_dir).absolute())


def network_class(name: str) -> type[torch.nn.Module]:
    """Return one of our networks, or of MONAI's, by the name of its class: what a model's description may hold.

    Raises:
        ValueError: if neither ``monai_deqkan.networks.nets`` nor ``monai.networks.nets`` has a network of that name.

    Example:
        >>> network_class("KANUNet").__module__, network_class("BasicUNet").__module__
        ('monai_deqkan.networks.nets.kan_unet', 'monai.networks.nets.basic_unet')
    """
    for room in (nets, monai_nets):
        found = getattr(room, name, None) if isinstance(name, str) else None
        if isinstance(found, type) and issubclass(found, torch.nn.Module):
            return found
    raise ValueError(
        f"`network_name` must be a network of monai_deqkan.networks.nets ({', '.join(nets.__all__)}) or of "
        f"monai.networks.nets; got {name!r}."
    )


def load_weights(network: torch.nn.Module, path: str | os.PathLike[str]) -> torch.nn.Module:
    """Load weights into a network and return it.

    Args:
        network: the network.
        path: file with a state dict.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file does not hold this network's weights, or they are not finite.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"No trained weights at {file}. Run the bundle's train.json first.")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        network.load_state_dict(state)
    except Exception as error:
        raise ValueError(
            f"The weights in {file} do not fit this network, or the file is damaged: {error}. Use the settings that it "
            "was trained with."
        ) from error
    tensors = [*network.named_parameters(), *network.named_buffers()]
    broken = [name for name, value in tensors if not bool(value.isfinite().all())]
    if broken:
        raise ValueError(
            f"The weights in {file} must be finite; {', '.join(broken[:3])} hold NaN or infinity. Train anew."
        )
    return network


def _epoch(path: Path) -> int:
    match = re.search(r"epoch=(\d+)", path.name)
    return int(match.group(1)) if match else -1


def _numbered(path: str | os.PathLike[str], number: int) -> Path:
    return Path(path) if number == 1 else Path(f"{path}_{number}")


def _in_use(folder: Path) -> bool:
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
