"""The Triton kernels of nearest_codebook: on the GPU, or in Triton's interpreter where there is none."""

from random import Random

import pytest
import torch
from fastvid.kernels.nearest_codebook import cases, reference

pytest.importorskip("triton", reason="Triton is not installed")

from fastvid.kernels.nearest_codebook import triton_gpu, triton_lookup, triton_update  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PRECISIONS = list(cases.ROUNDING)
# the interpreter computes by numpy, which speaks of the infinities that a mask then keeps out
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


@pytest.fixture
def device(device):
    if device.type == "cpu" and not triton_gpu.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is not set: Triton's kernels run on the CUDA device of this machine")
    return device


def look_up(x, codebook, statistics=True, precision="exact", config=None) -> reference.Nearest:
    return reference.Nearest(*triton_gpu.nearest_codebook(x, codebook, statistics, precision, config))


def judged(x, codebook, precision="exact", config=None) -> reference.Nearest:
    near = look_up(x, codebook, True, precision, config)
    cases.judge((x, codebook, True, precision), near)
    return near


def same_bits(a: reference.Nearest, b: reference.Nearest) -> bool:
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


def scores(x, codebook) -> torch.Tensor:
    """float64 squared distances [N, K]."""
    mode = "donot_use_mm_for_euclid_dist"
    return torch.cdist(x.double(), codebook.double(), compute_mode=mode).square()


class Watched:
    """Stands where the second look is launched and keeps what it was given; `run` decides if it still looks."""

    def __init__(self, monkeypatch, run: bool):
        self.kernel, self.run = triton_lookup._second_look_kernel, run
        monkeypatch.setattr(triton_lookup, "_second_look_kernel", self)

    def __getitem__(self, grid):
        def launch(*args, **constants):
            # the last pointers before the sizes: the list of doubtful rows and the counters
            self.rows = args[11][: int(args[12][1])].long()
            if self.run:
                self.kernel[grid](*args, **constants)

        return launch


# ---- the lookup


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions_and_dtypes(precision, dtype, device):
    judged(*cases.Case("", 90, 33, 21).make(device, dtype), precision)


@pytest.mark.parametrize("config, width", [(config, width) for config, width, *_ in triton_gpu.FITS], ids=str)
def test_configs(config, width, device):
    x, codebook = cases.Case("", config.rows + 6, 70, width - 3).make(device)
    if config._asdict() not in triton_gpu.tunable(x, codebook):
        pytest.skip(f"{triton_gpu._device(triton_gpu._index(x))[0]} has not the shared memory for this tile")
    for precision in ("exact", "bf16") if width <= 128 else ("exact",):  # wide rows are slow in the interpreter
        cases.judge((x, codebook, False, precision), look_up(x, codebook, False, precision, config._asdict()))


def test_random_shapes(device):
    random = Random(1)
    for _ in range(25):
        N, K, D = random.randint(1, 70), random.randint(1, 12), random.randint(1, 40)
        x, codebook = cases.Case("", N, K, D, random.choice([0.0, 10.0])).make(device, random.choice(DTYPES))
        judged(x, codebook, random.choice(PRECISIONS))


@pytest.mark.parametrize("N, K, D", [(0, 5, 4), (1, 1, 1), (40, 1, 3), (65, 17, 1), (64, 64, 16), (3, 100, 16)])
def test_edges(N, K, D, device):
    x, codebook = cases.Case("", N, K, D).make(device)
    if N:
        judged(x, codebook)
    else:
        near, empty = look_up(x, codebook), reference.nearest_codebook(x.new_zeros(0, D), codebook[:1].expand(K, D))
        assert all(a.shape == b.shape and a.dtype == b.dtype and not a.any() for a, b in zip(near, empty, strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_ties_go_to_the_lowest_index(precision, device):
    # small integers, whose mean over 128 codes is exact too: no rounding, in whatever order products are added up
    codebook = torch.randint(-4, 5, (128, 8), device=device).float()
    if device.type == "cuda":  # there every column of a product is added up alike; in the interpreter it is not
        codebook = torch.cat([codebook, torch.randn(22, 8, device=device)])
    for twin in (20, 63, 64, 127, len(codebook) - 1):  # of code 3: in its tile, at both sides of the border, last
        codebook[twin] = codebook[3]
    codebook[120] = codebook[90]
    x = torch.cat([codebook[[3, 127, 90, 120]], codebook[3:4] + 0.25, codebook[3:4] * 2])
    expected = scores(x, codebook).argmin(1)
    assert expected[:5].tolist() == [3, 3, 90, 90, 3]
    assert torch.equal(look_up(x, codebook, precision=precision).indices, expected)


def test_equal_distance_by_chance(device):
    codebook = torch.tensor([[5.0, 5.0], [1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]], device=device)
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0]], device=device)
    assert look_up(x, codebook).indices.tolist() == [1, 1]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_clusters_far_from_the_origin(precision, device):
    centre = 1000 * torch.randn(1, 24, device=device)
    codebook = centre + torch.randn(40, 24, device=device)
    judged(codebook[torch.randint(40, (100,), device=device)] + 0.1 * torch.randn(100, 24, device=device), codebook,
           precision)  # fmt: skip


