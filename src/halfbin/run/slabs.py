"""Some rows of a tensor at a time, so that neither the largest tensor nor the model decides how much memory is needed.

A slab is small for a second reason: memory blocks of this size are used again by the allocator for the next slab, while
larger ones are fetched from the system page by page each time. For a bf16 weight of 11008 x 4096 at int4 that fetching
took longer than rounding. And what was just read is still in the cache when it is rounded: with 16 MiB a run of 2.2 GB took
2.7 to 3.6 s on 2 cores, with 4 MiB 2.7, with 2 MiB 2.7 to 2.9, with 1 MiB, whose calls begin to count, 3.1 to 3.5.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from torch import Tensor

from halfbin.formats.checkpoint import Checkpoint
from halfbin.formats.layout import ROWS_ALIGNED
from halfbin.formats.safetensors import SafetensorsWriter
from halfbin.kernels.checksums import crc32
from halfbin.methods import TILEWISE
from halfbin.tensor.granularity import Granularity

SLAB_BYTES = 4 * 2**20


def slabs(shape: tuple[int, ...], row_step: int, itemsize: int) -> Iterator[slice]:
    """Rows of a tensor of `shape`, in order, in slices of about SLAB_BYTES that begin at multiples of `row_step`.

    One slice of everything for a tensor without rows.
    """
    num_rows = shape[0] if shape else 1
    row_bytes = max(1, math.prod(shape[1:]) * itemsize)
    step = max(1, SLAB_BYTES // row_bytes // row_step) * row_step
    for start in range(0, max(num_rows, 1), step):
        yield slice(start, min(start + step, num_rows))


def row_step(method: str, shape: tuple[int, ...], granularity: Granularity) -> int:
    """Rows that cannot be told apart when codes are chosen and stored; all of them unless `method` goes tile by tile."""
    if method not in TILEWISE:
        return max(1, shape[0])
    return math.lcm(ROWS_ALIGNED, max(1, granularity.tile(shape)[0]))


def read_slab(checkpoint: Checkpoint, name: str, rows: slice) -> Tensor:
    """These rows of a tensor; a tensor without rows whole."""
    return checkpoint.read_rows(name, rows.start, rows.stop) if checkpoint.info(name).shape else checkpoint.read(name)


class SlabWriter:
    """Appends rows to announced tensors, and keeps the CRC-32 of each one's bytes, to compare with what the disk gives back."""

    def __init__(self, file: SafetensorsWriter) -> None:
        self._file = file
        self._rows_written: dict[str, int] = {}
        self.checksums: dict[str, int] = {}

    def append(self, parts: Mapping[str, Tensor]) -> None:
        """Write each tensor behind the rows of that name that came before."""
        for name, tensor in parts.items():
            if tensor.ndim:
                start = self._rows_written.get(name, 0)
                self._file.write_rows(name, start, tensor)
                self._rows_written[name] = start + len(tensor)
            else:
                self._file.write(name, tensor)
            self.checksums[name] = crc32(tensor, self.checksums.get(name, 0))
