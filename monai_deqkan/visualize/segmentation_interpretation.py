"""One page on what a KAN segmenter has learned, each figure with what it shows and what to conclude from it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from monai_deqkan.visualize.kan_curves import plot_kan_layer
from monai_deqkan.visualize.learning import COLORS, MUTED, hide_unused, new_figure, plain_text, style_axes
from monai_deqkan.visualize.report import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["segmentation_interpretation_report"]

_MOST_FILTERS = 32
_LABELS = {
    "edge": "borders between bright and dark",
    "line": "thin bright or dark lines (texture)",
    "spot": "small bright or dark spots (texture)",
    "smoothing": "a local mean",
    "pass-through": "the pixel itself",
    "other": "no template",
    "zero": "nothing: all its weights are zero",
}


def segmentation_interpretation_report(
    numbers: Mapping[str, Any], network: nn.Module, samples: Mapping[str, Tensor], patterns: Tensor | None
) -> Report:
    """Make the page from the numbers of :func:`~monai_deqkan.engines.interpret_segmenter`.

    Args:
        numbers: ``SegmenterInterpretation.numbers``.
        network: the network that they are about.
        samples: what each of its KAN layers received.
        patterns: the spatial patterns of the first layer's filters, ``(out, *kernel)``; ``None`` for none.

    Returns:
        The page; call its ``save``.
    """
    subtitle = f"{numbers['network']}, looked into on {numbers['images']} images. {numbers['intended_use']}"
    report = Report("What this segmenter has learned", subtitle)
    _add_overview(report, numbers)
    _add_filters(report, numbers["first_layer"], patterns)
    _add_functions(report, numbers, network, samples)
    _add_formulas(report, numbers)
    _add_channels(report, numbers)
    _add_pruning(report, numbers)
    report.add_heading("All numbers")
    report.add_text("The same numbers are in interpretation.json beside this page.")
    report.add_json("Statistics of the layers", numbers["layers"])
    report.add_json("Channels", numbers["channels"])
    return report


def _add_overview(report: Report, numbers: Mapping[str, Any]) -> None:
    layers = numbers["layers"]
    report.add_heading("Overview")
    report.add_text(
        "In a KAN layer every weight is a learned curve of one variable, called an edge: it reads one input "
        "channel, in a convolution at one place of the kernel, and adds its value to one output channel. Curves can "
        "be looked at, ranked and removed. The importance of an edge is the root mean square of its values on these "
        "images."
    )
    half = next((row for row in numbers["pruning"] if math.isclose(row["amount"], 0.5)), None)
    kept = [] if half is None else [("Dice, half of the edges zero", _dice(half["dice"]), "without fine-tuning")]
    dead = numbers["dead_edges"]
    report.add_key_figures(
        [
            ("Mean Dice on these images", _dice(numbers["dice"]), "classes but the background"),
            ("Edges", f"{numbers['edges']:,}", f"in {len(layers)} KAN layers"),
            ("Dead edges", f"{dead / max(numbers['edges'], 1):.1%}", "below 1 % of their layer's typical importance"),
            *kept,
        ]
    )
    report.add_figure(
        plot_layer_map(layers),
        "Shows where the layers are: in the order of their calls, how many pixels (voxels) of an image each reads, and "
        "its channels in and out. In a network shaped like a U the bars fall along the encoder and rise along the "
        "decoder. Conclude: layers at the lowest bars see the most context, those at the outer ends the finest detail.",
        "A bar per layer, its height the number of positions it reads",
    )
    worst = max(layers, key=lambda row: row["outside_grid"])
    high = worst["outside_grid"] > 0.05
    advice = (
        "More than 5 % is much: beyond its grid a curve is not shaped by knots; refit or widen the grids."
        if high
        else "Less than 5 % everywhere: the grids cover what the layers see."
    )
    report.add_figure(
        plot_layer_statistics(layers),
        "Shows, for each KAN layer from input to output: the share of its inputs that lie outside its grid (left), "
        "of its edges that are dead (middle), and the share of the edges that together carry half of the layer's "
        "squared signal (right). Conclude: the layer with most inputs outside its grid is "
        f"{worst['layer']} ({worst['outside_grid']:.1%}). {advice} Many dead edges, or half of the signal in few "
        "edges, mean that the layer could be smaller.",
        "Three bar charts with one bar per layer",
    )
    header = [
        "layer",
        "inputs",
        "outputs",
        "edges",
        "exactly zero",
        "dead",
        "half of the signal in",
        "outside the grid",
    ]
    keys = ("layer", "inputs", "outputs", "edges", "zero_edges", "dead_edges", "half_of_the_signal_in")
    rows = [[*(row[key] for key in keys), f"{row['outside_grid']:.2%}"] for row in layers]
    report.add_table(header, rows, "Layers in the order in which they are called.")
    if numbers["layers_not_called"]:
        report.add_text(f"Not used in inference: {', '.join(numbers['layers_not_called'])}.")


def _add_filters(report: Report, first: Mapping[str, Any] | None, patterns: Tensor | None) -> None:
    report.add_heading("First filters: edges and textures")
    if first is None or patterns is None:
        report.add_text("This does not apply: no convolution with a kernel of more than one element was called.")
        return
    filters = first["filters"]
    counts = Counter(row["label"] for row in filters)
    found = "; ".join(f"{count} x {label} ({_LABELS[label]})" for label, count in counts.most_common())
    if first["is_kan"]:
        kind = (
            f"{first['layer']} is a KAN convolution. Drawn is the linear part of each filter: in each place the "
            "slope of the straight line nearest to the learned curve there, over the inputs seen."
        )
        shares = [row["linear_share"] for row in filters if row["linear_share"] is not None]
        if shares:
            kind += f" These lines explain {np.median(shares):.0%} of the curves' variance (median over the filters)."
    else:
        kind = f"{first['layer']} is a plain convolution, without learned curves: its weights are drawn as they are."
    report.add_text(kind)
    shown = min(len(filters), _MOST_FILTERS)
    limits = f" The {shown} with the clearest labels of {len(filters)} are drawn." if shown < len(filters) else ""
    cuts = "" if patterns.dim() == 3 else " Volumes are cut into slices along the first axis, side by side."
    conclusion = _filter_conclusion(first["detectors"], len(filters), first["chance"])
    report.add_figure(
        plot_filters(patterns, filters),
        "Shows each filter (red: adds, blue: subtracts; white is zero) with the template that it is nearest to and "
        "its correlation with it. A label is given from 0.8 on; below, the nearest template stands in "
        f"brackets.{limits}{cuts} Conclude: {found}. {conclusion} A label tells what a "
        "filter responds to, not what the network uses it for. Of kernels of random numbers, of this size, "
        f"{first['chance']:.1%} look like edge or texture detectors too.",
        "Small pictures of the kernels in red and blue, each with its label",
    )


def _filter_conclusion(detectors: int, count: int, chance: float) -> str:
    share = detectors / count
    if share > 0.5:
        return f"Most of the first filters ({detectors} of {count}) detect edges or texture, as classical filters do."
    if detectors > count * chance + 2 * (count * chance * (1 - chance)) ** 0.5:
        return f"{detectors} of {count} filters detect edges or texture; the others have no simple linear description."
    if detectors:
        return (
            f"{detectors} of {count} filters look like edge or texture detectors, which is no more than chance gives."
        )
    return "None is near an edge or texture template."


def _add_functions(
    report: Report, numbers: Mapping[str, Any], network: nn.Module, samples: Mapping[str, Tensor]
) -> None:
    report.add_heading("The strongest functions of each layer")
    report.add_text(
        "Layers are in the order in which they are called; in each layer the most important edge comes first. An "
        "edge is named by input channel, output channel, and place in the kernel. How to read a panel: the curve is "
        "what the edge adds to its output for each value of its input; grey, below the curve, is how often the "
        "images had that value; light blue is the range of the grid, its ticks are the knots. Trust a curve where "
        "there is grey. Flat means no effect; a straight line is an ordinary weight; a bend or a bump is what an "
        "ordinary weight cannot do."
    )
    for row in numbers["layers"]:
        name, functions = row["layer"], numbers["functions"][row["layer"]]
        layer: Any = network.get_submodule(name)
        report.add_heading(name or "the network", level=3)
        inputs = samples[name].to(layer.weight.device)
        share = sum(function["share_of_layer"] for function in functions)
        report.add_figure(
            plot_kan_layer(layer, inputs, len(functions), title=f"{name}: most important edges"),
            f"Shows the {len(functions)} most important of {row['edges']} edges; together they carry {share:.1%} of "
            f"the layer's squared signal. Conclude: {_spread(share, len(functions), row['edges'])} "
            f"Nearest shapes: {_shapes(functions)}. "
            f"{row['outside_grid']:.1%} of the inputs lie outside the grid.",
            f"Curves of the most important edges of {name}",
        )


def _shapes(functions: Sequence[Mapping[str, Any]]) -> str:
    names = {"x": "straight line", "constant": "constant"}
    counts = Counter(
        names.get(row["shape"], row["shape"]) if row["is_simple"] else "no simple formula" for row in functions
    )
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


def _spread(share: float, count: int, edges: int) -> str:
    times = round(share * edges / count, 1)  # as it is printed
    if share > 0.5:
        return "few curves do most of the work here; reading these is reading the layer."
    if times > 10:
        return f"these curves carry {times:.1f} times the signal of average ones, yet the work is shared by many."
    return f"no curve stands out: these carry {times:.1f} times the signal of average ones."


def _add_formulas(report: Report, numbers: Mapping[str, Any]) -> None:
    report.add_heading("Formulas of the strongest functions")
    rows, simple, total = [], 0, 0
    for layer, functions in numbers["functions"].items():
        for function in functions:
            total += 1
            simple += function["is_simple"]
            r2 = "n/a" if function["r2"] is None else f"{function['r2']:.3f}"
            text = function["formula"] if function["is_simple"] else "no simple formula"
            rows.append([layer, function["edge"], f"{function['importance']:.3g}", text, r2])
    report.add_text(
        "The best of sixteen common functions, fitted as a f(b x + c) + d where the inputs were, and the share R² "
        f"of the curve's variance that it explains. Below R² = 0.95 there is no simple formula. Conclude: {simple} "
        f"of {total} of these curves have one. A formula is a short name for a curve over the range of inputs seen; "
        "beyond it, both may differ. The constant d means nothing by itself, as constants can move between edges "
        "that add up."
    )
    report.add_table(["layer", "edge", "importance", "formula", "R²"], rows, "Most important edges of each layer.")


def _add_channels(report: Report, numbers: Mapping[str, Any]) -> None:
    report.add_heading("Sensitivity to channels")
    rows = numbers["channels"]
    if not rows:
        report.add_text("This does not apply: the only KAN layer gives the network's output.")
        return
    top = sorted(rows, key=lambda row: -row["dice_lost"])[:10]
    worst = top[0]
    harmless = sum(abs(row["dice_lost"]) < 0.001 for row in rows)
    helpful = sum(row["dice_lost"] < -0.001 for row in rows)
    gain = f" Replacing {helpful} of them raised Dice by more than 0.001." if helpful else ""
    if worst["dice_lost"] > 0.01:
        conclusion = (
            f"the network leans most on channel {worst['channel']} of {worst['layer']} (Dice falls by "
            f"{worst['dice_lost']:.3f}). Layers with far-right dots are bottlenecks; layers near zero hold spare "
            "channels."
        )
    else:
        conclusion = (
            f"no channel is needed by itself: the most sensitive one, channel {worst['channel']} of {worst['layer']}, "
            f"costs {worst['dice_lost']:.4f} of Dice. Others carry the same information."
        )
    report.add_figure(
        plot_channels(rows, [row["layer"] for row in numbers["layers"]]),
        "Shows how much mean Dice is lost when one output channel of a KAN layer is replaced by its mean over all "
        "images, which takes its information away; one dot per channel, the most sensitive channel of each layer "
        "with its number. Wide layers: only the channels that change the output most were tried. Conclude: "
        f"{conclusion} {harmless} of {len(rows)} channels can go one at a time with a change below 0.001.{gain}",
        "Dots per layer; the horizontal axis is the Dice that is lost",
    )
    table = [[row["layer"], row["channel"], f"{row['dice_lost']:.4f}", f"{row['logit_change']:.1%}"] for row in top]
    header = ["layer", "channel", "Dice lost", "change of the logits"]
    report.add_table(
        header, table, "The ten most sensitive channels. Change: root mean square, relative to the logits."
    )


def _add_pruning(report: Report, numbers: Mapping[str, Any]) -> None:
    report.add_heading("What pruning costs")
    rows = numbers["pruning"]
    if not rows:
        report.add_text("This does not apply: activations are the only KAN layers, and their functions are not pruned.")
        return
    full = numbers["dice"]
    start = numbers["live_edges"]
    # Edges that were zero before go first, and cost nothing.
    free = [1 - row["num_edges"] / max(start, 1) for row in rows if full - row["dice"] <= 0.01]
    if free and max(free) > 0:
        conclusion = (
            f"up to {max(free):.0%} of the {start:,} edges that were not zero yet can go at a cost of at most 0.01 "
            "Dice, with no training afterwards."
        )
    elif all(row["num_edges"] == start for row in rows):
        conclusion = "these amounts take away no edge that was not zero before; try larger ones."
    else:
        conclusion = "already the smallest amount tried costs more than 0.01 Dice; prune only with training afterwards."
    lost = max(full - row["dice"] for row in rows)
    advice = " Fine-tuning after pruning usually wins much of the loss back." if lost > 0.01 else ""
    report.add_figure(
        plot_pruning(rows),
        "Shows the mean Dice after the least important edges of the whole network were set to zero, on a copy and "
        f"without fine-tuning. Conclude: {conclusion}{advice}",
        "A curve of Dice over the share of edges that are zero",
    )
    table = [
        [f"{row['amount']:.0%}", f"{row['num_edges']:,}", _dice(row["dice"]), f"{full - row['dice']:.4f}"]
        for row in rows
    ]
    report.add_table(["zero edges", "edges left", "Dice", "Dice lost"], table)


def plot_layer_map(layers: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the layers in the order of their calls: positions read per image, and channels."""
    figure, axes = new_figure(1, 1, 3.6)
    panel = axes[0, 0]
    style_axes(panel, "", "", "positions per image")
    places, sizes = np.arange(len(layers)), [max(row["positions_per_image"], 1) for row in layers]
    panel.bar(places, sizes, color=COLORS[0], width=0.75)
    panel.set_yscale("log")
    panel.set_ylim(0.5 * min(sizes), 12 * max(sizes))
    for place, size, row in zip(places, sizes, layers, strict=True):
        channels = f"{row['inputs']} → {row['outputs']}"
        panel.annotate(
            channels, (place, size), (0, 4), textcoords="offset points", rotation=90, fontsize=8, ha="center"
        )
    panel.set_xticks(places, [plain_text(row["layer"] or "the network") for row in layers], rotation=90, fontsize=8)
    return figure


