"""The native sampler: the same bits whatever the window, the order, the batch, the threads and who is given."""

import pytest
import torch
from fastvid.kernels.pixelcnn_sampler import cases
from fastvid.kernels.pixelcnn_sampler.cases import GridCase
from fastvid.kernels.pixelcnn_sampler.session import OPEN, Sampled

from fastvid import _native, ops
from fastvid.nn import GatedPixelStack, GatedStackConfig
from fastvid.ops import _cpu_sampler
from fastvid.sampling import Noise, sample_grid, sample_naive

pytestmark = pytest.mark.skipif(
    _native.load() is None, reason=f"needs the native library, which is not there: {_native.why_not()}"
)
WINDOW, ORDER, GIVEN, DRAFT = 8, 9, 10, 11  # places among the op's arguments

CASES = [
    GridCase("3d", (3, 3, 4, 5), C=24, K=67),
    GridCase("3d-attention", (2, 3, 4, 7), attended=(0, 2), K=40),
    GridCase("kernel-5", (1, 2, 5, 6), kernel=5, L=2, frames=2),
    GridCase("odd-widths", (2, 2, 3, 6), C=20, heads=4, attended=(1,), K=41),
    GridCase("narrow", (2, 2, 3, 6), C=8, heads=1, attended=(0,), K=3),
    GridCase("2d", (3, 2, 5, 7), frames=1, attended=(1,), C=40, heads=2),
    GridCase("wavefront", (2, 2, 5, 6), wavefront=True, attended=(0, 2), order="raster"),
    GridCase("2d-wavefront", (3, 1, 6, 5), frames=1, kernel=5, wavefront=True, attended=(1,), order="raster"),
    GridCase("no-layers", (2, 2, 3, 4), L=0, condition=0),
    GridCase("wide", (2, 2, 2, 5), C=560, heads=4, attended=(0,), L=1, K=33, frames=2),  # products are shared
    GridCase("int8", (2, 2, 3, 5), weights="int8", attended=(1,)),
    GridCase("bfloat16", (2, 2, 3, 5), weights="bfloat16", attended=(1,), C=20, heads=2),
    GridCase("one-column", (2, 2, 4, 1), attended=(0,)),
    GridCase("one-row", (1, 4, 1, 9), attended=(0,)),
]


def drawn(args: tuple, **changes) -> Sampled:
    """The native sampler's result with arguments replaced by place: `_8=3` is a window of 3."""
    args = list(args)
    for place, value in changes.items():
        args[int(place[1:])] = value
    return ops.pixelcnn_sample(*args, backend="cpu")


def assert_same_bits(ours: Sampled, others: Sampled) -> None:
    assert torch.equal(ours.codes, others.codes)
    assert torch.equal(ours.logprob, others.logprob) and torch.equal(ours.margin, others.margin)


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return request.param


