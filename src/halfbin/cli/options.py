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
