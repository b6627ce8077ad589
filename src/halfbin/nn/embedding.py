"""An embedding with a quantized table."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from halfbin.nn.module import QuantModule
from halfbin.tensor import PerBlock, QTensor, dequantize


class QuantEmbedding(QuantModule):
    """Looks up rows of the table and dequantizes only those."""

    def __init__(self, q: QTensor, *, padding_idx: int | None = None, dtype: torch.dtype = torch.float32) -> None:
        """Make one of codes [num_embeddings, embedding_dim]; outputs are `dtype` until the module is cast."""
        super().__init__(q, dtype)
        self.num_embeddings, self.embedding_dim = q.shape
        self.padding_idx = padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        """Integers of any shape to `dtype` [*shape, embedding_dim]."""
        rows = dequantize(select_rows(self.qtensor, ids.reshape(-1)), self.dtype)
        return rows.reshape(*ids.shape, self.embedding_dim)


def select_rows(q: QTensor, rows: Tensor) -> QTensor:
    """The given rows (integers [k]) of a two-dimensional QTensor, each with its own scales, whoever shared them before."""
    tile_rows, tile_columns = q.scheme.granularity.tile(q.shape)
    tiles = rows // max(tile_rows, 1)
    scheme = dataclasses.replace(q.scheme, granularity=PerBlock(1, max(tile_columns, 1)))
    return QTensor(q.codes[rows], q.scale[tiles], None if q.zero_point is None else q.zero_point[tiles], scheme)
