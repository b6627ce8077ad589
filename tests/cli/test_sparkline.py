"""Counts as a line of bars."""

from __future__ import annotations

from halfbin.cli.inspection_table import sparkline


def test_the_highest_count_is_the_highest_bar_and_nothing_is_blank() -> None:
    assert sparkline([0, 1, 4, 8]) == " ▁▄█"
    assert sparkline([0, 0]) == "  "


def test_a_single_weight_among_millions_still_shows() -> None:
    assert sparkline([1, 10**9]) == "▁█"


def test_many_codes_share_bars() -> None:
    assert sparkline([1] * 256, 16) == "█" * 16
    assert len(sparkline([1] * 255, 16)) == 16
