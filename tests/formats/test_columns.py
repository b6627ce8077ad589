"""Columns in floating point beside codes, in halfbin's layout, version 3."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from formats.written import projections, tiny_llama, write_model
from halfbin.errors import FormatError, SchemeError
from halfbin.formats import COMPRESSED_TENSORS, HALFBIN, HoldsColumns, PlainLayout, SafetensorsWriter, open_quantized
from halfbin.formats.layout import PartInfo
from halfbin.tensor import (
    ColumnSpec,
    FloatColumns,
    MixedTensor,
    dequantize,
    parse_inputs,
    parse_scheme,
    quantize,
    split,
    take_columns,
)

NAME = "model.up_proj.weight"
INT8 = parse_scheme("int8-channel")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mixed(
    weight: Tensor, ids: list[int], scheme: str = "int8-channel", dtype: torch.dtype = torch.bfloat16
) -> MixedTensor:
    rest, columns = take_columns(weight, torch.tensor(ids), dtype)
    return MixedTensor(quantize(rest, parse_scheme(scheme)), columns)


def parts_of(weight: MixedTensor) -> dict[str, Tensor]:
    codec = HALFBIN.column_codec(NAME, weight.shape, weight.columns.spec)
    return HALFBIN.encode(NAME, weight.q) | codec.encode(weight.columns)


def config_of(weight: MixedTensor) -> Any:
    config = HALFBIN.config({NAME: (weight.q.scheme, weight.shape)}, [])
    return json.loads(json.dumps(HALFBIN.with_columns(config, {NAME: weight.columns.spec})))


def read(config: Any, parts: dict[str, Tensor]) -> MixedTensor:
    infos: dict[str, PartInfo] = dict(parts.items())
    (stored,) = HALFBIN.schemes(config, infos, parts.__getitem__).values()
    assert stored.columns is not None
    q = stored.codec.decode(NAME, stored.scheme, stored.shape, parts.__getitem__)
    return stored.columns.decode(q, parts.__getitem__)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_columns_are_held_without_loss(data: st.DataObject) -> None:
    rows, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 20))
    ids = sorted(data.draw(st.sets(st.integers(0, width - 1), min_size=1)))
    scheme = data.draw(st.sampled_from(["int8-channel", "int4-g8-asym", "nf4-g8"]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    whole = mixed(normal(rows, width), ids, scheme, dtype)
    parts = parts_of(whole)
    codec = HALFBIN.column_codec(NAME, whole.shape, whole.columns.spec)
    announced = HALFBIN.tensors(NAME, whole.shape, whole.q.scheme) | codec.parts()
    assert {n: (t.dtype, tuple(t.shape)) for n, t in parts.items()} == announced
    assert all(t.is_contiguous() for t in parts.values())
    found = read(config_of(whole), parts)
    assert found.columns.spec == whole.columns.spec
    assert torch.equal(found.columns.ids, whole.columns.ids)
    assert torch.equal(found.columns.values, whole.columns.values)
    assert torch.equal(dequantize(found), dequantize(whole))


def test_columns_of_a_transposed_weight_are_held_as_rows() -> None:
    q = quantize(normal(20, 8), parse_scheme("int8-channel@1"))
    columns = FloatColumns(torch.tensor([2, 19], dtype=torch.int32), normal(2, 8).half(), axis=0)
    whole = MixedTensor(q, columns)
    found = read(config_of(whole), parts_of(whole))
    assert found.columns.axis == 0
    assert torch.equal(dequantize(found), dequantize(whole))


def test_the_version_is_raised_only_where_there_are_columns() -> None:
    whole = mixed(normal(3, 12), [4])
    plain = HALFBIN.config({NAME: (INT8, (3, 12))}, [], {NAME: parse_inputs("int8-token-outliers6")})
    assert plain["version"] == 2
    assert HALFBIN.with_columns(plain, {NAME: whole.columns.spec})["version"] == 3
    for version in (1, 2):  # an older reader's view of such an entry
        with pytest.raises(FormatError, match="must hold a scheme and a shape"):
            read(config_of(whole) | {"version": version}, parts_of(whole))
    with pytest.raises(FormatError, match="reads versions 1 to 3: install a newer halfbin"):
        read(config_of(whole) | {"version": 4}, parts_of(whole))


def test_which_layouts_hold_columns() -> None:
    assert isinstance(HALFBIN, HoldsColumns)
    assert not isinstance(COMPRESSED_TENSORS, HoldsColumns)
    assert not isinstance(PlainLayout(), HoldsColumns)


def ids_of(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        pytest.param("column_ids", ids_of(5, 4), "rising, none twice", id="falling"),
        pytest.param("column_ids", ids_of(5, 5), "rising, none twice", id="twice"),
        pytest.param("column_ids", ids_of(-1, 5), "from 0 to 11", id="negative"),
        pytest.param("column_ids", ids_of(5, 12), "from 0 to 11", id="beyond"),
        pytest.param("column_ids", ids_of(5, 6).long(), "stored as torch.int64, expected torch.int32", id="wide"),
        pytest.param("column_ids", ids_of(5, 6, 7), r"shape \[3\], expected \[2\]", id="too many"),
        pytest.param("columns", torch.ones(3, 2), "stored as torch.float32, expected torch.bfloat16", id="type"),
        pytest.param("columns", torch.ones(2, 3).bfloat16(), r"expected \[3, 2\]", id="turned"),
        pytest.param("columns", torch.full((3, 2), math.nan).bfloat16(), "NaN or infinity", id="nan"),
        pytest.param("columns", torch.full((3, 2), math.inf).bfloat16(), "NaN or infinity", id="infinity"),
    ],
)
def test_damaged_columns_are_refused(part: str, value: Tensor, words: str) -> None:
    whole = mixed(normal(3, 12), [4, 9])
    parts = parts_of(whole) | {f"{NAME}.{part}": value}
    with pytest.raises(FormatError, match=words):
        read(config_of(whole), parts)
    # Where the header did not give it away, neither must the data.
    infos: dict[str, PartInfo] = dict(parts_of(whole).items())
    (stored,) = HALFBIN.schemes(config_of(whole), infos, parts.__getitem__).values()
    assert stored.columns is not None
    with pytest.raises(FormatError, match=words):
        stored.columns.decode(whole.q, parts.__getitem__)


def test_numbers_whose_differences_overflow_are_refused() -> None:
    whole = mixed(normal(3, 12), [1, 4, 6, 9])
    parts = parts_of(whole) | {f"{NAME}.column_ids": ids_of(0, 2**31 - 1, -2, 3)}
    with pytest.raises(FormatError, match="rising, none twice"):
        read(config_of(whole), parts)


@pytest.mark.parametrize("part", ["column_ids", "columns"])
def test_a_part_that_is_missing_is_named(part: str) -> None:
    whole = mixed(normal(3, 12), [4, 9])
    parts = parts_of(whole)
    del parts[f"{NAME}.{part}"]
    with pytest.raises(FormatError, match=f"{part}' is missing"):
        read(config_of(whole), parts)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        pytest.param(3, "must have count, dtype and axis", id="a number"),
        pytest.param({"count": 2, "dtype": "bfloat16"}, "must have count, dtype and axis", id="no axis"),
        pytest.param({"count": 2, "dtype": "bfloat16", "axis": 1, "x": 1}, "must have count", id="more"),
        pytest.param({"count": 2, "dtype": ["bfloat16"], "axis": 1}, "must have count", id="dtype is a list"),
        pytest.param({"count": 2, "dtype": "float64", "axis": 1}, "are some number of float16", id="float64"),
        pytest.param({"count": True, "dtype": "bfloat16", "axis": 1}, "are some number of", id="count is no number"),
        pytest.param({"count": 2, "dtype": "bfloat16", "axis": True}, "are some number of", id="axis is no number"),
        pytest.param({"count": 0, "dtype": "bfloat16", "axis": 1}, "expected 1 or more", id="none"),
        pytest.param({"count": 2, "dtype": "bfloat16", "axis": 2}, "along axis 0 or 1", id="no such axis"),
        pytest.param({"count": 13, "dtype": "bfloat16", "axis": 1}, "has no 13 columns", id="more than there are"),
        pytest.param({"count": 2**70, "dtype": "bfloat16", "axis": 1}, "has no", id="beyond 64 bits"),
        pytest.param({"count": 1, "dtype": "bfloat16", "axis": 1}, r"expected \[1\]", id="another count"),
        pytest.param({"count": 2, "dtype": "bfloat16", "axis": 0}, r"expected \[2, 12\]", id="another axis"),
    ],
)
def test_entries_that_mean_nothing_are_refused(entry: object, words: str) -> None:
    whole = mixed(normal(3, 12), [4, 9])
    config = config_of(whole)
    config["tensors"][NAME]["columns"] = entry
    with pytest.raises(FormatError, match=words):
        read(config, parts_of(whole))


def test_columns_that_nothing_speaks_of_are_refused() -> None:
    whole = mixed(normal(3, 12), [4, 9])
    config, parts = config_of(whole), parts_of(whole)
    del config["tensors"][NAME]["columns"]
    infos: dict[str, PartInfo] = dict(parts.items())
    with pytest.raises(FormatError, match="config.json speaks of no columns"):
        HALFBIN.schemes(config, infos, parts.__getitem__)


def test_columns_of_a_tensor_that_is_no_matrix_are_refused() -> None:
    config: Any = HALFBIN.config({NAME: (parse_scheme("int8-token"), (2, 3, 12))}, [])
    config = HALFBIN.with_columns(config, {NAME: ColumnSpec(count=2, dtype=torch.float16, axis=1)})
    parts = HALFBIN.encode(NAME, quantize(normal(2, 3, 12), parse_scheme("int8-token")))
    with pytest.raises(FormatError, match="has no 2 columns"):
        HALFBIN.schemes(config, dict(parts.items()), parts.__getitem__)


def test_other_columns_than_were_announced_are_refused() -> None:
    codec = HALFBIN.column_codec(NAME, (3, 12), ColumnSpec(count=1, dtype=torch.bfloat16, axis=1))
    with pytest.raises(SchemeError, match="columns were announced as"):
        codec.encode(mixed(normal(3, 12), [4, 9]).columns)


def test_a_directory_gives_codes_columns_and_inputs_that_leave_them_out(tmp_path: Path) -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    names = projections(model)
    how = parse_inputs("int8-token-outliers6").quantizer()
    written = write_model(
        tmp_path, model, HALFBIN, dict.fromkeys(names, INT8).get, input_quantizers=dict.fromkeys(names, how)
    )
    first, second = names[0], names[1]
    weight = model.get_parameter(first).detach()
    whole = mixed(weight, [3, 70])
    codec = HALFBIN.column_codec(first, whole.shape, whole.columns.spec)
    parts = written.parts | HALFBIN.encode(first, whole.q, how) | codec.encode(whole.columns)
    specs = {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()}
    with SafetensorsWriter(tmp_path / "model.safetensors", specs, {"format": "pt"}) as writer:
        for name, part in parts.items():
            writer.write(name, part)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = HALFBIN.with_columns(config["quantization_config"], {first: whole.columns.spec})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with open_quantized(tmp_path) as checkpoint:
        assert sorted(checkpoint.names) == sorted(model.state_dict())
        assert sum(map(checkpoint.bytes_of, checkpoint.names)) == checkpoint.num_bytes
        assert checkpoint.columns(first) == whole.columns.spec and checkpoint.columns(second) is None
        # Exact: place holder 0 bytes, a byte a code, four a scale, and the columns.
        assert 8 * checkpoint.bytes_of(first) == whole.num_bits
        found = checkpoint.read(first)
        assert isinstance(found, MixedTensor)
        assert torch.equal(dequantize(found), dequantize(whole))
        assert torch.equal(checkpoint.read_values(first, torch.bfloat16)[:, [3, 70]], weight[:, [3, 70]])
        quantizer, other = checkpoint.input_quantizer(first), checkpoint.input_quantizer(second)
        assert quantizer is not None and quantizer.columns is not None and other is not None
        assert quantizer.columns.tolist() == [3, 70] and other.columns is None
        assert split(found)[1] is found.columns
