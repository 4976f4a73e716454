"""The Triton sampler: on the GPU, or in Triton's interpreter where there is none, hence the very small models."""

import pytest
import torch
from fastvid.kernels.pixelcnn_sampler import packed, reference
from fastvid.kernels.pixelcnn_sampler.session import NEAR_TIE, OPEN, Job

from fastvid.nn import GatedPixelStack, GatedStackConfig

pytest.importorskip("triton", reason="Triton is not installed")

from fastvid.kernels.pixelcnn_sampler import triton_gpu, triton_pass, triton_sizes  # noqa: E402

# name -> model, grid [B, T, H, W], weights
CASES = {
    "frames": (GatedStackConfig(20, 16, 2, condition_channels=6, attention_every=2, heads=2), (1, 3, 2, 2), "float32"),
    "still": (
        GatedStackConfig(17, 12, 1, kernel=5, time_kernel=1, condition_channels=6, attention_every=1, heads=2),
        (2, 1, 2, 3), "float32",
    ),
    "axial": (
        GatedStackConfig(9, 8, 1, time_kernel=2, condition_channels=6, attention_every=1, heads=1, wavefront=True),
        (1, 3, 2, 2), "float32",
    ),
    "halved": (GatedStackConfig(9, 24, 1, condition_channels=3, attention_every=1, heads=3), (1, 2, 1, 2), "bfloat16"),
    "eighth": (GatedStackConfig(9, 12, 1, condition_channels=6, attention_every=0), (1, 2, 1, 2), "int8"),
    "attending_eighth": (
        GatedStackConfig(9, 8, 1, time_kernel=1, condition_channels=3, attention_every=1, heads=1), (1, 1, 1, 2), "int8"
    ),
}  # fmt: skip
SINGLE = pytest.mark.parametrize("single", [False, True], ids=["shared", "single"])


@pytest.fixture
def device(device):
    if device.type == "cpu" and not triton_gpu.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is not set: Triton's kernels run on the CUDA device of this machine")
    return device


def make(name: str, device, seed: int = 5, given=None, temperature: float = 1.0, rows=slice(None)) -> Job:
    """A job of a random model: the same for the same name."""
    config, grid, weights = CASES[name]
    generator = torch.Generator().manual_seed(1)
    stack = GatedPixelStack(config)
    with torch.no_grad():
        for parameter in stack.parameters():
            inputs = parameter.shape[:-1] if parameter.ndim == 3 else parameter.shape[1:]  # of a convolution; linear
            spread = 0.1 if parameter.ndim == 1 else inputs.numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    convolutions = stack.input_vertical, stack.input_horizontal, stack.layers[0].vertical, stack.layers[0].horizontal
    taps = packed.Taps(*(convolution.taps for convolution in convolutions))
    model = packed.pack(stack.to(device).state_dict(), taps, config.heads, config.wavefront, weights)
    condition = torch.randn(*grid, config.condition_channels, generator=generator)[rows].to(device)
    samples = (torch.arange(grid[0])[rows] * 7 + (1 << 32) - 9).to(device)  # also beyond 2^31
    return Job(model, condition, samples, seed, 3, (1 << 31) + 1, temperature, 1, "raster", given, None)


def drawn(session) -> Job:
    _, T, H, _ = session.job.grid
    for t in range(T):
        for y in range(H):
            session.row(t, y)
    return session.job


def by_reference(*args, **kwargs) -> Job:
    return drawn(reference.Session(make(*args, **kwargs)))


@SINGLE
@pytest.mark.parametrize("name", list(CASES))
def test_codes_of_the_reference(name, single, device):
    session, expected = triton_gpu.Session(make(name, device), single), by_reference(name, device)
    session.cache = session.cache.float()  # what a cache in bfloat16 loses is a matter of its own
    job = drawn(session)
    assert expected.margin.min() > NEAR_TIE  # else another order of summation may draw another code
    assert torch.equal(job.codes, expected.codes)
    assert (job.logprob - expected.logprob).abs().max() < 2e-5
    assert (job.margin - expected.margin).abs().max() < 4e-5
    assert (job.passes == job.grid[3]).all()


def test_cache_in_bfloat16(device):
    session, expected = triton_gpu.Session(make("halved", device), True), by_reference("halved", device)
    assert session.cache.dtype == torch.bfloat16
    job = drawn(session)
    assert torch.equal(job.codes, expected.codes)
    assert 0 < (job.logprob - expected.logprob).abs().max() < 1e-3


@SINGLE
def test_a_sample_does_not_depend_on_its_neighbours(single, device, monkeypatch):
    monkeypatch.setattr(triton_gpu, "PROGRAMS", 1)  # so that a program takes both samples
    both = drawn(triton_gpu.Session(make("still", device), single))
    alone = drawn(triton_gpu.Session(make("still", device, rows=slice(1, 2)), single))
    assert torch.equal(both.codes[1:], alone.codes)
    for name in ("logprob", "margin"):
        one, other = getattr(both, name)[1:], getattr(alone, name)
        if device.type == "cuda":
            assert torch.equal(one, other)
        else:  # the interpreter multiplies by a BLAS, whose rounding depends on a row's place in the tile
            assert (one - other).abs().max() < 2e-6


