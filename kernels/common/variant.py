"""What is said about a kernel so that it can be compiled where no GPU is."""

from typing import Any, NamedTuple


class Variant(NamedTuple):
    """One kernel in one shipped configuration: all that compiling it ahead of time needs.

    Every `triton_gpu.py` answers `variants() -> list[Variant]`; `bench/static.py` compiles each for every chip that
    is named there and reads registers, shared memory, spills and instructions from the machine code. `targets` keeps
    a configuration that is shipped for some chips only (a tile too large for the others) from being held against the
    rest; empty means all.

    Attributes:
        kernel: The function under `triton.jit`.
        name: Unique within its room and stable: it is the key of the room's report. Kernel, precision, tile, warps
            and stages, as in "nearest_fp16_128x128x64_w8_s3".
        signature: Argument name -> Triton type ("*fp32", "*i64", "i32", "fp32"), for every argument, in order; a
            compile-time constant has "constexpr". ":16" after the type promises what the launcher promises: a pointer
            or an integer that 16 divides ("*fp16:16"), without which no load can be 128 bits wide.
        constants: Argument name -> value of every "constexpr".
        num_warps: Warps (on AMD: wavefronts) per block, a power of two.
        num_stages: Depth of the software pipeline, 1 or more.
        matrix: True where the kernel must run on the tensor cores (on AMD: the matrix cores).
        precision: What the products are formed in: "fp16", "bf16", "tf32", "ieee", or None without products.
            "ieee" forbids tensor-core instructions.
        targets: The chips it is shipped for ("sm_90", "gfx942", ...); empty for all.
    """

    kernel: Any
    name: str
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    matrix: bool
    precision: str | None
    targets: tuple[str, ...] = ()
