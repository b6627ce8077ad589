"""Options that several commands share, so that they read and work alike."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu or cuda.", metavar="DEVICE")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that the model directory brings along.")
]
TextFile = Annotated[
    Path | None,
    typer.Option(
        "--text",
        help="The text to measure quality on (UTF-8); the embedded held-out text by default.",
        metavar="FILE",
        show_default=False,
    ),
]
MaxTokens = Annotated[
    int | None, typer.Option(help="Measure on no more than so many tokens.", min=1, metavar="N", show_default=False)
]
CalibrationFile = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        help="For recipes that need data: a text, .jsonl, .npy or .safetensors file, or a folder; embedded text by default.",
        metavar="FILE",
        show_default=False,
    ),
]
NumSamples = Annotated[int, typer.Option(help="Calibrate on no more than so many samples.", min=1, metavar="N")]
SampleLength = Annotated[
    int | None,
    typer.Option(help="Tokens in a sample; what suits the model by default.", min=2, metavar="N", show_default=False),
]
Activations = Annotated[
    str,
    typer.Option(
        help="Where calibration keeps what stands between blocks: memory, disk, or auto, by size.", metavar="WHERE"
    ),
]
Seed = Annotated[int, typer.Option(help="Of the choice of samples.", metavar="N")]
