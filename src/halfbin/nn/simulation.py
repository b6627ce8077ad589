"""A change made to a model for as long as it is wanted: what it took, and how to undo it."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType


class Simulation:
    """Undone by `remove()`, or by leaving a `with` block; the change is there from the call that returned it.

    Attributes:
      idle: names of what was changed and has not been used by any forward pass since. A model that reads a layer's weight past
            the layer's forward leaves its name here, and the simulation has not touched it.
    """

    def __init__(self, names: set[str]) -> None:
        """Of changes to modules of these names, to be undone by what `undo_by` is given."""
        self.idle = names
        self._undo: list[Callable[[], None]] = []

    def undo_by(self, step: Callable[[], None]) -> None:
        """Remember how to take one change back."""
        self._undo.append(step)

    def remove(self) -> None:
        """Take all changes back, the last one first; a second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Simulation:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.remove()
