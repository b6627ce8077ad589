"""What a run says about its progress while it works; who shows it, and how, is not its business."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Event:
    """One step forward in one stage.

    stage:   what is being done, as people read it: "reading", "quantizing", "verifying", "evaluating". A new name begins
             a new stage and ends the one before.
    done:    units finished so far, 0 <= done <= total.
    total:   units in this stage; 0 while it is not known.
    unit:    what is counted: "bytes" is shown as sizes, anything else ("tensors", "windows") as a count.
    message: what is being worked on now, such as a tensor's name; may be empty.
    """

    stage: str
    done: int
    total: int
    unit: str
    message: str = ""


OnEvent: TypeAlias = Callable[[Event], None]
