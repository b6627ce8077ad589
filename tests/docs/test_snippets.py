"""The code in the documentation runs, and every link between its pages leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "src").rglob("*.md")])
MARKED = re.compile(r"^```python run\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
WITH_CODE = [page for page in PAGES if MARKED.search(page.read_text(encoding="utf-8"))]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_marked_code_runs_from_the_top_of_its_page_to_the_end(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text, known = page.read_text(encoding="utf-8"), {"__name__": "snippets"}
    for found in MARKED.finditer(text):
        first_line = text.count("\n", 0, found.start(1))
        exec(compile("\n" * first_line + found[1], str(page), "exec"), known)  # a failure names the page's own line


def test_the_page_on_python_is_among_them() -> None:
    assert "docs/python.md" in map(name, WITH_CODE)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_between_pages_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_the_readme_leads_to_every_page() -> None:
    linked = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = [name(page) for page in PAGES if page.parent == ROOT / "docs"]
    assert [page for page in pages if f"]({page})" not in linked] == []
