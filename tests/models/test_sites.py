from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from halfbin.formats.checkpoint import open_checkpoint
from halfbin.models import Site, find_sites, open_skeleton
from halfbin.models.skeleton import Target
from models import zoo

EVERY = pytest.mark.parametrize("name", zoo.NAMES)


def sites_of(name: str, **how: Any) -> tuple[Site, ...]:
    directory = zoo.directory_of(name, **how)
    with open_checkpoint(directory) as checkpoint:
        return find_sites(open_skeleton(directory), checkpoint)


def site(name: str, tensor: str) -> Site:
    return next(s for s in sites_of(name) if s.tensor == tensor)


def product_weights(model: nn.Module) -> Iterator[Tensor]:
    """Every matrix of the loaded model that is multiplied or looked up, experts one by one and in halves as well."""
    for module in model.modules():
        kind = type(module).__name__
        if isinstance(module, nn.Linear | Conv1D | _ConvNd | nn.Embedding) or "Router" in kind:
            yield from (p for p in module.parameters(recurse=False) if p.ndim >= 2)
        if "Experts" in kind:
            for stack in (p for p in module.parameters(recurse=False) if p.ndim == 3):
                yield stack
                for matrix in stack:
                    yield matrix
                    yield from matrix.chunk(2)


def fingerprint(tensor: Tensor) -> tuple[Any, ...]:
    return (*tensor.shape, tensor.detach().contiguous().numpy().tobytes())


@EVERY
def test_the_sites_are_exactly_the_stored_tensors_that_the_loaded_model_multiplies(name: str) -> None:
    multiplied = {fingerprint(weight) for weight in product_weights(zoo.loaded(name))}
    with open_checkpoint(zoo.directory_of(name)) as checkpoint:
        expected = {tensor for tensor in checkpoint.names if fingerprint(checkpoint.read(tensor)) in multiplied}
    assert {s.tensor for s in sites_of(name)} == expected


@EVERY
def test_roles_are_as_many_as_counted_by_hand(name: str) -> None:
    sites = sites_of(name)
    counted = Counter(s.role for s in sites) | Counter(tied=sum(s.tied for s in sites))
    assert +counted == +Counter(vars(zoo.ZOO[name][1]))


@EVERY
def test_a_site_says_what_the_header_says(name: str) -> None:
    with open_checkpoint(zoo.directory_of(name)) as checkpoint:
        for s in sites_of(name):
            info = checkpoint.info(s.tensor)
            assert (s.shape, s.dtype) == (tuple(info.shape), info.dtype)
            assert s.tensor in (s.name, f"{s.name}.weight")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_sites_keep_the_type_on_disk(name: str, dtype: torch.dtype) -> None:
    assert {s.dtype for s in sites_of(name, dtype=dtype)} == {dtype}


@pytest.mark.parametrize("name", ["llama", "mixtral", "bart"])
def test_sites_of_many_files_are_those_of_one(name: str) -> None:
    directory = zoo.directory_of(name, shard="40KB")
    assert len(list(directory.glob("*.safetensors"))) > 1
    assert set(sites_of(name, shard="40KB")) == set(sites_of(name))


@pytest.mark.parametrize(
    ("name", "tensor", "tied"),
    [
        ("gpt2", "transformer.wte.weight", True),
        ("gpt2", "transformer.wpe.weight", False),
        ("bert-masked", "bert.embeddings.word_embeddings.weight", True),
        ("bert-masked", "bert.embeddings.token_type_embeddings.weight", False),
        ("t5", "shared.weight", True),
        ("t5", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", False),
    ],
)
def test_only_the_embedding_whose_weight_the_head_uses_is_tied(name: str, tensor: str, tied: bool) -> None:
    assert site(name, tensor).tied is tied


def test_a_transposed_linear_says_so() -> None:
    found = site("gpt2", "transformer.h.0.mlp.c_fc.weight")
    assert (found.module_class, found.shape, found.transposed) == ("Conv1D", (32, 128), True)
    assert not site("llama", "model.layers.0.mlp.up_proj.weight").transposed


def test_stacks_of_experts_say_which_way_round_they_are() -> None:
    transposed = {s.name.rpartition(".")[2]: s for s in sites_of("gpt-oss") if s.role == "expert"}
    assert transposed["gate_up_proj"].shape == (4, 32, 128)  # [experts, in, out]
    assert all(s.transposed for s in transposed.values())
    assert not any(s.transposed for s in sites_of("granite-moe"))  # [experts, out, in]


def test_an_expert_that_is_merged_says_so_and_a_router_that_is_no_linear_keeps_its_class() -> None:
    assert site("mixtral", "model.layers.0.block_sparse_moe.experts.3.w2.weight").module_class == "Expert"
    assert site("gpt-oss", "model.layers.0.mlp.experts.down_proj").module_class == ""
    assert site("mixtral", "model.layers.0.block_sparse_moe.gate.weight").module_class == "MixtralTopKRouter"


def test_a_gate_of_the_shared_expert_is_a_router_and_the_shared_expert_is_not() -> None:
    assert site("qwen2-moe", "model.layers.0.mlp.shared_expert_gate.weight").role == "router"
    assert site("qwen2-moe", "model.layers.0.mlp.shared_expert.gate_proj.weight").role == "linear"


def test_tables_of_three_dimensions_are_no_experts() -> None:
    with open_checkpoint(zoo.directory_of("vit")) as checkpoint:
        tables = {tensor for tensor in checkpoint.names if len(checkpoint.info(tensor).shape) == 3}
    assert len(tables) == 2  # class token [1, 1, 32] and positions [1, 17, 32]
    assert not tables & {s.tensor for s in sites_of("vit")}


def test_both_tensors_are_tied_where_a_file_holds_the_head_beside_the_embedding(tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file

    source = zoo.directory_of("llama-tied")
    state = load_file(source / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    with open_checkpoint(tmp_path) as checkpoint:
        tied = {s.tensor: s.role for s in find_sites(open_skeleton(tmp_path), checkpoint) if s.tied}
    assert tied == {"lm_head.weight": "head", "model.embed_tokens.weight": "embedding"}


def test_a_matrix_that_is_stored_under_no_module_s_name_has_no_class(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, parameter = "layers.0.conv.weight_proj", "model.layers.0.self_attn.q_proj.weight"
    monkeypatch.setattr("halfbin.models.sites.targets", lambda *_: {tensor: Target(parameter, unchanged=True)})
    header = SimpleNamespace(
        names=(tensor,), info=lambda _: SimpleNamespace(dtype=torch.float32, shape=torch.Size((32, 32)))
    )
    (found,) = find_sites(open_skeleton(zoo.directory_of("llama")), header)
    assert (found.role, found.module_class, found.name) == ("linear", "", tensor)


def test_a_tensor_without_elements_is_no_site() -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    header = SimpleNamespace(
        names=(name,), info=lambda _: SimpleNamespace(dtype=torch.float32, shape=torch.Size((0, 32)))
    )
    assert find_sites(open_skeleton(zoo.directory_of("llama")), header) == ()