@pytest.fixture
def threads():
    """A function that sets torch's thread count, which the kernel follows; set back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_windows_and_threads(case, threads):
    args, W = case.make(), case.grid[3]
    threads(1)
    single = drawn(args, _8=1)
    assert (single.passes == W).all()
    for count in (1, 2, 3):
        threads(count)
        for window in (0, 1, 2, 3, W, 99):
            others = drawn(args, _8=window)
            assert_same_bits(others, single)
            assert (others.passes >= 1).all() and (others.passes <= W).all()


def test_batches(case, threads):
    args, B = list(case.make()), case.grid[0]
    threads(2)
    crowd = drawn(args)
    for b in range(B):
        alone = [*args]
        alone[2], alone[3] = args[2][b : b + 1], args[3][b : b + 1]
        assert_same_bits(Sampled(*(result[b : b + 1] for result in crowd)), drawn(alone))
    many = [*args]
    many[2], many[3] = args[2][:1].expand(70, -1, -1, -1, -1), args[3][:1].expand(70)
    many = drawn(many)
    for result, one in zip(many[:3], crowd[:3], strict=True):
        assert torch.equal(result, one[:1].expand_as(result))


@pytest.mark.parametrize("name", ["wavefront", "2d-wavefront"])
def test_wavefronts(name, threads):
    case = next(case for case in CASES if case.name == name)
    args, (_, _, H, W), r = case.make(), case.grid, case.kernel // 2
    raster = drawn(args)
    for count in (1, 2, 3):
        threads(count)
        front = drawn(args, _9="wavefront")
        assert_same_bits(front, raster)
        assert (front.passes[:, :, 0] == W + (1 + r) * (H - 1)).all() and (front.passes[:, :, 1:] == 0).all()
    given = torch.where(torch.rand(raster.codes.shape) < 0.5, raster.codes, OPEN)
    again = drawn(args, _9="wavefront", _10=given)
    assert torch.equal(again.codes, raster.codes) and torch.equal(again.logprob, raster.logprob)


def test_given_codes_and_drafts(case, threads):
    args, W = case.make(), case.grid[3]
    free = drawn(args)
    threads(2)
    for window in (0, 1, 3):
        exact = drawn(args, _8=window, _11=free.codes)
        assert_same_bits(exact, free)
        assert window != 3 or (exact.passes == -(-W // 3)).all()  # every guess was right
        wrong = drawn(args, _8=window, _11=torch.randint(-1, case.K, free.codes.shape))
        assert_same_bits(wrong, free)
        given = torch.where(torch.rand(free.codes.shape) < 0.6, free.codes, OPEN)
        given[:, 0, 0] = free.codes[:, 0, 0]
        partly = drawn(args, _8=window, _10=given)
        assert torch.equal(partly.codes, free.codes) and torch.equal(partly.logprob, free.logprob)
        assert torch.equal(partly.margin, free.margin.masked_fill(given >= 0, torch.inf))
        assert (partly.passes[:, 0, 0] == 1).all()
    whole = drawn(args, _10=free.codes)
    assert torch.equal(whole.logprob, free.logprob) and (whole.passes == 1).all()
    other = drawn(args, _10=torch.randint(case.K, free.codes.shape))
    assert (other.logprob <= 0).all() and not torch.equal(other.logprob, free.logprob)


def test_levels(case, level):
    args = case.make()
    single = drawn(args, _8=1)
    cases.judge(args, single) if case.weights == "float32" else None
    assert_same_bits(drawn(args, _8=4), single)


@pytest.mark.parametrize("channels, heads", [(8, 1), (20, 4), (24, 3), (40, 2)])
@pytest.mark.parametrize("frames, kernel", [(3, 3), (1, 5)])
def test_a_stack_of_any_width(channels, heads, frames, kernel):
    config = GatedStackConfig(codes=29, channels=channels, layers=2, kernel=kernel, time_kernel=frames, heads=heads,
                              condition_channels=5, attention_every=2)  # fmt: skip
    stack = GatedPixelStack(config).eval()
    with torch.no_grad():
        for p in stack.parameters():  # far enough from uniform that a wrong tap changes codes
            p.mul_(1.5)
    condition, noise = torch.randn(2, 2, 3, 5, 5), Noise(4, (8, 9), stream=3, first_step=2)
    sampled = sample_grid(stack, condition, noise, backend="cpu")
    assert sampled.near_ties() == 0, "another seed is needed: here either code would be right"
    assert torch.equal(sampled.codes, sample_naive(stack, condition, noise))


def test_a_row_can_be_drawn_again():
    case = GridCase("again", (1, 2, 3, 6), attended=(1,))
    args = case.make()
    job = _job(args)
    session = _cpu_sampler.Session(job)
    for t in range(2):
        for y in range(3):
            session.row(t, y)
            first, job.codes[:, t, y] = job.codes[:, t, y].clone(), OPEN
            session.row(t, y)
            assert torch.equal(job.codes[:, t, y], first)
    assert torch.equal(job.codes, drawn(args).codes)


def _job(args: tuple):
    from fastvid.kernels.pixelcnn_sampler.packed import Packed
    from fastvid.kernels.pixelcnn_sampler.session import Job

    return Job(Packed(*args[:2]), *args[2:])


def test_scattered_inputs():
    args = list(GridCase("scattered", (2, 2, 3, 4), attended=(0,)).make())
    exact = drawn(args)
    args[0] = torch.cat([torch.zeros(3, dtype=torch.uint8), args[0]])[3:]  # on no boundary
    args[2] = args[2].transpose(2, 3).contiguous().transpose(2, 3)
    args[3] = args[3].repeat_interleave(2)[::2]
    assert_same_bits(drawn(args), exact)
    args[4] -= 1 << 64  # the same seed, as a signed number
    assert_same_bits(Sampled(*_by_session(args)), exact)


def _by_session(args: list) -> tuple:
    from fastvid.kernels.pixelcnn_sampler import session

    return session.run(_cpu_sampler.Session, *args)


def test_nan_weights_end():
    args = list(GridCase("nan", (1, 2, 2, 5), attended=(0,), K=19).make())
    args[0] = args[0].clone()
    args[0].view(torch.float32)[:] = torch.nan
    for window in (0, 1, 4):
        sampled = drawn(args, _8=window)
        assert ((sampled.codes >= 0) & (sampled.codes < 19)).all() and sampled.logprob.isnan().all()


def test_empty_grids():
    for grid in ((0, 2, 3, 3), (2, 0, 3, 3), (2, 2, 0, 3), (2, 2, 3, 0)):
        assert drawn(GridCase("empty", grid).make()).codes.shape == grid


def test_refusals():
    args = GridCase("refused", (1, 1, 2, 3)).make()
    assert "takes tensors on the CPU, got meta" in _cpu_sampler.why_not(*args[:2], args[2].to("meta"), *args[3:])
    assert _cpu_sampler.why_not(*args) is None
    job = _job(args)
    session = _cpu_sampler.Session(job)
    for t, y in ((1, 0), (0, 2), (-1, 0), (0, -1)):
        with pytest.raises(RuntimeError, match="refused"):
            session.row(t, y)
    with pytest.raises(RuntimeError, match="refused"):
        session.frame(0)  # of a model that sees too much for it
    wide = GridCase("heads", (1, 1, 1, 1), L=1, attended=(0,), heads=1, frames=1, C=1040).make()
    assert "heads of 1024 at most" in _cpu_sampler.why_not(*wide)
    assert ops.pixelcnn_sample.reasons(*wide)["reference"] == "serves"
    with pytest.raises(ValueError, match="backend='reference'"):
        _cpu_sampler.Session(_job(wide))
