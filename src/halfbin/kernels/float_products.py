"""Products of float inputs, as they are, with weights whose codes stand for floats: FP8, and tables of 16 such as NF4.

    y[t, r] = sum_g scale[r, g] * sum_k x[t, k] * value(codes[r, k])  +  bias[r]

in float32, one fused multiplication after the other in the order that `csrc/floats/product.h` gives: the same bits on every
instruction set, number of threads and cut of tokens. From the plain way, x @ dequantize(weight)^T, it differs by the order of
the sum, and by one rounding of each weight, scale times value, that it leaves out. With G groups of up to s columns,
u = 2**-24 and S = |x| @ |w_hat|^T + |bias|, y lies within

    (s + G + 1) u S,   to first order,

of the exact product of x and the unrounded scale * value, and within another u S of that with `dequantize`'s float32 weight;
then y is rounded to its type. Sums that leave float32's range on the way, or come near its smallest numbers, are not covered.

Many bfloat16 tokens torch multiplies by AMX tiles, several times as fast as float32 can be: from `TOKENS_FOR_TILES` on, where
a processor has them, weights are converted to bfloat16, some rows at a time, and torch multiplies. Its sums have an order of
its own, and each weight moves by up to 2**-8 of itself, as in the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from halfbin.errors import DataError
from halfbin.kernels import _native, instruction_sets, products
from halfbin.kernels.cpu import features
from halfbin.kernels.openmp import share_torchs_threads

PANEL = 64  # rows that lie together
COLUMN_STEP = 8
TOKENS_FOR_TILES = 48
ROWS_OF_A_THREAD = 256  # that are converted at once for torch: 2 MiB of bfloat16 at 4096 columns


class Kind(Enum):
    """What codes are."""

    TABLE = 0  # of four bits, indices into up to 16 floats
    E4M3 = 1
    E5M2 = 2


def refuses(group_size: int, columns: int, scale_type: torch.dtype) -> str | None:
    """Why a weight cannot be packed, in words; None: it can."""
    if group_size < columns and group_size % COLUMN_STEP:
        return f"groups of {group_size} columns are no multiple of {COLUMN_STEP}"
    if scale_type not in products.SCALE_TYPES:
        return f"scales are {scale_type}, and these products read float32, float16 and bfloat16"
    return None


def pack(codes: Tensor, scale: Tensor, kind: Kind, *, group_size: int, table: Sequence[float] = ()) -> Tensor:
    """A weight in the layout of these products (`csrc/floats/weights.h`): uint8 [bytes], made by torch's number of threads.

    Args:
      codes: uint8 [out_features, in_features]: bit patterns of FP8, or indices into `table`.
      scale: float32, float16 or bfloat16 [out_features, groups].
      kind: of the codes.
      group_size: columns that share a scale: a multiple of 8, or in_features and more for one scale a row.
      table: with `Kind.TABLE`, what codes stand for: up to 16 finite numbers, as float32.

    Raises:
      ValueError: shapes or types do not fit.
      DataError: codes that the table does not hold.
    """
    _check(codes, scale, kind, group_size, table)
    rows, columns = codes.shape
    share_torchs_threads()
    codes, scale = codes.contiguous(), scale.contiguous()
    shape = (rows, columns, group_size, products.SCALE_TYPES[scale.dtype])
    packed = torch.empty(_native.floats_packed_bytes(kind.value, *shape), dtype=torch.uint8)
    wrong = _native.floats_pack(
        kind.value, list(table), codes.data_ptr(), scale.data_ptr(), *shape, packed.data_ptr(), products.num_threads()
    )
    if wrong:
        raise DataError(
            f"{wrong} of {codes.numel()} codes are {len(table)} or more, and the table holds {len(table)} values; the file "
            "may be damaged, or its codes are of another format"
        )
    return packed


def _check(codes: Tensor, scale: Tensor, kind: Kind, group_size: int, table: Sequence[float]) -> None:
    if codes.ndim != 2 or codes.dtype != torch.uint8 or not codes.is_cpu or not scale.is_cpu or not codes.numel():
        raise ValueError(
            f"codes are {codes.dtype} {list(codes.shape)} on {codes.device}, expected a uint8 matrix with elements on the "
            f"CPU, and scales there, too; they are on {scale.device}"
        )
    if group_size < 1:
        raise ValueError(f"group_size={group_size} must be at least 1; in_features and more for one scale a row")
    if reason := refuses(group_size, codes.shape[1], scale.dtype):
        raise ValueError(reason)
    expected = [codes.shape[0], -(-codes.shape[1] // min(group_size, codes.shape[1]))]
    if list(scale.shape) != expected:
        raise ValueError(f"scale is {list(scale.shape)}, expected {expected} for codes {list(codes.shape)}")
    finite = bool(torch.tensor([*table, 0.0], dtype=torch.float32).isfinite().all())
    if not (len(table) <= 16 and finite and (kind is Kind.TABLE) == (len(table) > 0)):
        raise ValueError(
            f"a table of 1 to 16 finite float32 goes with codes of four bits, and none with FP8; got {len(table)}"
        )


def unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    """What `pack` was given, bit for bit: codes and scale."""
    memory = (packed.data_ptr(), packed.numel())
    rows, columns, groups, scale_type, _ = _native.floats_describe(*memory)
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    scale = torch.empty(
        rows, groups, dtype=next(t for t, number in products.SCALE_TYPES.items() if number == scale_type)
    )
    _native.floats_unpack(*memory, codes.data_ptr(), scale.data_ptr(), products.num_threads())
    return codes, scale


def dequantize_transposed(
    packed: Tensor, dtype: torch.dtype, first: int, last: int, *, instruction_set: str | None = None
) -> Tensor:
    """The bits of `tensor.dequantize` for rows 64 * first to 64 * last: [in_features, 64 * (last - first)], 0 behind the last.

    Args:
      packed: a weight.
      dtype: float32, or bfloat16.
      first, last: panels of 64 rows, first < last.
      instruction_set: names a compiled form; by default the best one.
    """
    columns = _native.floats_describe(packed.data_ptr(), packed.numel())[1]
    memory = torch.empty(columns * (last - first) * PANEL, dtype=dtype)
    return _dequantize_into(memory, packed, first, last, columns, instruction_set)


def _dequantize_into(
    memory: Tensor, packed: Tensor, first: int, last: int, columns: int, instruction_set: str | None = None
) -> Tensor:
    """The same in memory that is there."""
    rows = (last - first) * PANEL
    _native.floats_dequantize(
        packed.data_ptr(),
        packed.numel(),
        first,
        last,
        memory.data_ptr(),
        memory.numel(),
        memory.dtype is torch.bfloat16,
        instruction_set or instruction_sets.best(),
        products.num_threads(),
    )
    return memory[: columns * rows].view(columns, rows)


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """x @ w_hat.T + bias for x float32 or bfloat16 [..., in_features] and a packed weight of `out_features` rows.

    NaN and infinity spread as in any float product.

    Args:
      bias: float32 or bfloat16 [out_features], contiguous.
    """
    return (_multiply if products.is_plain(x) else _operator)(x, packed, bias, out_features)


def compiled(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    out_features: int,
    *,
    instruction_set: str | None = None,
    num_threads: int | None = None,
) -> Tensor:
    """`linear` by the compiled loops, however many tokens there are.

    Args:
      instruction_set: names a compiled form; by default the best one. All give the same bits.
      num_threads: as many as other products run on by default.
    """
    if x.dtype not in products.INPUT_TYPES or (bias is not None and bias.dtype not in products.INPUT_TYPES):
        raise ValueError(
            f"inputs are {x.dtype} and the bias {None if bias is None else bias.dtype}; float32 and bfloat16 are read"
        )
    if bias is not None and (bias.numel() != out_features or not bias.is_contiguous()):
        raise ValueError(f"bias is {list(bias.shape)}, expected {[out_features]}, contiguous")
    x = x.contiguous()
    columns = x.shape[-1]
    y = x.new_empty((*x.shape[:-1], out_features))
    _native.floats_multiply(
        packed.data_ptr(),
        packed.numel(),
        x.data_ptr(),
        x.dtype is torch.bfloat16,
        x.numel() // max(columns, 1),
        columns,
        0 if bias is None else bias.data_ptr(),
        bias is not None and bias.dtype is torch.bfloat16,
        y.data_ptr(),
        out_features,
        instruction_set or instruction_sets.best(),
        num_threads or products.num_threads(),
    )
    return y


def by_tiles(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """`linear` for bfloat16 inputs by torch's product, with a few rows of the weight at a time as bfloat16."""
    rows, at_once = x.reshape(-1, x.shape[-1]), ROWS_OF_A_THREAD * products.num_threads()
    columns = rows.shape[1]
    y = x.new_empty((len(rows), out_features))
    # Once: fresh pages from the system take as long as filling them.
    room = x.new_empty(columns * min(at_once, -(-out_features // PANEL) * PANEL))
    for first in range(0, out_features, at_once):
        last = min(first + at_once, out_features)
        weight = _dequantize_into(room, packed, first // PANEL, -(-last // PANEL), columns)[:, : last - first]
        if bias is None:
            torch.mm(rows, weight, out=y[:, first:last])
        else:
            torch.addmm(bias[first:last].to(x.dtype), rows, weight, out=y[:, first:last])
    return y.view((*x.shape[:-1], out_features))


def _multiply(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    many = x.dtype is torch.bfloat16 and x.numel() >= TOKENS_FOR_TILES * x.shape[-1] > 0
    if many and "amx_bf16" in features():
        return by_tiles(x, packed, bias, out_features)
    return compiled(x, packed, bias, out_features)


_torch_library: Any = torch.library  # it has no types
_library = _torch_library.Library("halfbin", "FRAGMENT")
_library.define("float_linear(Tensor x, Tensor packed, Tensor? bias, int out_features) -> Tensor")
_library.impl("float_linear", _multiply, "CPU")


def _shape(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


_torch_library.register_fake("halfbin::float_linear", _shape, lib=_library)
_operator = torch.ops.halfbin.float_linear.default
