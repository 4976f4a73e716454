"""The persistent CUDA sampler: its arithmetic and its exchange by a CPU that plays the CTAs; and the real thing
where there is a GPU."""

import ctypes
import os
import random
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fastvid.kernels.pixelcnn_sampler import cases, reference, session

from fastvid import _native
from fastvid.errors import BackendError
from fastvid.ops import _cuda_sampler, pixelcnn_sample

ROOT = Path(__file__).resolve().parents[2]
BY_PHASES, BY_THREADS = 0, 1  # of tests/native/cuda_host.cpp
SHARED, CHUNK = 227 * 1024, 4
MEASURED = cases.GridCase("measured", (3, 2, 3, 6), C=24, L=3, kernel=5, attended=(0, 2), heads=3, given=1)


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> ctypes.CDLL:
    """tests/native/cuda_host.cpp, built: the interface of the CUDA library, played by the CPU."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    made = tmp_path_factory.mktemp("host") / "host.so"
    options = ["-std=c++17", "-O1", "-march=native", "-ffp-contract=off", "-fPIC", "-shared", "-pthread"]
    warnings = ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    defines = [f"-DFASTVID_ABI_VERSION={_native.ABI_VERSION}", f"-I{ROOT / 'kernels'}"]
    command = [compiler, *options, *warnings, *defines, "-o", made, ROOT / "tests/native/cuda_host.cpp"]
    told = subprocess.run(command, capture_output=True, text=True)
    assert told.returncode == 0 and not told.stderr, told.stderr
    library = ctypes.CDLL(str(made))
    _native._type_functions(library, _native.SIGNATURES["cuda"])
    library.host_setting.argtypes = [ctypes.c_int64] * 4
    return library


def played(host, args: tuple, ctas: int = 3, manner: int = BY_PHASES, shared: int = SHARED, silent: int = -1):
    """pixelcnn_sample by so many CTAs of the host. silent: the one that never says anything."""
    host.host_setting(ctas, shared, manner, silent)
    made = []

    def start(job: session.Job) -> _cuda_sampler.Session:
        made.append(_cuda_sampler.Session(job, host, ctas, CHUNK))
        return made[0]

    result = session.Sampled(*session.run(start, *args))
    return result, made[0].fields


def one_of(args: tuple, b: int) -> tuple:
    """The arguments of sample b alone."""
    cut = slice(b, b + 1)
    condition, samples, given = args[2][cut], args[3][cut], None if args[10] is None else args[10][cut]
    return (*args[:2], condition, samples, *args[4:10], given, args[11])


def same(found: session.Sampled, wanted: session.Sampled) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("case", cases.GRIDS, ids=str)
@pytest.mark.parametrize("ctas", [1, 3])
def test_right_at_the_named_sizes(host, case, ctas):
    args = case.make()
    result, _ = played(host, args, ctas)
    cases.judge(args, result)
    assert (result.passes == case.grid[3]).all()


@pytest.mark.parametrize("seed", range(12))
def test_right_at_sizes_nobody_chose(host, seed):
    args = cases.drawn(random.Random(seed)).make()
    cases.judge(args, played(host, args, ctas=1 + seed % 5)[0])


@pytest.mark.parametrize("ctas", [2, 20])
def test_more_samples_than_are_taken_at_once(host, ctas):
    args = replace(MEASURED, grid=(6, 1, 2, 4)).make()
    whole, _ = played(host, args, ctas)
    for b in (0, 3, 4, 5):
        assert same(played(host, one_of(args, b))[0], session.Sampled(*(out[b : b + 1] for out in whole)))


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_bits_depend_neither_on_the_ctas_nor_on_the_batch(host, weights):
    args = replace(MEASURED, weights=weights).make()
    whole, _ = played(host, args, ctas=1)
    assert whole.codes.unique().numel() > 5
    for ctas in (2, 5, 16):
        assert same(played(host, args, ctas)[0], whole)
    for b in range(3):
        assert same(played(host, one_of(args, b))[0], session.Sampled(*(out[b : b + 1] for out in whole)))


class Rounding(reference.Session):
    """The reference with keys and values rounded to bfloat16."""

    def __init__(self, job: session.Job):
        super().__init__(job)
        for layer in self.layers:
            exact, width = layer.attention.qkv, job.table.attention_width
            layer.attention.qkv = lambda h, bias, exact=exact, width=width: torch.cat(
                [(made := exact(h, bias=bias))[..., :width], made[..., width:].bfloat16().float()], dim=-1
            )


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_short_weights_keep_keys_and_values_in_bfloat16(host, weights):
    case = cases.GridCase("", (2, 2, 3, 4), C=24, attended=(0, 1, 2), frames=2, weights=weights)
    args = case.make()
    result, _ = played(host, args)
    gap, apart = (
        (session.run(made, *args[:10], result.codes, None)[0] - result.logprob).abs().median()
        for made in (Rounding, reference.Session)
    )
    # a sum on the edge between two bfloat16 numbers may go either way; that is one number among thousands
    assert gap < apart / 10, f"{gap} from the reference that rounds, {apart} from the one that does not"


@pytest.mark.parametrize("ctas", [2, 5])
def test_ctas_that_run_as_they_like_find_the_same(host, ctas, monkeypatch):
    monkeypatch.setattr(_cuda_sampler, "PATIENCE", 300.0)  # they share a few busy processors
    args = replace(MEASURED, grid=(2, 2, 2, 4)).make()
    assert same(played(host, args, ctas, BY_THREADS)[0], played(host, args, 1)[0])


def test_weights_that_stay_or_move_give_the_same_bits(host):
    args = MEASURED.make()
    whole, all_stay = played(host, args, 2)
    assert all_stay.resident_tasks == all_stay.task_count
    fixed = all_stay.shared_bytes - all_stay.resident_bytes
    rooms = range(fixed, all_stay.shared_bytes, 1024)
    tightest = next(room for room in rooms if fits(host, args, room))
    stayed = []
    for shared in (tightest, (tightest + all_stay.shared_bytes) // 2):
        result, fields = played(host, args, 2, shared=shared)
        assert same(result, whole)
        stayed.append(fields.resident_tasks)
    assert 0 <= stayed[0] < stayed[1] < all_stay.task_count


def fits(host, args: tuple, shared: int) -> bool:
    try:
        return bool(played(host, args, 2, shared=shared))
    except RuntimeError as error:
        assert "it does not fit" in str(error)
        return False


def test_a_row_can_be_drawn_again_and_tags_can_run_out(host):
    args = MEASURED.make()
    host.host_setting(3, SHARED, BY_PHASES, -1)
    job = session.Job(session.Packed(*args[:2]), *args[2:])
    sampler = _cuda_sampler.Session(job, host, 3, CHUNK)
    _, T, H, W = job.grid
    for t in range(T):
        for y in range(H):
            sampler.row(t, y)
            once = job.codes[:, t, y].clone()
            sampler.launches = (1 << 32) // W - 2 + y % 2  # the next one, or the one after it, starts anew
            sampler.row(t, y)
            assert torch.equal(job.codes[:, t, y], once)
    assert torch.equal(job.codes, played(host, args)[0].codes)


@pytest.mark.parametrize("manner", [BY_PHASES, BY_THREADS])
def test_a_cta_that_says_nothing_is_an_error_and_no_hang(host, manner, monkeypatch):
    monkeypatch.setattr(_cuda_sampler, "PATIENCE", 0.2)
    with pytest.raises(RuntimeError, match="in vain"):
        played(host, MEASURED.make(), 3, manner, silent=1)


def test_a_struct_of_another_size_is_refused(host):
    row = _cuda_sampler.Row()
    assert host.fastvid_pixelcnn_row(ctypes.byref(row), ctypes.sizeof(row) - 8, None) != 0


def test_who_may_ask():
    args = cases.GRIDS[0].make()
    assert "needs CUDA tensors" in _cuda_sampler.why_not(*args)
    assert "backend='cuda'" in _cuda_sampler.unasked(*args)
    with pytest.raises(BackendError, match="needs CUDA tensors"):
        pixelcnn_sample(*args, backend="cuda")


def on_gpu(args: tuple, **options) -> session.Sampled:
    return session.Sampled(*session.run(lambda job: _cuda_sampler.Session(job, **options), *args))


@pytest.fixture
def gpu() -> torch.device:
    """A GPU with the library of CUDA kernels."""
    if reason := _native.why_not("cuda"):
        pytest.skip(reason)
    return torch.device("cuda")


@pytest.mark.gpu
def test_gpu_watchdog(gpu, monkeypatch):
    """First of all: a launch whose patience is over at once ends, says so, and leaves the device in order."""
    args = MEASURED.make(gpu)
    monkeypatch.setattr(_cuda_sampler, "PATIENCE", 0.0)
    with pytest.raises(RuntimeError, match="in vain"):
        on_gpu(args)
    torch.cuda.synchronize()
    monkeypatch.setattr(_cuda_sampler, "PATIENCE", 0.5)
    cases.judge(args, on_gpu(args))


@pytest.mark.gpu
@pytest.mark.parametrize("ctas", [1, 2, 0])
def test_gpu_agrees_with_the_host(gpu, host, ctas):
    args = cases.GRIDS[2].make(gpu)
    here = tuple(a.cpu() if isinstance(a, torch.Tensor) else a for a in args)
    found, wanted = on_gpu(args, ctas=ctas, chunk=CHUNK), played(host, here, 1)[0]
    assert torch.equal(found.codes.cpu(), wanted.codes) or wanted.margin.min() < session.NEAR_TIE
    cases.judge(args, found)


@pytest.mark.gpu
@pytest.mark.parametrize("case", cases.GRIDS, ids=str)
def test_gpu_right_at_the_named_sizes(gpu, case):
    args = case.make(gpu)
    cases.judge(args, pixelcnn_sample(*args, backend="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_gpu_same_bits_every_time_by_any_number_of_ctas_in_any_batch(gpu, weights):
    case = cases.GridCase("", (5, 2, 6, 16), K=512, C=256, L=6, attended=(2, 5), heads=4, weights=weights)
    args = case.make(gpu)
    whole = on_gpu(args)
    for _ in range(5):
        assert same(on_gpu(args), whole)
    for ctas in (1, 17, 64):
        assert same(on_gpu(args, ctas=ctas), whole)
    for b in (0, 4):
        assert same(on_gpu(one_of(args, b)), session.Sampled(*(out[b : b + 1] for out in whole)))
