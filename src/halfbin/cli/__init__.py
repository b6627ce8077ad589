"""The `halfbin` command: parse, call one verb of the api, show the result."""

from __future__ import annotations

from halfbin.cli.app import main

__all__ = ["main"]
