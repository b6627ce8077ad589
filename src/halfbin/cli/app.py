"""The commands gathered into one program. Nothing heavy is imported before a command runs: `--help` answers at once."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated, NoReturn

import typer

from halfbin import __version__
from halfbin.cli import interruption, quiet
from halfbin.cli.bench import bench
from halfbin.cli.check import check
from halfbin.cli.demo import demo
from halfbin.cli.evaluate import evaluate
from halfbin.cli.inspect import inspect
from halfbin.cli.quantize import quantize

EPILOG = (
    "Exit codes: 0 done; 1 something to mend, and the message says what; 2 the command line is not understood; "
    "70 a fault in halfbin; 130 interrupted."
)

app = typer.Typer(
    name="halfbin",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EPILOG,
)
app.command(no_args_is_help=True)(quantize)
app.command(no_args_is_help=True)(inspect)
app.command(no_args_is_help=True)(evaluate)
app.command(no_args_is_help=True)(check)
app.command(no_args_is_help=True)(bench)
app.command()(demo)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"halfbin {__version__}")
        raise typer.Exit


@app.callback()
def _halfbin(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Make trained networks smaller by quantization, and prove what it cost.

    New here? [bold]halfbin demo[/bold] shows everything on a small model that comes along, in under a minute.
    """


def main() -> NoReturn:
    """Run the command line and leave with its exit code."""
    quiet.set_up()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr] # a replaced stream may not have it
    interruption.listen()
    app()
    raise SystemExit(0)  # Typer leaves by itself; this is for the type checker
