from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from halfbin.errors import FormatError
from halfbin.formats import COMPRESSED_TENSORS
from halfbin.formats.layout import PartInfo, Stored
from halfbin.tensor import QTensor, parse_scheme, quantize

MODULES = {"a": "int4-g32", "b": "int8-channel", "c": "int4-g32-asym"}


def checkpoint(*modules: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, QTensor]]:
    """A configuration written the way other tools do, by patterns and classes, with its tensors."""
    parts: dict[str, Tensor] = {}
    quantized = {}
    groups: dict[str, Any] = {}
    for module in modules:
        q = quantize(torch.randn(16, 64, generator=torch.Generator().manual_seed(1)), parse_scheme(MODULES[module]))
        quantized[f"{module}.weight"] = q
        parts |= COMPRESSED_TENSORS.encode(f"{module}.weight", q)
        (group,) = COMPRESSED_TENSORS.config({"x.weight": (q.scheme, q.shape)}, [])["config_groups"].values()  # type: ignore[attr-defined]  # a JSON object
        groups[module] = {**group, "targets": [f"re:.*{module}"]}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": groups,
        "version": "0.20.0",
    }
    return config, parts, quantized


def read(config: dict[str, Any], parts: dict[str, Tensor]) -> dict[str, Stored]:
    infos: dict[str, PartInfo] = dict(parts.items())
    return COMPRESSED_TENSORS.schemes(config, infos, parts.__getitem__)


def test_tensors_decide_where_the_targets_are_patterns() -> None:
    config, parts, quantized = checkpoint("a", "b", "c")
    found = read(config, parts)
    assert {name: stored.scheme for name, stored in found.items()} == {n: q.scheme for n, q in quantized.items()}


def test_a_pattern_that_never_ends_is_not_run() -> None:
    config, parts, _ = checkpoint("a")
    config["config_groups"]["a"]["targets"] = ["re:(a*)*(a*)*(a*)*$!"]
    assert list(read(config, parts)) == ["a.weight"]


def test_an_exact_name_decides_between_groups_that_both_fit() -> None:
    config, parts, _ = checkpoint("a")
    other = copy.deepcopy(config["config_groups"]["a"])
    # One word holds 1 to 8 codes of 4 bits or 1 to 6 of 5: five columns in a row fit both.
    other["weights"] |= {"num_bits": 5, "strategy": "channel", "group_size": None}
    config["config_groups"]["a"]["weights"] |= {"strategy": "channel", "group_size": None}
    config["config_groups"]["other"] = other
    q = quantize(torch.ones(3, 5), parse_scheme("int4-channel"))
    parts = COMPRESSED_TENSORS.encode("a.weight", q)
    with pytest.raises(FormatError, match="could be int4-channel, int5-channel"):
        read(config, parts)
    config["config_groups"]["a"]["targets"] = ["a"]
    assert read(config, parts)["a.weight"].scheme == q.scheme


def test_scales_of_activations_belong_to_no_weight() -> None:
    config, parts, _ = checkpoint("a")
    parts["a.input_scale"] = torch.ones(1)
    assert read(config, parts)["a.weight"].hidden == ("a.input_scale",)


def test_zero_points_of_symmetric_weights_must_be_zero() -> None:
    config, parts, _ = checkpoint("a")
    parts["a.weight_zero_point"] = torch.zeros(16, 2, dtype=torch.int8)
    assert read(config, parts)["a.weight"].hidden == ("a.weight_zero_point",)
    parts["a.weight_zero_point"][3, 1] = 1
    with pytest.raises(FormatError, match="other than 0"):
        read(config, parts)


def change(*path: str, to: object) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def apply(config: dict[str, Any], parts: dict[str, Tensor]) -> None:
        table = config
        for key in path[:-1]:
            table = table[key]
        table[path[-1]] = to

    return apply


def drop(name: str) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda config, parts: parts.__delitem__(name) if name in parts else None


def add(name: str, value: Tensor) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda config, parts: parts.__setitem__(name, value)


