def cpu_features() -> list[str]: ...
def streaming_read(memory: int, num_bytes: int, num_threads: int, /) -> int: ...

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
    out: int,
    num_threads: int,
    /,
) -> None: ...
def matmul(
    packed: int,
    x: int,
    x_is_bfloat16: bool,
    m: int,
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
