"""`halfbin bench`: how fast a checkpoint runs on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from halfbin.cli.options import Json, TrustRemoteCode
from halfbin.cli.outcome import outcome
from halfbin.cli.progress import progress
from halfbin.cli.screen import print_json, results


def bench(
    model: Annotated[
        str, typer.Argument(help="A quantized checkpoint, a float model, or [bold]demo[/bold].", metavar="MODEL")
    ],
    *,
    prompt_tokens: Annotated[int, typer.Option("--prompt", help="Tokens of the prompt.", min=1, metavar="N")] = 256,
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded after it.", min=1, metavar="N")] = 32,
    rounds: Annotated[int, typer.Option(help="Measured rounds; medians are told.", min=1, metavar="N")] = 5,
    threads: Annotated[
        int | None,
        typer.Option(help="Threads; by default as many as torch takes.", min=1, metavar="N", show_default=False),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of activations: bf16, fp16 or fp32; the model's own by default.", metavar="TYPE", show_default=False
        ),
    ] = None,
    alone: Annotated[bool, typer.Option("--alone", help="Do not time the same weights as floats beside it.")] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Tell for each layer which kernel multiplies, and why others do not.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Time prefill and decoding, beside the same weights as floats, and beside what reading the weights alone would take.

    [bold]Examples[/bold]

      halfbin bench out
      halfbin bench out --threads 1 --dtype bf16 --explain
    """
    with outcome():
        from halfbin import api
        from halfbin.cli.bench_table import bench_table

        with progress() as on_event:
            found = api.bench(
                model,
                dtype=dtype,
                prompt_tokens=prompt_tokens,
                new_tokens=new_tokens,
                rounds=rounds,
                threads=threads,
                alone=alone,
                trust_remote_code=trust_remote_code,
                on_event=on_event,
            )
        if as_json:
            print_json(found.to_json())
        else:
            results().print(bench_table(found, explain=explain))