WEIGHTS = ("config_groups", "a", "weights")
BAD = [
    pytest.param(
        change("config_groups", "a", "format", to="marlin-24"), "'marlin-24', which is not read", id="legacy format"
    ),
    pytest.param(change("config_groups", "a", "format", to="nvfp4-pack-quantized"), "nvfp4", id="format not read yet"),
    pytest.param(
        change("config_groups", "a", "format", to="float-quantized"), "holds none such", id="format of floats"
    ),
    pytest.param(change("config_groups", to={"W4A16": ["Linear"]}), "presets", id="preset"),
    pytest.param(change("config_groups", to={}), "1 to 4096", id="no groups"),
    pytest.param(change("config_groups", to={"a": {"weights": 3}}), "must be a table", id="weights that are no table"),
    pytest.param(change(*WEIGHTS, "num_bits", to=1), "not read", id="1 bit"),
    pytest.param(change(*WEIGHTS, "num_bits", to="4"), "not read", id="bits as text"),
    pytest.param(change(*WEIGHTS, "num_bits", to=3), "no config group fits", id="other bits than stored"),
    pytest.param(change(*WEIGHTS, "group_size", to=64), "no config group fits", id="other groups than stored"),
    pytest.param(change(*WEIGHTS, "group_size", to=0), "not read", id="groups of nothing"),
    pytest.param(change(*WEIGHTS, "symmetric", to=False), "weight_zero_point' is missing", id="zero points not stored"),
    pytest.param(change(*WEIGHTS, "symmetric", to="yes"), "true or false", id="symmetric as text"),
    pytest.param(change(*WEIGHTS, "strategy", to="tensor_group"), "strategy", id="strategy not read"),
    pytest.param(change(*WEIGHTS, "actorder", to="group"), "actorder", id="reordered activations"),
    pytest.param(change("config_groups", "a", "targets", to="Linear"), "list of names", id="targets as text"),
    pytest.param(change("quantization_status", to="initialized"), "only compressed", id="not compressed"),
    pytest.param(change("sparsity_config", to={"format": "sparse-24-bitmask"}), "sparsity", id="sparse"),
    pytest.param(change("transform_config", to={"config_groups": {"u": {}}}), "rotations", id="rotated while running"),
    pytest.param(drop("a.weight_scale"), "weight_scale' is missing", id="no scale"),
    pytest.param(drop("a.weight_packed"), "weight_packed' is missing", id="no codes"),
    pytest.param(drop("a.weight_shape"), "no config group fits", id="no shape"),
    pytest.param(add("a.weight_g_idx", torch.zeros(64)), "reordered", id="an index of groups"),
    pytest.param(add("a.weight_shape", torch.tensor([-1, 2])), "no shape", id="negative shape"),
    pytest.param(add("a.weight_shape", torch.tensor([2**40, 2**40])), "no shape", id="endless shape"),
    pytest.param(add("a.weight_shape", torch.zeros(2)), "int64", id="shape of floats"),
    pytest.param(add("b.weight_scale", torch.ones(3, 1)), "no weight", id="scale without weight"),
]


@pytest.mark.parametrize(("damage", "words"), BAD)
def test_what_is_not_understood_is_refused(
    damage: Callable[[dict[str, Any], dict[str, Tensor]], None], words: str
) -> None:
    config, parts, _ = checkpoint("a")
    damage(config, parts)
    with pytest.raises(FormatError, match=words):
        read(config, parts)


def test_the_old_packing_of_odd_widths_is_refused_not_misread() -> None:
    config, _, _ = checkpoint("a")
    config["config_groups"]["a"]["weights"] |= {"num_bits": 3}
    config["version"] = "0.17.1"
    parts = COMPRESSED_TENSORS.encode("a.weight", quantize(torch.ones(8, 32), parse_scheme("int3-g32")))
    with pytest.raises(FormatError, match=r"before 0\.18"):
        read(config, parts)


def test_a_zero_point_beyond_the_codes_is_refused() -> None:
    config, _, _ = checkpoint("c")
    config["config_groups"]["c"]["format"] = "naive-quantized"
    parts = {
        "c.weight": torch.zeros(16, 64, dtype=torch.int8),
        "c.weight_scale": torch.ones(16, 2),
        "c.weight_zero_point": torch.full((16, 2), 8, dtype=torch.int8),
    }
    stored = read(config, parts)["c.weight"]
    with pytest.raises(FormatError, match=r"'c\.weight_zero_point' holds codes beyond int4's -8 to 7"):
        stored.codec.decode("c.weight", stored.scheme, stored.shape, parts.__getitem__)
