"""`halfbin demo`: the newcomer's first minute, on the model that comes along."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from halfbin.cli.outcome import outcome
from halfbin.cli.progress import progress
from halfbin.cli.screen import plain, remarks, results
from halfbin.errors import FormatError

BEFORE = """\
halfbin comes with a small real language model, trained on the text of Python's standard library. This is the whole
job on it, offline, as for any model of yours:

  halfbin quantize demo -o {output}

quantizing   every weight matrix becomes 4-bit integers with one scale for each group of weights, is written,
             and is read back from the disk
checking     transformers must be able to load the result
evaluating   the original and the result read the same held-out text, side by side
reporting    one page for people, the same numbers for programs
"""

AFTER = """\
How to read it
  perplexity       how many next tokens the model hesitates between; lower is better
  KL divergence    how far its predictions moved from the original's; 0 is identical
  top-1 agreement  how often both have the same first choice

Try next
  what it cost, site by site                     open {output}/report.html in a browser
  schemes, bytes and codes of every tensor       halfbin inspect {output}
  twice the bits, a fraction of the cost         halfbin quantize demo -o out8 --recipe int8
  what it would do to yours                      halfbin quantize path/to/your-model --dry-run
"""


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory to write.", metavar="OUT")] = Path(
        "halfbin-demo-out"
    ),
) -> None:
    """Show everything on the small model that comes along: quantize, measure, report. Offline, in under a minute.

    [bold]Example[/bold]

      halfbin demo
    """
    with outcome(output):
        from halfbin import api
        from halfbin.cli.report_table import report_table

        remarks().print(plain_lines(BEFORE, output), soft_wrap=True)
        with progress() as on_event:
            report = api.quantize("demo", output, recipe="int4", force=_is_earlier_demo(output), on_event=on_event)
        console = results()
        console.print(report_table(report))
        console.print(plain_lines(AFTER, output), soft_wrap=True)


def plain_lines(template: str, output: Path) -> object:
    """The template with the output's name filled in; its line ends stay, the name's own are replaced."""
    from rich.console import Group

    return Group(*(plain(line.format(output=output)) for line in template.split("\n")))


def _is_earlier_demo(output: Path) -> bool:
    """Whether `output` holds what an earlier demo left, which a new one may replace without being asked."""
    from halfbin.run.report import Report

    with contextlib.suppress(OSError, FormatError):
        return Report.read(output / "report.json").model == "demo"
    return False
