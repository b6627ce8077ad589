"""Files of calibration data: what is read from each kind, and what is refused, with file and line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from halfbin.errors import DataError
from halfbin.samples import read_documents, read_tokens
from halfbin.samples.documents import words_of


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
    assert [row.tolist() for row in read_tokens(tmp_path / "a.npy")] == [[0, 1, 2], [3, 4, 5]]
    stream = read_tokens(tmp_path / "b.safetensors")
    assert isinstance(stream, torch.Tensor) and stream.tolist() == [0, 1, 2, 3]


def test_masked_tokens_are_not_read_whatever_stands_there(tmp_path: Path) -> None:
    ids, mask = torch.tensor([[5, 6, 7], [8, -100, 9]]), torch.tensor([[0, 1, 1], [1, 0, 0]])
    save_file({"input_ids": ids, "attention_mask": mask}, tmp_path / "a.safetensors")
    assert [row.tolist() for row in read_tokens(tmp_path / "a.safetensors")] == [[6, 7], [8]]
    save_file({"input_ids": ids[0], "attention_mask": mask[0]}, tmp_path / "b.safetensors")
    stream = read_tokens(tmp_path / "b.safetensors")
    assert isinstance(stream, torch.Tensor) and stream.tolist() == [6, 7]


def test_a_mask_of_another_shape_is_refused(tmp_path: Path) -> None:
    save_file(
        {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(3).long()}, tmp_path / "a.safetensors"
    )
    with pytest.raises(DataError, match=r"attention_mask has shape \[3\]"):
        read_tokens(tmp_path / "a.safetensors")


def test_a_header_that_promises_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "x.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (2**40,)})
    with pytest.raises(DataError, match=r"x\.npy"):
        read_tokens(tmp_path / "x.npy")


@pytest.mark.parametrize("name", ["x.txt", "x.npy", "x.safetensors", "x.jsonl"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match="no regular file"):
        contents(tmp_path / name) if name in ("x.txt", "x.jsonl") else read_tokens(tmp_path / name)


def test_a_folder_is_read_with_those_below_it_but_not_in_circles(tmp_path: Path) -> None:
    for name in ("b/c.txt", "a.txt", ".hidden/d.txt", "b/.e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "b" / "again").symlink_to(tmp_path)
    (tmp_path / "b" / "self.txt").symlink_to(tmp_path / "b" / "self.txt")
    os.mkfifo(tmp_path / "b" / "pipe.txt")
    assert contents(tmp_path) == ["a.txt", "b/c.txt"]


def test_messages_may_lack_content_or_have_it_in_parts(tmp_path: Path) -> None:
    messages: list[dict[str, object]] = [
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        {
            "role": "user",
            "content": [{"type": "text", "text": "look: "}, {"type": "image"}, {"type": "text", "text": "this"}],
        },
    ]
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": None, "messages": messages}))
    (found,) = contents(tmp_path / "x.jsonl")
    assert found == messages
    assert [words_of(m) for m in messages] == ["", "look: this"]


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
