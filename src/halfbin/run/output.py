"""The output directory: complete or not there at all.

Everything is written into a hidden sibling, `.OUT.partial`, which takes OUT's name in one rename when all is done. After an
error, Ctrl-C or a full disk it is removed and OUT is as it was. An earlier OUT steps aside as `.OUT.replaced` for the moment
between two renames; a run that is killed right there leaves it to the next one, which puts it back first.

The working directory is locked (flock), so that a second run into the same OUT is refused instead of mixing its files in;
what a killed run left is not locked, and is removed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType

from halfbin.errors import OutputError

REPORT_NAME = "report.json"  # marks a directory as halfbin's own, which --force may replace


class OutputDirectory:
    """A context manager: write into `.work`, call `commit()`; leaving without it removes what was written."""

    def __init__(self, target: Path, *, source: Path, force: bool = False) -> None:
        """Check that `target` may be written; the working directory beside it is made on entering.

        Args:
          target: the directory to make; it may exist only if empty, or, with `force`, if halfbin wrote it.
          source: the model that is read; never written over.
          force: replace an earlier result.

        Raises:
          OutputError: the target is taken or cannot be made.
        """
        self.target = target.resolve()  # a link stays one, and what it points to is written
        _require_apart(self.target, source.resolve())
        _require_replaceable(self.target)
        self.work, self._replaced = _hidden(self.target, "partial"), _hidden(self.target, "replaced")
        _put_back(self._replaced, self.target)
        _require_free(self.target, force)
        self._made = [parent for parent in self.target.parents if not parent.exists()]  # the innermost first
        self._handle = -1

    def commit(self) -> None:
        """Give the finished directory its name; the replaced one, if any, goes only after that."""
        shutil.rmtree(self._replaced, ignore_errors=True)
        try:
            if self.target.exists():
                self.target.rename(self._replaced)
            self.work.rename(self.target)
        except OSError as error:
            raise OutputError(
                f"cannot move the result to {self.target}: {error.strerror}; choose another -o"
            ) from error
        finally:  # also after Ctrl-C between the two
            _put_back(self._replaced, self.target)
            shutil.rmtree(self._replaced, ignore_errors=True)
        _sync_directory(self.target.parent)

    def __enter__(self) -> OutputDirectory:
        """Make and lock the working directory.

        Raises:
          OutputError: it cannot be made, or another run has it.
        """
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(self.work)
            self.work.mkdir()
            self._handle = _lock(self.work)
        except OutputError:
            raise
        except KeyboardInterrupt:  # a `with` leaves only what it has entered
            self._clean_up()
            raise
        except OSError as error:
            if not isinstance(error, FileExistsError):  # else a run that was faster has just made it
                self._clean_up()
            raise OutputError(f"cannot write to {self.target.parent}: {error.strerror}; choose another -o") from error
        return self

    def _clean_up(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        if self._handle >= 0:
            os.close(self._handle)
        with contextlib.suppress(OSError):  # they hold the result, or something else by now
            for parent in self._made:
                parent.rmdir()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clean_up()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(self.target.parent).free
            raise OutputError(
                f"the disk that holds {self.target} is full ({free} bytes free); nothing was left behind: "
                "free some room or choose another -o"
            ) from error


def _hidden(target: Path, ending: str) -> Path:
    return target.with_name(f".{target.name}.{ending}")


def _require_apart(target: Path, source: Path) -> None:
    if target == source or target in source.parents:
        raise OutputError(f"-o {target} is, or contains, the model that is read; choose another directory")
    if source in target.parents:
        raise OutputError(
            f"-o {target} lies inside the model that is read, which stays as it is; choose a directory beside it, such as "
            f"{source.with_name(target.name)}"
        )


def _require_replaceable(target: Path) -> None:
    """A directory that something is mounted on cannot be renamed, which would come out at the very end."""
    if target.is_mount():
        raise OutputError(
            f"{target} is a mount point, which no finished result can replace; write into it: -o {target / 'out'}"
        )


def _put_back(replaced: Path, target: Path) -> None:
    """Give an earlier result its name again, where it stepped aside and nothing took its place."""
    if replaced.is_dir() and not target.exists():
        replaced.rename(target)


def _remove_abandoned(work: Path) -> None:
    """Remove what a killed run left.

    Raises:
      OutputError: it was not killed, it still runs.
    """
    if work.is_dir():
        os.close(_lock(work))
        shutil.rmtree(work)


def _lock(work: Path) -> int:
    """Lock a directory for as long as the returned handle stays open; where locks are not to be had, go on without."""
    handle = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise OutputError(
            f"another run writes to the same output now (it works in {work}); wait for it, or choose another -o"
        ) from error
    except OSError:  # some network file systems lock no directories
        pass
    return handle


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