@pytest.mark.parametrize("rows, codes", [(1e30, 1e30), (1e-30, 1e-30), (1e30, 1e-30), (1e-20, 1e3), (1.0, 1e-6)])
def test_scales(rows, codes, device):
    # rows of many sizes side by side: each has a scale of its own
    x = rows * torch.randn(60, 12, device=device) * torch.logspace(-3, 3, 60, device=device)[:, None]
    codebook = codes * torch.randn(30, 12, device=device)
    unit = max(rows, codes)
    distance = scores(x.double() / unit, codebook.double() / unit)
    middle = codebook.double().mean(0) / unit
    terms = (x.double() / unit - middle).norm(dim=1) * (codebook.double() / unit - middle).norm(dim=1).max()
    # of two codes at nearly one distance only the products with the row and the half norms are rounded
    terms += (codebook.double() / unit - middle).square().sum(1).max()
    for precision in ("exact", "tf32"):
        near = look_up(x, codebook, False, precision)
        regret = distance.gather(1, near.indices[:, None])[:, 0] - distance.amin(1)
        assert (regret <= 32 * cases.ROUNDING[precision] * terms + 1e-14 * distance.amin(1)).all()
        assert near.nonfinite.item() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_not_finite(dtype, device):
    x, codebook = cases.Case("", 70, 9, 20).make(device, dtype)
    x[3, 19], x[64, 0], x[65] = float("nan"), float("inf"), -float("inf")
    good = x.isfinite().all(1)
    near = look_up(x, codebook)
    assert near.nonfinite.item() == 3 and near.counts.sum().item() == 67
    assert not near.indices[~good].any() and near.squared_distance[~good].isnan().all()
    assert torch.equal(near.quantized[~good], codebook[:1].to(dtype).expand(3, -1))
    kept = reference.Nearest(*(t[good] for t in near[:3]), near.counts, near.sums, near.nonfinite * 0)
    cases.judge((x[good], codebook), kept)


def test_codes_that_are_not_finite_are_never_chosen(device):
    x, codebook = cases.Case("", 40, 12, 6).make(device)
    codebook[2, 1], codebook[7] = float("nan"), float("inf")
    sound = codebook.isfinite().all(1)
    expected = scores(x, codebook[sound]).argmin(1)
    for precision in ("exact", "bf16"):
        assert torch.equal(look_up(x, codebook, precision=precision).indices, sound.nonzero()[:, 0][expected])


def test_strides(device):
    x, codebook = cases.Case("", 50, 20, 18).make(device)
    dense = look_up(x, codebook)
    every_second = torch.zeros(50, 36, device=device)
    every_second[:, ::2] = x
    for rows in (x.T.contiguous().T, every_second[:, ::2]):
        assert same_bits(look_up(rows, codebook.T.contiguous().T), dense)
    assert same_bits(look_up(x[:1].expand(5, -1), codebook), look_up(x[:1].repeat(5, 1), codebook))


def test_half_codebooks_are_widened(device):
    x, codebook = cases.Case("", 40, 16, 10).make(device)
    for dtype in DTYPES[1:]:
        assert same_bits(look_up(x, codebook.to(dtype)), look_up(x, codebook.to(dtype).float()))


# ---- the certificate


@pytest.mark.parametrize("spread", [1.0, 0.1, 1e-3])
def test_what_is_certified_is_the_nearest(spread, device, monkeypatch):
    # many codes on few directions: every kind of near tie
    x, codebook = cases.Case("", 150, 60, 5).make(device)
    codebook = codebook[:20].repeat(3, 1) + spread * codebook
    watched = Watched(monkeypatch, run=False)
    indices = look_up(x, codebook, statistics=False).indices
    certain = torch.ones(150, dtype=torch.bool, device=device)
    certain[watched.rows] = False
    assert torch.equal(indices[certain], scores(x, codebook).argmin(1)[certain])
    assert 0 < certain.sum() < 150 or spread == 1.0


