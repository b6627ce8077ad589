"""The plan as people see it: sites that differ only in their layer's number share a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from halfbin.cli.screen import BLANK, facts, page, plain, rows
from halfbin.run.patterns import pattern
from halfbin.run.wording import count, duration, ratio, size


def plan_table(plan: Mapping[str, Any]) -> RenderableType:
    """`plan`: the JSON of a plan. What would become of every site, why, and what it adds up to."""
    table = rows()
    table.add_column("site", no_wrap=True)
    table.add_column("", justify="right", style="dim")
    table.add_column("stored as", no_wrap=True)
    table.add_column("shape", justify="right", no_wrap=True)
    table.add_column("before", justify="right", no_wrap=True)
    table.add_column("after", justify="right", no_wrap=True)
    table.add_column("why", overflow="fold", style="dim")
    for sites in _groups(plan["sites"]):
        first = sites[0]
        table.add_row(
            plain(first["name"] if len(sites) == 1 else pattern(first["name"])),
            "" if len(sites) == 1 else f"×{len(sites)}",
            plain(first["weights"], "bold" if first["quantized"] else ""),
            "×".join(map(str, first["shape"])),
            size(sum(site["bytes_before"] for site in sites)),
            size(sum(site["bytes_after"] for site in sites)),
            plain(first["reason"]),
        )
    return page(table, BLANK, _totals(plan), BLANK, plain("nothing was written: this is the plan", "dim"))


def _groups(sites: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Sites with the same pattern, shape, storage and reason, in the order in which the first of each comes."""
    groups: dict[tuple[object, ...], list[Mapping[str, Any]]] = {}
    for site in sites:
        key = (pattern(site["name"]), tuple(site["shape"]), site["weights"], site["reason"])
        groups.setdefault(key, []).append(site)
    return list(groups.values())


def _totals(plan: Mapping[str, Any]) -> Table:
    table = facts()
    quantized = [site for site in plan["sites"] if site["quantized"]]
    before, after = plan["input_bytes"], plan["output_bytes"]
    table.add_row("model", plain(plan["model"], "bold") + plain(f"   {plan['recipe']}, {plan['layout']}", "dim"))
    table.add_row("sites", f"{count(len(quantized), 'site')} of {len(plan['sites'])} would be quantized")
    table.add_row("size", f"{size(before)} → {size(after)}, {ratio(before, after)} smaller")
    more = plan.get("output_bytes_at_most", after) - after
    if more:
        table.add_row("", f"and {size(more // 100)} for each percent of the columns that data keep in 16 bits")
    on_disk = "; activations on disk" if plan.get("activations") == "disk" else ""
    table.add_row(
        "memory", f"{size(plan['peak_memory_bytes'])} besides the program itself{on_disk}; measuring quality takes more"
    )
    if plan.get("seconds") is not None:
        table.add_row("time", f"about {duration(plan['seconds'])}")
    return table
