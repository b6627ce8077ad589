"""The output directory: complete or not there, whoever else is at work and whenever the run is stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from halfbin.errors import OutputError
from halfbin.run.output import REPORT_NAME, OutputDirectory


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model directory in `tmp_path`, which is otherwise empty."""
    folder = tmp_path / "model"
    folder.mkdir()
    return folder


def write(target: Path, source: Path, content: str, *, force: bool = False) -> None:
    with OutputDirectory(target, source=source, force=force) as output:
        (output.work / REPORT_NAME).write_text(content)
        output.commit()


def test_a_finished_directory_takes_its_name_and_nothing_else_stays(tmp_path: Path, source: Path) -> None:
    write(tmp_path / "a" / "b" / "out", source, "first")
    assert names(tmp_path) == ["a", "a/b", "a/b/out", f"a/b/out/{REPORT_NAME}", "model"]


def test_an_unfinished_one_disappears_with_the_parents_that_were_made_for_it(tmp_path: Path, source: Path) -> None:
    with pytest.raises(ZeroDivisionError), OutputDirectory(tmp_path / "a" / "b" / "out", source=source) as output:
        (output.work / "half").write_text("")
        raise ZeroDivisionError
    assert names(tmp_path) == ["model"]


def test_parents_that_others_use_meanwhile_stay(tmp_path: Path, source: Path) -> None:
    with pytest.raises(ZeroDivisionError), OutputDirectory(tmp_path / "a" / "b" / "out", source=source):
        (tmp_path / "a" / "theirs").write_text("")
        raise ZeroDivisionError
    assert names(tmp_path) == ["a", "a/theirs", "model"]


def test_what_a_killed_run_left_is_removed(tmp_path: Path, source: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "stale").write_text("")
    write(tmp_path / "out", source, "new")
    assert names(tmp_path) == ["model", "out", f"out/{REPORT_NAME}"]


def test_a_second_run_into_the_same_directory_is_refused_and_the_first_goes_on(tmp_path: Path, source: Path) -> None:
    with OutputDirectory(tmp_path / "out", source=source) as first:
        (first.work / REPORT_NAME).write_text("first")
        second = OutputDirectory(tmp_path / "out", source=source, force=True)
        with pytest.raises(OutputError, match="another run writes to the same output"), second:
            pass
        first.commit()
    assert (tmp_path / "out" / REPORT_NAME).read_text() == "first"
    write(tmp_path / "out", source, "second", force=True)
    assert names(tmp_path) == ["model", "out", f"out/{REPORT_NAME}"]


def test_a_link_stays_a_link_and_what_it_points_to_is_written(tmp_path: Path, source: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    for content in ("first", "second"):
        write(tmp_path / "out", source, content, force=True)
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "real" / REPORT_NAME).read_text() == "second"
    assert names(tmp_path) == ["disk", "disk/real", f"disk/real/{REPORT_NAME}", "model", "out"]


@pytest.mark.parametrize("call", ["mkdir", "is_dir"])
def test_ctrl_c_while_the_working_directory_is_made_leaves_none(
    call: str, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, real = OutputDirectory(tmp_path / "a" / "out", source=source), getattr(Path, call)

    def stopped(path: Path, *arguments: Any, **options: Any) -> Any:
        found = real(path, *arguments, **options)
        if path == output.work:
            raise KeyboardInterrupt
        return found

    with monkeypatch.context() as patched:
        patched.setattr(Path, call, stopped)
        with pytest.raises(KeyboardInterrupt), output:
            pass
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("interrupted", [1, 2], ids=["first rename", "second rename"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_ctrl_c_between_the_renames_leaves_the_old_or_the_new_result(
    when: str, interrupted: int, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "out", source, "old")
    rename, calls = Path.rename, [0]

    def stopped(path: Path, target: Path) -> Path:
        calls[0] += 1
        if calls[0] == interrupted and when == "before":
            raise KeyboardInterrupt
        found = rename(path, target)
        if calls[0] == interrupted:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", source, "new", force=True)
    expected = "new" if (interrupted, when) == (2, "after") else "old"
    assert (tmp_path / "out" / REPORT_NAME).read_text() == expected
    assert names(tmp_path) == ["model", "out", f"out/{REPORT_NAME}"]


def test_a_result_that_stepped_aside_for_a_killed_run_is_put_back_first(tmp_path: Path, source: Path) -> None:
    write(tmp_path / "out", source, "old")
    (tmp_path / "out").rename(tmp_path / ".out.replaced")
    with pytest.raises(OutputError, match="not empty"):
        OutputDirectory(tmp_path / "out", source=source)
    assert (tmp_path / "out" / REPORT_NAME).read_text() == "old"


@pytest.mark.parametrize(
    ("target", "words"),
    [
        pytest.param("model", "the model that is read", id="the model"),
        pytest.param(".", "contains, the model that is read", id="around the model"),
        pytest.param("model/out", "inside the model that is read", id="inside the model"),
        pytest.param("model/../link", "the model that is read", id="the model by a link"),
    ],
)
def test_the_model_and_what_holds_it_are_never_the_output(
    target: str, words: str, tmp_path: Path, source: Path
) -> None:
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(OutputError, match=words):
        OutputDirectory(tmp_path / target, source=source, force=True)
    assert names(tmp_path) == ["link", "model"]


def test_a_mount_point_is_refused_before_the_work(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "volume")
    with pytest.raises(OutputError, match=r"mount point.*volume/out"):
        OutputDirectory(tmp_path / "volume", source=source)
    with pytest.raises(OutputError, match="contains, the model"):
        OutputDirectory(Path("/"), source=source)
