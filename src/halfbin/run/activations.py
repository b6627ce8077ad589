"""Where what stands between two blocks is kept: in memory, or in files that the system maps into it."""

from __future__ import annotations

import dataclasses

from halfbin.errors import HalfbinError
from halfbin.planning import Plan
from halfbin.planning.footprint import Reading, activation_bytes
from halfbin.run.memory import available_bytes
from halfbin.run.wording import size

CHOICES = ("auto", "memory", "disk")
SHARE = 0.25  # of the memory that is free: activations above it go to the disk unless the user says otherwise
TOLERANCE = 1.25  # the plan's figure may be so much too high


def with_reading(plan: Plan, reading: Reading, choice: str) -> Plan:
    """The plan with what it will read, and where activations will be.

    Raises:
      HalfbinError: no such choice.
    """
    if choice not in CHOICES:
        raise HalfbinError(f"--activations {choice} is none of {', '.join(CHOICES)}")
    free = available_bytes()
    in_files = choice == "disk"
    if choice == "auto" and free is not None:
        in_files = activation_bytes(plan.skeleton, reading, num_streams=plan.num_streams) > SHARE * free
    return dataclasses.replace(plan, reading=dataclasses.replace(reading, in_files=in_files))


def require_memory(plan: Plan) -> None:
    """Refuse a calibrated run that this machine cannot hold, before the work.

    Raises:
      HalfbinError: says how much is wanted and free, and what would help.
    """
    free, reading = available_bytes(), plan.reading
    if free is None or reading is None or not plan.needs_data or plan.peak_memory_bytes <= TOLERANCE * free:
        return
    less = "" if reading.in_files else " keep activations in files (--activations disk), or"
    raise HalfbinError(
        f"calibrating needs about {size(plan.peak_memory_bytes)} of memory, and {size(free)} are free;{less} take fewer or "
        "shorter samples (--num-samples, --sample-length), or a recipe without data, such as int8"
    )
