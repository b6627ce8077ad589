"""What tests of whole runs share."""

from __future__ import annotations

from pathlib import Path

import pytest

from halfbin.run import html


@pytest.fixture
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without drawing report.html, which takes four fifths of a tiny model's run and has tests of its own."""
    monkeypatch.setattr(html, "write", lambda report, path: Path(path).write_text("no page in this test"))
