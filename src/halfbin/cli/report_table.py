"""The report as people see it at the end of a run: what it became, what it cost, where it is and how to load it."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from halfbin.cli.screen import BLANK, facts, page, plain, rows
from halfbin.run.loading import needs, snippet
from halfbin.run.report import Report
from halfbin.run.wording import change, count, duration, number, percent, ratio, size

NUM_WORST = 5


def report_table(report: Report) -> RenderableType:
    """Before and after, the worst sites, time and memory, warnings, files, and the lines that load it."""
    parts: list[RenderableType] = [_title(report), BLANK, _before_and_after(report), BLANK, _cost(report), BLANK]
    if report.worst:
        parts.extend((_worst(report), BLANK))
    parts.append(_facts(report))
    if report.warnings:
        parts.append(BLANK)
        parts.extend(plain("warning: ", "bold yellow") + plain(warning) for warning in report.warnings)
    if report.output is not None:
        parts.extend((BLANK, _files(report), BLANK, _how_to_load(report)))
        return Group(page(*parts), *_snippet(report), BLANK)
    return page(*parts)


def _title(report: Report) -> Text:
    to = "" if report.output is None else f" → {report.output}"
    return plain(f"{report.model}{to}", "bold") + plain(f"   {report.recipe}, {report.layout}", "dim")


def _before_and_after(report: Report) -> Table:
    table = rows()
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right", style="bold")
    table.add_column("change")
    smaller = f"{ratio(report.bytes_before, report.bytes_after)} smaller"
    table.add_row("size", size(report.bytes_before), size(report.bytes_after), smaller)
    before = 8 * report.bytes_before / max(report.num_parameters, 1)
    where = f"{number(report.bits_per_weight, 3)} where quantized" if report.quantized else ""
    table.add_row("bits per weight", number(before, 3), number(report.bits_per_weight_total, 3), where)
    old, new = report.before.perplexity, report.after.perplexity
    if new is not None:
        table.add_row(f"perplexity, {report.after.dtype}", number(old), number(new), change(old, new))
    if report.after_default_load is not None:
        default = report.after_default_load
        loaded = f"perplexity, {default.dtype} (default load)"
        table.add_row(plain(loaded), "", number(default.perplexity), change(old, default.perplexity))
    return table


def _cost(report: Report) -> RenderableType:
    table = facts()
    if report.kl is not None:
        kl = report.kl
        spread = f"median {number(kl.median, 3)} · p99 {number(kl.p99, 3)} · max {number(kl.maximum, 3)}"
        table.add_row(
            "KL divergence", plain(number(kl.mean, 3), "bold"), plain(f"nats per token, mean; {spread}", "dim")
        )
    if report.top1_agreement is not None:
        agreement = plain(percent(report.top1_agreement), "bold")
        table.add_row("top-1 agreement", agreement, plain("of tokens keep their first choice", "dim"))
    if report.embeddings is not None:
        found = report.embeddings
        sentences = (
            f"mean over {count(found.num_sentences, 'sentence')}; squared error {number(found.mean_squared_error, 3)}"
        )
        table.add_row("embedding cosine", plain(number(found.mean_cosine, 5), "bold"), plain(sentences, "dim"))
    return table if table.row_count else plain("quality was not measured", "dim")


def _worst(report: Report) -> Table:
    shown = report.worst[:NUM_WORST]
    with_output = any(site.output_error for site in shown)
    table = rows()
    table.add_column("largest errors", overflow="fold")
    table.add_column("stored as")
    table.add_column("weight error", justify="right")
    if with_output:
        table.add_column("output error", justify="right")
    for site in shown:
        assert site.weight_error is not None
        row = [plain(site.name), plain(site.weights), plain(percent(site.weight_error.relative))]
        if with_output:
            row.append(plain(percent(site.output_error.relative if site.output_error else None)))
        table.add_row(*row)
    return table


def _facts(report: Report) -> Table:
    table = facts()
    kept = f", {len(report.left_alone)} left in floating point" if report.left_alone else ""
    table.add_row("sites", f"{len(report.quantized)} quantized{kept}")
    if report.float_columns:
        table.add_row("16-bit columns", report.float_columns)
    stages = ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in report.timings.items())
    table.add_row("time", plain(f"{duration(report.seconds)} ({stages})" if stages else duration(None)))
    table.add_row("peak memory", size(report.peak_memory_bytes))
    if report.calibration is not None:
        samples = report.calibration
        table.add_row("calibrated on", plain(f"{samples.text}, {count(samples.num_tokens, 'token')}"))
        table.add_row("", plain(samples.definition, "dim"))
    if report.evaluation is not None:
        found = report.evaluation
        tokens = f", {count(found.num_tokens, 'token')}" if found.num_tokens else ""
        table.add_row("measured on", plain(f"{found.text}{tokens}"))
        table.add_row("", plain(found.definition, "dim"))
    return table


def _files(report: Report) -> Table:
    table, directory = facts(), Path(report.output or "")
    table.add_row("report", plain(str(directory / "report.html")))
    table.add_row("for programs", plain(str(directory / "report.json")))
    return table


def _how_to_load(report: Report) -> Table:
    table = facts()
    table.add_row("load it", plain(needs(report.layout)))
    return table


def _snippet(report: Report) -> list[Text]:
    """At the left edge, so that it can be copied into a Python prompt."""
    return [plain(line, "cyan") for line in snippet(report.layout, report.output, report.model_class).split("\n")]
