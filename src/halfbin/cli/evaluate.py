"""`halfbin evaluate`: how well a model predicts a text, or what a second one lost against it."""

from __future__ import annotations

from typing import Annotated

import typer

from halfbin.cli.options import Device, Json, MaxTokens, TextFile, TrustRemoteCode
from halfbin.cli.outcome import outcome
from halfbin.cli.progress import progress
from halfbin.cli.screen import print_json, results


def evaluate(
    a: Annotated[str, typer.Argument(help="A model directory, the original one, or [bold]demo[/bold].", metavar="A")],
    b: Annotated[
        str | None, typer.Argument(help="Another one to hold against it.", metavar="[B]", show_default=False)
    ] = None,
    *,
    text: TextFile = None,
    max_tokens: MaxTokens = None,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens that the model reads at once; what it was made for by default.", min=2, metavar="N"),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(help="Tokens from one window to the next; windows do not overlap by default.", min=1, metavar="N"),
    ] = None,
    kv_cache: Annotated[
        str | None,
        typer.Option(
            help="Let B, or A beside itself, keep keys and values rounded: int8-token, int4-g32-asym and the like; simulated.",
            metavar="SCHEME",
            show_default=False,
        ),
    ] = None,
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure perplexity, and between two models KL divergence and agreement, on one text.

    [bold]Examples[/bold]

      halfbin evaluate demo
      halfbin evaluate path/to/model out --text mine.txt
      halfbin evaluate path/to/model --kv-cache int8-token
    """
    with outcome():
        from halfbin import api
        from halfbin.cli.judgement import judgement_json, judgement_table
        from halfbin.run.measure import text_name

        with progress() as on_event:
            found = api.evaluate(
                a,
                b,
                text=text,
                context=context,
                stride=stride,
                max_tokens=max_tokens,
                kv_cache=kv_cache,
                trust_remote_code=trust_remote_code,
                device=device,
                on_event=on_event,
            )
        if as_json:
            print_json(judgement_json(found, text_name(text)))
        else:
            second = f"{b or a}, keys and values {kv_cache}" if kv_cache else b
            results().print(judgement_table(found, text_name(text), a, second))
