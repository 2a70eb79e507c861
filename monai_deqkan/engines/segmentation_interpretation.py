"""What a trained KAN segmenter has learned: its functions, filters, channels and edges, as numbers and as one page."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from monai_deqkan._checks import check_int
from monai_deqkan.engines.first_layer_filters import FirstLayerFilters, first_layer_filters
from monai_deqkan.engines.segmentation_probe import SegmentationProbe, live_edges
from monai_deqkan.networks.layers import (
    InputStatistics,
    KANEdge,
    KANLayer,
    edge_importance,
    rank_edges,
    suggest_edge_symbolic,
)
from monai_deqkan.networks.layers.kan_inputs import kan_layers, recorded_samples
from monai_deqkan.visualize import segmentation_interpretation_report

__all__ = ["SegmenterInterpretation", "interpret_segmenter", "write_segmenter_interpretation"]

WEAK = 0.01  # of the root mean square over a layer's edges: an edge below this is called dead
SIMPLE = 0.95  # share of the variance that a formula must explain to be given as a readout
_NOTICE = "Research only; not for clinical use."


@dataclass(frozen=True)
class SegmenterInterpretation:
    """What was found.

    Attributes:
        numbers: all of it, in types that JSON has; nothing in it tells which images were used.
        samples: what each KAN layer received, by its name; see
            :func:`~monai_deqkan.networks.layers.record_kan_inputs`.
        filters: the first layer's filters; ``None`` where no convolution with more than one element was called.
    """

    numbers: dict[str, Any]
    samples: dict[str, Tensor]
    filters: FirstLayerFilters | None


def interpret_segmenter(
    network: nn.Module,
    batches: Iterable[Any],
    *,
    inferer: Callable[[Tensor, nn.Module], Any] | None = None,
    num_functions: int = 4,
    num_channels: int = 8,
    amounts: Sequence[float] = (0.0, 0.25, 0.5, 0.75),
    max_samples: int = 2048,
    progress: bool = False,
) -> SegmenterInterpretation:
    """Look into a trained segmenter with KAN layers; the network is left as it was.

    Args:
        network: see :class:`~monai_deqkan.engines.SegmentationProbe`.
        batches: a few images with their reference masks, see there; all are used.
        inferer: see there.
        num_functions: functions of each layer that are listed, drawn and fitted by formulas, some tenths of a
            second each.
        num_channels: channels of each layer that are replaced by their mean, one run over all images each.
        amounts: shares of the edges that are pruned, on copies.
        max_samples: inputs kept per layer, from all images.
        progress: whether to show bars.

    Returns:
        Statistics of the layers, their strongest functions with formulas, the first layer's filters, the sensitivity
        to channels and the cost of pruning.

    Raises:
        ValueError: if the network has no KAN layer, there is no image, or shapes do not fit.
        TypeError: if ``network`` is no module.
    """
    check_int("num_functions", num_functions)
    check_int("num_channels", num_channels)
    layers = kan_layers(network)
    probe = SegmentationProbe(network, batches, inferer=inferer, progress=progress)
    with InputStatistics(network, max_samples) as statistics:
        dice = probe.dice(probe.logits())
    samples = {name: inputs.cpu() for name, inputs in recorded_samples(statistics).items()}
    if not samples:
        raise ValueError("`network` must call at least one of its KAN layers on the images; it called none.")
    filters = first_layer_filters(network, probe.images, forward=probe.run)
    bar = tqdm(samples.items(), desc="functions", disable=not progress)
    functions = {name: _functions(layers[name], inputs, num_functions) for name, inputs in bar}
    numbers: dict[str, Any] = {
        "intended_use": _NOTICE,
        "network": type(network).__name__,
        "images": probe.num_images,
        "dice": dice,
        "layers": [
            {
                **_layer_numbers(name, layers[name], inputs, statistics.layers[name].outside),
                "positions_per_image": statistics.layers[name].count / probe.num_images,
            }
            for name, inputs in samples.items()
        ],
        "layers_not_called": [name for name in layers if name not in samples],
        "functions": functions,
        "first_layer": None if filters is None else _filter_numbers(filters),
        "channels": [asdict(row) for row in probe.channel_sensitivity(num_channels)],
        "pruning": [asdict(row) for row in probe.pruning_cost(amounts)],
    }
    numbers["edges"] = sum(row["edges"] for row in numbers["layers"])
    numbers["live_edges"] = live_edges(network)
    numbers["dead_edges"] = sum(row["dead_edges"] for row in numbers["layers"])
    return SegmenterInterpretation(numbers, samples, filters)


def write_segmenter_interpretation(
    network: nn.Module,
    batches: Iterable[Any],
    output_dir: str | os.PathLike[str],
    *,
    inferer: Callable[[Tensor, nn.Module], Any] | None = None,
    num_functions: int = 4,
    num_channels: int = 8,
    amounts: Sequence[float] = (0.0, 0.25, 0.5, 0.75),
    progress: bool = False,
) -> Path:
    """Look into a trained segmenter, and write what was found as ``interpretation.html`` and ``interpretation.json``.

    The page holds its pictures. Neither file names or shows an image.

    Args:
        network: see :func:`interpret_segmenter`.
        batches: see there.
        output_dir: folder of the files; made where absent.
        inferer: see there.
        num_functions: see there.
        num_channels: see there.
        amounts: see there.
        progress: whether to show bars.

    Returns:
        Path of the page.

    Raises:
        FileExistsError: if one of the files is there already.
        ValueError: see :func:`interpret_segmenter`.
    """
    folder = Path(output_dir)
    page, table = folder / "interpretation.html", folder / "interpretation.json"
    for path in (page, table):
        if os.path.lexists(path):
            raise FileExistsError(f"{path} is there already; nothing was written. Name another folder.")
    found = interpret_segmenter(
        network,
        batches,
        inferer=inferer,
        num_functions=num_functions,
        num_channels=num_channels,
        amounts=amounts,
        progress=progress,
    )
    patterns = None if found.filters is None else found.filters.patterns
    report = segmentation_interpretation_report(found.numbers, network, found.samples, patterns)
    folder.mkdir(parents=True, exist_ok=True)
    with table.open("x", encoding="utf-8") as file:
        file.write(json.dumps(found.numbers, indent=2) + "\n")
    return report.save(page)


@torch.no_grad()
def _layer_numbers(name: str, layer: KANLayer, inputs: Tensor, outside: float) -> dict[str, Any]:
    importance = edge_importance(layer, inputs.to(layer.weight.device)).flatten().cpu()
    typical = float(importance.square().mean().sqrt())
    low, high = layer.basis.grid_range
    return {
        "layer": name,
        "inputs": inputs.shape[1],
        "outputs": layer.weight.shape[0],
        "edges": importance.numel(),
        "zero_edges": int((importance == 0).sum()),
        "dead_edges": int((importance <= WEAK * typical).sum()),
        "half_of_the_signal_in": _edges_for(importance, 0.5),
        "outside_grid": outside,
        "grid_range": [low, high],
    }


def _edges_for(importance: Tensor, share: float) -> int:
    """Return the smallest number of edges that hold a share of the sum of squares."""
    squares = importance.square().sort(descending=True).values.cumsum(0)
    return int((squares < share * squares[-1]).sum()) + 1


def _functions(layer: KANLayer, inputs: Tensor, count: int) -> list[dict[str, Any]]:
    inputs = inputs.to(layer.weight.device)
    total = float(edge_importance(layer, inputs).square().sum())
    return [_function(layer, edge, inputs, total) for edge in rank_edges(layer, inputs, count)]


@torch.no_grad()
def _function(layer: KANLayer, edge: KANEdge, inputs: Tensor, total: float) -> dict[str, Any]:
    fits = suggest_edge_symbolic(layer, edge, inputs, num_candidates=1)
    best = fits[0] if fits else None
    return {
        "edge": str(edge),
        "in_channel": edge.in_channel,
        "out_channel": edge.out_channel,
        "offset": list(edge.offset),
        "importance": edge.importance,
        "share_of_layer": edge.importance**2 / max(total, 1e-300),
        "input_low": edge.low,
        "input_high": edge.high,
        "shape": None if best is None else best.name,
        "formula": None if best is None else str(best),
        "r2": None if best is None else best.r2,
        "is_simple": best is not None and best.r2 >= SIMPLE,
    }


def _filter_numbers(filters: FirstLayerFilters) -> dict[str, Any]:
    share = filters.linear_share
    return {
        "layer": filters.layer,
        "is_kan": filters.is_kan,
        "detectors": filters.detectors,
        "chance": filters.chance,
        "filters": [
            {**asdict(label), "kernel": kernel.tolist(), "linear_share": None if share is None else float(share[index])}
            for index, (label, kernel) in enumerate(zip(filters.labels, filters.kernels, strict=True))
        ],
    }
