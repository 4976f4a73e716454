"""How the Triton kernels of axial_attention are called: the kernel for a size, its grid, and its arguments."""

import contextlib
from typing import Any, NamedTuple

import torch
import triton
from fastvid.kernels.axial_attention import reference
from fastvid.kernels.axial_attention import triton_backward as backward
from fastvid.kernels.axial_attention import triton_bias as bias_kernels
from fastvid.kernels.axial_attention import triton_configs as configs
from fastvid.kernels.axial_attention import triton_forward as forward
from fastvid.kernels.axial_attention.triton_configs import BLOCK_D, Config, Cut
from torch import Tensor

MERGE_ROWS, SUM_PARTS, SUM_BLOCK = 16, 16, 128


def index_of(x: Tensor) -> int | None:
    return x.device.index if x.is_cuda else None


def on(x: Tensor):
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def cut_of(q: Tensor, k: Tensor, box: list[int]) -> Cut:
    return configs.cut(tuple(q.shape[1:4]), tuple(k.shape[1:4]), tuple(box))


def choose(q: Tensor, v: Tensor, bias: Tensor | None, cut: Cut, kind: str) -> Config | None:
    return configs.choose(
        index_of(q), kind, q.dtype, q.shape[5], v.shape[5], cut.n, cut.m, cut.line and bias is None
    )


def kinds(q: Tensor, v: Tensor, bias: Tensor | None, cut: Cut, gradient: bool) -> tuple[str, ...]:
    plain = cut.line and bias is None
    return configs.kinds(index_of(q), q.dtype, q.shape[5], v.shape[5], cut.n, cut.m, plain, gradient)


def constants_of(kind: str, E: int, D: int, line: bool, mask: str, tile: Config) -> dict[str, Any]:
    """Those of a kind of kernel that do not depend on the size of its boxes."""
    step = min(tile.step, max(_power(E), 0 if kind in ("tile", "long", "split", "box") else _power(D)))
    found = {"E": E, "D": D, "MASK": reference.MASKS.index(mask), "LINE": line, "STEP": step}
    if kind in ("box", "queries", "keys"):
        found["BLOCK_E"] = _power(E)
    if kind != "bias":
        found["BLOCK_D"] = min(tile.step if kind == "box" else BLOCK_D, _power(D))
    return found


