"""Products of float inputs with quantized weights, in integers: the inputs are rounded to 8 bits on the fly.

    y[t, r] = sum_g scale[r, g] * x_scale * sum_k (s[t, k] - x_zero)(codes[r, k] - zero_point[r, g])  +  bias[r]

sums over k in INT32, everything after them in float32, groups in their order, one rounding to the type of y. Every
instruction set and every number of threads gives the same bits; `csrc/matmul/product.h` has the order of operations.

A weight is repacked once, at load (`pack`), into a layout of the kernels' own (`csrc/matmul/weights.h`): rows in panels of 64,
four columns to a 32-bit lane, codes of 2 and 4 bits four and two to a byte, scales beside the codes that they belong to.
`linear` multiplies by it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfbin.errors import DataError
from halfbin.kernels import _native
from halfbin.kernels.openmp import share_torchs_threads

SCALE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
INPUT_TYPES = (torch.float32, torch.bfloat16)


def instruction_sets() -> list[str]:
    """What products can run on here, the preferred one first; "portable", the plain loops, is always the last."""
    return _native.matmul_sets()


@dataclass(slots=True)
class _Forced:
    """What the caller wants instead of what would be chosen; None: nothing."""

    instruction_set: str | None = None
    num_threads: int | None = None


_forced = _Forced()
# Looked up once: every product asks them.
_is_compiling, _is_tracing = torch.compiler.is_compiling, torch._C._is_tracing
_BFLOAT16 = torch.bfloat16
_num_modes, _torchs_threads = torch._C._len_torch_dispatch_stack, torch.get_num_threads


def set_num_threads(count: int | None) -> None:
    """How many threads products run on, from now on; None, as at the start: as many as `torch.get_num_threads()` says."""
    if count is not None and count < 1:
        raise ValueError(f"num_threads={count} must be at least 1, or None for torch's own number")
    _forced.num_threads = count


@contextlib.contextmanager
def forced(instruction_set: str | None = None, num_threads: int | None = None) -> Iterator[None]:
    """Within the block, products of all threads run on this instruction set and on so many threads: for tests and benches."""
    if instruction_set is not None and instruction_set not in instruction_sets():
        raise ValueError(f"{instruction_set!r} does not run here; these do: {', '.join(instruction_sets())}")
    before = _Forced(_forced.instruction_set, _forced.num_threads)
    _forced.instruction_set = instruction_set
    set_num_threads(num_threads)
    try:
        yield
    finally:
        _forced.instruction_set, _forced.num_threads = before.instruction_set, before.num_threads


def refuses(codes_bits: int, group_size: int, columns: int, scale_type: torch.dtype) -> str | None:
    """Why a weight cannot be packed, in words; None: it can."""
    if not 1 <= codes_bits <= 8:
        return f"codes have {codes_bits} bits, and these products take integers of up to 8"
    if group_size < columns and group_size % 32:
        return f"groups of {group_size} columns are no multiple of 32"
    if scale_type not in SCALE_TYPES:
        return f"scales are {scale_type}, and these products read float32, float16 and bfloat16"
    return None


def pack(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    bits: int,
    least: int,
    group_size: int,
    sums: bool = False,
    table: Sequence[int] | None = None,
    out: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """A weight in the layout of these products: uint8 [bytes], made by `torch.get_num_threads()` threads.

    Args:
      codes: int8 or uint8 [out_features, in_features], least <= codes < least + 2**bits.
      scale: float32, float16 or bfloat16 [out_features, groups], finite.
      zero_point: int32 shaped like scale, in the range of the codes; None for 0.
      bits: of a code; stored in 2, 4 or 8.
      least: the least code of the format.
      group_size: columns that share a scale: a multiple of 32, or in_features and more for one scale a row.
      sums: whether inputs with a zero point will be multiplied, which needs sums of codes.
      table: 16 integers, from -128 to 127: what codes from 0 to 15 stand for. Without zero points.
      out: gives the memory to fill for a number of bytes: contiguous, at a multiple of 64. By default it is new.
    """
    rows, columns = codes.shape
    groups = -(-columns // min(group_size, columns))
    if reason := refuses(bits, group_size, columns, scale.dtype):
        raise ValueError(reason)
    if tuple(scale.shape) != (rows, groups) or (zero_point is not None and zero_point.shape != scale.shape):
        raise ValueError(
            f"scale is {list(scale.shape)}, expected {[rows, groups]} for codes {list(codes.shape)}, and zero points alike"
        )
    low = least if table is None else min(table)
    share_torchs_threads()
    codes, scale = codes.contiguous(), scale.contiguous()
    zeros = None if zero_point is None else zero_point.to(torch.int32).contiguous()
    shape = (rows, columns, group_size, 2 if bits <= 2 else 4 if bits <= 4 else 8, SCALE_TYPES[scale.dtype])
    packed = (out or _new)(_native.matmul_packed_bytes(*shape, zeros is not None, sums))
    _native.matmul_pack(
        codes.data_ptr(),
        least,
        scale.data_ptr(),
        0 if zeros is None else zeros.data_ptr(),
        *shape,
        sums,
        -low,
        b"" if table is None else bytes(value - low for value in table),
        packed.data_ptr(),
        num_threads(),
    )
    return packed


def _new(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8)


def unpack(packed: Tensor, *, least: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """What `pack` was given, bit for bit: codes (int8, or uint8 where `least` is 0), scale, and zero point or None."""
    rows, columns, groups, scale_type, has_zeros = _native.matmul_describe(packed.data_ptr())
    codes = torch.empty(rows, columns, dtype=torch.int8 if least < 0 else torch.uint8)
    scale = torch.empty(rows, groups, dtype=next(t for t, number in SCALE_TYPES.items() if number == scale_type))
    zeros = torch.empty(rows, groups, dtype=torch.int32) if has_zeros else None
    _native.matmul_unpack(
        packed.data_ptr(),
        codes.data_ptr(),
        least,
        scale.data_ptr(),
        0 if zeros is None else zeros.data_ptr(),
        num_threads(),
    )
    return codes, scale, zeros


@dataclass(frozen=True, slots=True, kw_only=True)
class InputGrid:
    """What inputs are rounded to.

    by_group:  a scale for each token and group of the weight's columns; otherwise one a token, or the static one that is given.
    symmetric: without a zero point.
    qmin, qmax: the codes, from -128 to 127 or from 0 to 255 at most.
    """

    by_group: bool = True
    symmetric: bool = True
    qmin: int = -128
    qmax: int = 127

    def __post_init__(self) -> None:
        if not (-128 <= self.qmin <= 0 < self.qmax <= 255 and self.qmax - self.qmin < 256):
            raise ValueError(f"codes {self.qmin} to {self.qmax} must hold 0, fit a byte, and be signed or unsigned")
        if self.by_group and self.needs_sums:
            raise ValueError(
                "scales of groups are those of signed codes without a zero point: a zero point is a token's"
            )

    @property
    def needs_sums(self) -> bool:
        """Whether the weight must be packed with sums."""
        return not self.symmetric or self.qmax > 127


def linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    out_features: int,
    grid: InputGrid,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
) -> Tensor:
    """x_hat @ w_hat.T + bias for x float32 or bfloat16 [..., in_features] and a packed weight of `out_features` rows.

    With `grid.by_group`, a token that holds NaN or infinity gets NaN for all its outputs.

    Args:
      bias: float32 or bfloat16 [out_features].
      scale: float32 [1], for static inputs.
      zero_point: int32 [1], for static inputs that are asymmetric.

    Raises:
      DataError: NaN or infinity in `x`, unless `grid.by_group`; inputs of another width than the weight's.
    """
    if is_plain(x):
        return _multiply(x, packed, bias, out_features, grid, scale, zero_point)
    y: Tensor = _operator(
        x,
        packed,
        bias,
        out_features,
        grid.by_group,
        grid.symmetric,
        grid.qmin,
        grid.qmax,
        scale,
        zero_point,
    )
    return y


def mixed_linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    out_features: int,
    threshold: float,
    columns: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """LLM.int8(): inputs rounded to INT8 per token but for columns that are multiplied as floats; `csrc/matmul/mixed.h`.

    Not for compilers to look through: `is_plain` says whether it may be called.

    Args:
      x: float32 or bfloat16 [..., in_features]; all that comes before the last axis is one batch.
      packed: a weight.
      bias: float32 or bfloat16 [out_features].
      threshold: |x| from which on a column is a float one, by what its codes stand for.
      columns: those that always are: int32 ids [c], rising, and their float values [c, out_features], both contiguous.

    Raises:
      DataError: NaN or infinity in `x`.
    """
    x = x.contiguous()
    width = x.shape[-1]
    y = x.new_empty((*x.shape[:-1], out_features))
    ids, values = columns or (None, None)
    odd = _native.matmul_mixed(
        packed.data_ptr(),
        x.data_ptr(),
        x.dtype is torch.bfloat16,
        x.numel() // width,
        threshold,
        0 if ids is None else ids.data_ptr(),
        0 if values is None else values.data_ptr(),
        0 if values is None else SCALE_TYPES[values.dtype],
        0 if ids is None else ids.numel(),
        0 if bias is None else bias.data_ptr(),
        bias is not None and bias.dtype is torch.bfloat16,
        y.data_ptr(),
        _forced.instruction_set,
        num_threads(),
    )
    if odd:
        raise DataError(f"{odd} of {x.numel()} elements are NaN or infinite; look at the layer before this one")
    return y


def is_plain(x: Tensor) -> bool:
    """Whether nobody looks on who must see an operator: a compiler, an exporter, a tracer, a mode, a subclass.

    The operator's way through torch's dispatcher costs twice as much as the rest of a call: 8 us beside 4.
    """
    return type(x) is Tensor and not (_is_compiling() or _num_modes() or _is_tracing())


def num_threads() -> int:
    """How many threads products run on now."""
    return _forced.num_threads or _torchs_threads()


def forced_set() -> str | None:
    """The instruction set that was asked for; None: what suits the number of tokens."""
    return _forced.instruction_set


def _multiply(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    out_features: int,
    grid: InputGrid,
    scale: Tensor | None,
    zero_point: Tensor | None,
) -> Tensor:
    if not x.is_contiguous():
        x = x.contiguous()
    # Sizes as arguments of their own: torch reads a tuple of them 0.3 us more slowly, and slicing a shape takes 0.2. Nearly all
    # inputs are [batch, tokens, in_features]; taken apart by name they are 0.3 us faster than as a list.
    shape = x.shape
    if len(shape) == 3:
        batch, length, columns = shape
        tokens = batch * length
        y = x.new_empty(batch, length, out_features)
    else:
        *rest, columns = shape
        tokens = x.numel() // columns
        y = x.new_empty(*rest, out_features)
    odd = _native.matmul(
        packed.data_ptr(),
        x.data_ptr(),
        x.dtype is _BFLOAT16,
        tokens,
        columns,
        grid.by_group,
        grid.symmetric,
        grid.qmin,
        grid.qmax,
        0 if scale is None else scale.data_ptr(),
        0 if zero_point is None else zero_point.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        bias is not None and bias.dtype is _BFLOAT16,
        y.data_ptr(),
        _forced.instruction_set,
        _forced.num_threads or _torchs_threads(),
    )
    if odd == -2:
        width = _native.matmul_describe(packed.data_ptr())[1]
        raise DataError(f"inputs {list(x.shape)} have {columns} columns, and the weight has {width}")
    if odd and not grid.by_group:
        raise DataError(
            f"{odd} of {tokens} tokens hold NaN or infinity, and no scale could be right for them; look at the layer before "
            "this one"
        )
    return y


def _called(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    out_features: int,
    by_group: bool,
    symmetric: bool,
    qmin: int,
    qmax: int,
    scale: Tensor | None,
    zero_point: Tensor | None,
) -> Tensor:
    """The operator's: schemas know no grids."""
    grid = InputGrid(by_group=by_group, symmetric=symmetric, qmin=qmin, qmax=qmax)
    return _multiply(x, packed, bias, out_features, grid, scale, zero_point)


_torch_library: Any = torch.library  # it has no types
_library = _torch_library.Library("halfbin", "DEF")
_library.define(
    "linear(Tensor x, Tensor packed, Tensor? bias, int out_features, bool by_group, bool symmetric, int qmin, int qmax, "
    "Tensor? scale, Tensor? zero_point) -> Tensor"
)
_library.impl("linear", _called, "CPU")


def _shape(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    out_features: int,
    by_group: bool,
    symmetric: bool,
    qmin: int,
    qmax: int,
    scale: Tensor | None,
    zero_point: Tensor | None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


_torch_library.register_fake("halfbin::linear", _shape, lib=_library)
_operator = torch.ops.halfbin.linear.default