def plot_layer_statistics(layers: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw for each layer the share of inputs outside the grid, of dead edges, and of edges with half of the signal."""
    figure, axes = new_figure(1, 3, 0.26 * len(layers) + 1.4, "", sharey=True)
    kinds = (
        ("inputs outside the grid (%)", [100 * row["outside_grid"] for row in layers]),
        ("dead edges (%)", [100 * row["dead_edges"] / row["edges"] for row in layers]),
        ("edges with half of the signal (%)", [100 * row["half_of_the_signal_in"] / row["edges"] for row in layers]),
    )
    places = np.arange(len(layers))
    for index, (panel, (label, values)) in enumerate(zip(axes.flat, kinds, strict=True)):
        style_axes(panel, "", label)
        panel.barh(places, values, color=COLORS[index], height=0.7)
        panel.set_xlim(0, max(*values, 1.0) * 1.05)
        if not any(values):
            panel.annotate("none", (0.5, 0.5), xycoords="axes fraction", ha="center", color=MUTED, fontsize=10)
    axes[0, 0].set_yticks(places, [plain_text(row["layer"] or "the network") for row in layers], fontsize=8)
    axes[0, 0].invert_yaxis()
    return figure


def plot_filters(patterns: Tensor, filters: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw kernels ``(out, *kernel)`` with their labels, the clearest first."""
    order = sorted(range(len(filters)), key=lambda i: (filters[i]["label"] in ("other", "zero"), -filters[i]["score"]))
    order = order[:_MOST_FILTERS]
    columns = min(8, len(order)) if patterns.dim() < 4 else min(4, len(order))
    rows = math.ceil(len(order) / columns)
    figure, axes = new_figure(
        rows, columns, rows * (9.0 / max(columns, 4) * (0.55 if patterns.dim() == 4 else 1)) + 0.7
    )
    for panel, index in zip(axes.flat, order, strict=False):
        picture, row = _flat_picture(patterns[index]), filters[index]
        limit = max(float(np.nanmax(np.abs(picture))), 1e-12)
        panel.imshow(picture, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        label = row["label"] if row["label"] not in ("other",) else f"({row['nearest']})"
        panel.set_title(f"{index}: {label}\n{row['score']:.2f}", fontsize=9)
        panel.set(xticks=[], yticks=[])
    hide_unused(axes, len(order))
    return figure


def _flat_picture(kernel: Tensor) -> np.ndarray:
    """Return a kernel as an image: a row for a signal's, slices side by side for a volume's."""
    if kernel.dim() == 1:
        kernel = kernel[None]
    if kernel.dim() == 3:
        gap = torch.full((kernel.shape[1], 1), torch.nan, dtype=kernel.dtype)
        parts = [part for plane in kernel for part in (plane, gap)]
        kernel = torch.cat(parts[:-1], dim=1)
    return np.asarray(kernel.cpu().numpy())


def plot_channels(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Figure:
    """Draw the Dice that each channel's loss costs, one line of dots per layer."""
    shown = [name for name in names if any(row["layer"] == name for row in rows)]
    figure, axes = new_figure(1, 1, 0.3 * len(shown) + 1.3)
    panel = axes[0, 0]
    style_axes(panel, "", "mean Dice lost when the channel is replaced by its mean")
    panel.axvline(0, color=MUTED, linewidth=0.8)
    for place, name in enumerate(shown):
        values = [(row["dice_lost"], row["channel"]) for row in rows if row["layer"] == name]
        panel.plot([lost for lost, _ in values], [place] * len(values), "o", color=COLORS[0], alpha=0.5, markersize=6)
        lost, channel = max(values)
        panel.annotate(f"{channel}", (lost, place), (6, 0), textcoords="offset points", fontsize=8, va="center")
    panel.set_yticks(range(len(shown)), [plain_text(name) for name in shown], fontsize=8)
    panel.set_ylim(len(shown) - 0.5, -0.5)
    panel.margins(x=0.06)
    return figure


def plot_pruning(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw Dice over the share of edges that are zero."""
    figure, axes = new_figure(1, 1, 3.4)
    panel = axes[0, 0]
    style_axes(panel, "", "edges that are zero (%)", "mean Dice")
    amounts = [100 * row["amount"] for row in rows]
    panel.plot(amounts, [row["dice"] for row in rows], "o-", color=COLORS[0], linewidth=2.0)
    for amount, row in zip(amounts, rows, strict=True):
        panel.annotate(
            _dice(row["dice"]), (amount, row["dice"]), (0, 8), textcoords="offset points", ha="center", fontsize=9
        )
    values = [row["dice"] for row in rows if not math.isnan(row["dice"])] or [0.5]
    middle, half = (max(values) + min(values)) / 2, max(0.02, 0.7 * (max(values) - min(values)))
    panel.set_ylim(max(0, middle - half), middle + 1.2 * half)
    panel.set_xticks(amounts)
    return figure


def _dice(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.3f}"
