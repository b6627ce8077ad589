"""The drawings of the report: sizes, error per site, error by layer, and weights against the levels they are rounded to."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from halfbin.run.patterns import layer_index, pattern, tails
from halfbin.run.report import Report, SiteReport
from halfbin.run.svg import INK, SERIES, figure, label, to_svg
from halfbin.run.wording import count, number, percent, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_BARS = 40
MIN_LAYERS = 4
MAX_LEVELS = 40  # more lines than that would hide the histogram
LOG_FROM = 30.0  # the largest error over the smallest from which a linear axis hides the small ones


@dataclass(frozen=True, slots=True)
class Plot:
    """One drawing with its heading and what to read from it."""

    title: str
    note: str
    svg: str


def plots(report: Report) -> tuple[Plot, ...]:
    """The drawings that this report has the numbers for."""
    found = [size_plot(report), profile_plot(report), error_plot(report)]
    return tuple(plot for plot in found if plot is not None)


def size_plot(report: Report) -> Plot:
    """Bytes before and after, split by what became of them."""
    parts = _size_parts(report)
    drawing, axes = figure(400, 34 * 2 + 96)
    largest = max(report.bytes_before, report.bytes_after, 1)
    for row, when in enumerate(("before", "after")):
        left = 0
        for name, colour, sizes in parts:
            axes.barh(
                row, sizes[row], left=left, height=0.62, color=INK[colour], label=label(name) if row == 0 else None
            )
            left += sizes[row]
        total = (report.bytes_before, report.bytes_after)[row]
        axes.text(left + 0.015 * largest, row, f"{size(total)}", va="center", fontsize=12, color=INK["text"])
        axes.text(-0.015 * largest, row, when, va="center", ha="right", fontsize=12, color=INK["text"])
    axes.set_xlim(0, largest * 1.22)
    axes.invert_yaxis()
    axes.set_axis_off()
    drawing.legend(
        loc="outside lower left", ncols=3, frameon=False, fontsize=11, labelcolor=INK["muted"], handlelength=1
    )
    rows = "; ".join(f"{name}: {size(sizes[0])} before, {size(sizes[1])} after" for name, _, sizes in parts)
    svg = to_svg(drawing, name="size", description=f"Size on disk. {rows}")
    return Plot("Size on disk", "Weights only, as they lie on disk; scales and zero points are counted.", svg)


def error_plot(report: Report) -> Plot | None:
    """The relative error of each quantized weight; the worst ones where there are many."""
    sites = report.worst
    if not sites:
        return None
    shown = {site.name for site in sites[:MAX_BARS]}
    ordered = [site for site in report.quantized if site.name in shown]
    names = tails([site.name for site in ordered])
    drawing, axes = figure(400, 70 + 17 * len(ordered))
    _error_bars(axes, ordered)
    axes.set_yticks(range(len(ordered)), [label(_shorten(names[site.name])) for site in ordered], fontsize=10)
    axes.tick_params(axis="y", length=0, pad=6)
    axes.set_ylim(len(ordered) - 0.4, -0.6)
    axes.set_xlabel("relative error, %", fontsize=11, color=INK["muted"])
    axes.grid(axis="x", color=INK["line"], linewidth=0.6)
    if any(site.output_error for site in ordered):
        axes.figure.legend(loc="outside upper right", ncols=2, fontsize=11, labelcolor=INK["muted"], frameon=False)
    worst = sites[0]
    assert worst.weight_error is not None
    which = f"The {MAX_BARS} largest of {len(sites)}" if len(sites) > MAX_BARS else "All quantized sites"
    note = (
        f"{which}, in the model's order. Largest: {worst.name} with {_together(percent(worst.weight_error.relative))}."
    )
    return Plot("Error by site", note, to_svg(drawing, name="error", description=f"Relative error by site. {note}"))


def profile_plot(report: Report) -> Plot | None:
    """The relative error along the depth of the model, one line for each kind of site: of the outputs where they are known."""
    of_outputs = any(site.output_error for site in report.quantized)
    series = _series(report, of_outputs=of_outputs)
    depth = {index for points in series.values() for index in points}
    if len(depth) < MIN_LAYERS:
        return None
    drawing, axes = figure(400, 290)
    names = tails(list(series))
    for colour, (kind, points) in zip(SERIES, series.items(), strict=False):
        where = sorted(points)
        heights = [100 * points[i] for i in where]
        axes.plot(
            where, heights, color=colour, linewidth=1.6, marker="o", markersize=3.5, label=label(_shorten(names[kind]))
        )
    _error_axis(axes, "y", [100 * value for points in series.values() for value in points.values()])
    axes.set_ylabel("relative error, %", fontsize=11, color=INK["muted"])
    axes.set_xlabel("layer", fontsize=11, color=INK["muted"])
    axes.locator_params(axis="x", integer=True)
    axes.grid(axis="y", color=INK["line"], linewidth=0.6)
    columns = 2 if max(len(names[kind]) for kind in series) > 14 else 4
    drawing.legend(loc="outside lower left", ncols=columns, frameon=False, fontsize=10, labelcolor=INK["muted"])
    what = "output" if of_outputs else "weight"
    note = f"Relative {what} error along the depth of the model; where a layer has several such sites (experts), the worst."
    return Plot(f"{what.title()} error by layer", note, to_svg(drawing, name="profile", description=note))


def histogram_plots(report: Report) -> tuple[Plot, ...]:
    """The weights of the worst, the median and the best site, with the levels that they were rounded to."""
    ranked = [site for site in report.worst if site.histogram is not None]
    if not ranked:
        return ()
    chosen = {"Worst": ranked[0], "Median": ranked[len(ranked) // 2], "Best": ranked[-1]}
    distinct: dict[str, SiteReport] = {}
    for rank, site in chosen.items():
        if all(site is not other for other in distinct.values()):
            distinct[rank] = site
    return tuple(_histogram_plot(rank, site) for rank, site in distinct.items())


def _histogram_plot(rank: str, site: SiteReport) -> Plot:
    histogram, error = site.histogram, site.weight_error
    assert histogram is not None and error is not None
    drawing, axes = figure(360, 210)
    axes.stairs(histogram.counts, histogram.edges, fill=True, color=INK["accent-soft"], linewidth=0)
    axes.stairs(histogram.counts, histogram.edges, color=INK["accent"], linewidth=0.8)
    if len(histogram.levels) <= MAX_LEVELS:
        top = 1.06 * max(*histogram.counts, 1)
        axes.vlines(histogram.levels, 0, top, color=INK["warm"], linewidth=0.9, linestyles=(0, (2, 2)))
        axes.set_ylim(0, top)
    axes.set_xlim(histogram.edges[0], histogram.edges[-1])
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_ylabel("number of weights", fontsize=11, color=INK["muted"])
    axes.set_xlabel("weight, in steps of its group's scale", fontsize=11, color=INK["muted"])
    levels = count(len(histogram.levels), "level")
    if len(histogram.levels) > MAX_LEVELS:
        levels += " (too many to draw)"
    size_of_error = f"{_together(percent(error.relative))}, {_together(number(error.snr_db, 3) + ' dB')}"
    note = f"{site.weights}, {levels}; relative error {size_of_error}"
    description = f"Histogram of the weights of {site.name}: {note}"
    return Plot(
        f"{rank}: {site.name}", note, to_svg(drawing, name=f"histogram-{rank.lower()}", description=description)
    )


def _size_parts(report: Report) -> list[tuple[str, str, tuple[int, int]]]:
    """Name, colour and (before, after) bytes; what belongs to no site is the rest, headers included."""
    sums = {
        "quantized": (report.quantized, "accent"),
        "left in floating point": (report.left_alone, "neutral"),
    }
    parts = [
        (name, colour, (sum(site.bytes_before for site in sites), sum(site.bytes_after for site in sites)))
        for name, (sites, colour) in sums.items()
    ]
    rest = (
        max(report.bytes_before - sum(sizes[0] for _, _, sizes in parts), 0),
        max(report.bytes_after - sum(sizes[1] for _, _, sizes in parts), 0),
    )
    return [part for part in [*parts, ("everything else", "line", rest)] if any(part[2])]


def _error_bars(axes: Axes, sites: Sequence[SiteReport]) -> None:
    weight = [100 * site.weight_error.relative if site.weight_error else math.nan for site in sites]
    output = [100 * site.output_error.relative if site.output_error else math.nan for site in sites]
    scale = _error_axis(axes, "x", [*weight, *output])
    left = scale if scale > 0 else 0.0
    widths = [value - left if math.isfinite(value) else 0.0 for value in weight]
    axes.barh(range(len(sites)), widths, left=left, height=0.66, color=INK["accent-soft"], label="of the weight")
    for row, value in enumerate(weight):
        if not math.isfinite(value):
            axes.text(left, row, f" {number(value)}", va="center", fontsize=10, color=INK["warm"])
    if any(map(math.isfinite, output)):
        axes.plot(output, range(len(sites)), "D", color=INK["warm"], markersize=4, label="of the output")


def _error_axis(axes: Axes, axis: str, values: Sequence[float]) -> float:
    """Set the limits for values in percent and, where they span too much, a logarithmic scale.

    Returns:
      The axis' lower end; 0 if it is linear.
    """
    positive = [value for value in values if math.isfinite(value) and value > 0]
    if not positive:
        return 0.0
    if max(positive) / min(positive) < LOG_FROM:
        axes.set(**{f"{axis}lim": (0, 1.06 * max(positive))})
        return 0.0
    low = min(positive) / 2
    axes.set(**{f"{axis}scale": "log", f"{axis}lim": (low, 1.5 * max(positive))})
    from matplotlib.ticker import FuncFormatter

    # Not the default 10^x, which is a formula drawn from many small texts.
    getattr(axes, f"{axis}axis").set_major_formatter(FuncFormatter(lambda value, _: number(value, 1)))
    getattr(axes, f"{axis}axis").set_minor_formatter(FuncFormatter(lambda *_: ""))
    return low


def _series(report: Report, *, of_outputs: bool) -> dict[str, dict[int, float]]:
    """For each kind of site the largest finite error in each layer; at most as many kinds as there are colours."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for site in report.quantized:
        index, error = layer_index(site.name), site.output_error if of_outputs else site.weight_error
        if index is not None and error is not None and math.isfinite(error.relative):
            points = found[pattern(site.name)]
            points[index] = max(points.get(index, 0.0), error.relative)
    kept = sorted(found, key=lambda kind: max(found[kind].values()), reverse=True)[: len(SERIES)]
    return {kind: points for kind, points in found.items() if kind in kept}


def _together(text: str) -> str:
    """A number and its unit stay on one line."""
    return text.replace(" ", "\u00a0")


def _shorten(name: str, longest: int = 38) -> str:
    return name if len(name) <= longest else "…" + name[1 - longest :]
