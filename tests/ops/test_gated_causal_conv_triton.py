"""The Triton kernels of gated_causal_conv: on the GPU, or in Triton's interpreter where there is none."""

from itertools import product
from random import Random

import pytest
import torch
from fastvid.kernels.gated_causal_conv import cases, reference

from fastvid.testing import assert_within_yardstick

pytest.importorskip("triton", reason="Triton is not installed")

from fastvid.kernels.gated_causal_conv import triton_backward, triton_configs, triton_forward, triton_gpu  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# the interpreter computes by numpy, which speaks of the infinities that a saturated gate goes through
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


@pytest.fixture
def device(device):
    if device.type == "cpu" and not triton_gpu.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is not set: Triton's kernels run on the CUDA device of this machine")
    return device


def flat(args: tuple) -> tuple:
    """A case's arguments as backends see them."""
    return cases._settled(args, args[0].dtype)


def judged(case: cases.Case, device, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    args = case.make(device, dtype)
    result = triton_gpu.gated_causal_conv(*flat(args))
    cases.judge(args, result)
    return result


def judged_backward(case: cases.Case, device, dtype=torch.float32) -> None:
    args = case.make_backward(device, dtype)
    cases.judge_backward(args, triton_gpu.gated_causal_conv_backward(*args))


def same_bits(a: tuple, b: tuple) -> bool:
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


FEW = ((-1, 0, 1), (0, -1, 0), (0, 0, -1), (0, 0, 0))


def tiny(activation="gate", channels=(5, 6), grid=(2, 2, 3, 4), taps=FEW, **others) -> cases.Case:
    return cases.Case("tiny", grid, channels, taps, activation, **others)


# ---- forward


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_and_dtypes(dtype, activation, device):
    judged(tiny(activation), device, dtype)
    judged_backward(tiny(activation), device, dtype)


@pytest.mark.parametrize("name", ["one-position", "line"])
def test_named_sizes(name, device):
    case = next(case for case in cases.ALL if case.name == name)
    judged(case, device)
    judged_backward(case, device)


def test_random_sizes(device):
    random = Random(3)
    for _ in range(4):
        grid = (random.randint(1, 2), random.randint(1, 3), random.randint(1, 4), random.randint(1, 5))
        cube = [(dt, dy, dx) for dt in range(-3, 1) for dy in range(-3, 4) for dx in range(-3, 4)]
        taps = tuple(random.sample(cube, random.randint(1, 3)))
        origin, size = random.choice([((0, 0, 0), None), ((-1, 1, -2), (2, 3, 3)), ((1, 0, 0), (1, 1, grid[3]))])
        case = cases.Case(
            "drawn", grid, (random.randint(1, 33), 2 * random.randint(1, 17)), taps,
            random.choice(reference.ACTIVATIONS), random.random() < 0.5, origin, size,
        )  # fmt: skip
        judged(case, device)
        judged_backward(case, device)


@pytest.mark.parametrize("channels", [(16, 32), (48, 2), (20, 270)], ids=str)
def test_tiles_of_channels(channels, device):
    # whole tiles of input channels, three of them, and one cut off; several tiles of columns
    case = tiny(channels=channels, grid=(1, 1, 2, 3), taps=FEW[1:3])
    judged(case, device)
    judged_backward(case, device)


def test_several_tiles_of_positions(device):
    case = tiny(grid=(3, 1, 5, 11), taps=FEW[1:3])
    judged(case, device)
    judged_backward(case, device)


def test_offsets_beyond_the_grid(device):
    taps = ((-7, 0, 0), (0, 0, 0), (-1, 9, 0), (0, 0, -40))
    judged(tiny(taps=taps), device)
    judged_backward(tiny(taps=taps), device)
    nowhere = tiny("none", taps=((-7, 0, 0), (0, 5, 5)))
    out, _ = judged(nowhere, device)
    judged_backward(nowhere, device)
    x, weight, bias, *_ = args = nowhere.make(device)
    only = triton_gpu.gated_causal_conv(*flat((*args[:4], None, None, *args[6:])))[0]
    assert torch.equal(only, bias.expand_as(only)) and out.shape == only.shape


def test_strides(device):
    x, weight, bias, taps, addend, residual, *rest = flat(tiny().make(device))
    dense = triton_gpu.gated_causal_conv(x, weight, bias, taps, addend, residual, *rest)
    first = lambda t: t.movedim(-1, 1).contiguous().movedim(1, -1)  # noqa: E731  torch's layout, seen channels last
    spread = torch.zeros(*x.shape[:-1], 3 * x.shape[-1], device=device)
    spread[..., ::3] = x
    turned = weight.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.stack([bias, bias], 1)[:, 0]
    for view in (first(x), spread[..., ::3]):
        again = triton_gpu.gated_causal_conv(view, turned, wide, taps, first(addend), first(residual), *rest)
        assert same_bits(dense, again)
    one = addend[:, :1, :1, :1].expand_as(addend)
    spread, copied = (
        triton_gpu.gated_causal_conv(x, weight, bias, taps, t, None, *rest) for t in (one, one.contiguous())
    )
    assert same_bits(spread, copied)


def test_gradients_of_any_strides(device):
    x, weight, pre, grad_out, grad_pre, *rest = tiny().make_backward(device)
    dense = triton_gpu.gated_causal_conv_backward(x, weight, pre, grad_out, grad_pre, *rest)
    first = lambda t: t.movedim(-1, 1).contiguous().movedim(1, -1)  # noqa: E731
    again = triton_gpu.gated_causal_conv_backward(first(x), first(weight), first(pre), first(grad_out), first(grad_pre),
                                                  *rest)  # fmt: skip
    assert same_bits(dense, again)
    one = torch.ones((), device=device).expand_as(grad_out)
    spread, copied = (triton_gpu.gated_causal_conv_backward(x, weight, pre, g, None, *rest) for g in (one, one.clone()))
    assert same_bits(spread, copied)


def test_pre_is_kept_only_where_it_is_wanted(device):
    *args, keep = flat(tiny().make(device))
    out, pre = triton_gpu.gated_causal_conv(*args, True)
    bare, nothing = triton_gpu.gated_causal_conv(*args, False)
    assert torch.equal(out, bare) and nothing.shape == (0,) and pre.shape == (*out.shape[:4], 6) and keep
    assert triton_gpu.gated_causal_conv(*flat(tiny("none").make(device)))[1].shape == (0,)


def test_the_residual_decides_the_dtype(device):
    args = list(flat(tiny().make(device, torch.bfloat16)))
    args[5] = args[5].float()
    out, _ = triton_gpu.gated_causal_conv(*args)
    exact, wide = (
        reference.gated_causal_conv(*(a.to(dtype) if isinstance(a, torch.Tensor) else a for a in args))[0]
        for dtype in (torch.float64, torch.float32)
    )
    assert_within_yardstick(out, exact, wide)
    args = list(tiny().make_backward(device, torch.bfloat16))
    args[3] = args[3].float()
    cases.judge_backward(tuple(args), triton_gpu.gated_causal_conv_backward(*args))


@pytest.mark.parametrize("scale", [1e-12, 1e4])
def test_tiny_and_huge_values(scale, device):
    # tanh keeps its last places beside zero, and nothing overflows where the gate is shut
    a = torch.linspace(-3, 3, 63, device=device) * scale
    x = torch.stack([a, torch.full_like(a, 0.5)], -1).view(1, 1, 7, 9, 2)
    weight = torch.eye(2, device=device)[None]
    rest = None, [0, 0, 0], None, None, "gate", [0, 0, 0], [1, 7, 9], True
    out, pre = triton_gpu.gated_causal_conv(x, weight, *rest)
    assert torch.equal(pre, x)
    assert_within_yardstick(out, reference.gate(x.double()), reference.gate(x))
    shut, _ = triton_gpu.gated_causal_conv(x, weight.flip(2), *rest)
    assert_within_yardstick(shut, reference.gate(x.flip(-1).double()), reference.gate(x.flip(-1)))


def test_values_that_are_not_finite_stay_where_they_are_read(device):
    x, *rest = flat(tiny(grid=(1, 2, 3, 4)).make(device))
    clean, _ = triton_gpu.gated_causal_conv(x, *rest)
    x[0, 1, 1, 1] = float("nan")
    dirty, _ = triton_gpu.gated_causal_conv(x, *rest)
    hit = {(1, 1, 1), (1, 2, 1), (1, 1, 2)}  # itself, the row below, the column to the right; no later frame
    for place in product(range(2), range(3), range(4)):
        one, other = clean[0][place], dirty[0][place]
        assert other.isnan().all() if place in hit else torch.equal(one, other)


# ---- what bits may depend on


def test_same_bits_every_time(device):
    args = flat(tiny(grid=(2, 2, 4, 5)).make(device))
    first, second = (triton_gpu.gated_causal_conv(*args) for _ in range(2))
    assert same_bits(first, second)
    args = tiny(grid=(2, 2, 4, 5)).make_backward(device)
    first, second = (triton_gpu.gated_causal_conv_backward(*args) for _ in range(2))
    assert same_bits(first, second)


def test_no_output_sees_what_its_taps_do_not_read(device):
    x, *rest = flat(tiny(grid=(1, 2, 3, 3)).make(device))
    before = triton_gpu.gated_causal_conv(x, *rest)
    places = list(product(range(2), range(3), range(3)))
    for changed in Random(1).sample(places, 4):
        other = x.clone()
        other[(0, *changed)] += 1
        after = triton_gpu.gated_causal_conv(other, *rest)
        for place in places:
            offset = tuple(c - p for c, p in zip(changed, place, strict=True))
            same = [torch.equal(one[(0, *place)], two[(0, *place)]) for one, two in zip(before, after, strict=True)]
            assert same == [offset not in FEW] * 2


def test_rows_frames_and_samples_alone(device):
    x, weight, bias, taps, addend, residual, activation, *rest = flat(tiny(grid=(2, 3, 4, 5)).make(device))
    whole = triton_gpu.gated_causal_conv(x, weight, bias, taps, addend, residual, activation, *rest)
    everyone, last = slice(None), slice(1, 2)
    parts = [((0, 2, 0), (3, 1, 5), everyone), ((2, 0, 0), (1, 4, 5), everyone), ((0, 0, 0), (3, 4, 5), last)]
    for origin, size, samples in parts:
        t, y, z = (slice(o, o + n) for o, n in zip(origin, size, strict=True))
        part = triton_gpu.gated_causal_conv(
            x[samples], weight, bias, taps, addend[samples, t, y, z], residual[samples, t, y, z], activation, [*origin],
            [*size], True,
        )  # fmt: skip
        for one, all_of_it in zip(part, whole, strict=True):
            expected = all_of_it[samples, t, y, z]
            if device.type == "cuda":
                assert torch.equal(one, expected)
            else:  # the interpreter multiplies by a BLAS, whose rounding depends on a row's place in the tile
                assert (one - expected).abs().max() < 2e-6


# ---- gradients


def test_gradients_as_torch_finds_them(device):
    x, weight, bias, taps, addend, residual, activation, origin, size, _ = flat(
        tiny(origin=(-1, 0, 1), size=(3, 2, 3)).make(device)
    )
    leaves = [t.double().requires_grad_() for t in (x, weight, bias, addend)]
    out, pre = reference.gated_causal_conv(
        *leaves[:3], taps, leaves[3], residual.double(), activation, origin, size, True
    )
    grad_out, grad_pre = torch.randn_like(out), torch.randn_like(pre)
    expected = torch.autograd.grad([out, pre], leaves, [grad_out, grad_pre])
    found = triton_gpu.gated_causal_conv_backward(
        x, weight, pre.detach().float(), grad_out.float(), grad_pre.float(), taps, activation, origin, [True] * 4
    )
    for ours, true in zip(found, expected, strict=True):
        assert ours.shape == true.shape and (ours - true).abs().max() < 1e-5 * true.abs().max()


@pytest.mark.parametrize("activation", ["gate", "none"])
def test_only_what_is_wanted(activation, device):
    *args, _ = tiny(activation).make_backward(device)
    everything = triton_gpu.gated_causal_conv_backward(*args, [True] * 4)
    for i in range(4):
        wanted = [i == j for j in range(4)]
        alone = triton_gpu.gated_causal_conv_backward(*args, wanted)
        assert torch.equal(alone[i], everything[i])
        assert all(t.shape == (0,) for t, asked in zip(alone, wanted, strict=True) if not asked)
    assert all(t.shape == (0,) for t in triton_gpu.gated_causal_conv_backward(*args, [False] * 4))
    assert everything[3].data_ptr() != args[3].data_ptr()  # an output that shares an input's memory is none


def test_a_gradient_of_pre_alone(device):
    x, weight, pre, _, grad_pre, *rest = tiny().make_backward(device)
    args = x, weight, pre, None, grad_pre, *rest
    found = triton_gpu.gated_causal_conv_backward(*args)
    cases.judge_backward(args, found)
    assert torch.equal(found[3], grad_pre)


def test_many_parts_of_a_weight_gradient(device, monkeypatch):
    monkeypatch.setattr(triton_configs, "LEAST_BLOCKS", 1)
    monkeypatch.setattr(triton_gpu, "MOST_CHUNKS", 2)
    case = tiny(grid=(2, 2, 3, 31), taps=((-1, 0, 0), (0, -1, 1), (-9, 0, 0)))
    args = case.make_backward(device)
    tile = triton_configs.fitting("weight", torch.float32, 6, 0)[0]._replace(depth=16, columns=16)
    assert triton_configs.splits_of(tile, 3, 5, 6, 24) == 24  # more than some have blocks for
    cases.judge_backward(args, triton_gpu.gated_causal_conv_backward(*args))


def test_the_workspace_is_bounded():
    for taps, inputs, outputs in ((8, 512, 1024), (343, 512, 1024), (1, 3, 6)):
        for dtype in DTYPES[:2]:
            config = triton_configs.fitting("weight", dtype, outputs, 227)[0]
            splits = triton_configs.splits_of(config, taps, inputs, outputs, 10**6)
            assert splits == 1 or splits * taps * inputs * outputs <= triton_configs.WORKSPACE


@pytest.mark.parametrize("empty", [tiny(grid=(0, 1, 2, 3)), tiny("none", grid=(0, 1, 2, 3))], ids=str)
def test_nothing_to_do(empty, device):
    args = flat(empty.make(device))
    for ours, theirs in zip(triton_gpu.gated_causal_conv(*args), reference.gated_causal_conv(*args), strict=True):
        assert ours.shape == theirs.shape and torch.equal(ours, theirs)
    grads = triton_gpu.gated_causal_conv_backward(*empty.make_backward(device)[:-1], [True] * 4)
    assert [t.shape for t in grads] == [args[0].shape, args[1].shape, (6,), (*empty.outputs, 6)]
    assert not grads[0].any() and not grads[1].any()


# ---- around the kernels


def test_taps_are_sorted_and_dead_ones_left_out():
    taps, frames = triton_configs.tables(
        (-2, 0, 0, 0, 0, 0, -1, -5, 0, -1, 0, 1), (0, 0, 0), (3, 2, 2), (3, 2, 2), torch.device("cpu")
    )
    assert taps.view(-1, 4)[:-1].tolist() == [[0, 0, 0, 1], [-1, 0, 1, 3], [-2, 0, 0, 0]]
    assert frames.view(-1, 2).tolist() == [[0, 1], [0, 2], [0, 3]]
    _, back = triton_configs.tables((2, 0, 0, 0, 0, 0), (0, 0, 0), (3, 1, 1), (3, 1, 1), torch.device("cpu"))
    assert back.view(-1, 2).tolist() == [[0, 2], [1, 2], [1, 2]]


def test_what_it_cannot_do(device):
    args = flat(tiny().make(device))
    assert triton_gpu.why_not(*args) is None
    x, weight, bias, taps, addend, residual, *rest = args
    refused = [
        ((x.double(), weight.double(), bias.double(), taps, addend.double(), None, *rest), "float64"),
        ((x, weight.half(), bias, taps, addend, None, *rest), "of x's dtype, got torch.float16"),
        ((x, weight, bias, taps, addend.bfloat16(), None, *rest), "of x's dtype, got torch.bfloat16"),
        ((x[:1].expand(2**27, -1, -1, -1, -1), weight, bias, taps, None, None, *rest), "positions"),
    ]  # fmt: skip
    for wrong, message in refused:
        assert message in triton_gpu.why_not(*wrong)
        with pytest.raises(NotImplementedError, match=message):
            triton_gpu.gated_causal_conv(*wrong)
    x, weight, pre, grad_out, *rest = tiny().make_backward(device)
    assert triton_gpu.why_not_backward(x, weight, pre, grad_out, *rest) is None
    assert "float64" in triton_gpu.why_not_backward(x, weight, pre, grad_out.double(), *rest)
    with pytest.raises(NotImplementedError, match="float64"):
        triton_gpu.gated_causal_conv_backward(x, weight, pre, grad_out.double(), *rest)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("activation", ["gate", "none"])
def test_configs(activation, dtype, device):
    args = tiny(activation, channels=(20, 130), grid=(1, 1, 3, 5), taps=FEW[1:2]).make(device, dtype)
    for config in triton_gpu.tunable("plain" if activation == "none" else "gate", args[0], 130):
        cases.judge(args, triton_gpu.gated_causal_conv(*flat(args), config))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_configs_of_the_weight_gradient(dtype, device):
    case = tiny("none", channels=(20, 130), grid=(1, 1, 3, 5), taps=FEW[1:2])
    x, _, _, grad, _, taps, _, origin, _ = args = case.make_backward(device, dtype)
    args = *args[:-1], [False, True, False, False]
    nothing = x.new_empty(0)
    for config in triton_gpu.tunable("weight", x, 130):
        found = triton_gpu.weight_gradient(x, grad, 1, taps, origin, config)
        cases.judge_backward(args, (nothing, found, nothing, nothing))


def test_a_tuned_config_is_taken(monkeypatch):
    default, *_, other = triton_configs.fitting("gate", torch.bfloat16, 512, 227)
    key = triton_configs.bucket("gate", torch.bfloat16, 200, 500)
    assert key == "gate-half-I256-O512"
    monkeypatch.setattr(triton_configs, "tuned", lambda: {"interpreter": {key: other._asdict()}})
    choose = triton_configs.choose.__wrapped__
    assert choose(None, "gate", torch.float16, 256, 512) == other != default
    assert choose(None, "gate", torch.float16, 257, 512) == choose(None, "plain", torch.float16, 256, 512) == default


def test_tuned_json_names_shipped_configs():
    shipped = [config._asdict() for fits in triton_configs.FITS.values() for config, *_ in fits]
    assert all(config in shipped for sizes in triton_configs.tuned().values() for config in sizes.values())


def test_every_width_has_a_config_on_every_chip():
    for kind in ("gate", "plain", "weight"):
        for dtype in DTYPES:
            for shared in (64, 99, 163, 227):
                assert all(triton_configs.fitting(kind, dtype, outputs, shared) for outputs in (1, 96, 128, 1024))


def test_every_kernel_is_compiled_ahead_of_time():
    mine = {
        kernel for module in (triton_forward, triton_backward) for name, kernel in vars(module).items()
        if name.endswith("_kernel")
    }  # fmt: skip
    made = triton_gpu.variants()
    assert mine == {variant.kernel for variant in made}
    assert len({variant.name for variant in made}) == len(made)
    for variant in made:
        assert list(variant.signature) == list(variant.kernel.arg_names)
        assert {name for name, kind in variant.signature.items() if kind == "constexpr"} == set(variant.constants)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*cases.ALL, *cases.LARGE], ids=str)
def test_real_sizes(case, dtype):
    judged(case, torch.device("cuda"), dtype)
    judged_backward(case, torch.device("cuda"), dtype)
