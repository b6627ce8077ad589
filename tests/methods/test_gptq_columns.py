"""The compiled loop over columns, each instruction set by name, gives the bits of the plain one."""

from __future__ import annotations

import functools
import importlib

import pytest
import torch

from halfbin.kernels import instruction_sets
from halfbin.kernels.instruction_sets import usable
from halfbin.methods import factorise, gptq
from halfbin.methods.factor import Factor
from halfbin.tensor import PerGroup, parse_scheme
from tensor.cases import FEW_SCHEMES

SCHEMES = [*FEW_SCHEMES, "int4-b8x16", "int4-b8x16-asym", "int2-g40-asym-f16", "fp4_e2m1-g32-e8m0", "int4-g8"]


@functools.cache
def factor_of(columns: int, group_size: int | None, seed: int) -> Factor:
    x = torch.randn(2 * columns, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[:, 1:] += x[:, :-1]
    return factorise(x.T @ x, group_size=group_size)


def weight_of(rows: int, columns: int) -> torch.Tensor:
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 0.05
    w[rows // 2] = 0.0
    w[-1, -1] = 3.0
    return w


def in_rows_of_16(w: torch.Tensor) -> torch.Tensor:
    """With copies of the first row behind: torch fuses multiplications with additions in whole registers only."""
    return torch.cat([w, w[:1].expand(-len(w) % 16, -1)])


@pytest.mark.parametrize("recompute", [False, True], ids=["scales fixed", "scales again"])
@pytest.mark.parametrize("shape", [(3, 40), (70, 140)], ids=str)
@pytest.mark.parametrize("spelling", SCHEMES)
def test_every_instruction_set_gives_the_codes_of_the_plain_loop(
    spelling: str, shape: tuple[int, int], recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, scheme = weight_of(*shape), parse_scheme(spelling)
    height, width = scheme.granularity.tile(shape)
    if 1 < height < shape[0]:
        w = in_rows_of_16(w)  # copies would change what the scales of the last block of rows cover
    factor, module = (
        factor_of(shape[1], width if recompute else None, 1),
        importlib.import_module("halfbin.methods.gptq"),
    )
    with monkeypatch.context() as plain:
        plain.setattr(module, "compiled", lambda: False)
        expected = gptq(in_rows_of_16(w), scheme, factor, recompute_scales=recompute)
    for name in usable():
        monkeypatch.setattr(instruction_sets, "best", lambda name=name: name)
        found = gptq(w, scheme, factor, recompute_scales=recompute)
        assert torch.equal(found.codes, expected.codes[: len(w)]), name
        assert torch.equal(found.scale.float(), expected.scale.float()[: len(found.scale)]), name


def test_errors_in_a_row_are_passed_on_to_the_last_column_of_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the loop leaves in its memory, not only the codes that come of it: bit for bit, in every row and column."""
    module = importlib.import_module("halfbin.methods.gptq")
    found = []
    for name in ("plain", *usable()):
        columns = weight_of(80, 100).T.contiguous()
        factor = factor_of(100, None, 2)
        scheme = parse_scheme("int4-g32-asym")
        assert isinstance(scheme.granularity, PerGroup)
        scales = module.ColumnScales(columns.T, scheme, factor.order, None)
        monkeypatch.setattr(module, "compiled", lambda name=name: name != "plain")
        monkeypatch.setattr(instruction_sets, "best", lambda name=name: name)
        loop = module._ColumnLoop(columns, factor.upper, scheme.grid, module.RowScales(scales, 0, 80), 128)
        loop.span(0, 100, [])
        found.append((columns, loop.codes))
    for columns, codes in found[1:]:
        assert torch.equal(codes, found[0][1])
        assert torch.equal(columns, found[0][0])