@SINGLE
def test_given_codes_temperature_and_seed(single, device):
    shape = CASES["axial"][1]
    given = torch.full(shape, OPEN, device=device)
    given[..., 1], given[:, 0, 1] = 3, 8
    words = {"seed": (0xFFFFFFF1 << 32) + 0x80000001, "given": given, "temperature": 0.5}
    job, expected = (
        drawn(triton_gpu.Session(make("axial", device, **words), single)),
        by_reference("axial", device, **words),
    )
    assert expected.margin.min() > 2 * NEAR_TIE
    assert torch.equal(job.codes, expected.codes)
    assert (job.codes[given >= 0] == given[given >= 0]).all()
    assert ((job.margin == torch.inf) == (given >= 0)).all()
    assert (job.logprob - expected.logprob).abs().max() < 1e-5


def test_a_row_is_drawn_again_from_the_seed_of_now(device):
    session = triton_gpu.Session(make("eighth", device), True)
    session.row(0, 0)
    first = session.job.codes[:, 0, 0].clone(), session.job.margin[:, 0, 0].clone()
    session.job.seed += 1 << 40
    session.row(0, 0)
    assert not torch.equal(session.job.margin[:, 0, 0], first[1])
    session.job.seed -= 1 << 40
    session.row(0, 0)
    assert torch.equal(session.job.codes[:, 0, 0], first[0]) and torch.equal(session.job.margin[:, 0, 0], first[1])


def test_chunks_of_the_cache_are_put_together(device, monkeypatch):
    for name in ("LEAST_CHUNK", "LEAST_KEYS", "MOST_KEYS"):
        monkeypatch.setattr(triton_sizes, name, 4)
    session, expected = triton_gpu.Session(make("still", device), False), by_reference("still", device)
    assert session.sizes.attention()["CHUNKS"] == 2  # 6 positions, 4 at a time
    job = drawn(session)
    assert torch.equal(job.codes, expected.codes)
    assert (job.logprob - expected.logprob).abs().max() < 2e-5


@pytest.mark.parametrize("codes", [5, 700])
def test_noise(codes, device):
    W, samples = 2, torch.tensor([7, (1 << 32) - 1], device=device)
    place, noise = torch.zeros(8, dtype=torch.int32, device=device), torch.empty(2, W, codes, device=device)
    words = map(triton_gpu._word, (4, 32767, 0x89ABCDEF, 0xFEDCBA98, (1 << 32) - 2))
    triton_pass._place_kernel[1,](place, *words)
    triton_pass._noise_kernel[2 * W, -(-codes // 512)](
        place, samples, noise, W, 32767, CODES=codes, QUADS=128, num_warps=4
    )
    expected = reference.gumbel_row(0xFEDCBA9889ABCDEF, samples, 32767, (1 << 32) - 2, 32767, W, codes)
    assert torch.equal(noise, expected)


def test_what_it_cannot_serve():
    job = make("frames", torch.device("cpu"))
    arguments = *job.packed, job.condition
    assert (triton_gpu.why_not(*arguments) is None) == triton_gpu.INTERPRETED
    many = job.packed.table.clone()
    many[1] = 1 << 15
    assert "codes" in triton_gpu.why_not(job.packed.weights, many, job.condition)
    apart = job.packed.table.clone()
    apart[-(len(packed.GLOBALS) + 2 * len(packed.LAYER)) - 1] = -1  # dx of the last horizontal tap, the position itself
    assert "next to each other" in triton_gpu.why_not(job.packed.weights, apart, job.condition)


def test_tiles_follow_from_the_model_alone():
    for sizes in triton_gpu.SHIPPED.values():
        look = sizes.attention()
        assert look["CHUNK"] * look["CHUNKS"] >= sizes.positions and look["CHUNK"] % look["KEYS"] == 0
        for panels in (1, 4, 64):
            for B in (1, 3, 16, 1000):
                group = triton_gpu._group(panels, sizes.panels(sizes.C), B)
                grid = triton_gpu._grid(panels, sizes.panels(sizes.C), B)
                assert grid[1] * group >= B > (grid[1] - 1) * group


# ---- on a GPU only: the interpreter has no graphs


@pytest.mark.gpu
@SINGLE
@pytest.mark.parametrize("name", list(CASES))
def test_replayed_rows_equal_launched_rows(name, single):
    device = torch.device("cuda")
    replayed, launched = (triton_gpu.Session(make(name, device), single) for _ in range(2))
    launched._replay = launched.launch
    drawn(replayed)
    drawn(launched)
    assert replayed.graph is not None or replayed.job.grid[1] * replayed.job.grid[2] == 1
    for field in ("codes", "logprob", "margin"):
        assert torch.equal(getattr(replayed.job, field), getattr(launched.job, field))


@pytest.mark.gpu
def test_rows_inside_a_graph_of_the_caller():
    device = torch.device("cuda")
    session, expected = triton_gpu.Session(make("still", device)), by_reference("still", device)
    session.row(0, 0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        session.row(0, 1)
    graph.replay()
    assert torch.equal(session.job.codes, expected.codes)
