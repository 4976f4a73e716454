"""One trained gated PixelCNN as every sampler reads it: a blob of weights, and a table of what lies where in it.

`pack` makes both from the tensors of a state dict and the taps of its convolutions, `Unpacked` gives plain matrices
back, `Table` names the words. The layout is described in README.md beside this file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Tap = tuple[int, int, int]  # (dt, dy, dx): the neighbour's offset

VERSION = 1
PANEL = 16  # columns of a matrix that lie side by side
ALIGNMENT = 64  # bytes, of every section
WEIGHTS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}  # name -> storage, in table order

HEADER = (
    "version", "codes", "width", "stride", "layers", "condition_channels", "heads", "head_stride", "weight_type",
    "wavefront", "head_width", "frames_seen", "radius",
    "input_vertical_past", "input_vertical_now", "input_horizontal_past", "input_horizontal_now",
    "vertical_past", "vertical_now", "horizontal_past", "horizontal_now",
    "first_tap", "first_global", "first_layer", "layer_words", "channels", "words",
)  # fmt: skip
CONVOLUTIONS = ("input_vertical", "input_horizontal", "vertical", "horizontal")
GLOBALS = (
    "table_v", "bias_v", "table_h", "bias_h", "head1", "head1_scale", "head1_bias", "head2", "head2_scale", "head2_bias"
)  # fmt: skip
MATRICES = ("v_past", "v_now", "h_past", "h_now", "cond", "link", "out", "qkv", "att_out")
LAYER = (
    *(word for name in MATRICES for word in (name, f"{name}_scale")),
    "v_bias", "h_bias", "out_bias", "qkv_bias", "qkv_position", "att_bias",
)  # fmt: skip
ABSENT = -1  # the offset of a section that is not there


class Taps(NamedTuple):
    """The live taps of the four kinds of convolution, those of earlier frames before those of the present one."""

    input_vertical: tuple[Tap, ...]
    input_horizontal: tuple[Tap, ...]
    vertical: tuple[Tap, ...]
    horizontal: tuple[Tap, ...]


class Packed(NamedTuple):
    """weights: uint8 [bytes]. table: int64 [words], on the CPU."""

    weights: Tensor
    table: Tensor


class Table:
    """The words of a packed model's table by their names: `table.width`, `table.taps`, `table.layer(3)["h_now"]`."""

    def __init__(self, words: Tensor):
        self.words: list[int] = words.tolist()
        if self.words[:1] != [VERSION] or len(self.words) < len(HEADER) or self.words[-1 + len(HEADER)] != len(words):
            got = f"got words starting with {self.words[:1]}"
            raise ValueError(f"Table: wanted a packed model of version {VERSION}, {got}; pack the model again.")

    def __getattr__(self, name: str) -> int:
        if name in HEADER:
            return self.words[HEADER.index(name)]
        raise AttributeError(name)

    @property
    def taps(self) -> Taps:
        at, found = self.first_tap, []
        for name in CONVOLUTIONS:
            count = getattr(self, f"{name}_past") + getattr(self, f"{name}_now")
            found.append(tuple(tuple(self.words[at + 3 * i : at + 3 * i + 3]) for i in range(count)))
            at += 3 * count
        return Taps(*found)

    @property
    def globals(self) -> dict[str, int]:
        """Byte offsets of the sections that belong to no layer."""
        return dict(zip(GLOBALS, self.words[self.first_global :], strict=False))

    def layer(self, i: int) -> dict[str, int]:
        """Byte offsets of a layer's sections."""
        return dict(zip(LAYER, self.words[self.first_layer + i * self.layer_words :], strict=False))

    @property
    def attention_width(self) -> int:
        """Columns of queries, of keys, of values: every head padded to `head_stride`."""
        return self.heads * self.head_stride

    @property
    def weights(self) -> str:
        return list(WEIGHTS)[self.weight_type]


