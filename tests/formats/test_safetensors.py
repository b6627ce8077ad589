"""What we write the library reads, what it writes we read, and nothing half-written ever takes the file's name."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from halfbin.errors import FormatError, OutputError
from halfbin.formats import safetensors as safetensors_module
from halfbin.formats.safetensors import DTYPES, SafetensorsFile, SafetensorsWriter, Specs, header_bytes, write_hollow
from halfbin.formats.writeback import begin_writing_back

SHAPES = [(), (0,), (1,), (3,), (0, 5), (4, 0), (2, 3), (5, 2, 4)]
THEIRS = {name: dtype for name, dtype in DTYPES.items() if name != "F4"}  # the library's torch side cannot load F4


def random_bytes(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Any bit pattern, NaN of all kinds included; a bool's byte is 0 or 1."""
    top = 2 if dtype == torch.bool else 256
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty(shape, dtype=dtype).numel() * dtype.itemsize
    return torch.randint(0, top, (size,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def same_bits(a: Tensor, b: Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return a.numel() == 0 or torch.equal(
        a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8)
    )


def specs_of(tensors: dict[str, Tensor]) -> Specs:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def write_file(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    with SafetensorsWriter(path, specs_of(tensors), metadata) as writer:
        for name, tensor in reversed(tensors.items()):
            writer.write(name, tensor)


@pytest.mark.parametrize("dtype", THEIRS.values(), ids=THEIRS.keys())
def test_every_dtype_and_shape_goes_both_ways_bit_by_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {f"t{i}": random_bytes(dtype, shape, seed=i) for i, shape in enumerate(SHAPES)}
    write_file(tmp_path / "ours", tensors, {"format": "pt", "ключ": "значение"})
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    loaded = load_file(tmp_path / "ours")
    assert loaded.keys() == tensors.keys()
    for path in (tmp_path / "ours", tmp_path / "theirs"):
        with SafetensorsFile(path) as file:
            assert file.tensors.keys() == tensors.keys()
            for name, tensor in tensors.items():
                assert same_bits(file.read(name), tensor), (path, name)
                assert same_bits(loaded[name], tensor), name
    assert SafetensorsFile(tmp_path / "ours").metadata == {"format": "pt", "ключ": "значение"}


def test_pairs_of_four_bit_floats_count_double_on_disk_as_the_library_writes_them(tmp_path: Path) -> None:
    pairs = torch.arange(24, dtype=torch.uint8).view(torch.float4_e2m1fn_x2).reshape(2, 12)
    write_file(tmp_path / "ours", {"w": pairs})
    save_file({"w": pairs}, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    with SafetensorsFile(tmp_path / "theirs") as file:
        assert file.tensors["w"].shape == (2, 12)
        assert same_bits(file.read("w"), pairs)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_set_of_tensors_survives(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    names = data.draw(st.lists(st.text(max_size=12).filter(lambda n: n != "__metadata__"), unique=True, max_size=6))
    tensors = {}
    for seed, name in enumerate(names):
        dtype = data.draw(st.sampled_from(list(THEIRS.values())))
        tensors[name] = random_bytes(dtype, tuple(data.draw(st.lists(st.integers(0, 4), max_size=3))), seed)
    metadata = data.draw(st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3))
    path = tmp_path_factory.mktemp("any") / "file"
    write_file(path, tensors, metadata)
    loaded = load_file(path)
    with SafetensorsFile(path) as file:
        assert dict(file.metadata) == metadata
        for name, tensor in tensors.items():
            assert same_bits(file.read(name), tensor)
            assert same_bits(loaded[name], tensor)
    assert path.stat().st_size == header_bytes(specs_of(tensors), metadata) + sum(t.nbytes for t in tensors.values())


def test_tensors_start_at_multiples_of_their_element_size(tmp_path: Path) -> None:
    tensors = {
        "a": torch.ones(3, dtype=torch.uint8),
        "b": torch.ones(3, dtype=torch.float64),
        "c": torch.ones(1).half(),
    }
    write_file(tmp_path / "file", tensors)
    with SafetensorsFile(tmp_path / "file") as file:
        assert all(info.start % info.dtype.itemsize == 0 for info in file.tensors.values())
        assert [info.num_bytes for info in file.tensors.values()] == [24, 2, 3]


def test_rows_are_read_and_written_without_the_rest(tmp_path: Path) -> None:
    weight = torch.arange(60.0).reshape(10, 2, 3)
    with SafetensorsWriter(tmp_path / "file", {"w": (torch.float32, (10, 2, 3))}) as writer:
        for start, stop in ((7, 10), (0, 4), (4, 4), (4, 7)):
            writer.write_rows("w", start, weight[start:stop])
    with SafetensorsFile(tmp_path / "file") as file:
        assert torch.equal(file.read("w"), weight)
        for start, stop in ((0, 10), (3, 5), (9, 10), (5, 5)):
            assert torch.equal(file.read_rows("w", start, stop), weight[start:stop])
        for start, stop in ((-1, 2), (5, 11), (6, 5)):
            with pytest.raises(FormatError, match=f"has no rows {start} to {stop}"):
                file.read_rows("w", start, stop)


def test_tensors_larger_than_one_call_to_the_system_come_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halfbin.formats.safetensors.IO_BYTES", 7)
    weight = random_bytes(torch.int16, (5, 9))
    write_file(tmp_path / "file", {"w": weight})
    assert torch.equal(load_file(tmp_path / "file")["w"], weight)
    with SafetensorsFile(tmp_path / "file") as file:
        assert torch.equal(file.read("w"), weight)


def test_what_is_read_belongs_to_the_reader(tmp_path: Path) -> None:
    write_file(tmp_path / "file", {"w": torch.ones(4)})
    with SafetensorsFile(tmp_path / "file") as file:
        file.read("w").zero_()
        assert torch.equal(file.read("w"), torch.ones(4))
    with pytest.raises(FormatError, match="it was closed"):
        file.read("w")


def test_strided_tensors_and_parameters_are_written_as_their_values(tmp_path: Path) -> None:
    weight = torch.arange(12.0).reshape(3, 4)
    write_file(tmp_path / "file", {"t": weight.T, "s": weight[:, ::2], "p": torch.nn.Parameter(weight)})
    loaded = load_file(tmp_path / "file")
    assert torch.equal(loaded["t"], weight.T)
    assert torch.equal(loaded["s"], weight[:, ::2])
    assert torch.equal(loaded["p"], weight)


def test_threads_may_write_at_once(tmp_path: Path) -> None:
    tensors = {f"t{i}": random_bytes(torch.int32, (64, 33), seed=i) for i in range(16)}
    with SafetensorsWriter(tmp_path / "file", specs_of(tensors)) as writer:

        def write_part(part: int) -> None:
            for tensor_name, tensor in tensors.items():
                writer.write_rows(tensor_name, 16 * part, tensor[16 * part : 16 * part + 16])

        threads = [threading.Thread(target=write_part, args=(part,)) for part in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    loaded = load_file(tmp_path / "file")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_tensor_that_never_came_keeps_the_file_from_its_name(tmp_path: Path) -> None:
    specs: Specs = {"a": (torch.float32, (2, 2)), "b": (torch.float32, (0,))}
    with (
        pytest.raises(OutputError, match=r"2 tensors are not complete, such as 'a': 8 of 16 bytes"),
        SafetensorsWriter(tmp_path / "file", specs) as writer,
    ):
        writer.write_rows("a", 1, torch.ones(1, 2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt], ids=lambda error: error.__name__)
def test_an_exception_removes_the_partial_file_and_leaves_the_old_one(
    error: type[BaseException], tmp_path: Path
) -> None:
    path = tmp_path / "file"
    write_file(path, {"w": torch.ones(2)})
    before = path.read_bytes()
    with pytest.raises(error), SafetensorsWriter(path, {"w": (torch.float32, (2,))}) as writer:
        writer.write("w", torch.zeros(2))
        assert (tmp_path / "file.partial").exists()
        raise error
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_bytes_and_name_are_on_the_disk_before_commit_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    sync, replace = os.fsync, Path.replace

    def noted_sync(handle: int) -> None:
        calls.append("directory" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")  # noqa: PTH112 - a handle
        sync(handle)

    def noted_replace(self: Path, target: Path) -> Path:
        calls.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    write_file(tmp_path / "file", {"w": torch.ones(2)})
    assert calls == ["file", "rename", "directory"]


def test_the_disk_is_set_to_work_while_more_is_to_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []

    def begin(handle: int) -> None:
        begin_writing_back(handle)
        begun.append(sum(written))

    monkeypatch.setattr(safetensors_module, "WRITE_BACK_BYTES", 100)
    monkeypatch.setattr(safetensors_module, "begin_writing_back", begin)
    rows, written = torch.arange(240, dtype=torch.uint8).view(6, 40), list[int]()
    with SafetensorsWriter(tmp_path / "x", {"a": (torch.uint8, (6, 40))}) as file:
        for i in range(6):
            written.append(40)
            file.write_rows("a", i, rows[i : i + 1])
    assert begun == [120, 240]
    assert torch.equal(load_file(tmp_path / "x")["a"], rows)


def test_a_tensor_is_written_once_and_as_announced(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "file", {"weight": (torch.float32, (4, 2)), "b": (torch.float32, ())})
    writer.write_rows("weight", 1, torch.ones(2, 2))
    for start, count in ((0, 2), (2, 1), (1, 2), (0, 4)):
        with pytest.raises(OutputError, match="'weight' was already written"):
            writer.write_rows("weight", start, torch.ones(count, 2))
    with pytest.raises(OutputError, match="'weight' was already written"):
        writer.write("weight", torch.ones(4, 2))
    with pytest.raises(OutputError, match="'wieght' was not announced; did you mean 'weight'"):
        writer.write("wieght", torch.ones(4, 2))
    with pytest.raises(OutputError, match=r"announced as torch.float32 \[4, 2\], got torch.float16"):
        writer.write("weight", torch.ones(4, 2).half())
    with pytest.raises(OutputError, match=r"announced as torch.float32 \[4, 2\], got \[2, 4\]"):
        writer.write("weight", torch.ones(2, 4))
    for start, rows in ((3, torch.ones(2, 2)), (-1, torch.ones(1, 2)), (0, torch.ones(1, 3)), (0, torch.ones(2))):
        with pytest.raises(OutputError, match=f"as its rows from {start} on"):
            writer.write_rows("weight", start, rows)
    writer.abort()
    with pytest.raises(OutputError, match="already committed or aborted"):
        writer.write("b", torch.tensor(1.0))


@pytest.mark.parametrize(
    ("specs", "metadata", "message"),
    [
        pytest.param({"__metadata__": (torch.int8, (1,))}, None, "keeps that name", id="reserved name"),
        pytest.param({"w": (torch.complex128, (1,))}, None, "has no torch.complex128", id="dtype"),
        pytest.param({"w": (torch.int8, (-1,))}, None, "sizes of 0 or more", id="negative size"),
        pytest.param({"\ud800": (torch.int8, (1,))}, None, "no Unicode text", id="half a surrogate pair"),
        pytest.param({}, {"a": 1}, "holds texts only", id="metadata"),
        pytest.param({}, {"a": "x" * (100 * 10**6)}, "readers allow 100000000", id="huge header"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_before_a_file_is_made(
    specs: Specs, metadata: dict[str, str] | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(OutputError, match=message):
        SafetensorsWriter(tmp_path / "file", specs, metadata)
    assert list(tmp_path.iterdir()) == []


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_such_call(*_: object) -> None:
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


def test_a_full_disk_is_found_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", full_disk)
    with pytest.raises(OutputError, match=r"file: the disk is full: \d+ bytes are needed, \d+ are free"):
        SafetensorsWriter(tmp_path / "file", {"w": (torch.int8, (8,))})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_found_where_space_cannot_be_reserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", no_such_call)
    write_file(tmp_path / "small", {"w": torch.ones(3)})
    assert torch.equal(load_file(tmp_path / "small")["w"], torch.ones(3))
    with pytest.raises(OutputError, match=r"the disk is full: 1\d{18} bytes are needed"):
        SafetensorsWriter(tmp_path / "file", {"w": (torch.int8, (10**18,))})
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_a_disk_that_fills_up_meanwhile_is_an_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(OutputError, match="the disk is full"),
        SafetensorsWriter(tmp_path / "file", {"w": (torch.int8, (8,))}) as writer,
    ):
        monkeypatch.setattr(os, "pwrite", full_disk)
        writer.write("w", torch.ones(8, dtype=torch.int8))
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written_say_so(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file or directory"):
        SafetensorsWriter(tmp_path / "missing" / "file", {})
    with pytest.raises(OutputError, match="is a directory"):
        SafetensorsWriter(tmp_path, {})


def test_a_hollow_file_has_the_header_and_takes_no_room(tmp_path: Path) -> None:
    path = tmp_path / "hollow.safetensors"
    write_hollow(path, {"a": (torch.float32, (1000, 1000)), "b": (torch.int8, (3,))}, {"format": "pt"})
    with SafetensorsFile(path) as file:
        assert file.tensors["a"].shape == (1000, 1000)
        assert not file.read("a").any()
    assert path.stat().st_size > 4_000_000
    assert path.stat().st_blocks * 512 < 100_000
