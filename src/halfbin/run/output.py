"""The output directory: complete or not there at all.

Everything is written into a hidden sibling, `.OUT.partial`, which takes OUT's name in one rename when all is done. After an
error, Ctrl-C or a full disk it is removed and OUT is as it was.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import TracebackType

from halfbin.errors import OutputError

REPORT_NAME = "report.json"  # marks a directory as halfbin's own, which --force may replace


class OutputDirectory:
    """A context manager: write into `.work`, call `commit()`; leaving without it removes what was written."""

    def __init__(self, target: Path, *, source: Path, force: bool = False) -> None:
        """Check that `target` may be written, and make the working directory beside it.

        Args:
          target: the directory to make; it may exist only if empty, or, with `force`, if halfbin wrote it.
          source: the model that is read; never written over.
          force: replace an earlier result.

        Raises:
          OutputError: the target is taken or cannot be made.
        """
        self.target = target.absolute()
        self.work = self.target.with_name(f".{self.target.name}.partial")
        _require_apart(self.target, source.absolute())
        _require_free(self.target, force)
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(self.work, ignore_errors=True)  # left by a run that was killed
            self.work.mkdir()
        except OSError as error:
            raise OutputError(f"cannot write to {self.target.parent}: {error.strerror}; choose another -o") from error

    def commit(self) -> None:
        """Give the finished directory its name; the replaced one, if any, goes only after that."""
        replaced = self.target.with_name(f".{self.target.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        try:
            if self.target.exists():
                self.target.rename(replaced)
            self.work.rename(self.target)
        except OSError as error:
            if replaced.exists() and not self.target.exists():
                replaced.rename(self.target)
            raise OutputError(f"cannot move the result to {self.target}: {error.strerror}") from error
        shutil.rmtree(replaced, ignore_errors=True)
        _sync_directory(self.target.parent)

    def __enter__(self) -> OutputDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(self.target.parent).free
            raise OutputError(
                f"the disk that holds {self.target} is full ({free} bytes free); nothing was left behind: "
                "free some room or choose another -o"
            ) from error


def _require_apart(target: Path, source: Path) -> None:
    target, source = target.resolve(), source.resolve()
    if target == source or target in source.parents:
        raise OutputError(f"-o {target} is, or contains, the model that is read; choose another directory")


def _require_free(target: Path, force: bool) -> None:
    if target.is_dir():
        entries = sorted(entry.name for entry in target.iterdir())
        if not entries or (force and REPORT_NAME in entries):
            return
        if force:
            raise OutputError(
                f"{target} was not written by halfbin (it has no {REPORT_NAME}; it holds {', '.join(entries[:3])} ...), "
                "so --force does not replace it; choose another -o"
            )
        raise OutputError(
            f"{target} exists and is not empty; pass --force to replace an earlier result, or choose another -o"
        )
    if target.exists() or target.is_symlink():
        raise OutputError(f"{target} exists and is no directory; choose another -o")


def _sync_directory(directory: Path) -> None:
    """Make a rename last through a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
