"""The Triton kernels of conv_gru: on the GPU, or in Triton's interpreter where there is none."""

import pytest
import torch
from fastvid.kernels.conv_gru import cases, reference

pytest.importorskip("triton", reason="Triton is not installed")

from fastvid.kernels.conv_gru import triton_backward, triton_configs, triton_forward, triton_gpu  # noqa: E402

# the interpreter computes by numpy, which speaks of the infinities that a saturated gate goes through
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


@pytest.fixture
def device(device):
    if device.type == "cpu" and not triton_gpu.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is not set: Triton's kernels run on the CUDA device of this machine")
    return device


def tiny(grid=(1, 2, 2, 3), channels=5, **options) -> cases.Case:
    return cases.Case("tiny", grid, channels, **options)


def judged(case: cases.Case, device, dtype=torch.float32) -> None:
    args = case.make(device, dtype)
    cases.judge(args, triton_gpu.conv_gru(*args))
    args = case.make_backward(device, dtype)
    cases.judge_backward(args, triton_gpu.conv_gru_backward(*args))


def same_bits(a: tuple, b: tuple) -> bool:
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", triton_gpu.DTYPES, ids=str)
def test_dtypes(dtype, device):
    # each dtype with a start of its own; the laws hold both starts for float32 and bfloat16
    hidden = dtype == torch.bfloat16
    judged(tiny((1, 2, 2, 2), 3, hidden=hidden, activation="tanh" if hidden else "relu"), device, dtype)


def test_tiles_of_channels_and_positions(device):
    # channels beyond a tile of columns; positions beyond one of positions, of more than one sample
    judged(tiny((1, 1, 2, 2), 70, kernel=1, hidden=True), device)
    judged(tiny((3, 1, 5, 5), 3, kernel=1, hidden=True), device)


def test_one_input_for_every_frame(device):
    judged(tiny((1, 3, 2, 2), 3, same=True, hidden=True), device)


def test_cut_sums(device, monkeypatch):
    # every sum in shares, the last of them short; the counters are back at zero after every launch
    monkeypatch.setattr(triton_configs, "LEAST_TERMS", 2)
    triton_configs.cut.cache_clear()
    config = triton_configs.choose(None, torch.float32, 6, 5)
    cut = triton_configs.cut(config, 6, 5, 2, 5, 3, False)
    assert (cut.tiles, cut.splits, cut.constants["SPLIT"]) == (2, 3, True)
    judged(tiny(hidden=True), device)
    triton_configs.cut.cache_clear()


