"""The native nearest_codebook: against float64, and the same bits whatever the level, the threads and the screen."""

import pytest
import torch
from fastvid.kernels.nearest_codebook import cases, reference
from fastvid.kernels.nearest_codebook.reference import Nearest

from fastvid import _native
from fastvid.ops import _cpu
from fastvid.testing import assert_within_yardstick

pytestmark = pytest.mark.skipif(
    _native.load() is None, reason=f"needs the native library, which is not there: {_native.why_not()}"
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1, 1), (1, 3, 1), (77, 13, 5), (97, 33, 16), (200, 512, 64), (50, 70, 513), (300, 17, 3), (65, 1500, 7)]


def near(x: torch.Tensor, codebook: torch.Tensor, statistics: bool = True, screen: str = "auto") -> Nearest:
    assert _cpu.why_not(x, codebook) is None
    return Nearest(*_cpu.nearest_codebook(x, codebook, statistics, screen=screen))


@pytest.fixture
def threads():
    """A function that sets torch's thread count, which the kernel follows; set back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def judge(x: torch.Tensor, codebook: torch.Tensor, result: Nearest) -> None:
    """A result is right if no code is nearer in float64, and everything else follows from its indices."""
    K, finite = codebook.shape[0], x.isfinite().all(dim=1)
    distances = torch.cdist(x.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    chosen = distances.gather(1, result.indices[:, None]).squeeze(1)  # [N]
    least = distances.amin(dim=1)
    assert (chosen - least <= 1e-12 * least)[finite].all(), "a nearer code exists"
    torch.testing.assert_close(result.squared_distance[finite].double(), chosen[finite], rtol=1e-5, atol=1e-44)
    assert result.squared_distance[~finite].isnan().all() and (result.indices[~finite] == 0).all()
    assert torch.equal(result.quantized, codebook.float()[result.indices].to(x.dtype))
    assert result.nonfinite.item() == (~finite).sum().item()
    kept, of = x[finite], result.indices[finite]
    assert torch.equal(result.counts, torch.bincount(of, minlength=K))
    exact = torch.zeros(K, x.shape[1], dtype=torch.float64).index_add_(0, of, kept.double())
    peer = torch.zeros(K, x.shape[1]).index_add_(0, of, kept.float())
    assert_within_yardstick(result.sums, exact, peer)


def assert_same_bits(ours: Nearest, others: Nearest) -> None:
    for name, a, b in zip(Nearest._fields, ours, others, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(a.view(torch.uint8) if a.ndim else a, b.view(torch.uint8) if b.ndim else b), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values(size, dtype):
    N, K, D = size
    x, codebook = torch.randn(N, D).to(dtype), torch.randn(K, D)
    judge(x, codebook, near(x, codebook))


@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_named_sizes(case):
    x, codebook = case.make()
    judge(x, codebook, near(x, codebook))


@pytest.mark.parametrize("screen", _cpu.SCREENS)
def test_levels_and_screens_agree_to_the_last_bit(level, screen):
    library = _native.load()
    for N, K, D in SIZES:
        x, codebook = torch.randn(N, D), torch.randn(K, D)
        ours = near(x, codebook, screen=screen)
        library.fastvid_cpu_use_isa(b"generic")
        plain = near(x, codebook, screen="none")  # every distance of every code
        library.fastvid_cpu_use_isa(level)
        assert_same_bits(ours, plain)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_threads_agree_to_the_last_bit(count, threads):
    x, codebook = torch.randn(5000, 24), torch.randn(60, 24)
    threads(1)
    alone = near(x, codebook)
    threads(count)
    for _ in range(5):
        assert_same_bits(near(x, codebook), alone)


def test_repeats_agree_to_the_last_bit(threads):
    threads(3)
    x, codebook = torch.randn(700, 6), torch.randn(20, 6)
    first = near(x, codebook)
    for _ in range(250):
        assert_same_bits(near(x, codebook), first)


def test_rows_are_summed_in_their_order():
    x, codebook = torch.randn(3000, 5), torch.randn(7, 5)
    result = near(x, codebook)
    sums = torch.zeros(7, 5)
    for row, index in zip(x, result.indices.tolist(), strict=True):
        sums[index] += row
    assert torch.equal(result.sums, sums)


def test_random_shapes(level):
    for _ in range(60):
        N, K, D = (int(torch.randint(1, most, ())) for most in (300, 200, 90))
        dtype = DTYPES[int(torch.randint(3, ()))]
        spread = 10.0 ** float(torch.randint(-3, 4, ()))
        x, codebook = (torch.randn(N, D) * spread).to(dtype), torch.randn(K, D)
        judge(x, codebook, near(x, codebook))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype):
    wide, codebook = torch.randn(60, 40).to(dtype), torch.randn(12, 16)
    views = [wide[:, 5:21], wide[::3, :16], wide.T[:, :16], wide[:, ::2][:, :16], wide[:1, :16].expand(9, 16)]
    for x in views:
        assert_same_bits(near(x, codebook), near(x.contiguous(), codebook))
    x = wide[:, :12].contiguous()
    assert_same_bits(near(x, torch.arange(96.0).view(12, 8).T), near(x, torch.arange(96.0).view(12, 8).T.contiguous()))


def test_half_codebooks_are_widened():
    x, codebook = torch.randn(50, 8, dtype=torch.float16), torch.randn(9, 8, dtype=torch.float16)
    assert_same_bits(near(x, codebook), near(x, codebook.float()))


def test_without_rows():
    result = near(torch.zeros(0, 4), torch.randn(8, 4))
    assert [list(t.shape) for t in result] == [[0], [0, 4], [0], [8], [8, 4], []]
    assert result.counts.sum() == 0 and result.sums.abs().sum() == 0 and result.nonfinite == 0


def test_without_statistics():
    x, codebook = torch.randn(500, 8), torch.randn(30, 8)
    full, lookup = near(x, codebook), near(x, codebook, statistics=False)
    assert lookup.counts.shape == (0,) and lookup.sums.shape == (0, 8)
    for name in ("indices", "quantized", "squared_distance", "nonfinite"):
        assert torch.equal(getattr(lookup, name), getattr(full, name))


def test_ties_go_to_the_lowest_index(level):
    codebook = torch.tensor([[5.0, 5.0], [1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    assert near(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), codebook).indices.tolist() == [1, 1]
    assert near(torch.randn(40, 3), torch.ones(300, 3)).indices.tolist() == [0] * 40
    codes = torch.randn(5, 8)
    x = torch.randn(200, 8)
    repeated = near(x, codes.repeat(40, 1))  # more ties than the screen can list
    assert torch.equal(repeated.indices, near(x, codes).indices)


def test_ties_of_two_codes_wherever_they_stand(level):
    codes = torch.randn(48, 6)
    for low in range(0, 47, 5):
        for high in range(low + 1, 48):
            codebook = codes.clone()
            codebook[high] = codebook[low]
            x = codebook[low] + 1e-3 * torch.randn(3, 6)
            assert near(x, codebook).indices.tolist() == [low] * 3, (low, high)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_not_finite(dtype):
    x, codebook = torch.randn(300, 9).to(dtype), torch.randn(20, 9)
    x[3, 0], x[150, 8], x[299] = float("nan"), float("inf"), float("-inf")
    result = near(x, codebook)
    judge(x, codebook, result)
    assert result.nonfinite == 3 and result.counts.sum() == 297


def test_codes_that_are_not_finite_are_never_chosen():
    x, codebook = torch.randn(100, 4), torch.randn(40, 4)
    codebook[0], codebook[7, 2], codebook[33, 0] = float("nan"), float("inf"), float("nan")
    good = codebook.isfinite().all(dim=1).nonzero().squeeze(1)
    assert torch.equal(near(x, codebook).indices, good[near(x, codebook[good]).indices])


HOSTILE = {
    "huge": (1e18, 0, 1e18, 0), "tiny": (1e-20, 0, 1e-20, 0), "far rows": (1, 1e4, 1, 0),
    "very far rows": (1, 1e9, 1e-3, 0), "offset together": (1, 300, 1, 300), "rows at the centre": (1e-9, 0, 1, 0),
    "collapsed codes": (1, 0, 1e-6, 0), "collapsed far codes": (1, 0, 1e-3, 1e3), "largest": (1e38, 0, 1e37, 0),
    "subnormal": (1e-41, 0, 1e-41, 0),
}  # fmt: skip


@pytest.mark.parametrize("screen", ["int16", "float32"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_values(name, screen, level):
    size, offset, code_size, code_offset = HOSTILE[name]
    for N, K, D in [(200, 100, 16), (100, 30, 1), (60, 40, 130)]:
        x = torch.randn(N, D).clamp(-2, 2) * size + offset
        codebook = torch.randn(K, D).clamp(-2, 2) * code_size + code_offset
        result = near(x, codebook, screen=screen)
        assert_same_bits(result, near(x, codebook, screen="none"))
        if name != "largest":  # there squares leave the range of float32
            judge(x, codebook, result)


def test_one_far_code_does_not_blind_the_rest():
    x, codebook = torch.randn(500, 16), torch.randn(200, 16)
    codebook[77] = 1e6
    judge(x, codebook, near(x, codebook))


def test_clusters():
    centres = torch.randn(50, 32) * 5 + 40
    x = centres[torch.randint(50, (2000,))] + 0.1 * torch.randn(2000, 32)
    codebook = centres + 0.01 * torch.randn(50, 32)
    judge(x, codebook, near(x, codebook))


def test_the_reference_is_not_better():
    x, codebook = torch.randn(1000, 64), torch.randn(512, 64)
    ours, peer = near(x, codebook), reference.nearest_codebook(x, codebook)
    exact = (x.double() - codebook.double()[ours.indices]).square().sum(dim=1)
    assert_within_yardstick(ours.squared_distance, exact, (x - codebook[ours.indices]).square().sum(dim=1))
    assert (ours.indices == peer.indices).double().mean() > 0.999


def test_refusals():
    x, codebook = torch.zeros(2, 3), torch.zeros(4, 3)
    assert "takes float32, bfloat16 and float16, got torch.float64" in _cpu.why_not(x.double(), codebook)
    assert "takes tensors on the CPU, got meta" in _cpu.why_not(x.to("meta"), codebook.to("meta"))
