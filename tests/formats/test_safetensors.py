from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halfbin.errors import FormatError, OutputError
from halfbin.formats.safetensors import DTYPES, SafetensorsFile, SafetensorsWriter, header_bytes


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with SafetensorsWriter(path, specs, metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(5, 7).bfloat16(),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "codes": torch.arange(6, dtype=torch.uint8).reshape(2, 3),
        "index": torch.arange(3),
    }


def file_of(header: Any, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def entry(dtype: str = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_what_we_write_the_library_reads_bit_for_bit(tmp_path: Path) -> None:
    tensors = some_tensors()
    write(tmp_path / "x.safetensors", tensors, {"format": "pt"})
    loaded = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert set(loaded) == set(tensors)
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_what_the_library_writes_we_read_bit_for_bit(tmp_path: Path) -> None:
    tensors = some_tensors()
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", {"who": "library"})
    with SafetensorsFile(tmp_path / "x.safetensors") as file:
        assert file.metadata == {"who": "library"}
        assert all(torch.equal(file.read(name), tensors[name]) for name in tensors)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_type_comes_back_with_the_same_bytes(dtype: torch.dtype, tmp_path: Path) -> None:
    raw = torch.arange(64, dtype=torch.uint8) % (2 if dtype == torch.bool else 251)
    tensor = raw.view(dtype).reshape(2, -1)
    write(tmp_path / "x.safetensors", {"x": tensor})
    with SafetensorsFile(tmp_path / "x.safetensors") as file:
        back = file.read("x")
    assert back.dtype == dtype and back.shape == tensor.shape
    assert torch.equal(back.flatten().view(torch.uint8), raw)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.dictionaries(
        st.text(min_size=1, max_size=12).filter(
            lambda n: n != "__metadata__" and not any(0xD800 <= ord(c) < 0xE000 for c in n)
        ),
        st.tuples(
            st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]), st.lists(st.integers(0, 5), max_size=4)
        ),
        max_size=5,
    )
)
def test_any_names_and_shapes_come_back(shapes: dict[str, tuple[torch.dtype, list[int]]], tmp_path: Path) -> None:
    tensors = {name: torch.ones(shape, dtype=dtype) for name, (dtype, shape) in shapes.items()}
    write(tmp_path / "x.safetensors", tensors)
    with SafetensorsFile(tmp_path / "x.safetensors") as file:
        assert all(torch.equal(file.read(name), tensor) for name, tensor in tensors.items())


def test_rows_are_read_without_the_rest(tmp_path: Path) -> None:
    tensor = torch.randn(9, 3, 2)
    write(tmp_path / "x.safetensors", {"x": tensor, "before": torch.ones(3)})
    with SafetensorsFile(tmp_path / "x.safetensors") as file:
        assert torch.equal(file.read_rows("x", 2, 7), tensor[2:7])
        with pytest.raises(FormatError, match="has no rows 5 to 10"):
            file.read_rows("x", 5, 10)


def test_the_announced_header_size_is_the_real_one(tmp_path: Path) -> None:
    tensors = {"x": torch.ones(3), "y": torch.ones(2, 2, dtype=torch.uint8)}
    write(tmp_path / "x.safetensors", tensors, {"format": "pt"})
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    size = (tmp_path / "x.safetensors").stat().st_size
    assert size == header_bytes(specs, {"format": "pt"}) + 3 * 4 + 4


