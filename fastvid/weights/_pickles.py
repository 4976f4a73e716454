"""Float32 arrays out of a NumPy pickle, read as data: nothing named in the file is imported or called.

Python's own unpickler runs what a file tells it to. Here the few steps that rebuild a nested dict of arrays are done by
hand; anything else that a file asks for is refused by its name.
"""

import io
import pickletools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvid.errors import WeightsError

STEPS_LIMIT, TENSORS_LIMIT = 200_000, 10_000
_REBUILD = {"numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct"}  # old and new name
_NAMES = {*_REBUILD, "numpy ndarray", "numpy dtype"}
_MARK = object()


class _Name(str):
    """Something importable that the file names. It stays a name."""


class _Shell:
    """An array or dtype between the step that makes it and the one that fills it."""

    def __init__(self, word: str):
        self.word, self.value = word, None


def read_arrays(data: bytes, source: str) -> dict[str, Tensor]:
    """The arrays of a pickled nested dict, their keys joined by bars.

    data:    the whole pickle, of protocol 2 to 5. source: what to call it in messages.
    Returns: float32 tensors by name; "/" in a key counts as a level.
    Raises:  WeightsError if it is damaged, asks for anything but arrays in dicts, or holds other numbers than float32.
    """
    try:
        return _flat(_Machine(source).run(data), source)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        if isinstance(error, WeightsError):
            raise
        reason = str(error)[:120]
        raise WeightsError(f"{source}: not a whole pickle of arrays ({reason}); download it again.") from error


class _Machine:
    """The stack machine of pickle, without the steps that could run code."""

    def __init__(self, source: str):
        self.source, self.stack, self.memo = source, [], {}

    def run(self, data: bytes) -> Any:
        for count, (step, given, position) in enumerate(pickletools.genops(io.BytesIO(data))):
            if count >= STEPS_LIMIT:
                raise WeightsError(f"{self.source}: a pickle of over {STEPS_LIMIT} steps; weights need far fewer.")
            if step.name == "STOP":
                return self.stack.pop()
            self._step(step.name, given, position)
        raise ValueError("no end")

    def _step(self, name: str, given: Any, position: int) -> None:
        stack = self.stack
        if name in ("PROTO", "FRAME"):
            return
        if name in ("BININT", "BININT1", "BININT2", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES",
                    "SHORT_BINBYTES", "BINBYTES8"):  # fmt: skip
            stack.append(given)
        elif name in ("NONE", "NEWTRUE", "NEWFALSE"):
            stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            self.memo[len(self.memo) if given is None else given] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[given])
        elif name in ("EMPTY_DICT", "MARK", "EMPTY_TUPLE"):
            stack.append({"EMPTY_DICT": {}, "MARK": _MARK, "EMPTY_TUPLE": ()}[name])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(self._pop(int(name[-1]))))
        elif name == "TUPLE":
            stack.append(tuple(self._pop_to_mark()))
        elif name == "SETITEM":
            self._set_items(self._pop(2))
        elif name == "SETITEMS":
            self._set_items(self._pop_to_mark())
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            stack.append(self._name(given if name == "GLOBAL" else " ".join(self._pop(2))))
        elif name == "REDUCE":
            stack.append(self._made(*self._pop(2)))
        elif name == "BUILD":
            self._fill(state=stack.pop(), shell=stack[-1])
        else:
            raise WeightsError(f"{self.source}: refused: its step {name} at byte {position} is not needed for arrays.")

    def _pop(self, count: int) -> list:
        if len(self.stack) < count:
            raise ValueError("empty stack")
        taken = self.stack[-count:]
        del self.stack[-count:]
        return taken

    def _pop_to_mark(self) -> list:
        place = max(i for i, value in enumerate(self.stack) if value is _MARK)
        taken = self.stack[place + 1 :]
        del self.stack[place:]
        return taken

    def _set_items(self, pairs: list) -> None:
        into = self.stack[-1]
        if type(into) is not dict or len(pairs) % 2 or not all(type(key) is str for key in pairs[::2]):
            raise ValueError("items of something other than a dict by names")
        into.update(zip(pairs[::2], pairs[1::2], strict=True))

    def _name(self, words: str) -> _Name:
        if words not in _NAMES:
            raise WeightsError(
                f"{self.source}: refused: it asks for {words[:80].replace(' ', '.')}, and weights need only NumPy "
                "arrays; do not open this file elsewhere unless you trust it."
            )
        return _Name(words)

    def _made(self, name: Any, given: Any) -> _Shell:
        if isinstance(name, _Name) and name in _REBUILD and given[0] == "numpy ndarray":
            return _Shell("array")
        if isinstance(name, _Name) and name == "numpy dtype" and given[0] == "f4":
            return _Shell("dtype")
        raise ValueError(f"call of {name} with {str(given)[:60]}; wanted float32 arrays")

    def _fill(self, state: Any, shell: Any) -> None:
        if shell.word == "dtype":
            if state[1] != "<":
                raise ValueError("wanted little-endian numbers")
            shell.value = state
            return
        _, shape, dtype, by_columns, content = state
        if dtype.word != "dtype" or dtype.value is None or type(content) is not bytes:
            raise ValueError("an array without numbers")
        if type(shape) is not tuple or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError("an array of unknown shape")  # NumPy would make a size up from a negative one
        values = np.frombuffer(content, "<f4").reshape(shape, order="F" if by_columns else "C")
        shell.value = torch.from_numpy(np.array(values, order="C"))


def _flat(tree: Any, source: str) -> dict[str, Tensor]:
    if type(tree) is not dict:
        raise ValueError("wanted a dict of arrays")
    found, waiting, visited = {}, [("", tree)], 0
    while waiting:
        prefix, branch = waiting.pop()
        for key, value in branch.items():
            visited += 1
            if visited > TENSORS_LIMIT:  # a dict inside itself has no end
                raise WeightsError(f"{source}: over {TENSORS_LIMIT} tensors; no network here has so many.")
            name = f"{prefix}{key.replace('/', '|')}"
            if type(value) is dict:
                waiting.append((f"{name}|", value))
            elif isinstance(value, _Shell) and isinstance(value.value, Tensor):
                found[name] = value.value
            else:
                raise ValueError(f"{name[:80]} is not an array")
    return found
