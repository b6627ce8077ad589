"""The page: well formed, complete, closed to the network and to hostile names."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from halfbin.run.html import render
from halfbin.run.report import Quality, Report
from run.example_report import example_report, hostile_report

VOID = {"meta", "br", "hr", "input", "img", "link", "path", "use", "rect", "stop"}
FETCHING = {"src", "href", "srcset", "action", "data", "poster", "background", "formaction", "xlink:href"}


@functools.cache
def example_page() -> str:
    return render(example_report())


class Page(HTMLParser):
    """Elements, attributes and texts of a page; fails on a tag that is closed out of order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open and self.open.pop() == tag, f"</{tag}> closes {self.open}"

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def ids(self) -> list[str]:
        return [found for _, attributes in self.tags if (found := attributes.get("id"))]


def test_the_page_is_well_formed_and_its_ids_are_unique() -> None:
    page = Page(example_page())
    assert len(page.ids()) == len(set(page.ids()))


def test_references_inside_the_drawings_point_to_what_is_there() -> None:
    text = example_page()
    referenced = set(re.findall(r'xlink:href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text))
    assert referenced and referenced <= set(Page(text).ids())


def test_every_drawing_is_well_formed_xml_with_a_description() -> None:
    drawings = re.findall(r"<svg .*?</svg>", example_page(), flags=re.DOTALL)
    assert len(drawings) == 6  # size, layers, sites, and three histograms
    for drawing in drawings:
        assert ET.fromstring(drawing).attrib["aria-label"]


def test_nothing_on_the_page_is_fetched() -> None:
    text = example_page()
    for tag, attributes in Page(text).tags:
        assert tag not in {"link", "iframe", "img", "object", "embed"}
        for name in FETCHING & attributes.keys():
            assert (attributes[name] or "").startswith("#"), (tag, name, attributes[name])
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert "default-src 'none'" in text
    without_namespaces = re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)
    assert "://" not in without_namespaces


HOSTILE = [
    pytest.param("</script><script>alert(1)</script>", id="script"),
    pytest.param('"><img src=x onerror=alert(1)>', id="attribute"),
    pytest.param("'\"><svg onload=alert(1)>", id="svg"),
    pytest.param("--><b>out</b><!--", id="comment"),
    pytest.param("$x^{$", id="formula"),
    pytest.param("{{ 7*7 }}{% raw %}", id="template"),
    pytest.param("a\x00\x1b[31m\u202eb\ud800c", id="control-characters"),
    pytest.param("]]>&amp;&lt;", id="entities"),
    pytest.param("x" * 3000, id="long"),
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_stays_text(name: str) -> None:
    text = render(hostile_report(name))
    text.encode("utf-8")
    page, clean = Page(text), Page(example_page())
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in clean.tags}
    assert not any(attribute.startswith("on") for _, attributes in page.tags for attribute in attributes)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e\ud800-\udfff]", text)
    for drawing in re.findall(r"<svg .*?</svg>", text, flags=re.DOTALL):
        ET.fromstring(drawing)


def test_the_same_report_gives_the_same_page() -> None:
    assert render(example_report()) == render(example_report())


def test_the_table_holds_every_site_with_its_numbers() -> None:
    report = example_report()
    page = Page(render(report))
    words = " ".join(" ".join(page.texts).split())
    for site in report.sites:
        assert site.name in words and site.reason in words
        if site.weight_error:
            assert f"{100 * site.weight_error.relative:.2f} %" in words
    assert words.count("int4-channel-f16") >= 5


def test_the_headline_numbers_are_on_the_page() -> None:
    words = " ".join(" ".join(Page(example_page()).texts).split())
    for expected in ("194 kB", "1.04 MB", "5.36×", "4.569", "3.963", "+15.29 %", "4.571", "0.143", "84.21 %", "412 MB"):
        assert expected in words, expected
    assert "AutoModelForCausalLM.from_pretrained('stories-int4')" in words
    assert "every token scored once" in words


def test_a_run_without_evaluation_says_so_instead_of_showing_zeros() -> None:
    report = example_report()
    bare = dataclasses.replace(
        report,
        before=Quality(bytes=report.bytes_before),
        after=Quality(bytes=report.bytes_after),
        after_default_load=None,
        kl=None,
        top1_agreement=None,
        evaluation=None,
        peak_memory_bytes=None,
        warnings=(),
    )
    words = " ".join(Page(render(bare)).texts)
    assert "Quality was not measured" in words and "Perplexity" not in words


def test_a_perplexity_that_overflowed_is_shown() -> None:
    report = example_report()
    broken = dataclasses.replace(report, after=dataclasses.replace(report.after, perplexity=math.inf, nll=math.inf))
    assert "infinite" in " ".join(Page(render(broken)).texts)


@pytest.mark.parametrize(
    "relative", [pytest.param(math.nan, id="nan"), pytest.param(0.0, id="zero"), pytest.param(1e-9, id="tiny")]
)
def test_errors_at_the_edges_can_be_drawn(relative: float) -> None:
    report = example_report()
    worst = report.worst[0]
    assert worst.weight_error
    odd = dataclasses.replace(
        worst, weight_error=dataclasses.replace(worst.weight_error, relative=relative, snr_db=math.inf)
    )
    sites = tuple(odd if site is worst else site for site in report.sites)
    Page(render(dataclasses.replace(report, sites=sites)))


@pytest.mark.parametrize(
    "num_sites", [pytest.param(0, id="none"), pytest.param(1, id="kept"), pytest.param(2, id="one-quantized")]
)
def test_a_model_with_hardly_any_site_has_a_page(num_sites: int) -> None:
    report = dataclasses.replace(example_report(), sites=example_report().sites[:num_sites])
    Page(render(report))


def test_many_sites_are_drawn_as_the_worst_forty() -> None:
    report: Report = example_report(8)
    assert "The 40 largest of 56" in render(report)


def test_errors_are_drawn_in_the_unit_that_the_text_uses() -> None:
    page = example_page()
    assert page.count(">relative error, %<") == 2, "error by site and error by layer"
    largest = max(100 * site.weight_error.relative for site in example_report().quantized if site.weight_error)
    (drawn,) = re.findall(r'<svg[^>]*aria-label="Relative error by site.*?</svg>', page, flags=re.DOTALL)
    ticks = [float(text) for text in re.findall(r">(\d+\.\d+)</text>", drawn)]
    assert largest / 2 < max(ticks) < 1.2 * largest


def test_a_deep_model_names_what_stands_at_each_bar() -> None:
    (drawn,) = re.findall(
        r'<svg[^>]*aria-label="Relative error by site.*?</svg>', render(example_report(43)), flags=re.DOTALL
    )
    assert drawn.count("mlp.down_proj</text>") == 40


def test_every_histogram_says_what_its_axes_count_and_how_many_levels_it_has() -> None:
    page = example_page()
    assert page.count(">number of weights<") == page.count("in steps of its group's scale<") == 3
    assert "16 levels" in page
