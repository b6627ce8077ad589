"""A stranger's file can only ever raise FormatError; each fault has a message of its own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from halfbin.errors import FormatError
from halfbin.formats.safetensors import SafetensorsFile


def file_of(header: Any, data: bytes = b"") -> bytes:
    """A file with any header, given as JSON value or as text, padded as the format asks."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def one(dtype: Any = "U8", shape: Any = (8,), offsets: Any = (0, 8), data: int = 8, **more: Any) -> bytes:
    """A file of one tensor, right unless told otherwise."""
    return file_of({"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}}, bytes(data))


def two(first: tuple[int, int], second: tuple[int, int], data: int) -> bytes:
    places = {"a": first, "b": second}
    entries = {
        name: {"dtype": "U8", "shape": [end - at], "data_offsets": [at, end]} for name, (at, end) in places.items()
    }
    return file_of(entries, bytes(data))


ENTRY = b'{"dtype":"U8","shape":[8],"data_offsets":[0,8]}'
HUGE = 10**4299  # the longest integer that Python's own limit lets through

HOSTILE = {
    "empty": (b"", "0 bytes are no safetensors file"),
    "seven bytes": (b"1234567", "7 bytes are no safetensors file"),
    "header beyond the file": ((99).to_bytes(8, "little") + b"{}", "claims 99 bytes, but the file has 10"),
    "header of exabytes": (b"\xff" * 16, "claims 18446744073709551615 bytes, more than 100000000"),
    "text instead": (b"version https://git-lfs.github.com/spec/v1\n", "more than 100000000"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "header is not UTF-8: invalid start byte at byte 2"),
    "not JSON": (file_of(b"{nonsense"), "header is not valid JSON"),
    "empty header": (file_of(b""), "header is not valid JSON"),
    "two JSON values": (file_of(b"{} {}"), "header is not valid JSON: Extra data"),
    "NaN": (file_of(b'{"w": NaN}'), "NaN is no JSON number"),
    "integer of 5000 digits": (file_of(b'{"w":' + b"9" * 5000 + b"}"), "header is not valid JSON"),
    "a list": (file_of([]), "must be a JSON object, got list"),
    "space before the brace": (file_of(b" {}"), "must begin with a brace"),
    "deep nesting": (file_of(b"[" * 200_000), "nested too deeply"),
    "deep objects": (file_of(b'{"a":' * 200_000), "nested too deeply"),
    "duplicate tensor": (file_of(b'{"w":' + ENTRY + b',"w":' + ENTRY + b"}", bytes(8)), "names 'w' twice"),
    "duplicate key inside": (file_of(b'{"w":{"dtype":"U8","dtype":"I8"}}'), "names 'dtype' twice"),
    "half a surrogate pair as name": (file_of(b'{"\\ud800":' + ENTRY + b"}", bytes(8)), "no Unicode text"),
    "half a surrogate pair in metadata": (file_of(b'{"__metadata__":{"a":"\\udfff"}}'), "no Unicode text"),
    "entry is no object": (file_of({"w": 3}), "tensor 'w': expected dtype, shape and data_offsets"),
    "entry lacks shape": (file_of({"w": {"dtype": "U8", "data_offsets": [0, 0]}}), "expected dtype, shape"),
    "entry says more": (one(strides=[1]), "expected dtype, shape and data_offsets"),
    "unknown dtype": (one("F12"), "unknown dtype 'F12'; expected one of F64"),
    "dtype is a list": (one(["U8"]), r"unknown dtype \['U8'\]"),
    "negative size": (one(shape=[-8]), r"shape must be a list of integers .* got \[-8\]"),
    "true as size": (one(shape=[True, 8]), r"shape must be a list of integers .* got \[True, 8\]"),
    "fraction as size": (one(shape=[8.0]), r"shape must be a list of integers"),
    "size of 64 bits": (one(shape=[2**63]), "shape must be a list of integers from 0 to"),
    "size of 4300 digits": (one(shape=[HUGE]), "shape must be a list of integers from 0 to"),
    "shape is a number": (one(shape=8), "shape must be a list of integers"),
    "product of 2**64 and a bit": (one(shape=[2**32 + 1, 2**32]), "beyond 64 bits"),
    "product that wraps to 8": (one(shape=[2**61 + 1, 8]), "beyond 64 bits"),
    "bytes that wrap": (one("F64", shape=[2**61 + 1]), "beyond 64 bits"),
    "empty, and beyond torch": (one(shape=[0, 2**62, 2**62], offsets=[0, 0], data=0), "beyond 64 bits"),
    "a thousand dimensions": (one(shape=[2**62] * 1000), "1000 dimensions are too many"),
    "odd count of half bytes": (one("F4", shape=[15]), r"last dimension of \[15\] must be even"),
    "scalar of half a byte": (one("F4", shape=[]), r"last dimension of \[\] must be even"),
    "offsets reversed": (one(offsets=[8, 0]), r"data_offsets \[8, 0\] are no begin and end"),
    "one offset": (one(offsets=[8]), "are no begin and end"),
    "negative offset": (one(offsets=[-8, 0]), "data_offsets must be a list of integers"),
    "offset of 4300 digits": (one(offsets=[HUGE, HUGE]), "data_offsets must be a list of integers"),
    "shape and offsets disagree": (one(shape=[7]), r"U8 \[7\] takes 7 bytes, data_offsets give 8"),
    "wider dtype": (one("F32"), r"F32 \[8\] takes 32 bytes, data_offsets give 8"),
    "overlap": (two((0, 8), (4, 12), 12), "tensor 'b' overlaps the one before"),
    "same bytes twice": (two((0, 8), (0, 8), 8), "tensor 'b' overlaps the one before"),
    "hole": (two((0, 8), (10, 16), 16), "tensor 'b' leaves a hole of 2 bytes"),
    "hole at the start": (one(offsets=[8, 16], data=16), "tensor 'w' leaves a hole of 8 bytes"),
    "cut": (two((0, 8), (8, 16), 11), r"5 bytes are missing at the end .* tensor 'b' is the first that is cut"),
    "far beyond the file": (one(shape=[2**62], offsets=[0, 2**62]), "bytes are missing at the end"),
    "trailing bytes": (one(data=11), "3 bytes follow the last tensor"),
    "metadata is a list": (file_of({"__metadata__": []}), "must hold texts by name, got list"),
    "metadata is null": (file_of({"__metadata__": None}), "must hold texts by name, got NoneType"),
    "metadata holds a number": (file_of({"__metadata__": {"a": 1}}), "must hold texts, 'a' is int"),
}


@pytest.mark.parametrize(("content", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_broken_file_is_refused_with_what_is_wrong(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000 + len(str(path))  # a stranger's text must not flood the screen


def test_the_builders_make_good_files_when_told_nothing(tmp_path: Path) -> None:
    for content in (one(), two((0, 8), (8, 16), 16), file_of({})):
        (tmp_path / "file").write_bytes(content)
        SafetensorsFile(tmp_path / "file").close()


def test_many_names_with_one_twice_are_refused_in_no_time(tmp_path: Path) -> None:
    # Looking for the double by counting each name would take 10**10 steps.
    names = ",".join(f'"{i}":0' for i in [*range(100_000), 99_999])
    (tmp_path / "file").write_bytes(file_of(b"{" + names.encode() + b"}"))
    with pytest.raises(FormatError, match="names '99999' twice"):
        SafetensorsFile(tmp_path / "file")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be opened: No such file"):
        SafetensorsFile(tmp_path / "missing")
    with pytest.raises(FormatError, match="found a directory or device"):
        SafetensorsFile(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="found a directory or device"):
        SafetensorsFile(tmp_path / "pipe")


def test_a_file_that_is_cut_while_open_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(one())
    with SafetensorsFile(tmp_path / "file") as file:
        os.truncate(tmp_path / "file", (tmp_path / "file").stat().st_size - 1)
        with pytest.raises(FormatError, match="cut while it was open"):
            file.read("w")


GOOD = save({"a": torch.ones(3, 2), "b.c": torch.zeros(5, dtype=torch.int8)}, {"format": "pt"})


def read_all(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        with SafetensorsFile(path) as file:
            for name, info in file.tensors.items():
                assert tuple(file.read(name).shape) == info.shape
    except FormatError:
        pass


@settings(max_examples=400, deadline=None)
@given(
    edits=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=4),
    length=st.integers(0, len(GOOD) + 3),
)
@example(edits=[], length=len(GOOD))
def test_damage_anywhere_loads_or_is_a_format_error(
    edits: list[tuple[int, int]], length: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(GOOD + b"\0\0\0")
    for position, value in edits:
        content[position] = value
    read_all(tmp_path_factory.getbasetemp() / "damaged", bytes(content[:length]))


NUMBERS = st.one_of(st.integers(-2, 9), st.sampled_from([2**31, 2**61, 2**63, 2**64]), st.floats(), st.booleans())
ANYTHING = st.one_of(NUMBERS, st.none(), st.text(max_size=3), st.lists(NUMBERS, max_size=3))
ENTRIES = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["U8", "F32", "F4", "X", 3]), "shape": ANYTHING, "data_offsets": ANYTHING}
)


@settings(max_examples=300, deadline=None)
@given(header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), st.one_of(ENTRIES, ANYTHING)))
def test_any_header_loads_or_is_a_format_error(header: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    read_all(tmp_path_factory.getbasetemp() / "header", file_of(header, bytes(8)))