def test_codes_nearly_equal_are_looked_at_twice(device, monkeypatch):
    codebook = torch.randn(1, 16, device=device) + 1e-4 * torch.randn(30, 16, device=device)
    codebook[1] += 1.0  # keeps the others close in units of the whole
    watched = Watched(monkeypatch, run=True)
    judged(torch.randn(100, 16, device=device), codebook)
    assert len(watched.rows) > 50 and len(watched.rows.unique()) == len(watched.rows)


def test_well_separated_codes_are_certified(device, monkeypatch):
    watched = Watched(monkeypatch, run=True)
    codebook = 10 * torch.eye(32, device=device)
    judged(codebook[torch.randint(32, (100,), device=device)] + 0.1 * torch.randn(100, 32, device=device), codebook)
    assert len(watched.rows) == 0


def test_a_row_does_not_depend_on_its_neighbours(device):
    x, codebook = cases.Case("", 100, 40, 12).make(device)
    codebook[20:] = codebook[:20] + 1e-4
    mixed = torch.randperm(100, device=device)
    for precision in ("exact", "bf16"):
        whole, moved = (look_up(rows, codebook, False, precision) for rows in (x, x[mixed]))
        assert all(torch.equal(a[mixed], b) for a, b in zip(whole[:3], moved[:3], strict=True))


# ---- the statistics


def test_statistics_off(device, monkeypatch):
    monkeypatch.setattr(triton_gpu, "_add_up", None)
    x, codebook = cases.Case("", 30, 7, 4).make(device)
    near = look_up(x, codebook, statistics=False)
    assert near.counts.shape == (0,) and near.sums.shape == (0, 4) and near.sums.dtype == torch.float32


@pytest.mark.parametrize("runs", [[256, 0, 257, 1], [0, 700, 0], [1, 255, 512, 3]], ids=str)
def test_sums_of_many_blocks(runs, device):
    keys = torch.repeat_interleave(torch.arange(len(runs)), torch.tensor(runs))[torch.randperm(sum(runs))]
    x = torch.randn(sum(runs), 20, device=device)
    keys[::7] = len(runs)  # rows that no code gets
    keys = keys.to(device, torch.int16)
    counts, sums = triton_gpu._add_up(x, keys, len(runs))
    exact, plain = (torch.zeros(len(runs) + 1, 20, dtype=d, device=device) for d in (torch.float64, torch.float32))
    exact, plain = (t.index_add(0, keys.long(), x.to(t.dtype))[:-1] for t in (exact, plain))
    assert torch.equal(counts, torch.bincount(keys.long(), minlength=len(runs) + 1)[:-1])
    cases.assert_within_yardstick(sums, exact, plain)


def test_the_block_search_of_many_codes(device):
    # more codes than one look of 256: the block programs look twice
    K, N = 300, 290
    keys = torch.randint(K, (N,), device=device)
    keys[:270] = 257
    x = torch.randn(N, 3, device=device)
    counts, sums = triton_gpu._add_up(x, keys.to(torch.int16), K)
    assert torch.equal(counts, torch.bincount(keys, minlength=K))
    exact, plain = (torch.zeros(K, 3, dtype=d, device=device).index_add(0, keys, x.to(d)) for d in
                    (torch.float64, torch.float32))  # fmt: skip
    cases.assert_within_yardstick(sums, exact, plain)


def test_same_bits_every_time(device):
    x, codebook = cases.Case("", 300, 12, 10).make(device)
    x[7, 3] = float("nan")
    first, *others = [look_up(x, codebook) for _ in range(3)]
    for other in others:
        assert torch.equal(first.squared_distance.isnan(), other.squared_distance.isnan())
        finite = [near._replace(squared_distance=near.squared_distance.nan_to_num()) for near in (first, other)]
        assert same_bits(*finite)


# ---- the moving average