BAD = {
    "shorter than a length": (b"1234567", "cut short"),
    "a header longer than the file": (file_of({})[:8] + b"{", "claims 2 bytes, but the file has"),
    "an absurd header length": (b"\xff" * 8, "no safetensors file"),
    "no UTF-8": (file_of(b"\xff\xfe{}"), "not UTF-8"),
    "no JSON": (file_of(b"{"), "not valid JSON"),
    "JSON of another kind": (file_of([1]), "must be a JSON object"),
    "JSON nested without end": (file_of(b"[" * 100_000), "not valid JSON"),
    "a name twice": (file_of(b'{"a":1,"a":2}'), "names 'a' twice"),
    "an unknown type": (file_of({"a": entry("F12")}, b"1234"), "unknown dtype 'F12'"),
    "a type that is no text": (file_of({"a": {**entry(), "dtype": ["U8"]}}, b"1234"), "unknown dtype"),
    "a negative size": (file_of({"a": entry(shape=(-4,))}, b"1234"), "not negative"),
    "a size that is true": (file_of({"a": entry(shape=(True, 4))}, b"1234"), "not negative"),
    "a size that is no integer": (file_of({"a": entry(shape=(4.0,))}, b"1234"), "not negative"),
    "a product beyond 64 bits": (
        file_of({"a": entry(shape=(2**33, 2**33))}, b"1234"),
        "takes 73786976294838206464 bytes",
    ),
    "a size beyond 64 bits, of nothing": (
        file_of({"a": entry(shape=(2**70, 0), offsets=(0, 0))}),
        "beyond what a tensor can have",
    ),
    "offsets in reverse": (file_of({"a": entry(offsets=(4, 0))}, b"1234"), "no begin and end"),
    "three offsets": (file_of({"a": entry(offsets=(0, 4, 8))}, b"1234"), "no begin and end"),
    "offsets that do not fit the shape": (
        file_of({"a": entry(offsets=(0, 3))}, b"123"),
        "takes 4 bytes, data_offsets give 3",
    ),
    "a missing key": (file_of({"a": {"dtype": "U8", "shape": [4]}}, b"1234"), "expected dtype, shape and data_offsets"),
    "an entry of another kind": (file_of({"a": 7}), "expected dtype, shape and data_offsets"),
    "an overlap": (file_of({"a": entry(), "b": entry(offsets=(2, 6))}, b"123456"), "overlaps the one before"),
    "a hole": (file_of({"a": entry(), "b": entry(offsets=(6, 10))}, b"1234567890"), "leaves a hole of 2 bytes"),
    "a cut body": (file_of({"a": entry()}, b"12"), "2 bytes are missing at the end"),
    "bytes that nothing describes": (file_of({"a": entry()}, b"123456"), "2 bytes follow the last tensor"),
    "metadata that is no text": (file_of({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata of another kind": (file_of({"__metadata__": 3}), "__metadata__"),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_a_file_that_lies_is_refused_with_its_own_message(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message) as caught:
        SafetensorsFile(path)
    assert "bad.safetensors" in str(caught.value)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_raises_format_error_or_reads(data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(path, {"x": torch.arange(4.0), "y": torch.ones(2, 3)}, {"k": "v"})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        with SafetensorsFile(path) as file:
            for name in file.tensors:
                file.read(name)
    except FormatError:
        pass


def test_a_missing_file_and_a_missing_tensor_are_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"none\.safetensors: cannot be opened"):
        SafetensorsFile(tmp_path / "none.safetensors")
    write(tmp_path / "x.safetensors", {"x": torch.ones(1)})
    with SafetensorsFile(tmp_path / "x.safetensors") as file, pytest.raises(FormatError, match="no tensor 'z'"):
        file.read("z")


def test_a_file_cut_while_it_is_open_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(path, {"x": torch.ones(1000)})
    with SafetensorsFile(path) as file:
        os.truncate(path, 500)
        with pytest.raises(FormatError, match="ends early"):
            file.read("x")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError], ids=["ctrl-c", "error"])
def test_nothing_is_left_when_writing_stops_half_way(stop: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(stop), SafetensorsWriter(tmp_path / "x.safetensors", {"x": (torch.float32, (4,))}):
        raise stop
    assert list(tmp_path.iterdir()) == []


def test_the_name_appears_only_when_everything_is_there(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with SafetensorsWriter(path, {"x": (torch.float32, (4,))}) as writer:
        writer.write("x", torch.ones(4))
        assert not path.exists()
    assert path.exists()


def test_a_tensor_that_was_not_announced_so_is_refused(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "x.safetensors", {"x": (torch.float32, (4,))})
    with pytest.raises(FormatError, match="announced as"):
        writer.write("x", torch.ones(5))
    with pytest.raises(FormatError, match="announced as"):
        writer.write("x", torch.ones(4).half())
    with pytest.raises(FormatError, match="'y' was not announced"):
        writer.write("y", torch.ones(4))
    with pytest.raises(FormatError, match="never written, such as 'x'"):
        writer.commit()
    writer.write("x", torch.ones(4))
    with pytest.raises(FormatError, match="already written"):
        writer.write("x", torch.ones(4))
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_found_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match="the disk is full: .* bytes are needed"):
        SafetensorsWriter(tmp_path / "x.safetensors", {"x": (torch.float32, (1000,))})
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_reservation_is_let_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(handle: int, offset: int, size: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    write(tmp_path / "x.safetensors", {"x": torch.ones(4)})
    assert (tmp_path / "x.safetensors").exists()
