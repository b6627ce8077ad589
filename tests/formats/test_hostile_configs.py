"""Whatever a stranger writes into config.json, it is read or it is a `FormatError`; nothing else ever comes out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbin.errors import FormatError
from halfbin.formats import COMPRESSED_TENSORS, HALFBIN, WeightLayout
from halfbin.formats.layout import PartInfo
from halfbin.tensor import parse_inputs, parse_scheme, quantize, take_columns

NAME = "a.weight"
WORDS = [
    "channel",
    "group",
    "tensor",
    "block",
    "int",
    "float",
    "int4-g0",
    "nf4-g8-asym",
    "naive-quantized",
    "a",
    "Linear",
    "re:(",
]
LEAVES = (
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats(allow_nan=False) | st.sampled_from(WORDS) | st.text()
)
VALUES = st.recursive(LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=3))


def paths(value: object, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [*([at] if at else []), *(path for key, item in inner for path in paths(item, (*at, key)))]


@pytest.mark.parametrize(
    ("layout", "spelling", "inputs"),
    [
        pytest.param(HALFBIN, "int8-channel", "int8-token-outliers6", id="halfbin with columns"),
        pytest.param(HALFBIN, "int4-g8", "int8-tensor-asym", id="halfbin with inputs"),
        pytest.param(COMPRESSED_TENSORS, "int8-channel", "int8-tensor-asym", id="int8 with inputs"),
        pytest.param(HALFBIN, "int4-g8-asym", "", id="halfbin"),
        pytest.param(COMPRESSED_TENSORS, "int4-g8-asym", "", id="packed integers"),
        pytest.param(COMPRESSED_TENSORS, "fp8_e4m3-b8x8", "", id="fp8 in blocks"),
        pytest.param(COMPRESSED_TENSORS, "mxfp4", "", id="mxfp4"),
    ],
)
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_changed_config_is_read_or_refused(
    layout: WeightLayout, spelling: str, inputs: str, data: st.DataObject
) -> None:
    q = quantize(torch.ones(16, 32), parse_scheme(spelling))
    how = parse_inputs(inputs).calibrated(-1.0, 1.0) if inputs else None
    parts = layout.encode(NAME, q, how)
    config: Any = copy.deepcopy(layout.config({NAME: (q.scheme, q.shape)}, [], {NAME: how.inputs} if how else None))
    if how is not None and how.inputs.outliers is not None:
        _, columns = take_columns(torch.ones(16, 32), torch.tensor([2, 7]), torch.bfloat16)
        parts |= HALFBIN.column_codec(NAME, q.shape, columns.spec).encode(columns)
        config = HALFBIN.with_columns(config, {NAME: columns.spec})
    for path in data.draw(st.lists(st.sampled_from(paths(config)), min_size=1, max_size=2)):
        table = config
        try:
            for key in path[:-1]:
                table = table[key]
            table[path[-1]] = data.draw(VALUES)
        except (KeyError, IndexError, TypeError):
            continue  # the first change took away where the second would stand
    infos: dict[str, PartInfo] = dict(parts.items())
    try:
        for name, stored in layout.schemes(config, infos, parts.__getitem__).items():
            q = stored.codec.decode(name, stored.scheme, stored.shape, parts.__getitem__)
            if stored.columns:
                stored.columns.decode(q, parts.__getitem__)
            if stored.inputs:
                stored.inputs.decode(parts.__getitem__)
    except FormatError:
        pass
