"""`--help` and `--version` answer at once: nothing heavy is imported for them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"
HEAVY = ("torch", "transformers", "numpy", "matplotlib", "jinja2", "safetensors", "huggingface_hub")

PROGRAM = """
import sys
from halfbin.cli import main
try:
    main()
finally:
    print(sorted(set(sys.modules) & set({heavy!r})), file=sys.stderr)
"""


COMMANDS = [["--version"], ["--help"], *([name, "--help"] for name in ("quantize", "inspect", "evaluate", "demo"))]


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(heavy=HEAVY), *arguments],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(SOURCE), "PATH": ""},
    )
    assert result.stderr == "[]\n"


def test_python_m_halfbin_is_the_program() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "halfbin", "--version"],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(SOURCE), "PATH": ""},
    )
    assert result.stdout.startswith("halfbin ")
