"""The kernels as Triton compiles them for GPUs that need not be here: instructions, registers, roundings."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbin.kernels.triton import machine
from halfbin.kernels.triton.tiles import cut
from kernels.triton.where import INSTALLED

if not INSTALLED or machine.interpreted():
    pytest.skip("needs Triton, and not its interpreter: pip install 'halfbin[gpu]'", allow_module_level=True)
SPILLED = 16  # bytes of a thread, see tiles.py
COUNTS = ("tokens", "rows", "columns", "row_bytes", "span", "size", "splits")
tiles = pytest.mark.parametrize("tokens", [1, 40, 500])


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(
    kernel: Any, pointers: Mapping[str, str], constants: Mapping[str, Any], capability: int, **how: Any
) -> str:
    """PTX for pointers and counts that are multiples of 16, as those of real models are."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: pointers.get(name, "i32" if name in COUNTS else "constexpr") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, (n, t) in enumerate(types.items()) if t != "constexpr" and n != "tokens"
    }
    source = ASTSource(kernel, types, dict(constants), aligned)
    found: str = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=how).asm["ptx"]
    return found


def spilled(ptx: str, folder: Path) -> int:
    """Bytes that one thread keeps outside registers, as the assembler that comes with Triton says."""
    import triton

    (folder / "kernel.ptx").write_text(ptx)
    target = re.search(r"\.target (\w+)", ptx)
    assert target is not None
    command = [
        triton.knobs.nvidia.ptxas.path,
        "-v",
        "--gpu-name",
        target[1],
        "-o",
        folder / "kernel",
        folder / "kernel.ptx",
    ]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    stores = re.search(r"(\d+) bytes spill stores", told)
    assert stores is not None, told
    return int(stores[1])


WEIGHTS = [
    pytest.param({"bits": 4, "float8": False}, 32, id="int4-g32"),
    pytest.param({"bits": 4, "float8": False}, 128, id="int4-g128"),
    pytest.param({"bits": 4, "float8": False}, 4096, id="int4-row"),
    pytest.param({"bits": 8, "float8": False}, 128, id="int8-g128"),
    pytest.param({"bits": 8, "float8": True}, 4096, id="fp8-row"),
]


@tiles
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("kind", "size"), WEIGHTS)
def test_weight_only_products_are_made_on_tensor_cores_and_hardly_spill(
    kind: dict[str, Any], size: int, capability: int, tokens: int, tmp_path: Path
) -> None:
    from halfbin.kernels.triton.device.weight_only import product

    way = cut(tokens, 4096, 4096, size)
    tile, split = way.tile, way.splits > 1
    y = "*fp32" if split else "*bf16"
    pointers = {"x": "*bf16", "codes": "*u8", "scale": "*fp16", "offset": "*u8", "bias": "*bf16", "y": y}
    constants = kind | {
        "group_size": 0 if size == 4096 else size,
        "constant": 8,
        "has_offsets": not kind["float8"],
        "has_bias": not split,
        "split": split,
        "upcast": False,
        "tile_tokens": tile.tokens,
        "tile_rows": tile.rows,
        "tile_columns": tile.columns,
    }
    ptx = compiled(product, pointers, constants, capability, num_warps=tile.warps, num_stages=tile.stages)
    assert re.search(r"mma\S*\.f32\.bf16\.bf16", ptx)
    assert "cp.async" in ptx  # loads run ahead
    assert spilled(ptx, tmp_path) <= SPILLED


