"""How a command ends: each kind of failure with its message and its exit code.

0    done
1    the user can mend it; one message on stderr says what was seen, what was expected and what to do
2    the command line is not understood (Typer's own)
70   a fault in halfbin: the traceback, and where to report it (EX_SOFTWARE of BSD's sysexits)
130  interrupted by Ctrl-C or SIGTERM
141  whoever read the output closed the pipe, as `| head` does
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import typer

from halfbin import __version__
from halfbin.cli import interruption
from halfbin.cli.screen import plain, remarks
from halfbin.errors import HalfbinError

MENDABLE = 1
FAULT = 70
PIPE_CLOSED = 141


@contextlib.contextmanager
def outcome(output: Path | None = None) -> Iterator[None]:
    """Run a command's body; whatever it raises becomes a message and an exit code.

    Args:
      output: the directory that the command writes, which an interruption speaks of.
    """
    before = _last_written(output)
    try:
        with _undisguised():
            yield
    except HalfbinError as error:
        _complain(str(error))
        raise typer.Exit(MENDABLE) from None
    except KeyboardInterrupt:
        _say_interrupted(output, before)
        raise typer.Exit(interruption.INTERRUPTED) from None
    except BrokenPipeError:
        # Python flushes stdout once more at its end, and would complain then.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(PIPE_CLOSED) from None
    except OSError as error:
        where = f": {error.filename}" if error.filename is not None else ""
        _complain(f"{error.strerror}{where}" if error.strerror else str(error))
        raise typer.Exit(MENDABLE) from None
    except MemoryError:
        _complain("out of memory; --dry-run tells how much a run needs, and --no-evaluate needs least")
        raise typer.Exit(MENDABLE) from None
    except Exception:
        traceback.print_exc()
        _complain(
            f"this is a fault in halfbin {__version__}, not in what you did; "
            "please report it with the lines above and the command"
        )
        raise typer.Exit(FAULT) from None


@contextlib.contextmanager
def _undisguised() -> Iterator[None]:
    """Whatever is raised once a signal has interrupted the program is that interruption."""
    try:
        yield
    except Exception as error:
        if interruption.arrived():
            raise KeyboardInterrupt from error
        raise


def _complain(message: str) -> None:
    console = remarks()
    first, *notes = message.split("\n")
    console.print(plain("error: ", "bold red") + plain(first, "red"), soft_wrap=True)
    for note in notes:
        console.print(plain(note), soft_wrap=True)


def _say_interrupted(output: Path | None, before: float | None) -> None:
    if output is None:
        message = "interrupted"
    elif _last_written(output) == before:
        message = f"interrupted; nothing was written to {output}"
    else:
        message = f"interrupted after {output} was written; it is complete"
    remarks().print(plain(message, "yellow"), soft_wrap=True)


def _last_written(output: Path | None) -> float | None:
    """When the directory's report was written; it comes last, with the directory's final name."""
    if output is None:
        return None
    with contextlib.suppress(OSError):
        return (output / "report.json").stat().st_mtime
    return None
