from __future__ import annotations

from pathlib import Path

import pytest

from halfbin.errors import FormatError
from halfbin.formats import strict_json
from halfbin.formats.strict_json import read_json_object


def test_an_object_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [1, {"b": "ü"}]}', encoding="utf-8")
    assert read_json_object(tmp_path / "a.json") == {"a": [1, {"b": "ü"}]}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        pytest.param(b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c' twice", id="doubled key"),
        pytest.param(b"[1]", "list", id="no object"),
        pytest.param(b"", "JSON", id="empty"),
        pytest.param(b'{"a": NaN}', "NaN", id="NaN"),
        pytest.param(b'{"a": "\xff"}', "UTF-8", id="no UTF-8"),
        pytest.param(b'{"a":' * 65 + b"1" + b"}" * 65, "deeper", id="too deep"),
        pytest.param(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "a.json", id="deeper than the stack"),
        pytest.param(b'{"a": ' + b"1" * 5000 + b"}", "a.json", id="endless number"),
    ],
)
def test_a_strangers_json_is_refused(tmp_path: Path, raw: bytes, words: str) -> None:
    (tmp_path / "a.json").write_bytes(raw)
    with pytest.raises(FormatError, match=words):
        read_json_object(tmp_path / "a.json")


def test_too_many_bytes_are_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict_json, "MOST_BYTES", 10)
    (tmp_path / "a.json").write_text('{"abc": "defghi"}')
    with pytest.raises(FormatError, match="larger"):
        read_json_object(tmp_path / "a.json")


def test_a_missing_file_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"config\.json does not exist"):
        read_json_object(tmp_path / "config.json")