@tiles
@pytest.mark.parametrize(
    ("kind", "capability", "instruction"),
    [
        ("i8", 80, r"mma\S*\.s32\.s8\.s8"),
        ("i8", 90, r"mma\S*\.s32\.s8\.s8"),
        ("fp8e4nv", 89, r"mma\S*\.f32\.(e4m3\.e4m3|f16\.f16)"),
        ("fp8e4nv", 90, r"mma\S*\.f32\.(e4m3\.e4m3|f16\.f16)"),
    ],
)
def test_products_of_8_bits_are_made_on_tensor_cores_and_round_as_they_are_written(
    kind: str, capability: int, instruction: str, tokens: int, tmp_path: Path
) -> None:
    import triton.language as tl

    from halfbin.kernels.triton.device.quantized_inputs import product

    tile = cut(tokens, 4096, 4096, 4096).tile
    pointers = {
        "x": f"*{kind}",
        "x_scale": "*fp32",
        "codes": f"*{kind}",
        "scale": "*fp32",
        "bias": "*bf16",
        "y": "*bf16",
    }
    constants = {
        "sums": tl.int32 if kind == "i8" else tl.float32,
        "has_bias": True,
        "split": False,
        "tile_tokens": tile.tokens,
        "tile_rows": tile.rows,
        "tile_columns": tile.columns,
    }
    how = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": False}
    ptx = compiled(product, pointers, constants, capability, **how)
    assert re.search(instruction, ptx)
    assert "cp.async" in ptx
    assert "fma." not in ptx  # a scale and the bias are two roundings, as in int_matmul
    assert spilled(ptx, tmp_path) <= SPILLED
    assert "fma." in compiled(product, pointers, constants, capability, **how | {"enable_fp_fusion": True})


@pytest.mark.parametrize("tokens", [40, 500])
def test_hoppers_short_sums_of_fp8_go_on_in_float32_after_each_step(tokens: int) -> None:
    import triton.language as tl

    from halfbin.kernels.triton.device.quantized_inputs import product

    tile = cut(tokens, 4096, 4096, 4096).tile
    types = ("*fp8e4nv", "*fp32", "*fp8e4nv", "*fp32", "*bf16", "*bf16")
    pointers = dict(zip(("x", "x_scale", "codes", "scale", "bias", "y"), types, strict=True))
    constants = {"sums": tl.float32, "has_bias": True, "split": False}
    constants |= {"tile_tokens": tile.tokens, "tile_rows": tile.rows, "tile_columns": tile.columns}
    ptx = compiled(product, pointers, constants, 90, num_warps=tile.warps, num_stages=1, enable_fp_fusion=False)
    outputs = (
        tile.tokens * tile.rows // (32 * tile.warps)
    )  # of a thread: each has an addition of a step's sum, one of the bias
    assert len(re.findall(r"add\S*\.f32", ptx)) == 2 * outputs


@pytest.mark.parametrize("kind", ["i8", "fp8e4nv"])
def test_inputs_are_divided_with_ieee_rounding(kind: str) -> None:
    from halfbin.kernels.triton.device.quantized_inputs import rounded

    pointers = {"x": "*bf16", "given": "*fp32", "codes": f"*{kind}", "scale": "*fp32"}
    constants = {"smallest": torch.finfo(torch.float32).smallest_normal, "low": -128.0, "high": 127.0, "dynamic": True}
    constants |= {"integer": kind == "i8", "tile": 1024}
    ptx = compiled(rounded, pointers, constants, 89, enable_fp_fusion=False)
    assert "div.rn.f32" in ptx
    assert "div.full" not in ptx and ".ftz" not in ptx and "fma." not in ptx


@pytest.mark.parametrize("sums", ["fp32", "i32"])
def test_second_passes_compile(sums: str) -> None:
    from halfbin.kernels.triton.device import quantized_inputs, weight_only

    pointers = {"parts": f"*{sums}", "x_scale": "*fp32", "scale": "*fp32", "bias": "*bf16", "y": "*bf16"}
    constants = {"has_bias": True, "tile": 1024}
    ptx = compiled(quantized_inputs.finished, pointers, constants, 80, enable_fp_fusion=False)
    assert "fma." not in ptx and "atom" not in ptx
    if sums == "fp32":
        assert "atom" not in compiled(weight_only.added, pointers, constants, 80)