def pack(state: dict[str, Tensor], taps: Taps, heads: int, wavefront: bool, weights: str) -> Packed:
    """A gated PixelCNN's tensors in the layout of the samplers, on the device of the tensors.

    state:     the state dict of a fastvid.nn.GatedPixelStack, floating. taps: those of its convolutions.
    heads:     of its attention. wavefront: whether attention is axial and no vertical tap of a layer leaves its column.
    weights:   "float32", "bfloat16" (rounded to nearest) or "int8" (a scale per output); biases and the input layer's
               look-up tables stay float32.
    Returns:   Packed. The look-up tables are formed in float64, then rounded once.
    Raises:    ValueError for another kind of weights.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"pack: `weights` must be one of {', '.join(WEIGHTS)}, got {weights!r}.")
    return _Writer(state, taps, heads, wavefront, weights).finish()


def position_bytes(state: dict[str, Tensor], taps: Taps) -> int:
    """Bytes of float32 weights that every single code needs: present horizontal taps, 1x1s, attention, head."""
    share = sum(map(_now, taps.horizontal)) / max(1, len(taps.horizontal))
    horizontal = sum(p.numel() for name, p in state.items() if name.endswith(".horizontal.weight"))
    endings = (".out.weight", ".qkv.weight", "head.1.weight", "head.3.weight")
    return int(4 * (share * horizontal + sum(p.numel() for name, p in state.items() if name.endswith(endings))))


@dataclass
class _Writer:
    """Appends sections to the blob and notes where they are."""

    state: dict[str, Tensor]
    taps: Taps
    heads: int
    wavefront: bool
    weights: str

    def __post_init__(self):
        embed = self.state["embed.weight"]
        self.codes, self.channels = embed.shape
        self.width = _up(self.channels, 8)
        self.stride = _up(self.width, PANEL)
        self.layers = 1 + max((int(n.split(".")[1]) for n in self.state if n.startswith("layers.")), default=-1)
        self.head_width = self.channels // self.heads if any(".attention." in name for name in self.state) else 0
        self.head_stride = _up(self.head_width, 8)
        self.bytes, self.parts, self.device = 0, [], embed.device

    def finish(self) -> Packed:
        shared, layers = self._globals(), [self._layer(i) for i in range(self.layers)]
        taps = [word for group in self.taps for tap in group for word in tap]
        first_global = len(HEADER) + len(taps)
        first_layer = first_global + len(GLOBALS)
        every = [tap for group in self.taps for tap in group]
        counts = [sum(keep(tap) for tap in group) for group in self.taps for keep in (_past, _now)]
        cond = self.state["layers.0.condition.weight"].shape[1] if self.layers else 0
        header = [
            VERSION, self.codes, self.width, self.stride, self.layers, cond,
            self.heads if self.head_width else 0, self.head_stride, list(WEIGHTS).index(self.weights),
            int(self.wavefront), self.head_width, 1 - min(dt for dt, _, _ in every),
            max(max(abs(dy), abs(dx)) for _, dy, dx in every), *counts,
            len(HEADER), first_global, first_layer, len(LAYER), self.channels, first_layer + self.layers * len(LAYER),
        ]  # fmt: skip
        words = header + taps + [shared.get(name, ABSENT) for name in GLOBALS]
        words += [layer.get(name, ABSENT) for layer in layers for name in LAYER]
        return Packed(torch.cat(self.parts), torch.tensor(words, dtype=torch.int64))

    def _globals(self) -> dict[str, int]:
        found: dict[str, int] = {}
        embed = self._tensor("embed.weight").double()
        for letter, name in (("v", "input_vertical"), ("h", "input_horizontal")):
            table = embed @ self._tensor(f"{name}.weight").double()  # [taps, K, C]
            found[f"table_{letter}"] = self._floats(_padded(table, self.stride))
            found[f"bias_{letter}"] = self._floats(_padded(self._tensor(f"{name}.bias"), self.stride))
        for name, place in (("head1", "head.1"), ("head2", "head.3")):
            rows = self._rows(self._tensor(f"{place}.weight").t())
            self._matrix(found, name, rows if name == "head2" else _padded(rows, self.width))
            found[f"{name}_bias"] = self._bias(self._tensor(f"{place}.bias"))
        return found

    def _layer(self, i: int) -> dict[str, int]:
        found: dict[str, int] = {}

        def own(name: str) -> Tensor:
            return self._tensor(f"layers.{i}.{name}")

        for letter, name in (("v", "vertical"), ("h", "horizontal")):
            weight, group = own(f"{name}.weight"), getattr(self.taps, name)
            for when, keep in (("past", _past), ("now", _now)):
                chosen = [at for at, tap in enumerate(group) if keep(tap)]
                if chosen:
                    self._matrix(found, f"{letter}_{when}", self._paired(self._rows(weight[chosen]).flatten(0, 1)))
            found[f"{letter}_bias"] = self._floats(self._paired(own(f"{name}.bias")))
        self._matrix(found, "cond", self._paired(own("condition.weight").t()))
        self._matrix(found, "link", self._paired(self._paired(own("link.weight").t()).t()).t())
        self._matrix(found, "out", _padded(self._rows(own("out.weight").t()), self.width))
        found["out_bias"] = self._bias(own("out.bias"))
        if f"layers.{i}.attention.qkv.weight" in self.state:
            self._attention(found, own)
        return found

    def _attention(self, found: dict[str, int], own: Callable[[str], Tensor]) -> None:
        self._matrix(found, "qkv", self._rows(self._by_head(own("attention.qkv.weight").t(), 3)))
        found["qkv_bias"] = self._bias(self._by_head(own("attention.qkv.bias"), 3))
        found["qkv_position"] = self._floats(self._by_head(own("attention.qkv_position.weight").t(), 3))
        rows = self._by_head(own("attention.out.weight"), 1).t()  # [D, C]
        self._matrix(found, "att_out", _padded(rows, self.width))
        found["att_bias"] = self._bias(own("attention.out.bias"))

    def _tensor(self, name: str) -> Tensor:
        return self.state[name].detach().float()

    def _rows(self, matrix: Tensor) -> Tensor:
        """[..., C of the model, N] -> [..., width, N], zeros below."""
        return matrix if self.width == self.channels else F.pad(matrix, (0, 0, 0, self.width - self.channels))

    def _paired(self, matrix: Tensor) -> Tensor:
        """The last axis 2C -> 2 width: eight tanh channels, their eight sigmoid channels, and so on."""
        halves = matrix.unflatten(-1, (2, self.channels))
        halves = _padded(halves, self.width).unflatten(-1, (self.width // 8, 8))  # [..., 2, groups, 8]
        return halves.transpose(-3, -2).flatten(-3)

    def _by_head(self, matrix: Tensor, groups: int) -> Tensor:
        """The last axis, `groups` times A heads of E, with every head padded to its stride."""
        split = matrix.unflatten(-1, (groups * self.heads, self.head_width))
        return _padded(split, self.head_stride).flatten(-2)

    def _matrix(self, found: dict[str, int], name: str, matrix: Tensor) -> None:
        """[Kin, N] as panels; int8 with the scales of its columns."""
        panels = _padded(matrix, PANEL, multiple=True).unflatten(-1, (-1, PANEL)).transpose(0, 1)  # [panels, Kin, 16]
        if self.weights == "int8":
            scale = panels.abs().amax(dim=1, keepdim=True) / 127  # [panels, 1, 16]
            panels = (panels / scale.clamp_min(1e-30)).round()
            found[f"{name}_scale"] = self._floats(scale.flatten())
        panels = panels.to(WEIGHTS[self.weights])
        if self.weights == "bfloat16":  # lane i beside lane i + 8: one 32-bit word
            panels = panels.unflatten(-1, (2, 8)).transpose(-2, -1)
        found[name] = self._append(panels)

    def _bias(self, values: Tensor) -> int:
        return self._floats(_padded(values, PANEL, multiple=True))

    def _floats(self, values: Tensor) -> int:
        return self._append(values.float())

    def _append(self, values: Tensor) -> int:
        raw, at = values.reshape(-1).view(torch.uint8), self.bytes
        self.parts.append(raw)
        if missing := -raw.numel() % ALIGNMENT:
            self.parts.append(raw.new_zeros(missing))
        self.bytes += raw.numel() + missing
        return at


class Unpacked:
    """A packed model as plain matrices [Kin, N] and vectors in natural order, widths padded as packed.

    globals and layers[i] map the names of sections (without _scale) to tensors; int8 comes multiplied out.
    """

    def __init__(self, packed: Packed, dtype: torch.dtype = torch.float32):
        self.packed, self.dtype, self.table = packed, dtype, Table(packed.table)
        t, taps = self.table, self.table.taps
        self.globals = {
            "table_v": self._floats(t.globals["table_v"], len(taps.input_vertical), t.codes, t.stride)[..., : t.width],
            "table_h": self._floats(t.globals["table_h"], len(taps.input_horizontal), t.codes, t.stride)[
                ..., : t.width
            ],
            "bias_v": self._floats(t.globals["bias_v"], t.width),
            "bias_h": self._floats(t.globals["bias_h"], t.width),
            "head1": self._matrix(t.globals, "head1", t.width, t.width),
            "head1_bias": self._floats(t.globals["head1_bias"], t.width),
            "head2": self._matrix(t.globals, "head2", t.width, t.codes),
            "head2_bias": self._floats(t.globals["head2_bias"], t.codes),
        }
        self.layers = [self._layer(t.layer(i)) for i in range(t.layers)]

    def _layer(self, at: dict[str, int]) -> dict[str, Tensor]:
        t, C, D = self.table, self.table.width, self.table.attention_width
        found = {
            name: self._natural(self._matrix(at, name, rows, 2 * C))
            for name, rows in (
                ("v_past", t.vertical_past * C), ("v_now", t.vertical_now * C), ("h_past", t.horizontal_past * C),
                ("h_now", t.horizontal_now * C), ("cond", t.condition_channels), ("link", 2 * C),
            )
            if at[name] != ABSENT
        }  # fmt: skip
        found["link"] = self._natural(found["link"].t()).t()
        found |= {name: self._natural(self._floats(at[name], 2 * C)) for name in ("v_bias", "h_bias")}
        found |= {"out": self._matrix(at, "out", C, C), "out_bias": self._floats(at["out_bias"], C)}
        if at["qkv"] != ABSENT:
            found |= {"qkv": self._matrix(at, "qkv", C, 3 * D), "qkv_bias": self._floats(at["qkv_bias"], 3 * D)}
            found |= {"qkv_position": self._floats(at["qkv_position"], 3, 3 * D)}
            found |= {"att_out": self._matrix(at, "att_out", D, C), "att_bias": self._floats(at["att_bias"], C)}
        return found

    def _natural(self, paired: Tensor) -> Tensor:
        return paired.unflatten(-1, (-1, 2, 8)).transpose(-3, -2).flatten(-3)

    def _floats(self, at: int, *shape: int) -> Tensor:
        count = torch.Size(shape).numel()
        return self.packed.weights[at : at + 4 * count].view(torch.float32).view(shape).to(self.dtype)

    def _matrix(self, at: dict[str, int], name: str, rows: int, columns: int) -> Tensor:
        stored, panels = WEIGHTS[self.table.weights], -(-columns // PANEL)
        raw = self.packed.weights[at[name] : at[name] + panels * rows * PANEL * stored.itemsize].view(stored)
        if stored == torch.bfloat16:
            raw = raw.view(-1, 8, 2).transpose(1, 2).reshape(-1)
        matrix = raw.view(panels, rows, PANEL).to(self.dtype)
        if stored == torch.int8:
            matrix = matrix * self._floats(at[f"{name}_scale"], panels, 1, PANEL)
        return matrix.transpose(0, 1).flatten(1)[:, :columns]


def _past(tap: Tap) -> bool:
    return tap[0] < 0


def _now(tap: Tap) -> bool:
    return tap[0] == 0


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _padded(values: Tensor, length: int, multiple: bool = False) -> Tensor:
    """Zeros behind the last axis, to `length` or to the next multiple of it."""
    missing = (_up(values.shape[-1], length) if multiple else length) - values.shape[-1]
    return F.pad(values, (0, missing)) if missing else values