def _power(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _run(config: Config) -> dict[str, int]:
    return {"num_warps": config.warps, "num_stages": config.stages}


def _sizes(cut: Cut) -> tuple[int, ...]:
    return *cut.cells, *cut.box, *cut.key_box


def _laid(cut: Cut, q: Tensor, k: Tensor, v: Tensor, grad: Tensor | None) -> tuple[Cut, tuple[int, ...], Any, Any]:
    """The cut as kernels see it, the strides of the four tensors, and those of the queries' and the keys' positions."""
    tables = [(0,) * 6 if x is None else configs.strides(x.stride(), cut.order) for x in (q, k, v, grad)]
    tables += [configs.position_strides(x.shape[1:4], cut.order) for x in (q, k)]
    cut, tables = configs.folded(cut, q.shape[0], tables)
    return cut, tuple(stride for table in tables[: 3 if grad is None else 4] for stride in table), *tables[4:]


def _strides_of(bias: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if bias is None else bias.stride()


def _across(kind: str, tile: Config, cut: Cut) -> int:
    """Columns of a tile that a box's keys get."""
    return configs.slots(tile, cut.n, cut.m)["SLOT_M"] if kind in ("tile", "box", "bias") else tile.keys


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor | None, cut: Cut, mask: str,
    scale: float, config: Config | None,
) -> None:  # fmt: skip
    """Fills out and lse, which are contiguous and not empty. config: in place of the one that would be chosen."""
    (kind,) = kinds(q, v, bias, cut, False)
    tile = config or choose(q, v, bias, cut, kind)
    units, D = out.shape[:5].numel() // cut.n, v.shape[5]
    cut, strides, positions, _ = _laid(cut, q, k, v, None)
    constants = constants_of(kind, q.shape[5], D, cut.line, mask, tile)
    constants["WHOLE"] = bias is not None and cut.m % _across(kind, tile, cut) == 0
    columns = triton.cdiv(D, constants["BLOCK_D"])
    after = *_sizes(cut), q.shape[4], scale, *strides, *_strides_of(bias), *positions
    if kind == "tile":
        slots = configs.slots(tile, cut.n, cut.m)
        groups = triton.cdiv(units, slots["PACK"]) * triton.cdiv(cut.n, slots["SLOT_N"])
        forward._tile_kernel[groups * columns,](
            q, k, v, bias, out, lse, units, *after, **constants, **slots, **_run(tile)
        )
        return
    split = kind == "split"
    rows, chunks = units * cut.n, triton.cdiv(cut.m, configs.CHUNK) if split else 1
    part = q.new_empty(chunks * rows * (D + 2), dtype=torch.float32) if split else None
    blocks = {"BLOCK_N": tile.rows, "BLOCK_M": tile.keys, "CHUNK": configs.CHUNK if split else 0}
    forward._long_kernel[units * triton.cdiv(cut.n, tile.rows) * chunks * columns,](
        q, k, v, bias, None if split else out, None if split else lse, part, rows, *after, **constants, **blocks,
        **_run(tile),
    )  # fmt: skip
    if split:
        forward._merge_kernel[triton.cdiv(rows, MERGE_ROWS) * columns,](
            part, out, lse, rows, chunks, *cut.cells, *cut.box, q.shape[4], *positions, D=D,
            LINE=cut.line, BLOCK=MERGE_ROWS, BLOCK_D=constants["BLOCK_D"], num_warps=4, num_stages=1,
        )  # fmt: skip


class Gradient(NamedTuple):
    """A call of the gradient: its arguments, which its kernels share; out, lse, grad_lse and delta are contiguous.

    delta: [B, T, H, W, A] float32, what `box` and `queries` work out for the kernels behind them; [0] if there are
    none. tiles: by kind, in place of what would be chosen.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    out: Tensor
    lse: Tensor
    grad_out: Tensor | None
    grad_lse: Tensor | None
    delta: Tensor
    cut: Cut
    mask: str
    scale: float
    tiles: dict[str, Config]

    def box(self, grad_q: Tensor | None, grad_k: Tensor | None, grad_v: Tensor | None) -> None:
        """Whole boxes: all gradients that are wanted, and delta."""
        tile, units = self._config("box"), self.out.shape[:5].numel() // self.cut.n
        slots = configs.slots(tile, self.cut.n, self.cut.m)
        rows, wanted = (_row(grad_q), _row(grad_k), _row(grad_v)), self.delta.numel() > 0
        backward._box_kernel[triton.cdiv(units, slots["PACK"]),](
            *self._given(), None if self.bias is None else self.out, self.grad_out, self.lse, self.grad_lse, grad_q,
            grad_k, grad_v, self.delta if wanted else None, units, *self._sizes(), *rows, *self._strides(True),
            **self._constants("box"), **slots,
        )  # fmt: skip

    def queries(self, grad_q: Tensor | None) -> None:
        """delta, and the gradient of q where it is wanted."""
        tile, units = self._config("queries"), self.out.shape[:5].numel() // self.cut.n
        blocks = {"BLOCK_N": tile.rows, "BLOCK_M": tile.keys}
        backward._queries_kernel[units * triton.cdiv(self.cut.n, tile.rows),](
            *self._given(), self.out, self.grad_out, self.lse, self.grad_lse, grad_q, self.delta, *self._sizes(),
            _row(grad_q), *self._strides(), **self._constants("queries"), **blocks,
        )  # fmt: skip

    def keys(self, grad_k: Tensor | None, grad_v: Tensor | None) -> None:
        """Of long boxes the gradients of k and v."""
        tile, units = self._config("keys"), self.out.shape[:5].numel() // self.cut.n
        blocks = {"BLOCK_N": tile.rows, "BLOCK_M": tile.keys}
        backward._keys_kernel[units * triton.cdiv(self.cut.m, tile.keys),](
            *self._given(), self.grad_out, self.lse, self.delta, grad_k, grad_v, *self._sizes(), _row(grad_k),
            _row(grad_v), *self._strides(True), **self._constants("keys"), **blocks,
        )  # fmt: skip

    def bias_sum(self, grad_bias: Tensor) -> None:
        """The gradient of the bias, contiguous [A, n, m], by way of delta."""
        tile, (A, n, m) = self._config("bias"), grad_bias.shape
        slots = configs.slots(tile, n, m)
        tiles = A * triton.cdiv(n, slots["SLOT_N"]) * triton.cdiv(m, slots["SLOT_M"])
        boxes = self.out.shape[:4].numel() // n
        chunk = configs.chunk_of(slots["PACK"], boxes, tiles, grad_bias.numel())
        chunks = triton.cdiv(boxes, chunk)
        part = grad_bias.new_empty(chunks * slots["PACK"], A, n, m, dtype=torch.float32)
        bias_kernels._bias_kernel[chunks * tiles,](
            *self._given(), self.grad_out, self.lse, self.delta, part, boxes, chunk, *self._sizes(), *self._strides(),
            **self._constants("bias"), **slots,
        )
        bias_kernels._sum_kernel[triton.cdiv(grad_bias.numel(), SUM_BLOCK),](
            part, grad_bias, part.shape[0], grad_bias.numel(), BLOCK_S=SUM_PARTS, BLOCK=SUM_BLOCK, num_warps=4,
            num_stages=1,
        )  # fmt: skip

    def _config(self, kind: str) -> Config:
        return self.tiles.get(kind) or choose(self.q, self.v, self.bias, self.cut, kind)

    def _given(self) -> tuple[Tensor | None, ...]:
        return self.q, self.k, self.v, self.bias

    def _sizes(self) -> tuple[int | float, ...]:
        return *_sizes(self._laid()[0]), self.q.shape[4], self.scale

    def _laid(self) -> tuple[Cut, tuple[int, ...], Any, Any]:
        # without a gradient the strides of q, which nothing is read by
        return _laid(self.cut, self.q, self.k, self.v, self.q if self.grad_out is None else self.grad_out)

    def _strides(self, with_keys: bool = False) -> tuple[int, ...]:
        _, strides, positions, key_positions = self._laid()
        return *strides, *_strides_of(self.bias), *positions, *(key_positions if with_keys else ())

    def _constants(self, kind: str) -> dict[str, Any]:
        tile = self._config(kind)
        found = constants_of(kind, self.q.shape[5], self.v.shape[5], self._laid()[0].line, self.mask, tile)
        found["WHOLE"] = self.bias is not None and self.cut.m % _across(kind, tile, self.cut) == 0
        return found | _run(tile)


def _row(grad: Tensor | None) -> int:
    """Elements from one position to the next."""
    return 0 if grad is None else grad.stride(3)
