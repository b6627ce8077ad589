"""Tiles: every element lies in exactly one, and the shapes of scales follow."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbin.errors import SchemeError
from halfbin.tensor import (
    Granularity,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    scale_shape,
    spread,
)
from halfbin.tensor.granularity import regions, transposed
from tensor.cases import GRANULARITIES

law = settings(max_examples=300, deadline=None, derandomize=True, database=None)
shapes = st.lists(st.integers(0, 7), min_size=2, max_size=4).map(tuple)


@pytest.mark.parametrize(
    ("granularity", "scales"),
    [
        (PerTensor(), (1, 1)),
        (PerChannel(0), (4096, 1)),
        (PerChannel(1), (1, 300)),
        (PerChannel(-1), (1, 300)),
        (PerToken(), (4096, 1)),
        (PerGroup(128), (4096, 3)),
        (PerGroup(128, axis=0), (32, 300)),
        (PerGroup(300), (4096, 1)),
        (PerGroup(301), (4096, 1)),
        (PerBlock(128, 128), (32, 3)),
    ],
    ids=str,
)
def test_shapes_of_scales_of_a_4096_by_300_weight(granularity: Granularity, scales: tuple[int, int]) -> None:
    assert scale_shape((4096, 300), granularity) == scales


@law
@given(shapes, st.sampled_from(GRANULARITIES))
def test_regions_cover_every_element_and_every_scale_exactly_once(
    shape: tuple[int, ...], granularity: Granularity
) -> None:
    elements = torch.zeros(shape, dtype=torch.int32)
    tiles = torch.zeros(scale_shape(shape, granularity), dtype=torch.int32)
    for region in regions(shape, granularity):
        elements[region.elements] += 1
        tiles[region.tiles] += 1
    assert (elements == 1).all()
    assert (tiles == 1).all() or not math.prod(shape)


@law
@given(shapes, st.sampled_from(GRANULARITIES))
def test_rows_of_a_region_are_the_elements_of_its_tiles_in_order(
    shape: tuple[int, ...], granularity: Granularity
) -> None:
    """Each element is labelled by the tile it lies in, found here by dividing its position."""
    tile, scales = granularity.tile(shape), scale_shape(shape, granularity)
    if not math.prod(shape):
        return
    positions = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")
    label = torch.zeros(shape, dtype=torch.int64)
    for position, t, n in zip(positions, tile, scales, strict=True):
        label = label * n + position // t
    flat = torch.arange(math.prod(scales)).reshape(scales)
    for region in regions(shape, granularity):
        rows = region.rows(label)
        assert torch.equal(rows, flat[region.tiles].reshape(-1, 1).expand(rows.shape))
        assert rows.shape[1] == math.prod(region.tile)


@law
@given(shapes, st.sampled_from(GRANULARITIES))
def test_spread_gives_each_element_its_own_tiles_value(shape: tuple[int, ...], granularity: Granularity) -> None:
    scales = scale_shape(shape, granularity)
    values = torch.arange(math.prod(scales), dtype=torch.float32).reshape(scales)
    wide = spread(values, shape, granularity).expand(shape)
    for region in regions(shape, granularity):
        rows = region.rows(wide)
        assert torch.equal(rows, values[region.tiles].reshape(-1, 1).expand(rows.shape))


# Groups along axis 0 are those of a transposed weight already: a weight's own lie along in_features.
@pytest.mark.parametrize("granularity", [g for g in GRANULARITIES if g != PerGroup(3, axis=0)], ids=str)
def test_a_transposed_granularity_shares_the_same_weights_scales(granularity: Granularity) -> None:
    shape = (6, 9)
    label = torch.arange(math.prod(scale_shape(shape, granularity)), dtype=torch.float32)
    here = spread(label.reshape(scale_shape(shape, granularity)), shape, granularity).expand(shape)
    swapped = transposed(granularity)
    there_shape = scale_shape((9, 6), swapped)
    there = spread(label.reshape(there_shape[::-1]).T, (9, 6), swapped).expand(9, 6)
    assert torch.equal(there, here.T)


@pytest.mark.parametrize("size", [0, -1], ids=str)
def test_a_group_without_elements_is_refused(size: int) -> None:
    with pytest.raises(SchemeError, match=f"group_size={size} must be at least 1; one scale a row is spelled channel"):
        PerGroup(size)


@pytest.mark.parametrize(("rows", "columns"), [(0, 4), (4, 0), (-1, -1)], ids=str)
def test_a_block_without_elements_is_refused(rows: int, columns: int) -> None:
    with pytest.raises(SchemeError, match=f"a block of {rows} x {columns} holds nothing"):
        PerBlock(rows, columns)


@pytest.mark.parametrize(
    ("granularity", "shape", "message"),
    [
        (PerChannel(2), (3, 4), r"channel@2: axis 2 does not exist in a tensor of shape \[3, 4\]"),
        (PerGroup(4, axis=1), (3,), r"g4@1: axis 1 does not exist in a tensor of shape \[3\]"),
        (PerToken(), (), r"token needs 1 dimensions or more, got shape \[\]"),
        (PerBlock(2, 2), (3,), r"b2x2 needs 2 dimensions or more, got shape \[3\]"),
    ],
    ids=["channel", "group", "token", "block"],
)
def test_a_shape_with_too_few_dimensions_is_refused(
    granularity: Granularity, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(SchemeError, match=message):
        scale_shape(shape, granularity)
