"""Numbers and names as people read them. Sizes are decimal, as model hubs and disks count them: 1 MB is 10**6 bytes."""

from __future__ import annotations

import math
import unicodedata

ABSENT = "–"
"""What stands where nothing was measured."""

UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")


def printable(text: str) -> str:
    """`text` without what could move a cursor, colour a terminal or turn the reading direction.

    Names come from strangers' files. Control, format, surrogate and private characters become U+FFFD.
    """
    return "".join("\ufffd" if unicodedata.category(char).startswith("C") else char for char in text)


def base_name(path: str) -> str:
    """The last part of a path of either kind; the text itself where there is none."""
    return path.replace("\\", "/").rstrip("/").rpartition("/")[2] or path


def number(value: float | None, digits: int = 4) -> str:
    """`value` with that many significant digits, without an exponent where it can be avoided."""
    if value is None:
        return ABSENT
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite" if value > 0 else "-infinite"
    if value == 0:
        return "0"
    magnitude = int(f"{value:.{digits - 1}e}".partition("e")[2])  # after rounding: 999.96 has four digits as 1,000
    if not -5 < magnitude < 9:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(digits - 1 - magnitude, 0)}f}"


def size(num_bytes: int | None) -> str:
    """A number of bytes, three digits and a decimal unit."""
    if num_bytes is None:
        return ABSENT
    value, unit = float(num_bytes), 0
    while abs(value) >= 999.5 and unit < len(UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{num_bytes} bytes" if unit == 0 else f"{number(value, 3)} {UNITS[unit]}"


def ratio(before: float, after: float) -> str:
    """How many times smaller `after` is than `before`."""
    return f"{before / after:.2f}×" if after else ABSENT


def percent(share: float | None) -> str:
    """A share of 1 in percent; what is less than everything never reads as 100 %."""
    if share is None:
        return ABSENT
    if not math.isfinite(share):
        return number(share)
    text = f"{100 * share:.2f}"
    if text == "100.00" and share < 1:
        return "> 99.99 %"
    return f"{text} %"


def change(before: float | None, after: float | None) -> str:
    """By how many percent `after` differs from `before`, with its sign; empty where that means nothing."""
    if before is None or after is None or not before or not math.isfinite(before) or not math.isfinite(after):
        return ""
    relative = 100 * (after - before) / before
    return f"{relative:+,.0f} %" if abs(relative) >= 100 else f"{relative:+.2f} %"


def duration(seconds: float | None) -> str:
    """Seconds as 0.84 s, 42 s, 3 min 05 s or 2 h 04 min."""
    if seconds is None or not math.isfinite(seconds):
        return ABSENT
    if seconds < 59.5:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def count(num: int, noun: str, plural: str = "") -> str:
    """`num` with its noun in the right number: 1 site, 2 sites."""
    return f"{num:,} {noun if num == 1 else plural or noun + 's'}"
