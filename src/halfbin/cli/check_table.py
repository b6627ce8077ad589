"""A calibration check as people see it."""

from __future__ import annotations

from rich.console import RenderableType
from rich.table import Table

from halfbin.cli.screen import BLANK, facts, page, plain, rows
from halfbin.run.checking import CalibrationCheck
from halfbin.run.wording import count, percent
from halfbin.samples.overview import RUN

NUM_SHOWN = 8


def check_table(check: CalibrationCheck) -> RenderableType:
    """What the samples are, the inputs whose ranges are least certain, and warnings."""
    title = plain(check.model, "bold") + plain(f"   calibration: {check.text}", "dim")
    parts: list[RenderableType] = [title, BLANK, _facts(check), BLANK, _layers(check), BLANK]
    if check.warnings:
        parts += [plain("warning: ", "bold yellow") + plain(warning) for warning in check.warnings]
    else:
        parts.append(plain("nothing stands against it", "green"))
    return page(*parts)


def _facts(check: CalibrationCheck) -> Table:
    table, tokens = facts(), check.tokens
    table.add_row("samples", f"{count(tokens.num_samples, 'sample')}, {count(tokens.num_tokens, 'token')}")
    table.add_row("", plain(check.definition, "dim"))
    if tokens.vocabulary:
        share = percent(tokens.num_kinds / tokens.vocabulary)
        table.add_row("vocabulary", f"{tokens.num_kinds} of {tokens.vocabulary} kinds of token seen ({share})")
    if check.likeness is not None:
        found = check.likeness
        table.add_row("like the other text", f"{percent(found.covered)} of its tokens are of kinds that were seen")
        table.add_row(
            "",
            plain(
                f"{found.divergence:.3f} bits of Jensen-Shannon divergence (0 the same, 1 disjoint); halves of the samples: "
                f"{found.own:.3f}",
                "dim",
            ),
        )
        table.add_row("", plain(f"{percent(found.shared)} of its runs of {RUN} tokens stand in a sample", "dim"))
    return table


def _layers(check: CalibrationCheck) -> Table:
    table = rows()
    table.add_column("least certain inputs", overflow="fold")
    table.add_column("tokens", justify="right")
    table.add_column("dead channels", justify="right")
    table.add_column("range off by", justify="right")
    worst = sorted(check.layers, key=lambda layer: (-layer.range_change, layer.num_tokens))
    for layer in worst[:NUM_SHOWN]:
        dead = f"{layer.dead_channels} of {layer.num_channels}"
        table.add_row(plain(layer.name), str(layer.num_tokens), dead, percent(layer.range_change))
    return table
