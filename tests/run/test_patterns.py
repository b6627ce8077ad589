"""Names of repeated layers."""

from __future__ import annotations

from halfbin.run.patterns import layer_index, pattern, tails


def test_numbers_between_dots_are_replaced_and_others_are_not() -> None:
    assert pattern("model.layers.12.mlp.experts.3.fc1") == "model.layers.*.mlp.experts.*.fc1"


def test_the_first_number_is_the_layer() -> None:
    assert layer_index("model.layers.12.experts.3.w1") == 12
    assert layer_index("lm_head") is None
    assert layer_index("a.²") is None


def test_tails_are_never_mere_numbers() -> None:
    names = ["model.layers.3.mlp.down_proj", "model.layers.10.mlp.down_proj"]
    assert list(tails(names).values()) == ["3.mlp.down_proj", "10.mlp.down_proj"]


def test_tails_drop_what_all_names_share() -> None:
    assert tails(["model.layers.0.q.weight", "model.layers.1.k.weight"]) == {
        "model.layers.0.q.weight": "0.q",
        "model.layers.1.k.weight": "1.k",
    }
    assert tails(["a.b", "a.b"]) == {"a.b": "a.b"}
    assert tails(["a", "a.b"]) == {"a": "a", "a.b": "b"}
    assert tails(["model.norm"]) == {"model.norm": "norm"}
