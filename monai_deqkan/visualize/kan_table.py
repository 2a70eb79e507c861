"""A table of the learned functions of a network, for spreadsheets."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from torch import Tensor, nn

from monai_deqkan._checks import check_folder, check_int
from monai_deqkan.networks.layers import rank_edges, record_kan_inputs, suggest_edge_symbolic
from monai_deqkan.networks.layers.kan_inputs import kan_layers

__all__ = ["write_edge_table"]

_COLUMNS = (
    *("layer", "in_channel", "out_channel", "kernel_offset"),
    *("importance", "input_low", "input_high", "formula", "r2"),
)


def write_edge_table(
    path: str | Path,
    network: nn.Module,
    inputs: Tensor | None = None,
    *,
    num_edges: int | None = None,
    num_formulas: int = 16,
) -> Path:
    """Write the edges of all KAN layers of a network as CSV, layer by layer, the most important first.

    Columns: layer, in_channel, out_channel, kernel_offset, importance (root mean square of the function, in the unit
    of the output), input_low and input_high (0.1 and 99.9 % quantile of the inputs), formula and r2 (the best of
    :func:`suggest_edge_symbolic`).

    Args:
        path: file that does not exist yet, in a folder that does.
        network: a network, or one KAN layer.
        inputs: a batch for it, which it is run on once to see the inputs of its layers. Without one, the inputs of
            each layer are taken as spread evenly over its grid.
        num_edges: most edges of each layer; all by default.
        num_formulas: number of edges of each layer, the first ones, for which a formula is sought, some
            tenths of a second each.

    Returns:
        Path of the file.

    Raises:
        FileExistsError: if something is there; it is left as it is.
        FileNotFoundError: if the folder is missing.
        ValueError: if the network has, or with inputs calls, no KAN layer.
        TypeError: if ``network`` is no module.
    """
    target = Path(path).expanduser()
    check_folder(target.parent, "the table")
    if os.path.lexists(target):
        raise FileExistsError(f"The table would overwrite {target}. Nothing was written; name a new file.")
    check_int("num_formulas", num_formulas, minimum=0)
    layers = kan_layers(network)
    seen: dict[str, Tensor] = {} if inputs is None else record_kan_inputs(network, inputs)
    rows: list[tuple[object, ...]] = []
    for name, layer in layers.items():
        if inputs is not None and name not in seen:
            continue
        for index, edge in enumerate(rank_edges(layer, seen.get(name), num_edges)):
            fits = suggest_edge_symbolic(layer, edge, seen.get(name)) if index < num_formulas else []
            offset = " ".join(map(str, edge.offset))
            numbers = [f"{value:.6g}" for value in (edge.importance, edge.low, edge.high)]
            formula = (str(fits[0]), f"{fits[0].r2:.5f}") if fits else ("", "")
            rows.append((name, edge.in_channel, edge.out_channel, offset, *numbers, *formula))
    with target.open("x", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        writer.writerows(rows)
    return target
