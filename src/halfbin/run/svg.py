"""Matplotlib figures as SVG to be put inside a page: no files, no fonts, colours left to the page's style sheet.

The text stays text, so the page's font and the reader's search apply. Every colour drawn must be one of `INK`; it leaves
as a CSS variable, which is how one drawing suits light and dark. The same figure gives the same bytes: ids are
hashed with a fixed salt and prefixed, so that several drawings share one page, and dates are left out.
"""

from __future__ import annotations

import io
import re
from html import escape
from typing import TYPE_CHECKING, Any

from halfbin.run.wording import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Sentinels that no style sheet would choose. Keys are the names of the page's CSS variables.
INK = {
    "text": "#010203",
    "muted": "#020304",
    "line": "#030405",
    "accent": "#040506",
    "accent-soft": "#050607",
    "warm": "#060708",
    "neutral": "#070809",
    "series-1": "#08090a",
    "series-2": "#090a0b",
    "series-3": "#0a0b0c",
    "series-4": "#0b0c0d",
    "series-5": "#0c0d0e",
    "series-6": "#0d0e0f",
    "series-7": "#0e0f10",
    "series-8": "#0f1011",
}
SERIES = tuple(INK[f"series-{i}"] for i in range(1, 9))

PIXELS_PER_INCH = 72.0  # of the SVG backend
LARGEST = (
    1.2  # how far a drawing may grow; it is drawn small, so that its text is still read on a telephone's 360 pixels
)


def figure(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure of that many CSS pixels, with one quiet axes."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(width / PIXELS_PER_INCH, height / PIXELS_PER_INCH), layout="constrained")
    axes = drawing.add_subplot()
    drawing.patch.set_visible(False)
    axes.patch.set_visible(False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(INK["line"])
    axes.tick_params(which="both", color=INK["line"], labelcolor=INK["muted"], labelsize=11)
    axes.set_axisbelow(True)
    return drawing, axes


def label(text: str) -> str:
    """A stranger's text, safe to draw: no control characters, and dollar signs that start no formula."""
    return printable(text).replace("\\", "/").replace("$", r"\$")


def to_svg(drawing: Figure, *, name: str, description: str) -> str:
    """The figure as one <svg> element that scales to its container.

    Args:
      drawing: made by `figure`.
      name: lower-case letters and dashes; unique on the page, as it prefixes every id.
      description: what a reader who cannot see it should know.
    """
    import matplotlib

    settings: dict[str, Any] = {"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "DejaVu Sans"}
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    sink = io.StringIO()
    with matplotlib.rc_context(settings):
        drawing.savefig(sink, format="svg", metadata=nothing)
    return _embed(sink.getvalue(), name, description)


def _embed(svg: str, name: str, description: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    for variable, colour in INK.items():
        svg = svg.replace(colour, f"var(--{variable})")
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    head, rest = svg.split(">", 1)
    found = re.search(r'viewBox="0 0 ([0-9.]+) ([0-9.]+)"', head)
    assert found is not None
    width, height = found[1], found[2]
    spoken = escape(printable(description), quote=True)
    opening = (
        f'<svg class="plot" role="img" aria-label="{spoken}" viewBox="0 0 {width} {height}" '
        f'style="max-width: {LARGEST * float(width):.0f}px" xmlns="http://www.w3.org/2000/svg" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return opening + rest.strip()
