"""What one task of the demonstration adds to the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from monai_deqkan.visualize import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Section"]


@dataclass
class Section:
    """The results of one task.

    Attributes:
        title: heading.
        text: paragraphs, plain text.
        key_figures: label, value, comparison.
        header: header of the table of numbers.
        rows: its rows.
        figures: figure, caption, text for those who cannot see it.
        numbers: everything measured, for ``summary.json``.
    """

    title: str
    text: list[str]
    key_figures: list[tuple[str, str, str]]
    header: Sequence[str]
    rows: list[Sequence[str]]
    numbers: dict[str, Any]
    figures: list[tuple[Figure, str, str]] = field(default_factory=list)

    def add_to(self, report: Report) -> None:
        """Append this section to a report."""
        report.add_heading(self.title)
        for paragraph in self.text:
            report.add_text(paragraph)
        report.add_key_figures(self.key_figures)
        report.add_table(self.header, self.rows)
        for figure, caption, alt in self.figures:
            report.add_figure(figure, caption, alt)
