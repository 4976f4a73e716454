"""Tiles of the Triton sampler: what its kernels are compiled for, decided by the model and the grid alone."""

from dataclasses import dataclass

import torch
import triton
from fastvid.kernels.pixelcnn_sampler.packed import ABSENT, Table

# A multiprocessor reads a narrow model's weights from the second-level cache in less time than launches take: up to so
# many bytes per code one program draws a row. A guess until a GPU has been asked.
SINGLE_BYTES = 2 << 20
SINGLE_SHIPS = torch.version.hip is None  # AMD's compiler spills the program that holds every stage
LEAST_CHUNK = 128  # positions of the cache that a program looks at
LEAST_KEYS, MOST_KEYS = 16, 64  # of them at once


@dataclass(frozen=True)
class Sizes:
    """What the kernels of a model on a grid are compiled for; all but `keys` and the chunks follows from the table."""

    C: int
    S: int
    codes: int
    condition: int
    frames: int
    taps: int
    kind: int
    A: int
    E: int
    axial: bool
    positions: int  # that a code can look at
    single: bool

    @classmethod
    def of(cls, table: Table, T: int, H: int, W: int, single: bool | None) -> "Sizes":
        positions = T + H + W - 2 if table.wavefront else T * H * W
        if single is None:
            single = SINGLE_SHIPS and bytes_of_a_code(table) <= SINGLE_BYTES
        return cls(
            table.width, table.stride, table.codes, table.condition_channels, table.frames_seen, table.horizontal_now,
            table.weight_type, table.heads, table.head_stride, bool(table.wavefront), positions, single,
        )  # fmt: skip

    @property
    def D(self) -> int:
        return self.A * self.E

    @property
    def logits(self) -> int:
        """Codes rounded up to whole panels."""
        return triton.cdiv(self.codes, 16) * 16

    def channels(self) -> dict[str, int]:
        return {"C": self.C, "S": self.S}

    def tile(self) -> dict[str, int]:
        """Of a product for the cells of a row: two panels, so that many programs share what a small row needs."""
        return {"KIND": self.kind, "BLOCK_M": 32, "PANELS": 2, "BLOCK_K": 64 if self.kind else 32}

    @property
    def stages(self) -> int:
        """Of the pipeline over such tiles: with three deep ones in flight ptxas spills on sm_86 and sm_100."""
        return 2 if self.kind else 3

    def panels(self, K: int) -> dict[str, int]:
        """Of a product for one cell: as much of a panel at once as registers hold, or several panels' beginning."""
        panels, widest = (4 if self.kind else 8, 64) if self.single else (1, 512)
        return {"KIND": self.kind, "PANELS": panels, "BLOCK_K": min(triton.next_power_of_2(K), widest)}

    def attention(self) -> dict[str, int]:
        """Of a look at the cache: chunks of positions for programs to share, as many as can be put together; or one."""
        block_a, block_e = (max(1, triton.next_power_of_2(n)) for n in (self.A, self.E))
        most = 4096 // block_e if self.single else MOST_KEYS
        keys = max(LEAST_KEYS, min(most, triton.next_power_of_2(self.positions)))
        most = 1 if self.single else max(1, min(32, 16384 // (block_a * block_e)))
        chunk = max(1 if self.single else LEAST_CHUNK, triton.cdiv(triton.cdiv(self.positions, most), keys) * keys)
        chunks = triton.next_power_of_2(triton.cdiv(self.positions, chunk))
        return {"BLOCK_A": block_a, "BLOCK_E": block_e, "CHUNKS": chunks, "CHUNK": chunk, "KEYS": keys,
                "AXIAL": self.axial}  # fmt: skip

    def draw(self, given: bool) -> dict[str, int]:
        return {"CODES": self.codes, "LOGITS": self.logits, "S": self.S, "TAPS": self.taps, "GIVEN": given,
                "BLOCK_N": triton.next_power_of_2(self.logits), "BLOCK_S": triton.next_power_of_2(self.S)}  # fmt: skip


def bytes_of_a_code(table: Table) -> int:
    """Bytes of the weights that every code needs."""
    C, D = table.width, table.attention_width
    attended = sum(table.layer(i)["qkv"] != ABSENT for i in range(table.layers))
    numbers = table.layers * (2 * table.horizontal_now + 1) * C * C + attended * 4 * C * D + C * (C + table.codes)
    return numbers * (4, 2, 1)[table.weight_type]
