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
from fastvid.kernels.axial_attention.triton_configs import Config, Cut
from torch import Tensor

BLOCK_D = 128  # columns of values at once
MERGE_ROWS, SUM_PARTS, SUM_BLOCK = 16, 16, 128


def index_of(x: Tensor) -> int | None:
    return x.device.index if x.is_cuda else None


def on(x: Tensor):
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def cut_of(q: Tensor, k: Tensor, box: list[int]) -> Cut:
    return configs.cut(tuple(q.shape[1:4]), tuple(k.shape[1:4]), tuple(box))


def width_of(q: Tensor, v: Tensor) -> int:
    """What decides how much room a tile needs."""
    return max(q.shape[5], min(v.shape[5], BLOCK_D))


def choose(q: Tensor, v: Tensor, cut: Cut, kind: str) -> Config | None:
    return configs.choose(index_of(q), kind, q.dtype, width_of(q, v), cut.n, cut.m)


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


def _strides(cut: Cut, *tensors: Tensor | None) -> tuple[int, ...]:
    """Of tensors [B, T, H, W, A, E], with the axes turned; zeros for None."""
    given = (((0,) * 6) if x is None else configs.strides(x.stride(), cut.order) for x in tensors)
    return tuple(stride for strides in given for stride in strides)


def _strides_of(bias: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if bias is None else bias.stride()


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor | None, cut: Cut, mask: str,
    scale: float, config: Config | None,
) -> None:  # fmt: skip
    """Fills out and lse, which are contiguous and not empty. config: in place of the one that would be chosen."""
    kind = configs.forward_kind(index_of(q), q.dtype, width_of(q, v), cut.n, cut.m)
    tile = config or choose(q, v, cut, kind)
    units, D = out.shape[:5].numel() // cut.n, v.shape[5]
    constants = constants_of(kind, q.shape[5], D, cut.line, mask, tile)
    columns = triton.cdiv(D, constants["BLOCK_D"])
    after = (*_sizes(cut), q.shape[4], scale, *_strides(cut, q, k, v), *_strides_of(bias),
             *configs.position_strides(q.shape[1:4], cut.order))  # fmt: skip
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
            part, out, lse, rows, chunks, *cut.cells, *cut.box, q.shape[4],
            *configs.position_strides(q.shape[1:4], cut.order), D=D, LINE=cut.line, BLOCK=MERGE_ROWS,
            BLOCK_D=constants["BLOCK_D"], num_warps=4, num_stages=1,
        )  # fmt: skip


class Gradient(NamedTuple):
    """A call of the gradient: its arguments, which its kernels share; out, lse, grad_lse and delta are contiguous.

    delta: [B, T, H, W, A] float32, what `box` and `queries` work out for the kernels behind them; [0] if there are
    none. configs: by kind, in place of what would be chosen.
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
    configs: dict[str, Config]

    def box(self, grad_q: Tensor | None, grad_k: Tensor | None, grad_v: Tensor | None) -> None:
        """Whole boxes: all gradients that are wanted, and delta."""
        tile, units = self._config("box"), self.out.shape[:5].numel() // self.cut.n
        slots = configs.slots(tile, self.cut.n, self.cut.m)
        rows, wanted = (_row(grad_q), _row(grad_k), _row(grad_v)), self.delta.numel() > 0
        backward._box_kernel[triton.cdiv(units, slots["PACK"]),](
            *self._given(), self.out if wanted else None, self.grad_out, self.lse, self.grad_lse, grad_q, grad_k,
            grad_v, self.delta if wanted else None, units, *self._sizes(), *rows, *self._strides(),
            *self._key_positions(), **self._constants("box"), **slots,
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
            _row(grad_v), *self._strides(), *self._key_positions(), **self._constants("keys"), **blocks,
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
        return self.configs.get(kind) or choose(self.q, self.v, self.cut, kind)

    def _given(self) -> tuple[Tensor | None, ...]:
        return self.q, self.k, self.v, self.bias

    def _sizes(self) -> tuple[int | float, ...]:
        return *_sizes(self.cut), self.q.shape[4], self.scale

    def _strides(self) -> tuple[int, ...]:
        positions = configs.position_strides(self.q.shape[1:4], self.cut.order)
        given = _strides(self.cut, self.q, self.k, self.v, self.grad_out)
        return *given, *_strides_of(self.bias), *positions

    def _key_positions(self) -> tuple[int, ...]:
        return configs.position_strides(self.k.shape[1:4], self.cut.order)

    def _constants(self, kind: str) -> dict[str, Any]:
        tile = self._config(kind)
        found = constants_of(kind, self.q.shape[5], self.v.shape[5], self.cut.line, self.mask, tile)
        return found | _run(tile)


def _row(grad: Tensor | None) -> int:
    """Elements from one position to the next."""
    return 0 if grad is None else grad.stride(3)
