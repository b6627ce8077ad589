from collections.abc import Sequence
from enum import Enum

from torch import Tensor

def cpu_features() -> list[str]: ...
def use_openmp(gomp_parallel: int, /) -> None: ...
def uses_openmp() -> bool: ...
def streaming_read(memory: int, num_bytes: int, num_threads: int, /) -> int: ...
def crc32(instruction_set: str, data: Tensor, before: int) -> int: ...
def add_to_strips(instruction_set: str, x: Tensor, sums: Sequence[Tensor], num_threads: int) -> None: ...
def upper_product(instruction_set: str, x: Tensor, product: Tensor, num_threads: int) -> None: ...

# Norms; addresses are integers.
def rms_norm(
    instruction_set: str,
    x: int,
    weight: int,
    y: int,
    m: int,
    n: int,
    eps: float,
    one_plus: bool,
    bfloat16: bool,
    num_threads: int,
    /,
) -> None: ...

# Matrix products; addresses are integers.
def matmul_sets() -> list[str]: ...
def matmul_packed_bytes(
    n: int, k: int, group_size: int, bits: int, scale_type: int, has_zeros: bool, has_sums: bool, /
) -> int: ...
def matmul_pack(
    codes: int,
    least: int,
    scales: int,
    zero_points: int,
    n: int,
    k: int,
    group_size: int,
    bits: int,
    scale_type: int,
    has_sums: bool,
    zero: int,
    table: bytes,
    out: int,
    num_threads: int,
    /,
) -> None: ...
def matmul_describe(packed: int, /) -> tuple[int, int, int, int, bool]: ...
def matmul_unpack(packed: int, codes: int, least: int, scales: int, zero_points: int, num_threads: int, /) -> None: ...
def matmul(
    packed: int,
    x: int,
    x_is_bfloat16: bool,
    m: int,
    columns: int,
    by_group: bool,
    symmetric: bool,
    qmin: int,
    qmax: int,
    scale: int,
    zero_point: int,
    bias: int,
    bias_is_bfloat16: bool,
    y: int,
    set: str | None,
    num_threads: int,
    /,
) -> int: ...
def matmul_experts(
    packed: int,
    count: int,
    stride: int,
    x: int,
    x_is_bfloat16: bool,
    m: int,
    chosen: int,
    slots: int,
    symmetric: bool,
    by_group: bool,
    qmin: int,
    qmax: int,
    bias: int,
    bias_is_bfloat16: bool,
    y: int,
    set: str | None,
    num_threads: int,
    /,
) -> int: ...
def matmul_mixed(
    packed: int,
    x: int,
    x_is_bfloat16: bool,
    m: int,
    threshold: float,
    ids: int,
    values: int,
    values_type: int,
    count: int,
    bias: int,
    bias_is_bfloat16: bool,
    y: int,
    set: str | None,
    num_threads: int,
    /,
) -> int: ...

# Products of floats.
def floats_packed_bytes(kind: int, n: int, k: int, group_size: int, scale_type: int, /) -> int: ...
def floats_pack(
    kind: int,
    table: Sequence[float],
    codes: int,
    scales: int,
    n: int,
    k: int,
    group_size: int,
    scale_type: int,
    out: int,
    num_threads: int,
    /,
) -> int: ...
def floats_describe(packed: int, bytes: int, /) -> tuple[int, int, int, int, int]: ...
def floats_unpack(packed: int, bytes: int, codes: int, scales: int, num_threads: int, /) -> None: ...
def floats_multiply(
    packed: int,
    bytes: int,
    x: int,
    x_is_bfloat16: bool,
    m: int,
    k: int,
    bias: int,
    bias_is_bfloat16: bool,
    y: int,
    n: int,
    instruction_set: str,
    num_threads: int,
    /,
) -> None: ...
def floats_dequantize(
    packed: int,
    bytes: int,
    first: int,
    last: int,
    out: int,
    numbers: int,
    to_bfloat16: bool,
    instruction_set: str,
    num_threads: int,
    /,
) -> None: ...

class Covers(Enum):
    BOTH_ALIKE = 0
    POSITIVE = 1
    RANGE = 2

class ScaleType(Enum):
    FLOAT32 = 0
    FLOAT16 = 1
    BFLOAT16 = 2
    E8M0 = 3

class CodeFormat:
    @staticmethod
    def integers(qmin: int, qmax: int) -> CodeFormat: ...
    @staticmethod
    def floats(
        exponent_bits: int, mantissa_bits: int, bias: int, largest: float, values: Sequence[float]
    ) -> CodeFormat: ...
    @staticmethod
    def table(boundaries: Sequence[float], values: Sequence[float]) -> CodeFormat: ...

class ScaleRule:
    def __init__(self, covers: Covers, divisor: float, stored: ScaleType) -> None: ...

def fit_and_round(
    instruction_set: str,
    x: Tensor,
    size: int,
    format: CodeFormat,
    rule: ScaleRule,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    num_threads: int,
) -> bool: ...
def fit_round_and_pack(
    instruction_set: str,
    x: Tensor,
    size: int,
    format: CodeFormat,
    rule: ScaleRule,
    packed: Tensor,
    bits: int,
    lowest: int,
    scale: Tensor,
    zero: Tensor | None,
    compare: bool,
    num_threads: int,
) -> tuple[float, float, float] | None: ...
def round_with(
    instruction_set: str,
    x: Tensor,
    size: int,
    format: CodeFormat,
    scale: Tensor,
    zero: Tensor | None,
    codes: Tensor,
    num_threads: int,
) -> None: ...
def compare(
    instruction_set: str,
    x: Tensor,
    size: int,
    format: CodeFormat,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    num_threads: int,
) -> tuple[float, float, float]: ...
def search_ranges(
    instruction_set: str,
    x: Tensor,
    size: int,
    format: CodeFormat,
    rule: ScaleRule,
    factors: Sequence[float],
    least: Tensor,
    greatest: Tensor,
    num_threads: int,
) -> bool: ...
def pack_rows(
    instruction_set: str, codes: Tensor, bits: int, lowest: int, packed: Tensor, num_threads: int
) -> bool: ...
def unpack_rows(
    instruction_set: str, packed: Tensor, bits: int, lowest: int, codes: Tensor, num_threads: int
) -> None: ...
def round_columns(
    instruction_set: str,
    columns: Tensor,
    num_rounded: int,
    upper: Tensor,
    format: CodeFormat,
    scale: Tensor,
    zero: Tensor | None,
    tiles: Tensor,
    codes: Tensor,
) -> None: ...
def solve_hqq(
    instruction_set: str,
    tiles: Tensor,
    format: CodeFormat,
    stored: ScaleType,
    scale: Tensor,
    zero: Tensor | None,
    iterations: int,
    p: float,
    beta: float,
    growth: float,
    num_threads: int,
) -> None: ...
