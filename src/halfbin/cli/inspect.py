"""`halfbin inspect`: what a checkpoint holds, tensor by tensor."""

from __future__ import annotations

from typing import Annotated

import typer

from halfbin.cli.options import Json
from halfbin.cli.outcome import outcome
from halfbin.cli.progress import progress
from halfbin.cli.screen import print_json, results


def inspect(
    checkpoint: Annotated[
        str,
        typer.Argument(help="A checkpoint directory, quantized or not, or [bold]demo[/bold].", metavar="CHECKPOINT"),
    ],
    as_json: Json = False,
) -> None:
    """Show scheme, bytes, bits per weight and the use of codes for every tensor. Changes nothing.

    [bold]bits[/bold]: all stored bits over the number of weights, scales included.
    [bold]codes[/bold] is a histogram from the lowest to the highest value. [bold]saturated[/bold]: weights on the lowest or the
    highest value, each group's own largest among them. [bold]unused[/bold]: values that no weight takes.

    [bold]Examples[/bold]

      halfbin inspect out
      halfbin inspect out --json
    """
    with outcome():
        from halfbin import api
        from halfbin.cli.inspection_table import inspection_table

        with progress() as on_event:
            inspection = api.inspect(checkpoint, on_event=on_event)
        if as_json:
            print_json(inspection.to_json())
        else:
            results().print(inspection_table(inspection))
