"""The command line run inside this process, on a fake api."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

import halfbin
from cli import fake_api

Invoke = Callable[..., Any]


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch) -> Iterator[Invoke]:
    """Call the program with arguments; the result has exit_code, stdout and stderr."""
    monkeypatch.setitem(sys.modules, "halfbin.api", fake_api)
    monkeypatch.setattr(halfbin, "api", fake_api, raising=False)
    monkeypatch.setenv("COLUMNS", "140")
    fake_api.CALLS.clear()

    def run(*arguments: object) -> Any:
        from halfbin.cli.app import app

        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    yield run
    fake_api.OUTCOMES.clear()
