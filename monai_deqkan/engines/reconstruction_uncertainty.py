"""How much a reconstruction would change with other noise, other lines or other weights: a spread for every pixel."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from monai.inferers import Inferer
from torch import Tensor, nn

from monai_deqkan._checks import check_choice, check_int, check_range, check_tensor
from monai_deqkan._complex import as_complex
from monai_deqkan.engines.bundle import load_weights
from monai_deqkan.engines.prepare_batch import PrepareBatchKspace
from monai_deqkan.metrics import SpreadCalibration, fit_spread_factor, head_region, magnitude, spread_calibration
from monai_deqkan.operators import drop_lines, estimate_noise_level, infer_mask
from monai_deqkan.visualize import plot_spread_calibration, plot_spread_map

__all__ = [
    "ReconstructionSpread",
    "SpreadInferer",
    "calibrate_spread",
    "ensemble_spread",
    "load_ensemble",
    "load_spread_factor",
    "resampled_spread",
]

logger = logging.getLogger(__name__)

_LARGE_FACTOR = 5.0

_NOTE = "Research only; not for clinical use."


@dataclass(frozen=True)
class ReconstructionSpread:
    """A reconstruction and the standard deviation of its magnitude.

    Attributes:
        image: the reconstruction of the data as they are, two channels ``(B, 2, *space)``.
        spread: standard deviation of the magnitude over the samples, ``(B, 1, *space)``, in the unit of the image.
    """

    image: Tensor
    spread: Tensor


@torch.no_grad()
def resampled_spread(
    network: nn.Module,
    kspace: Tensor,
    mask: Tensor | None = None,
    sensitivity_maps: Tensor | None = None,
    *,
    method: str = "noise",
    num_samples: int = 16,
    noise_level: float | Tensor | None = None,
    drop_share: float = 0.2,
    generator: torch.Generator | None = None,
) -> ReconstructionSpread:
    """Reconstruct resampled data, and tell how much the result changes.

    With ``"noise"``, noise of the measured level is added again to the measured samples: the spread is how noise goes
    through the reconstruction. With ``"mask"``, each sample drops some of the measured lines outside the centre: the
    spread shows what rests on few lines. Neither sees errors that all samples share, such as smoothing, wrong coil maps
    or what was never measured: see :func:`calibrate_spread`.

    Args:
        network: reconstruction network, ``network(kspace, mask, sensitivity_maps)``.
        kspace: complex ``(B, K, *space)``, or real with a last axis of two, zero where nothing was measured.
        mask: where it was measured, ``(B or 1, 1, *space)``, possibly with axes of size one; None infers it.
        sensitivity_maps: coil maps, the same for all samples; None lets the network estimate them each time.
        method: ``"noise"`` or ``"mask"``.
        num_samples: number of resampled reconstructions, at least 2.
        noise_level: standard deviation of the real and of the imaginary part of a sample of k-space, in its unit: one
            number, or ``(B, K)``; None estimates it, see :func:`~monai_deqkan.operators.estimate_noise_level`.
        drop_share: share of the lines that each sample drops, for ``"mask"``, in ``(0, 1)``.
        generator: source of noise and choice, on the CPU; by default one with a fixed seed, so that results repeat.

    Returns:
        The reconstruction and its spread.

    Raises:
        ValueError: for an unknown method, fewer than two samples, or a share or noise level out of range.
    """
    check_choice("method", method, ("noise", "mask"))
    check_int("num_samples", num_samples, minimum=2)
    check_range("drop_share", drop_share, 0.0, 1.0, open_low=True, open_high=True)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    data = as_complex(check_tensor("kspace", kspace).as_subclass(Tensor))
    spatial_dims = data.ndim - 2
    mask = infer_mask(data, spatial_dims) if mask is None else check_tensor("mask", mask).as_subclass(Tensor) != 0
    masks = mask.split(1) if len(mask) > 1 else [mask] * len(data)
    deviation = _noise_levels(data, mask, noise_level) if method == "noise" else None
    # Each sample draws as if it were alone: its spread does not depend on the others of its batch.
    generators = [generator, *(generator.clone_state() for _ in data[1:])]

    def samples() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(num_samples):
            if deviation is None:
                parts = [
                    drop_lines(part, own, drop_share, spatial_dims=spatial_dims, generator=source)
                    for part, own, source in zip(data.split(1), masks, generators, strict=True)
                ]
                kept = torch.cat(parts)
                yield data * kept, kept
            else:
                # torch.randn gives a complex normal with E|n|^2 = 1, so a variance of 1/2 in each part.
                drawn = [torch.randn(data.shape[1:], dtype=data.dtype, generator=source) for source in generators]
                noise = torch.stack(drawn).to(data.device)
                yield data + noise * deviation * (mask & (data != 0)), mask

    image = network(data, mask, sensitivity_maps).as_subclass(Tensor)
    images = (network(sample, kept, sensitivity_maps).as_subclass(Tensor) for sample, kept in samples())
    return ReconstructionSpread(image, _standard_deviation(images))


@torch.no_grad()
def ensemble_spread(
    networks: Sequence[nn.Module], kspace: Tensor, mask: Tensor | None = None, sensitivity_maps: Tensor | None = None
) -> ReconstructionSpread:
    """Reconstruct with several networks, such as trainings with several seeds, and tell how much they differ.

    Args:
        networks: at least two networks; the first one's image is returned.
        kspace: see :func:`resampled_spread`.
        mask: see :func:`resampled_spread`.
        sensitivity_maps: see :func:`resampled_spread`.

    Raises:
        ValueError: if there are fewer than two networks.
    """
    if len(networks) < 2:
        raise ValueError(f"An ensemble needs at least two networks; got {len(networks)}. Name more weights files.")
    images = [network(kspace, mask, sensitivity_maps).as_subclass(Tensor) for network in networks]
    return ReconstructionSpread(images[0], _standard_deviation(images))


class SpreadInferer(Inferer):
    """Infer an image with its spread as a third channel, which :class:`ReconstructionWriter` writes beside the image.

    Args:
        method: ``"noise"``, ``"mask"`` (:func:`resampled_spread`) or ``"ensemble"`` (:func:`ensemble_spread`).
        num_samples: number of resampled reconstructions.
        drop_share: share of the lines that each sample drops, for ``"mask"``.
        factor: what spreads are multiplied by, such as that of :func:`calibrate_spread`.
        others: networks that make an ensemble with the one that is inferred; for ``"ensemble"`` only.
        seed: of the noise or the choice; each batch has the same.

    Raises:
        ValueError: for an unknown method or a number out of range, an ensemble without others, or others without one.
    """

    def __init__(
        self,
        method: str = "noise",
        num_samples: int = 16,
        drop_share: float = 0.2,
        factor: float = 1.0,
        others: Sequence[nn.Module] = (),
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.method = check_choice("method", method, ("noise", "mask", "ensemble"))
        self.num_samples = check_int("num_samples", num_samples, minimum=2)
        self.drop_share = check_range("drop_share", drop_share, 0.0, 1.0, open_low=True, open_high=True)
        self.factor = check_range("factor", factor, 0.0, open_high=True)
        self.others = tuple(others)
        self.seed = check_int("seed", seed, minimum=0)
        if (method == "ensemble") != bool(self.others):
            raise ValueError(
                f"`others` belong to the method 'ensemble', which needs at least one; got {len(self.others)} with "
                f"{method!r}. Name the further weights files."
            )

    @property
    def settings(self) -> dict[str, str | int | float]:
        """How spreads are made, to be kept with them: ``method``, ``factor`` and what the method varies."""
        more: dict[str, int | float] = {"num_networks": 1 + len(self.others)}
        if self.method != "ensemble":
            more = {"num_samples": self.num_samples}
        if self.method == "mask":
            more["drop_share"] = self.drop_share
        return {"method": self.method, "factor": self.factor, **more}

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """Return the image and its spread times the factor, ``(B, 3, *space)``; arguments go to the network.

        Raises:
            TypeError: if the network is no module.
        """
        if not isinstance(network, nn.Module):
            raise TypeError(f"`network` must be a torch.nn.Module; got {type(network).__name__}.")
        if self.method == "ensemble":
            result = ensemble_spread((network, *self.others), inputs, *args, **kwargs)
        else:
            result = resampled_spread(
                network,
                inputs,
                *args,
                method=self.method,
                num_samples=self.num_samples,
                drop_share=self.drop_share,
                generator=torch.Generator().manual_seed(self.seed),
                **kwargs,
            )
        return torch.cat([result.image, self.factor * result.spread], dim=1)


def load_ensemble(
    network: nn.Module, weights: Sequence[str | os.PathLike[str]], device: torch.device | str = "cpu"
) -> list[nn.Module]:
    """Return copies of a network with other weights, in evaluation mode.

    Args:
        network: the network.
        weights: one file for each copy.
        device: where they run.
    """
    return [load_weights(copy.deepcopy(network), path).to(device).eval() for path in weights]


def load_spread_factor(path: str | os.PathLike[str], method: str) -> float:
    """Return the factor that :func:`calibrate_spread` found; 1, with a line in the log, where there is none.

    Args:
        path: ``spread_calibration.json``.
        method: the method that spreads are made by now; one made with another says nothing about them.

    Raises:
        ValueError: if the file is no such record.
    """
    file = Path(path)
    if not file.is_file():
        logger.warning("There is no calibration of the spread at %s: spreads are written as they are.", file.name)
        return 1.0
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        factor, made_with = float(record["factor"]), record["method"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} holds no calibration of a spread ({error}). Calibrate anew.") from error
    if made_with != method:
        logger.warning(
            "%s calibrates spreads of the method %r: those of %r are written as they are.", file.name, made_with, method
        )
        return 1.0
    logger.info(
        "Spreads are multiplied by %.2f, as %s says. That holds for data like those it was found on: other scanners, "
        "anatomies, masks or numbers of samples need their own calibration.",
        factor,
        file.name,
    )
    return factor


def calibrate_spread(
    network: nn.Module,
    inferer: SpreadInferer,
    val_loader: Iterable[Mapping[str, Any]],
    test_loader: Iterable[Mapping[str, Any]],
    output_dir: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Fit one factor for the spread on validation slices, and show on test slices whether it holds.

    Writes ``spread_calibration.json`` (factor, and the share of pixels whose true error lies within k spreads, before
    and after), its figure ``spread_calibration.png``, and ``spread_map.png`` of the first test slice. Pixels inside
    the head count. The true error is the difference from the root sum of squares of the fully sampled data, with all
    that is in it: bias, and noise of the reference too.

    Args:
        network: the network with its weights.
        inferer: makes the spreads.
        val_loader: batches with ``kspace``, ``mask``, ``sensitivity_maps``, ``reference_rss``, ``source`` and
            ``slice``, to fit the factor.
        test_loader: others, to show it.
        output_dir: folder to write into; made where absent.
        device: where the network runs.

    Returns:
        What the JSON file holds.

    Raises:
        FileExistsError: if one of the files is there already.
        ValueError: if a loader is empty.
    """
    folder = Path(output_dir)
    files = [folder / name for name in ("spread_calibration.json", "spread_calibration.png", "spread_map.png")]
    taken = [file for file in files if file.exists()]
    if taken:
        raise FileExistsError(f"{taken[0]} exists and was not touched. Name a new `output_dir`, or move it away.")
    network.eval()
    val, _, fitted = _pixels(network, inferer, val_loader, device, "val_loader")
    test, example, shown_on = _pixels(network, inferer, test_loader, device, "test_loader")
    shared = len(fitted & shown_on)
    if shared:
        logger.warning("%d slices are in both parts: the curve of the test slices flatters. Add a test folder.", shared)
    factor = fit_spread_factor(val[0], val[1])
    curves = {
        "validation, as it is": spread_calibration(*val),
        "test, as it is": spread_calibration(*test),
        "validation, times the factor": spread_calibration(val[0], factor * val[1]),
        "test, times the factor": spread_calibration(test[0], factor * test[1]),
    }
    record = {
        "note": _NOTE,
        "method": inferer.method,
        "num_samples": inferer.num_samples if not inferer.others else 1 + len(inferer.others),
        "drop_share": inferer.drop_share if inferer.method == "mask" else None,
        "num_slices": {"validation": len(fitted), "test": len(shown_on), "in_both": shared},
        "factor": inferer.factor * factor,
        "curves": {name: asdict(curve) for name, curve in curves.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    shown = {name: curve for name, curve in curves.items() if not name.startswith("validation, times")}
    plot_spread_calibration(shown, title="Share of pixels within k spreads").savefig(files[1], dpi=100)
    image, spread, error = example
    maps = plot_spread_map(
        image, factor * spread, error, title="First test slice, its spread times the factor, its error"
    )
    maps.savefig(files[2], dpi=100)
    files[0].write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    _log_calibration(record["factor"], curves)
    return record


def _pixels(
    network: nn.Module,
    inferer: SpreadInferer,
    batches: Iterable[Mapping[str, Any]],
    device: torch.device | str,
    name: str,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor], set[tuple[str, int]]]:
    """Return errors and spreads of the heads' pixels; image, spread and error of the first slice; the slices' names."""
    prepare = PrepareBatchKspace()
    errors, spreads, example = [], [], None
    names: set[tuple[str, int]] = set()
    for batch in batches:
        kspace, _, _, given = prepare(dict(batch), device)
        names |= {(str(file), int(index)) for file, index in zip(batch["source"], batch["slice"], strict=True)}
        result = inferer(kspace, network, **given).float().cpu()
        reference = torch.as_tensor(batch["reference_rss"]).as_subclass(Tensor).float()
        reference = reference.reshape(len(result), 1, *result.shape[2:])
        image, spread = magnitude(result[:, :2]), result[:, 2:]
        region, error = head_region(reference), image - reference
        errors.append(error[region])
        spreads.append(spread[region])
        example = (image[0, 0], spread[0, 0], error[0, 0]) if example is None else example
    if example is None:
        raise ValueError(f"`{name}` holds no batch. Check the folder and the part that it reads.")
    return (torch.cat(errors), torch.cat(spreads)), example, names


def _log_calibration(factor: float, curves: Mapping[str, SpreadCalibration]) -> None:
    logger.info("Spreads times %.3g hold 68 %% of the errors of the validation slices within one spread.", factor)
    if factor > _LARGE_FACTOR:
        logger.warning(
            "The factor is large: most of this network's error is not what was resampled, and the spread says little "
            "of where it is. Look at spread_map.png."
        )
    for name, curve in curves.items():
        logger.info("%s: largest gap to the normal law %.3f.", name, curve.largest_gap)


def _noise_levels(kspace: Tensor, mask: Tensor, noise_level: float | Tensor | None) -> Tensor:
    """Return the standard deviation of the complex noise, ``(B, K, *ones)``."""
    if noise_level is None:
        level = estimate_noise_level(kspace, mask, spatial_dims=kspace.ndim - 2)
    elif isinstance(noise_level, Tensor):
        if noise_level.shape != kspace.shape[:2]:
            raise ValueError(
                f"`noise_level` must be one number or have shape {tuple(kspace.shape[:2])}, one per sample and coil; "
                f"got {tuple(noise_level.shape)}."
            )
        if not bool(((noise_level >= 0) & noise_level.isfinite()).all()):
            raise ValueError("`noise_level` must be finite and not negative for every sample and coil.")
        level = noise_level.to(kspace.real)
    else:
        given = check_range("noise_level", noise_level, 0.0, open_high=True)
        level = torch.full(kspace.shape[:2], given).to(kspace.real)
    return 2**0.5 * level.view(*kspace.shape[:2], *[1] * (kspace.ndim - 2))


def _standard_deviation(images: Iterable[Tensor]) -> Tensor:
    """Return the standard deviation of magnitudes, one image at a time (Welford's recurrence), ``(B, 1, *space)``."""
    mean = squares = torch.zeros(())
    count = 0
    for image in images:
        count += 1
        value = magnitude(image).double()
        change = value - mean.to(value.device)
        mean = mean.to(value.device) + change / count
        squares = squares.to(value.device) + change * (value - mean)
    return (squares / max(count - 1, 1)).sqrt().float()
