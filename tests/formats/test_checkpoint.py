from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from halfbin.errors import FormatError
from halfbin.formats.checkpoint import open_checkpoint


def sharded(folder: Path) -> dict[str, torch.Tensor]:
    """Two shards and their index."""
    torch.manual_seed(0)
    tensors = {"a": torch.randn(3, 2), "b": torch.randn(4).half(), "c": torch.randn(2, 2).bfloat16()}
    save_file({"a": tensors["a"]}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": tensors["b"], "c": tensors["c"]}, folder / "model-00002-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors"} | dict.fromkeys("bc", "model-00002-of-00002.safetensors")
    write_index(folder, weight_map)
    return tensors


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_read_as_one_checkpoint(tmp_path: Path) -> None:
    tensors = sharded(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.names) == set(tensors)
        assert all(torch.equal(checkpoint.read(name), tensors[name]) for name in tensors)
        assert checkpoint.num_bytes == 6 * 4 + 4 * 2 + 4 * 2
        assert checkpoint.num_parameters == 14
        assert checkpoint.file_of("c").name == "model-00002-of-00002.safetensors"


@pytest.mark.parametrize("name", ["model.safetensors", "weights.safetensors"])
def test_a_single_file_reads_whatever_it_is_called(name: str, tmp_path: Path) -> None:
    save_file({"x": torch.ones(3)}, tmp_path / name)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.names == ("x",)


def test_a_pickle_of_tensors_is_read_without_running_it(tmp_path: Path) -> None:
    tensors = {"x": torch.randn(3, 4), "half": torch.randn(2).bfloat16()}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with open_checkpoint(tmp_path) as checkpoint:
        assert all(torch.equal(checkpoint.read(name), tensors[name]) for name in tensors)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (Path(tmp_path / "it ran"),)  # type: ignore[return-value]

    torch.save({"x": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FormatError, match="weights-only loading refuses it"):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "it ran").exists()


def test_an_old_pickle_without_an_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"x": 1}))
    with pytest.raises(FormatError, match="not a zip archive"):
        open_checkpoint(tmp_path)


def test_a_compressed_archive_is_refused_before_it_unfolds(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1000)}, tmp_path / "stored.bin")
    with (
        zipfile.ZipFile(tmp_path / "stored.bin") as stored,
        zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for info in stored.infolist():
            bomb.writestr(info.filename, stored.read(info))
    with pytest.raises(FormatError, match="is compressed, which PyTorch never does"):
        open_checkpoint(tmp_path)


def test_a_pickle_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save([torch.ones(1)], tmp_path / "pytorch_model.bin")
    with pytest.raises(FormatError, match="expected tensors by name"):
        open_checkpoint(tmp_path)


def test_a_missing_directory_and_a_file_in_its_place_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="found nothing"):
        open_checkpoint(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(FormatError, match="found a file"):
        open_checkpoint(tmp_path / "file")


def test_a_directory_without_weights_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FormatError, match=r"no weights; expected model\.safetensors, found config\.json"):
        open_checkpoint(tmp_path)


def test_several_files_without_an_index_are_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(FormatError, match="no model.safetensors.index.json"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ""],
    ids=["up", "root", "down", "dots", "none"],
)
def test_an_index_cannot_lead_out_of_its_directory(name: str, tmp_path: Path) -> None:
    write_index(tmp_path, {"a": name})
    with pytest.raises(FormatError, match="no plain file name"):
        open_checkpoint(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FormatError, match=r"names model-00002-of-00002\.safetensors, which is missing"):
        open_checkpoint(tmp_path)


def test_a_truncated_shard_is_named_with_what_is_missing(tmp_path: Path) -> None:
    sharded(tmp_path)
    path = tmp_path / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(FormatError, match=r"model-00002-of-00002\.safetensors: 3 bytes are missing"):
        open_checkpoint(tmp_path)


def test_an_index_that_disagrees_with_its_files_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    write_index(tmp_path, {"a": first, "b": first, "c": second})
    with pytest.raises(FormatError, match=f"says that {first} holds tensor 'b', which is in {second}"):
        open_checkpoint(tmp_path)
    write_index(tmp_path, {"a": first, "b": second, "c": second, "d": second})
    with pytest.raises(FormatError, match="tensor 'd', which no file holds"):
        open_checkpoint(tmp_path)
    write_index(tmp_path, {"a": first, "b": second})
    with pytest.raises(FormatError, match="holds 'c', which its index does not list"):
        open_checkpoint(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(FormatError, match="'b' is in both"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'], ids=["cut", "list", "empty", "number"]
)
def test_a_broken_index_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(FormatError, match=r"index\.json"):
        open_checkpoint(tmp_path)
