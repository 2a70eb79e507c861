"""One self-contained HTML page about a run."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monai_deqkan._checks import check_choice, check_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Report"]

NOTICE = "Research software: nothing in this report is for clinical use."
PIXELS_PER_INCH = 100  # of the page, at 100 %
STORED_DPI = 160  # finer than the page, for sharp pictures on dense displays and in print

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
{subtitle}<p class="notice" role="note">{notice}</p>
</header>
{nav}<main>
{body}
</main>
</body>
</html>
"""

STYLE = """
:root { --back: #ffffff; --card: #f4f6f8; --text: #1b1f24; --muted: #57606a; --line: #d0d7de; --link: #0b57a4;
  --notice-back: #fff4d6; --notice-text: #5c3d00; }
@media screen and (prefers-color-scheme: dark) {
  :root { --back: #14171c; --card: #1f242b; --text: #e6e9ee; --muted: #a8b1bc; --line: #3a424d; --link: #8ab8f5;
    --notice-back: #3a2f10; --notice-text: #ffe2a0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 62rem; background: var(--back); color: var(--text);
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif; overflow-wrap: break-word; }
h1 { margin: 0 0 .25rem; font-size: 1.9rem; line-height: 1.2; }
h2 { margin: 2.75rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); font-size: 1.4rem; }
h3 { margin: 1.75rem 0 .5rem; font-size: 1.12rem; }
p { margin: .6rem 0; max-width: 46rem; white-space: pre-line; }
a { color: var(--link); }
.subtitle, figcaption, caption, .comparison { color: var(--muted); }
.subtitle { margin-top: 0; font-size: 1.05rem; }
.notice { display: inline-block; margin: .75rem 0 0; padding: .4rem .8rem; border-radius: 6px; font-weight: 600;
  background: var(--notice-back); color: var(--notice-text); }
nav ol { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: 1rem 0 0; padding: 0; list-style: none; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); gap: .75rem; margin: 1rem 0; }
.cards div { padding: .8rem 1rem; border: 1px solid var(--line); border-radius: 8px; background: var(--card); }
.cards dt { font-size: .92rem; }
.cards dd { margin: 0; }
.cards .value { font-size: 1.75rem; font-weight: 650; line-height: 1.3; font-variant-numeric: tabular-nums; }
.comparison { font-size: .92rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { padding: .3rem 0; text-align: left; font-size: .92rem; }
th, td { padding: .4rem .8rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid var(--muted); }
tbody th { font-weight: 500; }
.number { text-align: right; }
figure { margin: 1.25rem 0; }
figure img { display: block; max-width: 100%; height: auto; padding: 4px; border: 1px solid var(--line);
  border-radius: 8px; background: #ffffff; }
figcaption { margin-top: .4rem; max-width: 46rem; font-size: .92rem; }
details { margin: 1rem 0; padding: .5rem 1rem; border: 1px solid var(--line); border-radius: 8px;
  background: var(--card); }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; font: .85rem/1.45 ui-monospace, "Liberation Mono", Consolas, monospace; }
@media print { body { max-width: none; padding: 0; font-size: 11pt; } nav { display: none; }
  figure, table, .cards div { break-inside: avoid; } h2, h3 { break-after: avoid; }
  pre { white-space: pre-wrap; } .scroll { overflow: visible; } }
"""


