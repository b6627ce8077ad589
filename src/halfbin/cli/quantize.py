"""`halfbin quantize`: a model in, a smaller model and its report out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from halfbin.cli.options import (
    Activations,
    CalibrationFile,
    Device,
    Json,
    MaxTokens,
    NumSamples,
    SampleLength,
    Seed,
    TextFile,
    TrustRemoteCode,
)
from halfbin.cli.outcome import outcome
from halfbin.cli.progress import progress
from halfbin.cli.screen import print_json, results
from halfbin.errors import LimitError


def quantize(
    model: Annotated[
        str, typer.Argument(help="A Hugging Face model directory, or [bold]demo[/bold].", metavar="MODEL")
    ],
    *,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The directory to write.", metavar="OUT", show_default=False)
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(
            help="int4, int4-best, int3, int8, fp8, nf4, fp16, bf16 or a TOML file of rules.", metavar="NAME|FILE"
        ),
    ] = "int4",
    layout: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="How the weights lie on disk: compressed-tensors, halfbin or safetensors; the recipe's own by default.",
            metavar="NAME",
            show_default=False,
        ),
    ] = None,
    text: TextFile = None,
    max_tokens: MaxTokens = None,
    calibration: CalibrationFile = None,
    num_samples: NumSamples = 128,
    sample_length: SampleLength = None,
    seed: Seed = 0,
    activations: Activations = "auto",
    all_experts: Annotated[
        bool, typer.Option("--all-experts", help="Let every expert see every token while statistics are taken.")
    ] = False,
    untie: Annotated[
        bool,
        typer.Option("--untie", help="Write an embedding and a head that share a tensor as two; rotations need it."),
    ] = False,
    max_kl: Annotated[
        float | None,
        typer.Option(
            help="Fail (exit code 1) when the mean KL divergence, in nats, is above this.", show_default=False
        ),
    ] = None,
    evaluate: Annotated[
        bool, typer.Option("--evaluate/--no-evaluate", help="Measure quality before and after.")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and do nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier result of halfbin in OUT.")] = False,
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Quantize a model, read back what was written, and measure what it cost.

    OUT then holds the weights, the tokenizer and configuration, report.html for people and report.json for programs.
    OUT is complete or not there at all: an error or Ctrl-C leaves it as it was.

    [bold]Examples[/bold]

      halfbin quantize demo -o out
      halfbin quantize path/to/model -o out --recipe int8
      halfbin quantize path/to/model -o out --recipe int4-best --calibration mine.jsonl
      halfbin quantize path/to/model --recipe nf4 --dry-run
      halfbin quantize path/to/model -o out --text mine.txt --max-kl 0.1
    """
    if dry_run:
        _show_plan(
            model,
            as_json=as_json,
            recipe=recipe,
            format=layout,
            trust_remote_code=trust_remote_code,
            calibration=calibration,
            num_samples=num_samples,
            sample_length=sample_length,
            activations=activations,
            untie=untie,
        )
        return
    if output is None:
        raise typer.BadParameter("say where to write: -o OUT (or only look at the plan: --dry-run)")
    with outcome(output):
        from halfbin import api
        from halfbin.cli.report_table import report_table
        from halfbin.run.report import Report

        exceeded = None
        with progress() as on_event:
            try:
                report = api.quantize(
                    model,
                    output,
                    recipe=recipe,
                    format=layout,
                    text=text,
                    max_tokens=max_tokens,
                    evaluate=evaluate,
                    force=force,
                    trust_remote_code=trust_remote_code,
                    device=device,
                    max_kl=max_kl,
                    calibration=calibration,
                    num_samples=num_samples,
                    sample_length=sample_length,
                    seed=seed,
                    activations=activations,
                    untie=untie,
                    all_experts=all_experts,
                    on_event=on_event,
                )
            except LimitError as error:  # finished: the result and its report are there all the same
                exceeded, report = error, Report.read(output / "report.json")
        if as_json:
            print_json(report.to_json())
        else:
            results().print(report_table(report))
        if exceeded:
            raise exceeded


def _show_plan(model: str, *, as_json: bool, **options: Any) -> None:
    with outcome():
        from halfbin import api
        from halfbin.cli.plan_table import plan_table

        with progress():
            found = api.plan(model, **options)
        plan = found.to_json() | {"model": model}
        if as_json:
            print_json(plan)
        else:
            results().print(plan_table(plan))
