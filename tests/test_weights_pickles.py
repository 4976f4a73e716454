"""Pickles of arrays are read as data: the right ones exactly, all others refused, and nothing in them is run."""

import random
import struct

import numpy as np
import pytest

from fastvid.errors import WeightsError
from fastvid.weights._pickles import read_arrays

A = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
B = np.float32([1.5, -2.5])


def _word(text):
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def _steps(value):
    """The steps of pickle protocol 3 that rebuild a value; of an array those that NumPy itself asks for."""
    if isinstance(value, dict):
        return b"}(" + b"".join(_word(key) + _steps(inner) for key, inner in value.items()) + b"u"
    if isinstance(value, tuple):
        return b"(" + b"".join(_steps(inner) for inner in value) + b"t"
    if isinstance(value, (np.ndarray, np.dtype)):
        call, given, state = value.__reduce__()
        return _steps(call) + _steps(given) + b"R" + _steps(state) + b"b"
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, bytes):
        return b"B" + struct.pack("<I", len(value)) + value
    if isinstance(value, str):
        return _word(value)
    return f"c{value.__module__}\n{value.__qualname__}\n".encode()


def _nested(tree):
    return b"\x80\x03" + _steps(tree) + b"."


def _as_old(data):
    return data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def test_a_nested_dict_becomes_names_joined_by_bars():
    data = _nested({"params": {"Conv_0": {"kernel": A, "bias": B}, "Branch_0/Conv_1": {"bias": B + 1}}})
    assert b"numpy._core.multiarray" in data or b"numpy.core.multiarray" in data
    for written in (data, _as_old(data)):
        told = read_arrays(written, "file")
        assert told.keys() == {"params|Conv_0|kernel", "params|Conv_0|bias", "params|Branch_0|Conv_1|bias"}
        assert (told["params|Conv_0|kernel"].numpy() == A).all()
        assert (told["params|Branch_0|Conv_1|bias"].numpy() == B + 1).all()


def test_arrays_by_columns_are_turned():
    told = read_arrays(_nested({"a": np.asfortranarray(A)}), "file")["a"]
    assert told.shape == A.shape and (told.numpy() == A).all() and told.is_contiguous()


def test_memory_is_its_own():
    told = read_arrays(_nested({"a": A}), "file")["a"]
    told += 1  # over the file's read-only bytes this would end the process
    assert told[0, 0, 0] == 1


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"cposix\nsystem\n" + _word("touch ran") + b"\x85R", r"asks for posix\.system"),
        (_word("builtins") + _word("exec") + b"\x93" + _word("1/0") + b"\x85R", r"asks for builtins\.exec"),
        (b"cnumpy\nload\n" + _word("x") + b"\x85R", r"asks for numpy\.load"),
        (b"cnumpy.core.multiarray\nscalar\n", r"asks for numpy\.core\.multiarray\.scalar"),
        (b"cbuiltins\ngetattr\n", r"asks for builtins\.getattr"),
        (b"(S'touch ran'\niposix\nsystem\n", "step STRING"),
        (b"(iposix\nsystem\n", "step INST"),
        (b"(cnumpy\nndarray\no", "step OBJ"),
        (b"cnumpy\nndarray\n)\x81", "step NEWOBJ"),
        (b"\x82\x01", "step EXT1"),
        (b"Pname\n", "step PERSID"),
        (b"cnumpy\nndarray\n(K\x05tR", "wanted float32 arrays"),  # an allowed name in a call that is not
        (b"cnumpy\ndtype\nX\x02\x00\x00\x00f8\x89\x88\x87R", "wanted float32 arrays"),
        (b"cnumpy\ndtype\nX\x02\x00\x00\x00O8\x89\x88\x87R", "wanted float32 arrays"),
        (b"}", "not an array"),
        (b"N", "not an array"),
        (b"K\x05N\x86b", "not a whole pickle"),
    ],
)
def test_whatever_is_not_an_array_is_refused(body, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = b"\x80\x04}(" + _word("a") + body + _word("b") + _steps(B) + b"u."
    if body == b"}":
        data = b"\x80\x04}(" + _word("a") + b"}" + _word("x") + b"Nsu."
    with pytest.raises(WeightsError, match=words) as told:
        read_arrays(data, "the file")
    assert str(told.value).startswith("the file: ") and "\n" not in str(told.value)
    assert list(tmp_path.iterdir()) == []


def test_a_dict_inside_itself_has_an_end():
    with pytest.raises(WeightsError, match="over 10000 tensors"):
        read_arrays(b"\x80\x04}\x94" + _word("a") + b"h\x00s.", "file")


def test_a_pickle_without_end_is_stopped(monkeypatch):
    monkeypatch.setattr("fastvid.weights._pickles.STEPS_LIMIT", 1000)
    with pytest.raises(WeightsError, match="over 1000 steps"):
        read_arrays(b"\x80\x04" + b"N" * 1001 + b".", "file")


def test_a_length_that_is_not_there_takes_no_memory():
    huge = b"\x80\x04}" + _word("a") + b"\x8e" + struct.pack("<Q", 1 << 60) + b"xxxx"
    with pytest.raises(WeightsError, match="not a whole pickle"):
        read_arrays(huge, "file")


@pytest.mark.parametrize("shape", [(2, 3, 5), (-2, 12), "24", (1, b"2"), (2, 3, 1 << 30)])
def test_a_shape_that_does_not_fit_is_refused(shape):
    steps = _steps(A)
    assert steps.count(_steps(A.shape)) == 1
    with pytest.raises(WeightsError, match="not a whole pickle"):
        read_arrays(b"\x80\x03}(" + _word("a") + steps.replace(_steps(A.shape), _steps(shape)) + b"u.", "file")


def test_300_damaged_pickles_end_in_tensors_or_one_line():
    whole = _nested({"params": {"a": {"kernel": A, "bias": B}, "b": {"kernel": A * 2}}})
    rng, refused = random.Random(5), 0
    for case in range(300):
        data = bytearray(whole)
        place = rng.randrange(len(data))
        if case % 3 == 0:
            del data[place:]
        elif case % 3 == 1:
            data[place] ^= 1 << rng.randrange(8)
        else:
            data[place : place + rng.randrange(1, 20)] = rng.randbytes(rng.randrange(20))
        try:
            told = read_arrays(bytes(data), "file")
            assert all(values.dtype.is_floating_point for values in told.values())
        except WeightsError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 400
    assert refused > 200  # the others have changed numbers or names, which a fingerprint tells
