"""Rooms import only rooms to their left. The table is DESIGN's; docs/architecture.md shows it to people."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "halfbin"

# A room may import rooms of the lines above its own, and itself. Those on one line do not know each other.
LINES = [
    {"errors"},
    {"numerics", "kernels", "demo"},
    {"tensor"},
    {"packing", "calibration", "methods", "transforms"},
    {"formats"},
    {"nn", "samples"},
    {"models", "onnx", "train"},
    {"evaluation"},
    {"planning"},
    {"run"},
    {"api"},
    {"cli", "explorer"},
]
LINE_OF = {room: i for i, rooms in enumerate(LINES) for room in rooms}
VERBS = {"bench", "evaluate", "inspect", "load", "plan", "quantize"}  # of `import halfbin as hb`
FILES = sorted(SOURCE.rglob("*.py"))


def room_of(path: Path) -> str:
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


def imported_rooms(source: str) -> set[str]:
    """Rooms of halfbin that a file imports, wherever the import stands."""
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "halfbin" and len(parts) > 1:
                rooms.add(parts[1])
    return rooms


def wrong_imports(room: str, rooms: set[str]) -> set[str]:
    known = {r for r in rooms if r in LINE_OF}
    return {r for r in known if r != room and LINE_OF[r] >= LINE_OF[room]}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_file_imports_only_rooms_to_its_left(path: Path) -> None:
    room = room_of(path)
    if room in ("__init__", "__main__"):
        return
    assert room in LINE_OF, f"{room} is a new room: give it a line in this table and in docs/architecture.md"
    assert wrong_imports(room, imported_rooms(path.read_text(encoding="utf-8"))) == set()


def test_an_import_to_the_right_or_sideways_is_caught() -> None:
    rooms = imported_rooms("from halfbin.cli import main\nimport halfbin.methods.rtn\nfrom halfbin import errors")
    assert rooms == {"cli", "methods", "errors"}
    assert wrong_imports("packing", rooms) == {"cli", "methods"}


def test_rooms_without_logic_do_no_work_on_import() -> None:
    for path in FILES:
        if path.name == "__init__.py" and path.parent != SOURCE and room_of(path) not in ("demo", "cli"):
            kinds = {type(node) for node in ast.parse(path.read_text(encoding="utf-8")).body}
            assert kinds <= {ast.Expr, ast.ImportFrom, ast.Import, ast.Assign, ast.AnnAssign}, path


def test_no_room_has_the_name_of_a_verb() -> None:
    # `hb.plan` would be the function or the room, whichever was imported last.
    assert not VERBS & {path.name.removesuffix(".py") for path in SOURCE.iterdir()}
