from __future__ import annotations

import base64
import io
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from monai_deqkan.visualize import Report, plot_bars
from monai_deqkan.visualize import report as report_module

EVIL = "<script>alert('x')</script> \" onload=\"x & {title}"
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Read a page, checking that its tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"repeated attribute in {tag}"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def _full_report(text: str) -> Report:
    report = Report(text, text)
    report.add_heading(text)
    report.add_heading(text, level=3)
    report.add_text(f"{text}\n\n{text}")
    report.add_key_figures([(text, text, text)])
    report.add_table([text, text], [[text, text]], text)
    report.add_figure(plot_bars({"ours": {"Dice": 0.9}}), text, text)
    report.add_json(text, {text: [text]})
    return report


def test_page_is_balanced_and_loads_nothing(tmp_path):
    path = _full_report("plain").save(tmp_path / "report.html")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"base64,[^\"]*", "", text))
    assert not page.all("script")
    assert not page.all("link")
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert (attributes.get("href") or "#").startswith("#")
    assert [tag for tag, attributes in page.tags if "src" in attributes] == ["img"]
    assert page.all("img")[0]["src"].startswith("data:image/png;base64,")
    assert "nothing in this report is for clinical use" in " ".join(page.texts)


def test_an_empty_report_still_says_that_it_is_not_for_clinical_use():
    page = Page(Report("empty").to_html())
    assert "nothing in this report is for clinical use" in " ".join(page.texts)
    assert not page.all("nav")


def test_every_field_is_escaped():
    page = Page(_full_report(EVIL).to_html())
    assert not page.all("script")
    assert not [name for _, attributes in page.tags for name in attributes if name == "onload"]
    # title, h1, subtitle, nav, h2, h3, 2 p, 3 card fields, 2 header cells, 2 cells, caption, figure caption, summary
    assert sum(text == EVIL for text in page.texts) == 18
    assert page.all("img")[0]["alt"] == EVIL
    details = page.texts[-1 - page.texts[::-1].index(next(t for t in page.texts[::-1] if t.startswith("{")))]
    assert details.count("<script>") == 2


def test_pictures_are_png_at_the_stated_size():
    report = Report("pictures")
    figure = plot_bars({"ours": {"Dice": 0.9}})
    report.add_figure(figure, "a caption", "a bar")
    image = Page(report.to_html()).all("img")[0]
    data = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"), validate=True)
    with Image.open(io.BytesIO(data)) as picture:
        picture.load()
        assert picture.format == "PNG"
        assert picture.width / picture.height == pytest.approx(int(image["width"]) / int(image["height"]), rel=0.01)
    assert int(image["width"]) == 900


def test_headings_go_in_order_and_the_navigation_reaches_each_section():
    report = Report("run")
    for name in ("Classification", "Segmentation"):
        report.add_heading(name)
        report.add_heading("Numbers", level=3)
    page = Page(report.to_html())
    assert [tag for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)] == ["h1", "h2", "h3", "h2", "h3"]
    assert [f"#{heading['id']}" for heading in page.all("h2")] == [link["href"] for link in page.all("a")]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (float("nan"), "n/a"),
        (float("inf"), "n/a"),
        (None, "n/a"),
        (True, "yes"),
        (12, "12"),
        (0.91234567, "0.9123"),
        (123456.7, "123457"),
        (1.5e-7, "1.5e-07"),
        (np.float32(0.25), "0.25"),
        (torch.tensor(float("nan")), "n/a"),
        (np.bool_(False), "no"),
        ("as it is", "as it is"),
    ],
)
def test_values_are_shown_for_people(value, shown):
    report = Report("numbers")
    report.add_table(["name", "value"], [["row", value]])
    report.add_key_figures([("label", value, "")])
    texts = Page(report.to_html()).texts
    assert texts.count(shown) == 2


def test_json_keeps_all_digits_and_shows_non_finite_numbers_as_not_available():
    report = Report("details")
    report.add_json("all", {"a": (1.23456789012, float("inf")), 2: torch.tensor(3), "path": os.PathLike})
    details = "".join(Page(report.to_html()).texts)
    assert '"a": [\n    1.23456789012,\n    "n/a"\n  ],\n  "2": 3' in details


def test_save_never_overwrites_and_leaves_no_draft(tmp_path):
    target = tmp_path / "report.html"
    assert Report("first").save(target) == target
    before = target.read_bytes()
    with pytest.raises(FileExistsError, match="Nothing was written"):
        Report("second").save(target)
    assert target.read_bytes() == before
    dangling = tmp_path / "dangling.html"
    dangling.symlink_to(tmp_path / "nowhere.html")
    with pytest.raises(FileExistsError, match="dangling"):
        Report("third").save(dangling)
    assert sorted(os.listdir(tmp_path)) == ["dangling.html", "report.html"]
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Report("fourth").save(tmp_path / "missing" / "report.html")


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_a_file_that_appears_meanwhile_is_kept(tmp_path, monkeypatch, links):
    target = tmp_path / "report.html"
    report = Report("late")
    page = report.to_html()

    def slow() -> str:
        target.write_text("another's")
        return page

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(report, "to_html", slow)
    if not links:
        monkeypatch.setattr(report_module.os, "link", refuse)
    with pytest.raises(FileExistsError, match="would overwrite"):
        report.save(target)
    assert target.read_text() == "another's"
    assert os.listdir(tmp_path) == ["report.html"]


def test_save_works_without_hard_links_and_with_undecodable_names(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(report_module.os, "link", refuse)
    path = Report("scan \udce9 Größe").save(tmp_path / "report.html")
    assert "scan ? Größe" in path.read_text(encoding="utf-8")
    assert os.listdir(tmp_path) == ["report.html"]


def _luminance(color: str) -> float:
    channels = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_contrast_is_wcag_aa_in_light_and_dark():
    blocks = re.findall(r":root \{(.*?)\}", Report("colors").to_html(), flags=re.S)
    assert len(blocks) == 2
    for block in blocks:
        colors = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        pairs = [(ink, paper) for ink in ("text", "muted", "link") for paper in ("back", "card")]
        for ink, paper in [*pairs, ("notice-text", "notice-back")]:
            low, high = sorted(_luminance(colors[name]) for name in (ink, paper))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, paper)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda r: r.add_table(["a", "b"], [["x"]]), "2 cells"),
        (lambda r: r.add_table([], []), "at least one column"),
        (lambda r: r.add_key_figures([]), "at least one key figure"),
        (lambda r: r.add_key_figures([("a", 1)]), "label, value, comparison"),
        (lambda r: r.add_figure(plot_bars({"a": {"b": 1.0}}), "caption", " "), "cannot see"),
        (lambda r: r.add_heading("part", level=3), "Add a section first"),
        (lambda r: r.add_heading("part", level=1), "`level` must be one of 2, 3"),
    ],
)
def test_bad_input_is_rejected(call, match):
    with pytest.raises(ValueError, match=match):
        call(Report("bad"))
