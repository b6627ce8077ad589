"""The text the demo model learns: the Python standard library's own source, in a fixed three-way split.

A file's part is decided by a hash of its path alone, so that it never moves when other files come or go:
4 % held-out, 4 % calibration, the rest training.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

# Tables and generated data teach a language model nothing about language.
LEFT_OUT = ("site-packages", "__pycache__", "encodings", "pydoc_data", "lib2to3/tests/data", "test/cjkencodings")
BYTES_MAX = 300_000  # longer files are generated tables or one test's data


@dataclass(frozen=True, slots=True)
class Document:
    """One source file."""

    path: str  # relative to the library
    text: str


def documents(library: Path | None = None) -> list[Document]:
    """Every usable source file of the running Python's standard library, sorted by path."""
    root = library or Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root).as_posix()
        if any(part in relative for part in LEFT_OUT) or not 200 <= path.stat().st_size <= BYTES_MAX:
            continue
        try:
            found.append(Document(relative, path.read_text(encoding="utf-8")))
        except UnicodeDecodeError:
            continue  # a few of the library's tests are in other encodings on purpose
    return found


def part(path: str) -> str:
    """`train`, `calibration` or `heldout`, from the file's path alone."""
    bucket = int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big") % 100
    return "heldout" if bucket < 4 else "calibration" if bucket < 8 else "train"


def split(found: list[Document]) -> dict[str, list[Document]]:
    """The documents of each part."""
    parts: dict[str, list[Document]] = {"train": [], "calibration": [], "heldout": []}
    for document in found:
        parts[part(document.path)].append(document)
    return parts


def excerpt(found: list[Document], num_bytes: int) -> str:
    """Whole files, in the order of a hash of their paths, up to about `num_bytes` of UTF-8."""
    order = sorted(found, key=lambda d: hashlib.sha256(("excerpt " + d.path).encode()).digest())
    taken, size = [], 0
    for document in order:
        length = len(document.text.encode())
        if length <= num_bytes // 8 and size + length <= num_bytes:  # no single file may dominate
            taken.append(document.text.rstrip("\n") + "\n")
            size += length
    return "\n\n".join(taken)
