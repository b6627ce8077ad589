from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from halfbin.errors import ModelError
from halfbin.models import load_as_client, load_weights, open_skeleton
from models import zoo

State = dict[str, Tensor]


def changed(source: Path, directory: Path, change: Callable[[State], object]) -> Path:
    """A copy of a model whose tensors went through `change`."""
    state = load_file(source / "model.safetensors")
    change(state)
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_bytes((source / "config.json").read_bytes())
    return directory


def both(directory: Path) -> list[Callable[[], Any]]:
    skeleton = open_skeleton(directory)
    return [lambda: load_weights(skeleton), lambda: load_as_client(skeleton, directory, dtype=torch.float32)]


@pytest.mark.parametrize("name", zoo.NAMES)
def test_our_loading_gives_the_weights_that_transformers_gives(name: str) -> None:
    directory = zoo.directory_of(name)
    expected = zoo.loaded(name).state_dict()
    for load in both(directory):
        model = load()
        assert not model.training
        found = model.state_dict()
        assert set(found) == set(expected)
        different = [key for key in expected if not torch.equal(found[key], expected[key])]
        assert different == []


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_many_files_load_as_one(name: str) -> None:
    found = load_weights(open_skeleton(zoo.directory_of(name, shard="40KB"))).state_dict()
    expected = zoo.loaded(name).state_dict()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_weights_are_loaded_in_the_type_asked_for(dtype: torch.dtype) -> None:
    skeleton = open_skeleton(zoo.directory_of("llama", dtype))
    assert {p.dtype for p in load_weights(skeleton, dtype=dtype).parameters()} == {dtype}
    assert {p.dtype for p in load_weights(skeleton).parameters()} == {torch.float32}
    assert {p.dtype for p in load_as_client(skeleton, skeleton.path).parameters()} == {dtype}


@pytest.mark.parametrize("client", [0, 1], ids=["ours", "client"])
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        pytest.param(
            lambda s: s.pop("model.layers.0.mlp.up_proj.weight"),
            r"missing keys: model.layers.0.mlp.up_proj.weight",
            id="missing",
        ),
        pytest.param(
            lambda s: s.update({"model.layers.0.mlp.up_proj.bias": torch.zeros(64)}),
            r"unexpected keys: model.layers.0.mlp.up_proj.bias",
            id="a bias that the module has not",
        ),
        pytest.param(
            lambda s: s.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(64, 32)}),
            r"unexpected keys: model.layers.2.mlp.up_proj.weight",
            id="a layer more than the config counts",
        ),
        pytest.param(
            lambda s: s.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(64, 31)}),
            r"model.layers.0.mlp.up_proj.weight",
            id="wrong shape",
        ),
    ],
)
def test_weights_that_do_not_fill_the_model_are_named(
    tmp_path: Path, client: int, change: Callable[[State], object], complaint: str
) -> None:
    directory = changed(zoo.directory_of("llama"), tmp_path, change)
    with pytest.raises(ModelError, match=complaint):
        both(directory)[client]()


def test_many_missing_weights_are_counted(tmp_path: Path) -> None:
    def halve(state: State) -> None:
        for name in [name for name in state if "mlp" in name]:
            del state[name]

    directory = changed(zoo.directory_of("llama"), tmp_path, halve)
    with pytest.raises(ModelError, match=r"missing keys: .* and 1 more"):
        load_weights(open_skeleton(directory))


@pytest.mark.parametrize("client", [0, 1], ids=["ours", "client"])
@pytest.mark.parametrize(
    ("name", "left_over"),
    [
        pytest.param("bert-masked", {"cls.seq_relationship.weight": torch.ones(2, 32)}, id="the head of another task"),
        pytest.param("bert-masked", {"bert.embeddings.position_ids": torch.arange(64)[None]}, id="a constant"),
        pytest.param(
            "llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, id="a constant's module"
        ),
    ],
)
def test_what_belongs_to_no_part_of_the_model_may_be_left_over(
    tmp_path: Path, client: int, name: str, left_over: State
) -> None:
    directory = changed(zoo.directory_of(name), tmp_path, lambda state: state.update(left_over))
    found = both(directory)[client]().state_dict()
    expected = zoo.loaded(name).state_dict()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


def test_what_a_client_raises_is_told_with_the_directory(tmp_path: Path) -> None:
    skeleton = open_skeleton(zoo.directory_of("llama"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError, match=rf"transformers cannot load {tmp_path}"):
        load_as_client(skeleton, tmp_path)


def test_weights_of_another_directory_fill_the_same_skeleton(tmp_path: Path) -> None:
    def double(state: State) -> None:
        state["model.norm.weight"] *= 2

    source = zoo.directory_of("llama")
    model = load_weights(open_skeleton(source), directory=changed(source, tmp_path, double))
    expected = zoo.loaded("llama").state_dict()["model.norm.weight"] * 2
    assert torch.equal(model.state_dict()["model.norm.weight"], expected)