@pytest.mark.parametrize("steps", [None, 0, 1000])
@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("K, D, decay", [(1, 1, 0.0), (70, 21, 0.99), (40, 130, 0.9)])
def test_moving_average(K, D, decay, restart, steps, device):
    args = list(cases.Case("", 5, K, D).make_update(device))
    args[5] = decay
    args[7] = None if steps is None else torch.tensor(steps, device=device)
    if not restart:
        args[9] = None
    exact = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in args]
    ours, true, peer = update(args), update(exact, reference.nearest_codebook_ema_), update(
        args, reference.nearest_codebook_ema_
    )  # fmt: skip
    for a, b, c in zip(ours[:3], true[:3], peer[:3], strict=True):
        cases.assert_within_yardstick(a, b, c)
    assert steps is None or ours[3].item() == steps + 1


def update(args, function=None):
    own = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    (function or triton_gpu.nearest_codebook_ema_)(*own)
    return own[0], own[1], own[2], own[7]


def test_codes_whose_sums_are_not_finite_keep_their_state(device):
    args = list(cases.Case("", 5, 40, 9).make_update(device))
    args[8], args[9] = 0.0, None
    args[4][3, 8], args[4][33, 0] = float("nan"), float("inf")
    code, size, total, _ = update(args)
    spared = torch.tensor([3, 33], device=device)
    for ours, before in zip((code, size, total), args[:3], strict=True):
        assert torch.equal(ours[spared], before[spared]) and ours.isfinite().all()
    cases.judge_update(args, update(args))


def test_moving_average_of_any_strides(device):
    args = cases.Case("", 5, 20, 6).make_update(device)
    spread = []
    for a in args:
        if isinstance(a, torch.Tensor) and a.ndim:
            wide = torch.zeros(*a.shape[:-1], 2 * a.shape[-1], dtype=a.dtype, device=device)
            wide[..., ::2] = a
            a = wide[..., ::2]
        spread.append(a)
    triton_gpu.nearest_codebook_ema_(*spread[:7], spread[7].clone(), *spread[8:])
    dense = update(args)
    assert all(torch.equal(a, b) for a, b in zip(spread[:3], dense[:3], strict=True))


# ---- around the kernels


def test_what_it_cannot_do(device):
    x, codebook = torch.zeros(3, 4, device=device), torch.zeros(2, 4, device=device)
    assert triton_gpu.why_not(x, codebook) is None
    refused = [
        (x.double(), codebook, "float64"), (x, codebook.double(), "float64"),
        (torch.zeros(3, 513, device=device), torch.zeros(2, 513, device=device), "D up to 512"),
        (x, torch.zeros(1, 4, device=device).expand(65537, 4), "K up to 65536"),
        (x[:1].expand(2**27 + 1, 4), codebook, "N up to"),
    ]  # fmt: skip
    for rows, codes, message in refused:
        assert message in triton_gpu.why_not(rows, codes)
        with pytest.raises(NotImplementedError, match=message):
            triton_gpu.nearest_codebook(rows, codes)


def test_a_tuned_config_is_taken(device, monkeypatch):
    x, codebook = cases.Case("", 40, 20, 30).make(device)
    default, *_, other = triton_gpu.tunable(x, codebook)
    name = triton_gpu._device(triton_gpu._index(x))[0]
    monkeypatch.setattr(triton_gpu, "_tuned", lambda: {name: {"exact-D32-K64": other}})
    monkeypatch.setattr(triton_gpu, "_choose", triton_gpu._choose.__wrapped__)
    chosen = [triton_gpu._choose(triton_gpu._index(x), 30, 20, precision) for precision in ("exact", "tf32")]
    assert [config._asdict() for config in chosen] == [other, default] and other != default


def test_tuned_json_names_shipped_configs():
    shipped = [config._asdict() for config, *_ in triton_gpu.FITS]
    assert all(config in shipped for sizes in triton_gpu._tuned().values() for config in sizes.values())


def test_every_width_has_a_config_on_every_chip():
    for shared in (64, 99, 163, 227):
        for DP in (16, 32, 64, 128, 256, 512):
            assert triton_gpu._fitting(DP, shared)


def test_every_kernel_is_compiled_ahead_of_time():
    mine = {
        kernel for module in (triton_lookup, triton_update) for name, kernel in vars(module).items()
        if name.endswith("_kernel")
    }  # fmt: skip
    made = triton_gpu.variants()
    assert mine == {variant.kernel for variant in made}
    assert len({variant.name for variant in made}) == len(made)
    for variant in made:
        assert list(variant.signature) == list(variant.kernel.arg_names)
        assert {name for name, kind in variant.signature.items() if kind == "constexpr"} == set(variant.constants)
