"""A directory's weights come out whole whatever they lie in, and a broken directory says what to do."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from halfbin.errors import FormatError
from halfbin.formats.checkpoint import open_checkpoint
from halfbin.formats.torch_pickle import PickleShard

ONE = "model-00001-of-00002.safetensors"
TWO = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "embed.weight": torch.randn(6, 4, generator=generator).bfloat16(),
        "layer.weight": torch.randn(4, 4, generator=generator),
        "layer.bias": torch.randn(4, generator=generator).half(),
        "steps": torch.tensor(7),
    }


def save_sharded(directory: Path, ending: str = "safetensors") -> dict[str, Tensor]:
    """Two shards of two tensors each, and their index."""
    tensors = weights()
    stem = "model" if ending == "safetensors" else "pytorch_model"
    weight_map: dict[str, str] = {}
    for number, names in ((1, list(tensors)[:2]), (2, list(tensors)[2:])):
        file = f"{stem}-0000{number}-of-00002.{ending}"
        part = {name: tensors[name] for name in names}
        save_file(part, directory / file, {"format": "pt"}) if stem == "model" else torch.save(part, directory / file)
        weight_map |= dict.fromkeys(names, file)
    write_index(directory, weight_map, f"{stem}.{ending}.index.json")
    return tensors


def write_index(directory: Path, weight_map: Any, name: str = INDEX) -> None:
    (directory / name).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))


def save_single(directory: Path) -> dict[str, Tensor]:
    save_file(weights(), directory / "model.safetensors", {"format": "pt"})
    return weights()


def save_named(directory: Path) -> dict[str, Tensor]:
    save_file(weights(), directory / "adapter.safetensors")
    return weights()


def save_pickle(directory: Path) -> dict[str, Tensor]:
    torch.save(weights(), directory / "pytorch_model.bin")
    return weights()


def save_sharded_pickles(directory: Path) -> dict[str, Tensor]:
    return save_sharded(directory, "bin")


KINDS = pytest.mark.parametrize(
    "save",
    [save_single, save_sharded, save_named, save_pickle, save_sharded_pickles],
    ids=["one file", "shards", "one file of any name", "a pickle", "sharded pickles"],
)


@KINDS
def test_every_tensor_comes_out_as_it_went_in(save: Any, tmp_path: Path) -> None:
    tensors = save(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.path == tmp_path
        assert set(checkpoint.names) == set(tensors)
        assert checkpoint.num_bytes == sum(tensor.nbytes for tensor in tensors.values())
        assert checkpoint.num_parameters == sum(tensor.numel() for tensor in tensors.values())
        for name, tensor in tensors.items():
            info = checkpoint.info(name)
            assert (info.dtype, info.shape, info.num_bytes) == (tensor.dtype, tuple(tensor.shape), tensor.nbytes)
            assert checkpoint.file_of(name) in checkpoint.files
            assert torch.equal(checkpoint.read(name), tensor)
            if tensor.ndim:
                assert torch.equal(checkpoint.read_rows(name, 1, 3), tensor[1:3])


@KINDS
def test_what_is_read_belongs_to_the_reader(save: Any, tmp_path: Path) -> None:
    tensors = save(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        checkpoint.read("layer.weight").zero_()
        checkpoint.read_rows("layer.weight", 0, 2).zero_()
        assert torch.equal(checkpoint.read("layer.weight"), tensors["layer.weight"])


@KINDS
def test_names_and_rows_that_are_not_there_are_refused(save: Any, tmp_path: Path) -> None:
    save(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(FormatError, match=r"no tensor 'layer\.wieght'; did you mean 'layer\.weight'"):
        checkpoint.read("layer.wieght")
    for name, start, stop in (("layer.weight", 3, 5), ("layer.weight", -1, 2), ("steps", 0, 1)):
        with pytest.raises(FormatError, match=f"has no rows {start} to {stop}"):
            checkpoint.read_rows(name, start, stop)
    checkpoint.close()
    with pytest.raises(FormatError, match="it was closed"):
        checkpoint.read("layer.weight")


def test_safetensors_are_preferred_to_pickles_and_an_index_to_a_file(tmp_path: Path) -> None:
    save_pickle(tmp_path)
    save_single(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        assert [path.name for path in checkpoint.files] == ["model.safetensors"]
    save_sharded(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        assert [path.name for path in checkpoint.files] == [ONE, TWO]
        assert checkpoint.metadata == {"format": "pt"}


def test_opening_reads_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"w": torch.zeros(1000, 1000)}, tmp_path / "model.safetensors")
    read = os.preadv
    counts: list[int] = []

    def counted(handle: int, buffers: Any, offset: int) -> int:
        counts.append(read(handle, buffers, offset))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", counted)
    open_checkpoint(tmp_path).close()
    assert 0 < sum(counts) < 200


def test_a_snapshot_of_the_hugging_face_cache_opens_though_it_is_all_links(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_sharded(snapshot)
    for path in list(snapshot.iterdir()):
        path.rename(blobs / f"hash-of-{path.name}")
        path.symlink_to(Path("../../blobs") / f"hash-of-{path.name}")
    with open_checkpoint(snapshot) as checkpoint:
        assert len(checkpoint.names) == 4


def refusal(directory: Path) -> str:
    with pytest.raises(FormatError) as caught:
        open_checkpoint(directory)
    return str(caught.value)


def test_a_directory_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "found nothing there; check the path" in refusal(tmp_path / "missing")
    assert "found a file" in refusal(tmp_path / "file")


def test_a_directory_without_weights_says_what_is_there(tmp_path: Path) -> None:
    assert "expected model.safetensors, found nothing" in refusal(tmp_path)
    (tmp_path / "config.json").touch()
    (tmp_path / "model.gguf").touch()
    assert "no weights; expected model.safetensors, found config.json, model.gguf" in refusal(tmp_path)


def test_shards_without_an_index_are_not_guessed_together(tmp_path: Path) -> None:
    save_sharded(tmp_path)
    (tmp_path / INDEX).unlink()
    assert "2 safetensors files but no model.safetensors.index.json" in refusal(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_sharded(tmp_path)
    (tmp_path / TWO).unlink()
    assert f"names '{TWO}', which is missing; download" in refusal(tmp_path)


def test_a_cut_shard_says_how_many_bytes_are_missing(tmp_path: Path) -> None:
    save_sharded(tmp_path)
    os.truncate(tmp_path / TWO, (tmp_path / TWO).stat().st_size - 3)
    assert f"{TWO}: 3 bytes are missing at the end" in refusal(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ".", "", "a\0b", "n" * 5000, "\\ud800"],
    ids=["parent", "absolute", "folder", "two dots", "a dot", "nothing", "zero byte", "too long", "escape"],
)
def test_an_index_leads_to_no_other_place(name: str, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    save_file(weights(), tmp_path / "outside.safetensors")
    write_index(directory, {"steps": name})
    message = refusal(directory)
    assert "its index names" in message
    assert "no plain file name" in message or "cannot be a file" in message or "is missing" in message
    assert len(message) < 500 + len(str(directory))


def test_a_link_that_leaves_the_directory_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    save_sharded(directory)
    (directory / TWO).rename(tmp_path / TWO)
    (directory / TWO).symlink_to(tmp_path / TWO)
    assert "a link that leaves the directory" in refusal(directory)
    (directory / TWO).unlink()
    (tmp_path / TWO).rename(directory / "renamed")
    (directory / TWO).symlink_to("renamed")
    open_checkpoint(directory).close()


def test_a_ring_of_links_is_refused(tmp_path: Path) -> None:
    save_sharded(tmp_path)
    (tmp_path / TWO).unlink()
    (tmp_path / TWO).symlink_to(TWO)
    assert "its index names" in refusal(tmp_path)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    tensors = save_sharded(tmp_path)
    good = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    write_index(tmp_path, good | {"ghost": ONE})
    assert f"{ONE} holds tensor 'ghost', which no file holds" in refusal(tmp_path)
    write_index(tmp_path, good | {"steps": ONE})
    assert f"{ONE} holds tensor 'steps', which is in {TWO}" in refusal(tmp_path)
    write_index(tmp_path, {name: file for name, file in good.items() if name != "steps"})
    assert f"{TWO} holds 'steps', which its index does not list" in refusal(tmp_path)
    write_index(tmp_path, good)
    save_file({name: tensors[name] for name in ("embed.weight", "layer.bias", "steps")}, tmp_path / TWO)
    assert f"tensor 'embed.weight' is in both {ONE} and {TWO}" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(b"{", "the index is not valid JSON", id="cut"),
        pytest.param(b"\xff", "the index is not UTF-8", id="not UTF-8"),
        pytest.param(b"[" * 200_000, "nested too deeply", id="deep"),
        pytest.param(b"[]", "expected a weight_map", id="a list"),
        pytest.param(b"{}", "expected a weight_map", id="no map"),
        pytest.param(b'{"weight_map": {}}', "expected a weight_map", id="empty map"),
        pytest.param(b'{"weight_map": {"a": 1}}', "expected a weight_map", id="numbers"),
        pytest.param(b'{"weight_map": {"a": "x", "a": "y"}}', "names 'a' twice", id="a tensor twice"),
    ],
)
def test_a_broken_index_is_refused(text: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_bytes(text)
    assert message in refusal(tmp_path)


def test_files_are_closed_when_a_later_one_is_broken(tmp_path: Path) -> None:
    save_sharded(tmp_path)
    (tmp_path / TWO).write_bytes(b"broken")
    before = len(list(Path("/proc/self/fd").iterdir()))
    refusal(tmp_path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


class Attack:
    """Runs a command when a pickle of it is opened without care."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.mark),))


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    torch.save({"w": Attack(mark)}, tmp_path / "pytorch_model.bin")
    assert "weights-only loading refuses it" in refusal(tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize("legacy", ["torch", "plain", "hidden"])
def test_pickles_that_are_no_archive_are_refused_and_do_not_run(legacy: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "it ran", tmp_path / "pytorch_model.bin"
    if legacy == "torch":
        torch.save({"w": Attack(mark)}, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(Attack(mark)))
    if legacy == "hidden":  # before an archive that looks harmless
        torch.save(weights(), tmp_path / "tail")
        path.write_bytes(path.read_bytes() + (tmp_path / "tail").read_bytes())
    assert "not a zip archive as PyTorch writes it since 1.6" in refusal(tmp_path)
    assert "Convert it to safetensors" in refusal(tmp_path)
    assert not mark.exists()


def test_a_compressed_archive_is_refused_before_it_unfolds(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1_000_000)}, tmp_path / "plain")
    with (
        zipfile.ZipFile(tmp_path / "plain") as source,
        zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    assert (tmp_path / "pytorch_model.bin").stat().st_size < 10_000
    assert "is compressed, which PyTorch never does" in refusal(tmp_path)


def test_an_archive_with_one_name_twice_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as target:
        target.writestr("a/data.pkl", b"1")
        with pytest.warns(UserWarning, match="Duplicate name"):
            target.writestr("a/data.pkl", b"2")
    assert "two of its entries have one name" in refusal(tmp_path)


def test_entries_that_claim_more_than_the_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(weights(), path)
    content = bytearray(path.read_bytes())
    central = content.index(b"PK\x01\x02")
    content[central + 20 : central + 28] = (10**9).to_bytes(4, "little") * 2  # both sizes of the first entry
    path.write_bytes(content)
    assert "the whole file has" in refusal(tmp_path)


def test_a_few_bytes_that_pose_as_terabytes_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1).expand(2**40)}, tmp_path / "pytorch_model.bin")
    assert "would take 4398046511104 bytes, the whole file has" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        pytest.param([torch.ones(1)], "expected tensors by name, got a list", id="a list"),
        pytest.param({"state_dict": {"w": torch.ones(1)}, "epoch": 3}, "got 'state_dict': dict", id="a training state"),
        pytest.param({"w": torch.eye(3).to_sparse()}, "expected a plain dense tensor", id="sparse"),
    ],
)
def test_a_pickle_of_something_else_is_refused(state: Any, message: str, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert message in refusal(tmp_path)


def test_tied_and_strided_tensors_of_a_pickle_come_out_contiguous(tmp_path: Path) -> None:
    weight = torch.arange(12.0).reshape(3, 4)
    torch.save({"a": weight.T, "b": weight, "c": torch.nn.Parameter(weight)}, tmp_path / "pytorch_model.bin")
    with open_checkpoint(tmp_path) as checkpoint:
        assert torch.equal(checkpoint.read("a"), weight.T)
        assert checkpoint.read("a").is_contiguous()
        assert not checkpoint.read("c").requires_grad


def test_damage_to_a_pickle_loads_or_is_a_format_error(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(weights(), path)
    content = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        damaged = bytearray(content)
        for position in torch.randint(0, len(content), (3,), generator=generator).tolist():
            damaged[position] ^= 1 << int(torch.randint(0, 8, (1,), generator=generator))
        path.write_bytes(damaged)
        try:
            shard = PickleShard(path)
        except FormatError:
            continue
        for name, info in shard.tensors.items():
            assert tuple(shard.read(name).shape) == info.shape
        shard.close()
