"""The methods that a reconstruction suite compares, by name, and the table of their tuned weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from torch import Tensor, nn

from monai_deqkan._checks import did_you_mean
from monai_deqkan.engines.bundle import load_task, load_weights
from monai_deqkan.metrics import magnitude
from monai_deqkan.operators import MRIOperator, combine_map_sets
from monai_deqkan.solvers import SolveRecorder
from monai_deqkan.transforms import NormalizeKspace
from monai_deqkan.variational import cg_sense, tv_sense, wavelet_sense

__all__ = [
    "RIVALS",
    "Reconstruction",
    "ReconstructionMethod",
    "TunedWeights",
    "load_method",
    "load_reconstructor",
    "trained_maps_method",
]

Reconstruct = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, bool | None]]


@dataclass(frozen=True)
class Reconstruction:
    """What a method made of one batch.

    Attributes:
        image: magnitude ``(B, 1, H, W)``, in the unit of the k-space.
        converged: whether all solves converged; None for a method that solves nothing.
    """

    image: Tensor
    converged: bool | None


@dataclass(frozen=True)
class ReconstructionMethod:
    """A method of reconstruction by name.

    Attributes:
        name: what tables call it.
        run: maps k-space ``(B, K, H, W)``, mask, coil maps ``(B, K, H, W)`` or map sets ``(B, M, K, H, W)`` and the
            weight to a complex image (one per map set) and whether it converged.
        default_weight: the weight where none was tuned; NaN for methods without.
        search: lowest and highest weight to try when it is tuned.
        whole: whether the weight is a whole number.
        brief: like ``run`` with few iterations, which take as much memory; None where ``run`` is short.
    """

    name: str
    run: Reconstruct
    default_weight: float = math.nan
    search: tuple[float, float] | None = None
    whole: bool = False
    brief: Reconstruct | None = None

    def __call__(self, kspace: Tensor, mask: Tensor, maps: Tensor, weight: float | None = None) -> Reconstruction:
        """Reconstruct a batch without gradients."""
        with torch.no_grad():
            image, converged = self.run(kspace, mask, maps, self.default_weight if weight is None else weight)
            if image.is_complex() and maps.ndim > kspace.ndim:
                image = combine_map_sets(image)
            return Reconstruction(magnitude(image).float(), converged)


def _zero_filled(kspace: Tensor, mask: Tensor, maps: Tensor, weight: float) -> tuple[Tensor, None]:
    return MRIOperator(mask, maps).adjoint(kspace), None


def _cg_sense(kspace: Tensor, mask: Tensor, maps: Tensor, weight: float) -> tuple[Tensor, None]:
    # Stopped early on purpose: the number of iterations regularizes.
    return cg_sense(kspace, mask, maps, max_iter=int(weight)), None


def _tv(kspace: Tensor, mask: Tensor, maps: Tensor, weight: float, max_iter: int = 300) -> tuple[Tensor, bool]:
    solution = tv_sense(kspace, mask, maps, weight=weight, max_iter=max_iter, on_failure="ignore")
    return solution.image, bool(solution.converged.all())


def _wavelet(kspace: Tensor, mask: Tensor, maps: Tensor, weight: float, max_iter: int = 500) -> tuple[Tensor, bool]:
    solution = wavelet_sense(kspace, mask, maps, weight=weight, max_iter=max_iter, on_failure="ignore")
    return solution.image, bool(solution.converged.all())


# docs/reference/mri-rivals.md says where the default weights come from.
RIVALS: Mapping[str, ReconstructionMethod] = {
    "zero_filled": ReconstructionMethod("zero_filled", _zero_filled),
    "cg_sense": ReconstructionMethod("cg_sense", _cg_sense, 8, (1, 30), whole=True),
    "tv": ReconstructionMethod("tv", _tv, 1e-2, (3e-4, 0.1), brief=partial(_tv, max_iter=3)),
    "wavelet": ReconstructionMethod("wavelet", _wavelet, 5e-3, (3e-4, 0.1), brief=partial(_wavelet, max_iter=3)),
}
"""The methods without learning: zero-filled SENSE, CG-SENSE (its weight is the number of iterations), TV, wavelet."""


def load_method(name: str | Path, device: torch.device | str = "cpu") -> ReconstructionMethod:
    """Return a method: one of :data:`RIVALS`, or a trained bundle.

    Args:
        name: a rival's name; the folder of a bundle with ``configs/inference.json`` and ``models/model.pt``; or a
            weights file in ``models`` or in a folder of it, with its own ``model.json`` beside it.
        device: where a trained network runs.

    Raises:
        ValueError: if it is none of these.
        FileNotFoundError: if the bundle has no trained weights.
    """
    if str(name) in RIVALS:
        return RIVALS[str(name)]
    root, weights = _find_model(name)
    network = load_reconstructor(name, device)
    normalize = NormalizeKspace()

    def run(kspace: Tensor, mask: Tensor, maps: Tensor, weight: float) -> tuple[Tensor, bool | None]:
        images = []
        with SolveRecorder() as recorder:
            for sample, sample_mask, sample_maps in zip(kspace, mask, maps, strict=True):
                scaled, scale = normalize(sample)
                images.append(network(scaled[None], sample_mask[None], sample_maps[None]) * scale)
        solved = bool(recorder.converged().all()) if recorder.records else None
        return torch.cat(images).as_subclass(Tensor), solved

    below = weights.parent.absolute().relative_to(root.absolute()).parts[1:]
    return ReconstructionMethod("/".join((root.resolve().name, *below)), run)


def load_reconstructor(name: str | Path, device: torch.device | str = "cpu") -> nn.Module:
    """Return the network of a trained bundle in evaluation mode; arguments and errors as of :func:`load_method`."""
    root, weights = _find_model(name)
    parser = ConfigParser()
    parser.read_config(str(root / "configs" / "inference.json"))
    parser.update({"bundle_root": str(root), "ckpt_dir": str(weights.parent), "device": torch.device(device)})
    return load_weights(parser.get_parsed_content("network"), weights).to(device).eval()


def trained_maps_method(name: str | Path) -> str | None:
    """Return how the coil maps of a bundle's model were estimated in training; None for a rival or an unknown one.

    Args:
        name: as for :func:`load_method`.
    """
    if str(name) in RIVALS:
        return None
    try:
        _, weights = _find_model(name)
        return str(load_task(weights.with_name("model.json"))["sampling"]["maps_method"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _find_model(name: str | Path) -> tuple[Path, Path]:
    """Return the folder of a bundle and the weights file in it that a name stands for."""
    path = Path(name).expanduser()
    root = _bundle_of(path) if path.is_file() and path.suffix == ".pt" else path
    config = root / "configs" / "inference.json"
    if not config.is_file():
        weights = path / "model.pt"
        hint = f" Name the file {str(weights)!r} in it." if weights.is_file() else did_you_mean(name, RIVALS)
        raise ValueError(
            f"`methods` may name {', '.join(RIVALS)}, a bundle's folder or a model.pt in its models; got "
            f"{str(name)!r}, where there is no configs/inference.json.{hint}"
        )
    return root, path if path.is_file() else root / "models" / "model.pt"


def _bundle_of(weights: Path) -> Path:
    """Return the folder of the bundle in whose ``models`` a weights file lies, however deep."""
    models = next((folder for folder in weights.absolute().parents if folder.name == "models"), weights.parent)
    return models.parent


class TunedWeights:
    """Weights by method, mask pattern, acceleration and noise, as ``monai-deqkan reconstruction tune`` writes them.

    Args:
        entries: mappings with ``method``, ``mask``, ``acceleration``, ``snr_db`` and ``weight``.
    """

    def __init__(self, entries: Sequence[Mapping[str, Any]] = ()) -> None:
        self.entries = [dict(entry) for entry in entries]

    @classmethod
    def load(cls, files: Sequence[str | Path]) -> TunedWeights:
        """Read files of tuned weights.

        Raises:
            ValueError: if a file is none of that kind.
        """
        entries: list[dict[str, Any]] = []
        for file in files:
            try:
                content = json.loads(Path(file).read_text())
                entries += [
                    {key: entry[key] for key in ("method", "mask", "acceleration", "snr_db", "weight")}
                    for entry in content["entries"]
                ]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{file} does not hold tuned weights ({error}). Write it by `monai-deqkan reconstruction tune`."
                ) from error
        return cls(entries)

    def find(self, method: str, mask: str, acceleration: float, snr_db: float | None) -> float | None:
        """Return the weight tuned in the nearest setting: noise first, then the mask, then the acceleration."""

        def distance(entry: Mapping[str, Any]) -> tuple[float, bool, float]:
            # No noise is the end of the scale; 0 dB is not.
            tuned, wanted = (1e3 if value is None else value for value in (entry["snr_db"], snr_db))
            return abs(tuned - wanted), entry["mask"] != mask, abs(math.log(entry["acceleration"] / acceleration))

        fitting = [entry for entry in self.entries if entry["method"] == method]
        return float(min(fitting, key=distance)["weight"]) if fitting else None
