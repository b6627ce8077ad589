"""A checkpoint's tensors as people see them, with the use of each one's codes as a line of bars."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from halfbin.cli.screen import BLANK, facts, page, plain, rows
from halfbin.run.inspection import Inspection, TensorInspection
from halfbin.run.wording import count, number, percent, size

BARS = "▁▂▃▄▅▆▇█"
NUM_BARS = 16


def inspection_table(inspection: Inspection) -> RenderableType:
    """A row for each tensor, and the totals."""
    with_codes = bool(inspection.quantized)
    table = rows()
    table.add_column("tensor", overflow="fold")
    table.add_column("stored as", no_wrap=True)
    for heading in ("shape", "size", "bits"):
        table.add_column(heading, justify="right", no_wrap=True)
    if with_codes:
        table.add_column("codes", no_wrap=True)
        table.add_column("saturated", justify="right", no_wrap=True)
        table.add_column("unused", justify="right", no_wrap=True)
    for tensor in inspection.tensors:
        shape = "×".join(map(str, tensor.shape)) or "scalar"
        numbers = [plain(shape), plain(size(tensor.bytes)), plain(number(tensor.bits_per_weight, 3))]
        codes = _codes(tensor) if with_codes else []
        table.add_row(plain(tensor.name), plain(tensor.weights, "bold" if tensor.scheme else ""), *numbers, *codes)
    return page(table, BLANK, _totals(inspection))


def sparkline(counts: Sequence[int], num_bars: int = NUM_BARS) -> str:
    """Counts as bars of eight heights, neighbours summed where there are more of them than bars; blank: none at all."""
    width = -(-len(counts) // num_bars)
    sums = [sum(counts[i : i + width]) for i in range(0, len(counts), width)]
    highest = max(sums, default=0)
    return "".join(BARS[-(-total * len(BARS) // highest) - 1] if total else " " for total in sums)


def _codes(tensor: TensorInspection) -> list[Text]:
    if tensor.codes is None:
        return []
    codes = tensor.codes
    bad = plain(f" {count(codes.not_finite, 'code')} not finite!", "bold red") if codes.not_finite else Text()
    return [
        plain(sparkline(codes.counts), "cyan") + bad,
        plain(percent(codes.saturated / max(tensor.num_weights, 1))),
        plain(f"{codes.unused} of {len(codes.levels)}"),
    ]


def _totals(inspection: Inspection) -> Table:
    table = facts()
    table.add_row("checkpoint", plain(inspection.path, "bold") + plain(f"   {inspection.layout}", "dim"))
    quantized = f"{count(len(inspection.tensors), 'tensor')}, {len(inspection.quantized)} quantized"
    table.add_row("tensors", f"{quantized}; {count(inspection.num_weights, 'weight')}")
    table.add_row("size", size(inspection.bytes))
    where = f"; {number(inspection.bits_per_weight, 3)} where quantized" if inspection.quantized else ""
    table.add_row("bits per weight", f"{number(inspection.bits_per_weight_total, 3)} over everything{where}")
    return table
