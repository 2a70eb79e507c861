"""Curves and the report of a reconstruction suite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from monai_deqkan.visualize.learning import COLORS, new_figure, style_axes
from monai_deqkan.visualize.reconstruction import plot_reconstruction
from monai_deqkan.visualize.report import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_reconstruction_curves", "reconstruction_suite_report"]

_LABELS = {"psnr": "PSNR (dB)", "ssim": "SSIM", "nmse": "NMSE", "vif": "VIF"}


def plot_reconstruction_curves(
    results: Sequence[Mapping[str, Any]], *, title: str = "Quality over acceleration"
) -> Figure:
    """Draw the metrics of a reconstruction suite over the net acceleration, one line per method.

    Args:
        results: entries with ``method``, ``net_acceleration``, ``psnr``, ``ssim``, ``nmse`` and ``vif``, all of one
            mask and noise, as in a suite's ``summary.json``.
        title: title of the figure.

    Returns:
        Figure, 900 pixels wide at 100 dpi.

    Raises:
        ValueError: if there is no result.
    """
    if not results:
        raise ValueError("`results` must hold at least one entry; got none.")
    figure, axes = new_figure(2, 2, 6.5, title)
    methods = list(dict.fromkeys(result["method"] for result in results))
    for panel, (metric, label) in zip(axes.flat, _LABELS.items(), strict=True):
        for index, method in enumerate(methods):
            points = sorted((r["net_acceleration"], r[metric]) for r in results if r["method"] == method)
            x, y = zip(*points, strict=True)
            panel.plot(x, y, marker="o", markersize=4, color=COLORS[index % len(COLORS)], label=method)
        style_axes(panel, "", "net acceleration", label)
        if metric == "nmse":
            panel.set_yscale("log")
    axes[0, 0].legend(fontsize=9)
    return figure


def reconstruction_suite_report(
    result: Mapping[str, Any], examples: Mapping[str, Mapping[str, Any]] | None = None
) -> Report:
    """Make the HTML report of a reconstruction suite.

    Args:
        result: what a suite's ``summary.json`` holds.
        examples: per scenario a ``reference`` image, and ``images`` and ``scores`` by method.
    """
    rows = result["results"]
    report = Report("MRI reconstruction: evaluation suite", "Research only; not for clinical use.")
    report.add_heading("What was measured")
    report.add_text(result["statement"])
    report.add_heading("Results")
    for mask, snr_db in dict.fromkeys((row["mask"], row["snr_db"]) for row in rows):
        own = [row for row in rows if (row["mask"], row["snr_db"]) == (mask, snr_db)]
        noise = "no noise added" if snr_db is None else f"noise added at {snr_db:g} dB"
        report.add_heading(f"{mask} masks, {noise}", level=3)
        report.add_table(
            ["method", "net acceleration", "weight", *_LABELS.values(), "volume PSNR (dB)", "volume SSIM", "converged"],
            [_line(row) for row in own],
            f"Means over slices ({own[0]['num_slices']}), those named so over volumes ({own[0]['num_volumes']}).",
        )
        figure = plot_reconstruction_curves(own, title=f"{mask} masks, {noise}")
        report.add_figure(figure, "Means over slices.", "Quality falls as acceleration grows, one line per method.")
    if examples:
        report.add_heading("Error maps")
        for name, example in examples.items():
            figure = plot_reconstruction(example["reference"], example["images"], example["scores"], title=name)
            report.add_figure(
                figure,
                f"{name}: middle slice of the first file; all error maps share one scale.",
                "Reference, reconstructions and their error maps.",
            )
    report.add_heading("Time and memory")
    report.add_table(
        ["part", "seconds per slice", "peak memory (MiB)"],
        [(part["part"], part["seconds"], part["peak_memory_mib"]) for part in result["profile"]],
        "Medians of the time; the peak of what a method allocates on one slice, its input left out.",
    )
    report.add_json("Settings", result["settings"])
    return report


def _line(row: Mapping[str, Any]) -> list[Any]:
    converged = "" if row["share_converged"] is None else f"{row['share_converged']:.0%}"
    weight = "" if row["weight"] is None else f"{row['weight']:g}"
    net = f"{row['net_acceleration']:.2f}"
    return [row["method"], net, weight, *(row[m] for m in _LABELS), row["volume_psnr"], row["volume_ssim"], converged]
