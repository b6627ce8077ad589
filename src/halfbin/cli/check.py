"""`halfbin check`: is this calibration set good for this model?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halfbin.cli.options import CalibrationFile, Json, NumSamples, SampleLength, Seed, TrustRemoteCode
from halfbin.cli.outcome import outcome
from halfbin.cli.progress import progress
from halfbin.cli.screen import print_json, results


def check(
    model: Annotated[
        str, typer.Argument(help="A Hugging Face model directory, or [bold]demo[/bold].", metavar="MODEL")
    ],
    *,
    calibration: CalibrationFile = None,
    against: Annotated[
        Path | None,
        typer.Option(help="A text like those the model is for; how like it the samples are is told.", metavar="FILE"),
    ] = None,
    num_samples: NumSamples = 128,
    sample_length: SampleLength = None,
    seed: Seed = 0,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Look at calibration data before they decide about a model: what they cover, and what they leave open.

    The float model reads the samples, one block in memory at a time.

    [bold]Examples[/bold]

      halfbin check demo
      halfbin check path/to/model --calibration mine.jsonl --against test.txt
    """
    with outcome():
        from halfbin import api
        from halfbin.cli.check_table import check_table

        with progress() as on_event:
            found = api.check_calibration(
                model,
                calibration,
                against=against,
                num_samples=num_samples,
                sample_length=sample_length,
                seed=seed,
                trust_remote_code=trust_remote_code,
                on_event=on_event,
            )
        if as_json:
            print_json(found.to_json())
        else:
            results().print(check_table(found))
