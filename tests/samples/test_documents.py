"""Files of calibration data: what is read from each kind, and what is refused, with file and line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from halfbin.errors import DataError
from halfbin.samples import read_documents, read_tokens


def contents(path: Path) -> list[object]:
    return [document.content for document in read_documents(path)]


def test_a_text_is_one_document_and_a_line_of_jsonl_is_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first\nsecond\n", encoding="utf-8")
    messages = [{"role": "user", "content": "hi"}]
    lines = [json.dumps({"text": "one"}), "", json.dumps({"messages": messages})]
    (tmp_path / "b.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert contents(tmp_path / "a.txt") == ["first\nsecond\n"]
    assert contents(tmp_path / "b.jsonl") == ["one", messages]
    assert contents(tmp_path) == ["first\nsecond\n", "one", messages]  # a folder, in the order of names


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        pytest.param("x.jsonl", b'{"text": "a"}\n{"text": 3}\n', "line 2", id="no text"),
        pytest.param("x.jsonl", b'{"text": "a"\n', "line 1: not valid JSON", id="broken"),
        pytest.param("x.jsonl", b'{"prompt": "a"}\n', "'prompt'", id="another key"),
        pytest.param("x.jsonl", b'{"messages": [{"role": "user"}]}\n', "role and content", id="a message without content"),
        pytest.param("x.txt", b"\xff\xfe\x00", "no UTF-8 text", id="binary"),
        pytest.param("x.txt", b"PAR1\x00\x00", "zero bytes", id="binary that is UTF-8"),
        pytest.param("x.jsonl", b'{"text": "a\\ud800"}\n', "line 1.*surrogate", id="half a character"),
    ],
)  # fmt: skip
def test_what_holds_no_text_is_refused(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=words):
        contents(tmp_path / name)


def test_line_separators_inside_a_string_do_not_cut_it(tmp_path: Path) -> None:
    (tmp_path / "x.ndjson").write_text('{"text": "a\u2028b"}\n', encoding="utf-8")
    assert contents(tmp_path / "x.ndjson") == ["a\u2028b"]


def test_a_missing_file_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        contents(tmp_path / "nothing.txt")
    with pytest.raises(DataError, match="no files of text"):
        contents(tmp_path)


def test_tokens_come_from_numpy_and_safetensors(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(6, dtype=np.uint16).reshape(2, 3))
    save_file({"input_ids": torch.arange(4), "other": torch.ones(2)}, tmp_path / "b.safetensors")
    assert read_tokens(tmp_path / "a.npy").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert read_tokens(tmp_path / "b.safetensors").tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("array", "words"),
    [
        pytest.param(np.ones(3), "expected integers", id="floats"),
        pytest.param(np.ones((2, 2, 2), dtype=np.int64), "one or two dimensions", id="three dimensions"),
        pytest.param(np.array([1, -100]), "negative", id="padding"),
        pytest.param(np.array([], dtype=np.int64), "one or two dimensions", id="nothing"),
        pytest.param(np.array([{"a": 1}], dtype=object), "without pickle", id="pickled"),
    ],
)
def test_arrays_that_are_no_tokens_are_refused(tmp_path: Path, array: np.ndarray, words: str) -> None:
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=words):
        read_tokens(tmp_path / "x.npy")


def test_a_file_that_only_has_the_ending_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"nothing of the kind")
    (tmp_path / "x.npy").write_bytes(b"PK\x03\x04 nothing of the kind")
    for name in ("x.safetensors", "x.npy"):
        with pytest.raises(DataError, match=name):
            read_tokens(tmp_path / name)
