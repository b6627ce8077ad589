"""The report as one page: it stands alone, asks the network for nothing, and reads well in light, dark, wide and narrow.

Every name on it may come from a stranger's file: Jinja escapes all of them, control characters are replaced, and the page's
own content security policy forbids it to load anything.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from halfbin.run import wording
from halfbin.run.loading import needs, snippet
from halfbin.run.plots import histogram_plots, plots
from halfbin.run.report import Report

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"


def render(report: Report) -> str:
    """The page as text; the same report gives the same text."""
    page: str = (
        _environment()
        .get_template("report.html")
        .render(
            report=report,
            plots=plots(report),
            histograms=histogram_plots(report),
            snippet=snippet(report.layout, report.output, report.model_class),
            needs=needs(report.layout),
            has_output_errors=any(site.output_error for site in report.sites),
            largest_error=max((_relative(site.weight_error) for site in report.quantized), default=0.0),
        )
    )
    return page


def write(report: Report, path: Path) -> None:
    """Write the page to `path`."""
    path.write_text(render(report), encoding="utf-8")


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for function in (
        wording.base_name,
        wording.change,
        wording.count,
        wording.duration,
        wording.number,
        wording.percent,
        wording.printable,
        wording.ratio,
        wording.size,
    ):
        environment.filters[function.__name__] = function
    environment.filters["bar_width"] = _bar_width
    return environment


def _relative(error: object) -> float:
    relative = getattr(error, "relative", 0.0)
    return relative if relative < float("inf") else 0.0  # NaN and infinity set no scale


def _bar_width(relative: float, largest: float) -> str:
    """The length of a bar in the table, as a CSS percentage."""
    if not 0 < relative < float("inf") or not largest:
        return "0%" if not relative > 0 else "100%"
    return f"{100 * relative / largest:.1f}%"
