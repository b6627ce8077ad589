"""Where tensors on disk lie in memory: read there, they are the tensors on disk, to the bit."""

from __future__ import annotations

import pytest
import torch

from halfbin.models import Site, find_sites
from halfbin.models.placement import _read_off, find_places
from halfbin.tensor.matrices import matrices
from models.walking import walking

MODELS = ("llama-tied", "gpt2", "mixtral", "qwen3-moe", "gpt-oss", "granite-moe", "switch", "t5", "llava")


@pytest.mark.parametrize("name", MODELS)
def test_a_matrix_in_memory_is_the_one_on_disk(name: str) -> None:
    with walking(name) as w:
        sites = find_sites(w.skeleton, w.checkpoint)
        places = find_places(w.partial, sites)
        w.partial.load(p for p, _ in w.partial.model.named_parameters())
        for site in sites:
            if site.role == "convolution":
                continue
            on_disk = matrices(w.checkpoint.read(site.tensor), transposed=site.transposed)
            assert len(places[site.tensor]) == len(on_disk)
            for place, matrix in zip(places[site.tensor], on_disk, strict=True):
                assert torch.equal(place.view(w.partial.get(place.parameter)), matrix)


def test_a_tensor_whose_rows_are_shuffled_has_no_place() -> None:
    site = Site("experts.w13", "experts.w13", (2, 4, 3), torch.float32, "expert", "")
    numbers = torch.arange(1, 25, dtype=torch.float64).reshape(2, 4, 3)
    assert _read_off(numbers, "experts", {site: 1})
    assert not _read_off(numbers[:, [0, 2, 1, 3]], "experts", {site: 1})  # its strides would lead beyond the parameter


def test_parameters_come_and_go_under_all_their_names() -> None:
    with walking("llama-tied") as w:
        embedding, head = "model.embed_tokens.weight", "lm_head.weight"
        assert w.partial.canonical(head) == embedding
        assert w.partial.model.get_parameter(head) is w.partial.model.get_parameter(embedding)
        w.partial.release([head])
        assert w.partial.model.get_parameter(embedding).is_meta
        w.partial.load([head])
        assert torch.equal(w.partial.get(embedding), w.checkpoint.read(embedding))


def test_a_shared_parameter_is_loaded_whichever_of_its_names_is_on_disk() -> None:
    with walking("camembert") as w:
        embedding, head = "roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"
        assert w.partial.canonical(embedding) == head
        w.partial.load([embedding])
        assert torch.equal(w.partial.get(head), w.checkpoint.read(embedding))
        assert w.partial.model.get_parameter(head) is w.partial.model.get_parameter(embedding)


def test_a_kept_parameter_comes_back_as_it_was_changed() -> None:
    with walking("llama-tied") as w:
        name = w.blocks[0].parameters[0]
        w.partial.load([name])
        w.partial.get(name).detach().zero_()
        w.partial.keep(name)
        w.partial.release([name])
        w.partial.load([name])
        assert float(w.partial.get(name).detach().abs().sum()) == 0
