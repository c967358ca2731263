"""The C extension: `csrc/module.c`. Everything goes through `cpu.py`, which checks first."""

def known() -> tuple[str, ...]: ...
def built() -> tuple[str, ...]: ...
def usable() -> tuple[str, ...]: ...
def isa() -> str: ...
def use(name: str, /) -> None: ...
def share(start: int, size: int, /) -> None: ...
def linear(
    x: int,
    x_bytes: int,
    weight: int,
    weight_bytes: int,
    bias: int,
    bias_bytes: int,
    out: int,
    out_bytes: int,
    tokens: int,
    dtype: int,
    kind: int,
    rows: int,
    columns: int,
    group: int,
    symmetric: bool,
    scale_dtype: int,
    exact: bool,
    threads: int,
    /,
) -> None: ...
def block(
    codes: int,
    codes_bytes: int,
    scales: int,
    scales_bytes: int,
    zeros: int,
    zeros_bytes: int,
    data: int,
    data_bytes: int,
    kind: int,
    rows: int,
    columns: int,
    group: int,
    symmetric: bool,
    scale_dtype: int,
    threads: int,
    /,
) -> None: ...
def nearest(
    goal: int,
    block: int,
    unit: int,
    stride: int,
    scale: int,
    zero: int,
    group: int,
    codes: int,
    clipped: int,
    steps: int,
    rows: int,
    groups: int,
    low: int,
    high: int,
    threads: int,
    /,
) -> None: ...
def gram_usable() -> bool: ...
def gram(
    left: int,
    right: int,
    total: int,
    tokens: int,
    rows: int,
    columns: int,
    upper: bool,
    threads: int,
    /,
) -> None: ...
def spans(
    weight: int,
    cost: int,
    shares: int,
    scale: int,
    zero: int,
    rows: int,
    columns: int,
    group: int,
    polish: int,
    symmetric: bool,
    low: int,
    high: int,
    threads: int,
    /,
) -> None: ...