class Report:
    """Collect the texts, numbers and figures of a run, and save them as one HTML page.

    The page holds its style and its pictures, runs no script and loads nothing, so that it opens anywhere. It follows
    the reader's light or dark setting and always says that nothing in it is for clinical use. All text is taken as
    plain text, never as HTML. Numbers that are not finite read "n/a".

    Args:
        title: title of the page.
        subtitle: a line below it.

    Example:
        >>> report = Report("Demo", "three tasks on sample images")
        >>> report.add_heading("Reconstruction")
        >>> report.add_key_figures([("PSNR", "34.1 dB", "zero-filled: 27.5 dB")])
        >>> report.add_table(["method", "PSNR (dB)"], [["ours", 34.1], ["zero-filled", 27.5]])
        >>> report.save("report.html")  # doctest: +SKIP
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self._title = title
        self._subtitle = subtitle
        self._body: list[str] = []
        self._sections: list[str] = []

    def add_heading(self, text: str, *, level: int = 2) -> None:
        """Start a section.

        Args:
            text: the heading.
            level: 2 for a section, which the page's navigation lists, or 3 for a part of one.

        Raises:
            ValueError: if ``level`` is neither, or a part comes before any section.
        """
        check_choice("level", level, (2, 3))
        if level == 3:
            if not self._sections:
                raise ValueError(
                    "A heading of level 3 must follow one of level 2; got none before. Add a section first."
                )
            self._body.append(f"<h3>{_escape(text)}</h3>")
            return
        self._sections.append(text)
        self._body.append(f'<h2 id="section-{len(self._sections)}">{_escape(text)}</h2>')

    def add_text(self, text: str) -> None:
        """Add plain text; empty lines part its paragraphs."""
        for paragraph in text.replace("\r\n", "\n").split("\n\n"):
            if paragraph.strip():
                self._body.append(f"<p>{_escape(paragraph.strip())}</p>")

    def add_table(self, header: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "") -> None:
        """Add a table whose first column names the rows.

        Args:
            header: titles of the columns, with units.
            rows: texts and numbers; each row as long as the header.
            caption: what the table shows.

        Raises:
            ValueError: if there is no column, or a row has another length.
        """
        if not header:
            raise ValueError("`header` must name at least one column; got none.")
        for index, row in enumerate(rows):
            if len(row) != len(header):
                raise ValueError(f"`rows[{index}]` must have {len(header)} cells, as the header; got {len(row)}.")
        numeric = [bool(rows) and all(_is_number(row[column]) for row in rows) for column in range(len(header))]
        classes = [' class="number"' if number else "" for number in numeric]
        titles = "".join(
            f'<th scope="col"{kind}>{_escape(text)}</th>' for text, kind in zip(header, classes, strict=True)
        )
        lines = []
        for row in rows:
            cells = [f"<td{kind}>{_escape(cell)}</td>" for cell, kind in zip(row[1:], classes[1:], strict=True)]
            lines.append(f'<tr><th scope="row"{classes[0]}>{_escape(row[0])}</th>{"".join(cells)}</tr>')
        note = f"<caption>{_escape(caption)}</caption>" if caption else ""
        body = "\n".join(lines)
        # Focusable, so that the keyboard can scroll a wide table.
        self._body.append(
            f'<div class="scroll" tabindex="0" role="region" aria-label="{_escape(caption or "Table")}">'
            f"<table>{note}<thead><tr>{titles}</tr></thead>\n<tbody>{body}</tbody></table></div>"
        )

    def add_figure(self, figure: Figure, caption: str, alt: str) -> None:
        """Add a matplotlib figure as it looks now.

        Args:
            figure: the figure, shown at 100 pixels per inch.
            caption: what it shows, for all readers.
            alt: what it says, for those who cannot see it.

        Raises:
            ValueError: if ``alt`` is empty.
        """
        if not alt.strip():
            raise ValueError("`alt` must describe the figure for readers who cannot see it; got an empty text.")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=STORED_DPI, metadata={"Software": None})
        data = base64.b64encode(buffer.getvalue()).decode("ascii")
        width, height = (round(PIXELS_PER_INCH * float(inches)) for inches in figure.get_size_inches())
        note = f"<figcaption>{_escape(caption)}</figcaption>" if caption else ""
        self._body.append(
            f'<figure><img src="data:image/png;base64,{data}" alt="{_escape(alt)}" width="{width}" height="{height}">'
            f"{note}</figure>"
        )

    def add_key_figures(self, figures: Sequence[tuple[str, Any, Any]]) -> None:
        """Add the few numbers that matter most, as cards.

        Args:
            figures: for each card its label, its value, and what to compare it with (may be empty).

        Raises:
            ValueError: if there is no card, or one is no triple.
        """
        cards = []
        for figure in figures:
            if len(figure) != 3:
                raise ValueError(f"Each key figure must be (label, value, comparison); got {figure!r}.")
            label, value, comparison = (_escape(part) for part in figure)
            extra = f'<dd class="comparison">{comparison}</dd>' if comparison else ""
            cards.append(f'<div><dt>{label}</dt><dd class="value">{value}</dd>{extra}</div>')
        if not cards:
            raise ValueError("`figures` must hold at least one key figure; got none.")
        self._body.append(f'<dl class="cards">{"".join(cards)}</dl>')

    def add_json(self, name: str, obj: Any) -> None:
        """Add all details of ``obj`` as JSON that opens on a click.

        Args:
            name: what they are.
            obj: mappings, sequences, texts and numbers; anything else is shown by its ``str``.
        """
        text = json.dumps(_as_json(obj), indent=2, ensure_ascii=False)
        self._body.append(f"<details><summary>{_escape(name)}</summary><pre>{_escape(text)}</pre></details>")

    def to_html(self) -> str:
        """Return the page as text."""
        links = "".join(
            f'<li><a href="#section-{number}">{_escape(text)}</a></li>' for number, text in enumerate(self._sections, 1)
        )
        return PAGE.format(
            title=_escape(self._title),
            subtitle=f'<p class="subtitle">{_escape(self._subtitle)}</p>\n' if self._subtitle else "",
            notice=_escape(NOTICE),
            nav=f'<nav aria-label="Sections"><ol>{links}</ol></nav>\n' if links else "",
            style=STYLE,
            body="\n".join(self._body),
        )

    def save(self, path: str | Path) -> Path:
        """Write the page to a new file, whole or not at all.

        Args:
            path: file that does not exist yet, in a folder that does.

        Returns:
            Path of the file.

        Raises:
            FileExistsError: if something is there; it is left as it is.
            FileNotFoundError: if the folder is missing.
        """
        target = Path(path).expanduser()
        check_folder(target.parent, "the report")
        if os.path.lexists(target):
            raise _taken(target)
        draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            draft.write_text(self.to_html(), encoding="utf-8", errors="replace")
            _move_without_overwriting(draft, target)
        finally:
            draft.unlink(missing_ok=True)
        return target


def _taken(path: Path) -> FileExistsError:
    return FileExistsError(
        f"The report would overwrite {path}. Nothing was written; name a new file, or move that one."
    )


def _move_without_overwriting(draft: Path, target: Path) -> None:
    try:
        os.link(draft, target)
    except FileExistsError:
        raise _taken(target) from None
    except OSError:  # a file system without hard links: look again, then move, with a moment in between
        if os.path.lexists(target):
            raise _taken(target) from None
        os.replace(draft, target)


def _escape(value: Any) -> str:
    """Return a text or a number as HTML text that is safe in elements and attributes."""
    return html.escape(_as_text(value), quote=True)


def _unwrap(value: Any) -> Any:
    """Return scalars of NumPy and PyTorch as Python's own."""
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


def _is_number(value: Any) -> bool:
    value = _unwrap(value)
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _as_text(value: Any) -> str:
    value = _unwrap(value)
    if value is None:
        return "n/a"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        return "n/a"
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.4g}"


def _as_json(value: Any) -> Any:
    value = _unwrap(value)
    if isinstance(value, Mapping):
        return {str(key): _as_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "n/a"
    return value if value is None or isinstance(value, (str, int, float)) else str(value)
