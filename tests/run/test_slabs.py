"""Rows of a tensor, a few at a time, become the bytes that the whole tensor becomes."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from halfbin.evaluation.layers import TensorError, rounding_sums, weight_error
from halfbin.formats import COMPRESSED_TENSORS, HALFBIN, WeightLayout
from halfbin.formats.layout import HoldsPackedRows
from halfbin.formats.plain import PlainLayout
from halfbin.formats.safetensors import SafetensorsFile, SafetensorsWriter
from halfbin.kernels.errors import ErrorSums
from halfbin.methods import METHODS, TILEWISE
from halfbin.run import execute as execute_module
from halfbin.run import slabs as slabs_module
from halfbin.run.job import Job, planned
from halfbin.run.slabs import SlabWriter, row_step, slabs
from halfbin.tensor import dequantize, parse_scheme, quantize_packed

NAME = "a.weight"


def weight_of(shape: tuple[int, ...] = (200, 300)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)) ** 3


@pytest.mark.parametrize("step", [1, 7, 32])
@pytest.mark.parametrize("shape", [(), (0, 4), (1,), (100, 3), (5, 1000, 1000)], ids=str)
def test_slabs_cover_every_row_once_in_order_and_begin_at_the_step(
    shape: tuple[int, ...], step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slabs_module, "SLAB_BYTES", 100)
    parts = list(slabs(shape, step, 4))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(shape[0] if shape else 1))
    assert all(part.start % step == 0 for part in parts)


LAYOUTS: list[tuple[WeightLayout, list[str]]] = [
    (COMPRESSED_TENSORS, ["int4-g100", "int4-g100-asym", "int3-g100-asym", "int8-channel", "fp8_e4m3-channel"]),
    (COMPRESSED_TENSORS, ["fp8_e4m3-tensor"]),
    (HALFBIN, ["int4-g128", "int3-g128-asym", "nf4-g64", "mxfp4", "fp8_e4m3-b64x64", "int8-channel@1"]),
    (HALFBIN, ["int4-g128@0", "ternary-tensor", "int5-token"]),
    (PlainLayout(torch.bfloat16), ["int4-g128", "int8-tensor"]),
]
CASES = [
    pytest.param(layout, spelling, id=f"{layout.name} {spelling}")
    for layout, spellings in LAYOUTS
    for spelling in spellings
]


@pytest.mark.parametrize("method", sorted(TILEWISE))
@pytest.mark.parametrize(("layout", "spelling"), CASES)
def test_slabs_become_the_bytes_that_the_whole_tensor_becomes(
    layout: WeightLayout, spelling: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, scheme = weight_of(), parse_scheme(spelling)
    q = METHODS[method](weight, scheme)
    expected = layout.encode(NAME, q)
    monkeypatch.setattr(slabs_module, "SLAB_BYTES", 1)  # as few rows as may be
    fixed, sums = layout.fixed(NAME, q.shape, scheme), ErrorSums()
    path = tmp_path / "x.safetensors"
    with SafetensorsWriter(path, layout.tensors(NAME, q.shape, scheme)) as file:
        output = SlabWriter(file)
        for rows in slabs(q.shape, row_step(method, q.shape, scheme.granularity), 4):
            part = METHODS[method](weight[rows].contiguous(), scheme)
            output.append({name: x for name, x in layout.encode(NAME, part).items() if name not in fixed})
            sums += rounding_sums(weight[rows].contiguous(), part)
        output.append(fixed)
    with SafetensorsFile(path) as written:
        for name, tensor in expected.items():
            assert torch.equal(written.read(name).view(torch.uint8), tensor.view(torch.uint8)), name
            assert output.checksums[name] == zlib.crc32(tensor.flatten().view(torch.uint8).numpy().tobytes())
    whole = weight_error(weight, dequantize(q))
    assert TensorError.of(sums).relative == pytest.approx(whole.relative, rel=1e-6)
    assert TensorError.of(sums).max_abs == pytest.approx(whole.max_abs, rel=1e-6)


def test_most_schemes_may_be_cut_and_one_scale_for_all_may_not() -> None:
    assert row_step("rtn", (4096, 4096), parse_scheme("int4-g128").granularity) == 32
    assert row_step("rtn", (4096, 4096), parse_scheme("fp8_e4m3-b128x128").granularity) == 128
    assert row_step("rtn", (4096, 4096), parse_scheme("int8-tensor").granularity) == 4096
    assert row_step("gptq", (4096, 4096), parse_scheme("int4-g128").granularity) == 4096


ROUNDED_AT_ONCE = [
    pytest.param(layout, spelling, id=f"{layout.name} {spelling}")
    for layout, spellings in LAYOUTS
    for spelling in spellings
    if isinstance(layout, HoldsPackedRows)
    and layout.row_multiple(parse_scheme(spelling)) is not None
    and spelling not in ("fp8_e4m3-b64x64", "int8-channel@1", "int4-g128@0", "ternary-tensor")  # no tiles within rows
]


@pytest.mark.parametrize(
    ("layout", "spelling"), [*ROUNDED_AT_ONCE, pytest.param(COMPRESSED_TENSORS, "mxfp4", id="mxfp4")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_pass_over_a_weight_gives_the_parts_and_sums_of_one_step_after_the_other(
    layout: WeightLayout, spelling: str, dtype: torch.dtype
) -> None:
    assert isinstance(layout, HoldsPackedRows)
    weight, scheme = weight_of((64, 320)).to(dtype), parse_scheme(spelling)
    multiple = layout.row_multiple(scheme)
    found = None if multiple is None else quantize_packed(weight, scheme, row_multiple=multiple)
    assert found is not None
    q = METHODS["rtn"](weight, scheme)
    expected, parts = layout.encode(NAME, q), layout.encode_packed(NAME, found[0])
    assert list(parts) == list(expected)
    for name, part in parts.items():
        assert part.dtype == expected[name].dtype
        assert torch.equal(part, expected[name])
    assert found[1] == rounding_sums(weight, q)


@pytest.mark.parametrize("spelling", ["fp8_e4m3-b64x64", "int8-channel@1", "int4-g128@0", "ternary-tensor"])
def test_tiles_that_are_no_part_of_a_row_are_left_to_the_steps(spelling: str) -> None:
    assert quantize_packed(weight_of(), parse_scheme(spelling)) is None


def test_what_is_not_finite_is_left_to_the_steps_which_name_it() -> None:
    weight = weight_of()
    weight[3, 5] = torch.nan
    assert quantize_packed(weight, parse_scheme("int4-g100")) is None


def test_a_run_that_rounds_to_nearest_goes_over_its_weights_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> ErrorSums:
        raise AssertionError("a second pass")

    with planned(Job(model="demo", recipe="int4")) as (plan, checkpoint):
        expected = execute_module.execute(plan, checkpoint, empty(tmp_path / "once"))
        monkeypatch.setattr(execute_module, "quantize_packed", lambda *_, **__: None)
        stepwise = execute_module.execute(plan, checkpoint, empty(tmp_path / "stepwise"))
        monkeypatch.undo()
        monkeypatch.setattr(execute_module, "rounding_sums", refuse)
        execute_module.execute(plan, checkpoint, empty(tmp_path / "watched"))
    assert expected.errors == stepwise.errors and expected.errors
    for file in expected.files:
        assert (tmp_path / "once" / file).read_bytes() == (tmp_path / "stepwise" / file).read_bytes()


def empty(directory: Path) -> Path:
    directory.mkdir()
    return directory
