"""Samples: packed without waste, chosen by the seed, the same whatever the machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from halfbin.errors import DataError, ModelError
from halfbin.samples import load_samples, pack, separate
from halfbin.samples.cutting import spread
from halfbin.samples.loading import EMBEDDED

OPTIONS: dict[str, Any] = {"num_samples": 100, "length": 5, "seed": 0, "bos": 1, "eos": 2, "name": "text"}


class Letters:
    """A tokenizer whose tokens are the letters' codes."""

    bos_token_id = 1
    eos_token_id = 2
    chat_template = None

    def __call__(self, text: str, add_special_tokens: bool = False, **options: Any) -> Mapping[str, Any]:
        ids = [ord(letter) for letter in text]
        ids = ids[: options.get("max_length", len(ids))]
        return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}


def test_packing_wastes_at_most_one_sample_and_pads_nothing() -> None:
    documents = [torch.arange(10, 19), torch.arange(20, 28)]
    found = pack(documents, **OPTIONS)
    joined = [*range(10, 19), 2, *range(20, 28)]
    assert [ids.tolist() for ids in found.ids] == [[1, *joined[i : i + 4]] for i in (0, 4, 8, 12)]
    assert found.num_tokens == 20


def test_the_choice_follows_the_seed_and_repeats_nothing() -> None:
    stream = [torch.arange(1000)]

    def chosen(seed: int) -> list[int]:
        return [int(ids[1]) for ids in pack(stream, **(OPTIONS | {"num_samples": 50, "seed": seed})).ids]

    assert chosen(0) == chosen(0) != chosen(1)
    assert len(set(chosen(0))) == 50


@pytest.mark.parametrize(("num", "wanted"), [(1000, 50), (7, 5), (100, 99)])
def test_the_choice_takes_one_of_each_stretch(num: int, wanted: int) -> None:
    for seed in range(20):
        chosen = spread(num, wanted, seed)
        assert all(i * num // wanted <= c < (i + 1) * num // wanted for i, c in enumerate(chosen))
        assert len(set(chosen)) == wanted


def test_everything_is_taken_where_there_is_no_more() -> None:
    assert spread(3, 5, seed=1) == spread(3, 3, seed=1) == [0, 1, 2]


def test_a_document_that_brings_its_own_beginning_has_not_two() -> None:
    found = pack([torch.tensor([1, 7, 8, 9]), torch.tensor([1, 6, 5])], **OPTIONS)
    assert [ids.tolist() for ids in found.ids] == [[1, 7, 8, 9, 2]]  # and 6, 5 are less than a sample


def test_a_text_shorter_than_a_sample_is_one_as_it_is() -> None:
    assert [ids.tolist() for ids in pack([torch.tensor([7, 8])], **OPTIONS).ids] == [[1, 7, 8]]


def test_no_token_is_refused() -> None:
    with pytest.raises(DataError, match="no tokens"):
        pack([], **OPTIONS)
    with pytest.raises(DataError, match="no tokens"):
        separate([torch.zeros(0)], num_samples=2, length=4, seed=0, name="text")


def test_batches_hold_samples_of_one_length_and_depend_on_nothing_else() -> None:
    found = separate([torch.arange(n) for n in (3, 5, 3, 5, 5)], num_samples=9, length=9, seed=0, name="text")
    assert [tuple(batch.shape) for batch in found.batches(10)] == [(2, 5), (1, 5), (2, 3)]


def test_a_file_becomes_samples_for_models_that_read_on_and_for_those_that_read_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a line of more than twenty letters\nshort\nanother line of more than twenty\n", encoding="utf-8")
    packed = load_samples(path, Letters, num_samples=3, length=16)
    assert {len(ids) for ids in packed.ids} == {16}
    assert all(int(ids[0]) == 1 for ids in packed.ids)
    lines = load_samples(path, Letters, num_samples=3, length=8, packed=False)
    assert ["".join(map(chr, ids[1:].tolist())) for ids in lines.ids] == ["a line ", "another"]


def test_conversations_without_a_template_are_their_contents(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]}\n')
    assert load_samples(path, Letters, num_samples=1, length=6).ids[0].tolist() == [1, *map(ord, "ab\ncd")]


def test_tokens_made_beforehand_need_no_tokenizer(tmp_path: Path) -> None:
    def none() -> Letters:
        raise ModelError("there is none")

    np.save(tmp_path / "a.npy", np.arange(8).reshape(2, 4))
    found = load_samples(tmp_path / "a.npy", none, num_samples=5, length=3)
    assert [ids.tolist() for ids in found.ids] == [[0, 1, 2], [4, 5, 6]]
    np.save(tmp_path / "b.npy", np.arange(6))
    found = load_samples(tmp_path / "b.npy", none, num_samples=5, length=3)
    assert [ids.tolist() for ids in found.ids] == [[0, 1, 2], [3, 4, 5]]


def test_padding_at_the_ends_of_samples_is_cut_off(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[9, 9, 3, 9, 4, 9], [9, 9, 9, 9, 9, 9], [3, 4, 5, 6, 7, 8]]))
    found = load_samples(tmp_path / "a.npy", Letters, num_samples=5, length=6, pad=9)
    assert [ids.tolist() for ids in found.ids] == [[3, 9, 4], [3, 4, 5, 6, 7, 8]]


def test_what_stands_before_a_sample_of_a_text_stands_before_one_of_a_stream(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(10, 18))
    found = load_samples(tmp_path / "a.npy", Letters, num_samples=5, length=5)
    assert [ids.tolist() for ids in found.ids] == [[1, 10, 11, 12, 13], [1, 14, 15, 16, 17]]


def test_the_embedded_text_is_named_as_such() -> None:
    assert load_samples(None, Letters, num_samples=2, length=32).name == EMBEDDED
