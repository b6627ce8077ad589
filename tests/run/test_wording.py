"""Numbers and names as people read them."""

from __future__ import annotations

import math

import pytest

from halfbin.run import wording


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0"),
        (3.96312, "3.963"),
        (0.012345, "0.01235"),
        (12345.6, "12,346"),
        (1e-7, "1.000e-07"),
        (1e12, "1.000e+12"),
        (math.inf, "infinite"),
        (math.nan, "not a number"),
    ],
    ids=str,
)
def test_numbers_have_four_digits(value: float | None, text: str) -> None:
    assert wording.number(value) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.00 kB"),
        (999_999, "1.00 MB"),
        (9_996, "10.0 kB"),
        (1_234_567, "1.23 MB"),
        (70 * 10**9, "70.0 GB"),
    ],
    ids=str,
)
def test_sizes_are_decimal(num_bytes: int, text: str) -> None:
    assert wording.size(num_bytes) == text


@pytest.mark.parametrize(
    ("share", "text"), [(1.0, "100.00 %"), (0.999999, "> 99.99 %"), (0.8421, "84.21 %"), (0.0, "0.00 %")], ids=str
)
def test_less_than_everything_never_reads_as_everything(share: float, text: str) -> None:
    assert wording.percent(share) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.042, "0.042 s"), (42.4, "42 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7445, "2 h 04 min")],
    ids=str,
)
def test_durations_have_the_unit_that_suits_them(seconds: float, text: str) -> None:
    assert wording.duration(seconds) == text


def test_names_lose_what_could_move_a_cursor() -> None:
    assert wording.printable("a\x1b[31mb\u202ec\nd é 漢") == "a\ufffd[31mb\ufffdc\ufffdd é 漢"


@pytest.mark.parametrize(
    ("path", "name"), [("a/b/", "b"), ("C:\\models\\x", "x"), ("demo", "demo"), ("/", "/"), ("", "")], ids=repr
)
def test_a_path_is_known_by_its_last_part(path: str, name: str) -> None:
    assert wording.base_name(path) == name