def test_no_share_is_empty():
    for terms in range(1, 40):
        for positions in (16, 300, 5000):
            cut = triton_configs.cut(triton_configs.FITS["half"][0][0], positions, 128, 1, 64 * terms, 1, False)
            share = -(-terms // cut.splits)
            assert (cut.splits - 1) * share < terms <= cut.splits * share


def test_frames_one_by_one(device):
    gates, hidden, *weights, T, activation, _ = tiny((1, 3, 2, 2), hidden=True).make(device)
    whole, kept = triton_gpu.conv_gru(gates, hidden, *weights, T, activation, True)
    for t in range(T):
        state, one = triton_gpu.conv_gru(gates[:, t : t + 1], hidden, *weights, 1, activation, True)
        assert torch.equal(state[:, 0], whole[:, t]) and torch.equal(one[:, 0], kept[:, t])
        hidden = state[:, 0]


def test_strides(device):
    gates, hidden, *weights, T, activation, keep = tiny((2, 1, 2, 3), hidden=True).make(device)
    dense = triton_gpu.conv_gru(gates, hidden, *weights, T, activation, keep)
    first = lambda t: t.movedim(-1, 1).contiguous().movedim(1, -1)  # noqa: E731  torch's layout, seen channels last
    turned = [weight.contiguous(memory_format=torch.channels_last) for weight in weights]
    row = gates.transpose(2, 3).contiguous().transpose(2, 3)
    for view in (first(gates), row):
        assert same_bits(dense, triton_gpu.conv_gru(view, first(hidden), *turned, T, activation, keep))


def test_kept_only_where_it_is_wanted(device):
    *args, keep = tiny().make(device)
    states, kept = triton_gpu.conv_gru(*args, True)
    bare, nothing = triton_gpu.conv_gru(*args, False)
    assert torch.equal(states, bare) and nothing.shape == (0,) and kept.shape == (*states.shape[:4], 15) and keep


def test_gradients_as_torch_finds_them(device):
    gates, hidden, *weights, T, activation, _ = tiny((1, 2, 2, 2), 3, hidden=True, activation="tanh").make(device)
    leaves = [tensor.double().requires_grad_() for tensor in (gates, hidden, *weights)]
    states, kept = reference.conv_gru(*leaves, T, activation, True)
    to_states, to_kept = torch.randn_like(states), torch.randn_like(kept)
    expected = torch.autograd.grad([states, kept], leaves, [to_states, to_kept])
    found = triton_gpu.conv_gru_backward(
        to_states.float(), to_kept.float(), hidden, *weights, states.detach().float(), kept.detach().float(), T,
        activation, [True] * 4,
    )  # fmt: skip
    for ours, true in zip(found, expected, strict=True):
        assert ours.shape == true.shape and (ours - true).abs().max() < 1e-5 * true.abs().max()
    alone = triton_gpu.conv_gru_backward(
        None, to_kept.float(), hidden, *weights, states.detach().float(), kept.detach().float(), T, activation,
        [True, False, False, False],
    )  # fmt: skip
    (true,) = torch.autograd.grad(reference.conv_gru(*leaves, T, activation, True)[1], leaves[:1], to_kept)
    assert (alone[0] - true).abs().max() < 1e-5 * true.abs().max() and [len(t) for t in alone[1:]] == [0] * 3


def test_only_what_is_wanted(device):
    *args, _ = tiny((1, 2, 1, 2), 2, hidden=True).make_backward(device)
    everything = triton_gpu.conv_gru_backward(*args, [True] * 4)
    for i in range(4):
        alone = triton_gpu.conv_gru_backward(*args, [i == j for j in range(4)])
        assert torch.equal(alone[i], everything[i])
        assert all(t.shape == (0,) for j, t in enumerate(alone) if i != j)
    assert all(t.shape == (0,) for t in triton_gpu.conv_gru_backward(*args, [False] * 4))


def test_nothing_to_do(device):
    args = cases.EMPTY.make(device)
    assert same_bits(triton_gpu.conv_gru(*args), reference.conv_gru(*args))
    args = cases.EMPTY.make_backward(device)
    assert same_bits(triton_gpu.conv_gru_backward(*args), reference.conv_gru_backward(*args))


def test_what_it_cannot_do(device):
    args = tiny().make(device)
    assert triton_gpu.why_not(*args) is None
    gates, hidden, weight, *rest = args
    for wrong, message in ((gates.double(), "float64"), (gates[:1].expand(2**28, -1, -1, -1, -1), "values of a frame")):
        assert message in triton_gpu.why_not(wrong, hidden, weight, *rest)
        with pytest.raises(NotImplementedError, match=message):
            triton_gpu.conv_gru(wrong, hidden, weight, *rest)
    assert "of one dtype" in triton_gpu.why_not(gates.bfloat16(), hidden, weight, *rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_configs(dtype, device):
    args = tiny((1, 1, 2, 2), 20, kernel=1, hidden=True).make(device, dtype)
    for config, *_ in triton_configs.FITS[triton_configs.width(dtype)]:
        cases.judge(args, triton_gpu.conv_gru(*args, config._asdict()))


def test_every_size_has_a_config_on_every_chip():
    for dtype in triton_gpu.DTYPES:
        for shared in (64, 99, 163, 227):
            for positions in (1, 16, 32, 64, 5000):
                assert all(triton_configs.fitting(dtype, positions, channels, shared) for channels in (1, 96, 1024))


def test_the_reverse_scan_has_narrow_tiles():
    for dtype in triton_gpu.DTYPES:
        for config, *_ in triton_configs.FITS[triton_configs.width(dtype)]:
            narrow = triton_configs.narrowed(config, dtype)
            assert narrow.positions <= 64 and (narrow is config or config.positions == 128)


def test_a_tuned_config_is_taken(monkeypatch):
    default, *_, other = triton_configs.fitting(torch.bfloat16, 64, 512, 227)
    key = triton_configs.bucket(torch.bfloat16, 50, 500)
    assert key == "half-N64-C512"
    monkeypatch.setattr(triton_configs, "tuned", lambda: {"interpreter": {key: other._asdict()}})
    choose = triton_configs.choose.__wrapped__
    assert choose(None, torch.float16, 64, 512) == other != default == choose(None, torch.float16, 64, 600)


def test_every_kernel_is_compiled_ahead_of_time():
    mine = {
        kernel for module in (triton_forward, triton_backward) for name, kernel in vars(module).items()
        if name.endswith("_kernel")
    }  # fmt: skip
    made = triton_gpu.variants()
    assert mine == {variant.kernel for variant in made} and len({variant.name for variant in made}) == len(made)
    for variant in made:
        assert list(variant.signature) == list(variant.kernel.arg_names)
        assert {name for name, kind in variant.signature.items() if kind == "constexpr"} == set(variant.constants)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", cases.LARGE, ids=str)
def test_real_sizes(case, dtype):
    judged(case, torch.device("cuda"), dtype)
