"""The Triton kernels of conditional_batch_norm's ops: on the GPU, or in Triton's interpreter where there is none."""

import pytest
import torch
from fastvid.kernels.conditional_batch_norm import cases, reference

pytest.importorskip("triton", reason="Triton is not installed")

from fastvid.kernels.conditional_batch_norm import triton_backward, triton_forward, triton_gpu  # noqa: E402

# the interpreter computes by numpy, which speaks of the infinities and NaN that are asked of it
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


@pytest.fixture
def device(device):
    if device.type == "cpu" and not triton_gpu.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is not set: Triton's kernels run on the CUDA device of this machine")
    return device


def same_bits(a: tuple, b: tuple) -> bool:
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


def case(*shape: int, **options) -> cases.Case:
    return cases.Case("here", shape, **options)


def judged(one: cases.Case, device, dtype=torch.float32) -> None:
    args = one.make_batch(device, dtype)
    cases.judge_batch(args, triton_gpu.conditional_batch_norm(*args))
    args = one.make_backward(device, dtype)
    cases.judge_backward(args, triton_gpu.conditional_norm_backward(*args))


@pytest.mark.parametrize("dtype", triton_gpu.DTYPES, ids=str)
def test_dtypes(dtype, device):
    judged(case(2, 1, 2, 3, 5, upsample=True), device, dtype)


def test_several_shares_tiles_and_columns(device, monkeypatch):
    # shares of positions, cut off in the middle of a tile; tiles of channels, too
    judged(case(1, 1, 3, 7, 130), device)
    monkeypatch.setattr(triton_gpu, "PROGRAMS", 4)
    monkeypatch.setattr(triton_gpu, "LEAST_TILES", 1)
    args = case(3, 1, 7, 7, 130).make_moments(device)
    assert triton_gpu._shares(147, 2, 16) == (80, 2) and triton_gpu._shares(147, 2, 16, 8) == (80, 2)
    cases.judge_moments(args, triton_gpu.frame_moments(*args))


def test_as_torch_normalises_and_interpolates(device):
    x, gain, bias, eps, *_ = case(2, 1, 3, 4, 6).make_batch(device)
    flat = x[:, 0].permute(0, 3, 1, 2).double()  # [B, C, H, W]
    normal = torch.nn.functional.batch_norm(flat, None, None, training=True, eps=eps)
    scaled = (normal * gain[:, :, None, None] + bias[:, :, None, None]).relu()
    grown = torch.nn.functional.interpolate(scaled, scale_factor=2, mode="bilinear", align_corners=False)
    out, mean, var = triton_gpu.conditional_batch_norm(x, gain, bias, eps, True, True)
    assert (out[:, 0].permute(0, 3, 1, 2) - grown).abs().max() < 1e-5
    assert (mean[0] - flat.mean(dim=(0, 2, 3))).abs().max() < 1e-6
    assert (var[0] - flat.var(dim=(0, 2, 3), correction=0)).abs().max() < 1e-6


def test_strides(device):
    one = case(2, 1, 2, 3, 3, upsample=True)
    x, mean, var, gain, bias, grad, *rest = one.make_backward(device)
    spread = torch.zeros(*x.shape[:-1], 6, device=device)
    spread[..., ::2] = x
    first = lambda t: t.movedim(-1, 1).contiguous().movedim(1, -1)  # noqa: E731  torch's layout, seen channels last
    turned = [t.T.contiguous().T for t in (mean, var, gain, bias)]
    dense = triton_gpu.conditional_norm_backward(x, mean, var, gain, bias, grad, *rest)
    for view in (first(x), spread[..., ::2], x.transpose(2, 3).contiguous().transpose(2, 3)):
        assert same_bits(dense, triton_gpu.conditional_norm_backward(view, *turned, first(grad), *rest))
        assert same_bits(triton_gpu.frame_moments(x), triton_gpu.frame_moments(view))
        args = mean, var, gain, bias, 1e-5, False, False
        assert same_bits(triton_gpu.conditional_norm(x, *args), triton_gpu.conditional_norm(view, *args))


@pytest.mark.parametrize("own", [False, True], ids=["given", "own"])
def test_only_what_is_wanted(own, device):
    *args, _, _ = case(2, 1, 2, 3, 4).make_backward(device)
    whole = [not own or i not in (1, 2) for i in range(5)]
    everything = triton_gpu.conditional_norm_backward(*args, own, whole)
    for i in (0, 3, 4) if own else range(5):
        wanted = [i == j for j in range(5)]
        alone = triton_gpu.conditional_norm_backward(*args, own, wanted)
        assert torch.equal(alone[i], everything[i])
        assert all(t.shape == (0,) for t, asked in zip(alone, wanted, strict=True) if not asked)
    assert all(t.shape == (0,) for t in triton_gpu.conditional_norm_backward(*args, own, [False] * 5))


def test_nothing_to_do(device):
    args = cases.EMPTY.make_batch(device)
    assert same_bits(triton_gpu.conditional_batch_norm(*args), reference.conditional_batch_norm(*args))
    args = cases.EMPTY.make_backward(device)
    assert same_bits(triton_gpu.conditional_norm_backward(*args), reference.conditional_norm_backward(*args))


def test_values_that_are_not_finite_stay_in_their_channel(device):
    x, mean, var, gain, bias, eps, *_ = case(1, 1, 3, 4, 3).make(device)
    x[0, 0, 1, 1, 1] = float("nan")
    (out,) = triton_gpu.conditional_norm(x, mean, var, gain, bias, eps, True, True)
    assert out.isnan().any() and not out[..., ::2].isnan().any()
    own, dirty, _ = triton_gpu.conditional_batch_norm(x, gain, bias, eps, False, False)
    assert own[..., 1].isnan().all() and dirty[0, 1].isnan() and not own[..., ::2].isnan().any()


def test_what_it_cannot_do(device):
    args = case(1, 1, 2, 2, 3).make(device)
    assert triton_gpu.why_not(*args) is None
    vast = args[0].expand(2**29, -1, -1, -1, -1)
    for wrong, message in ((args[0].double(), "float64"), (vast, "positions of 64 channels")):
        assert message in triton_gpu.why_not(wrong)
        with pytest.raises(NotImplementedError, match=message):
            triton_gpu.conditional_norm(wrong, *args[1:])


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
@pytest.mark.parametrize("one", cases.LARGE, ids=str)
def test_real_sizes(one, dtype):
    judged(one, torch.device("cuda"), dtype)
