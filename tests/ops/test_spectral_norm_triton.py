"""The Triton kernels of spectral_norm: on the GPU, or in Triton's interpreter where there is none."""

import pytest
import torch
from fastvid.kernels.spectral_norm import cases, reference

pytest.importorskip("triton", reason="Triton is not installed")

from fastvid.kernels.spectral_norm import triton_gpu  # noqa: E402


@pytest.fixture
def device(device):
    if device.type == "cpu" and not triton_gpu.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is not set: Triton's kernels run on the CUDA device of this machine")
    return device


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_even_and_uneven_weights_in_one_call(dtype, device):
    # some with columns that 16 bytes divide, some not; several pieces of rows, and rows over several tiles
    case = cases.Case("", ((37, 64), (5, 27), (40, 300), (3, 8, 3, 3)))
    args, given = case.make(device, dtype), case.make_backward(device, dtype)
    cases.judge(args, cases._flat(triton_gpu.spectral_norm(*args)))
    cases.judge_backward(given, cases._flat(triton_gpu.spectral_norm_backward(*given)))


@pytest.mark.parametrize("scale", [1e20, 1e-22])
def test_products_beyond_float32(scale, device):
    weights, u, v, iterations, _, dims = cases.ALL[2].make(device)
    args = [weight * scale for weight in weights], u, v, iterations, 1e-30, dims
    exact = cases._flat(reference.spectral_norm(*cases._exactly(args)))
    for ours, true in zip(cases._flat(triton_gpu.spectral_norm(*args)), exact, strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=1e-4, atol=1e-6 * float(true.abs().max()))


def test_memory_that_is_not_aligned(device):
    weight = torch.randn(8 * 16 + 1, device=device)[1:].view(8, 16)
    u, v = torch.randn(8, device=device), torch.randn(16, device=device)
    ours = triton_gpu.spectral_norm([weight], [u], [v], 1, 1e-12, [0])
    peer = reference.spectral_norm([weight], [u], [v], 1, 1e-12, [0])
    torch.testing.assert_close(ours[0][0], peer[0][0])


def test_refuses_what_it_cannot_do(device):
    two = [torch.ones(2, 2, device=device), torch.ones(2, 2, device=device, dtype=torch.bfloat16)]
    assert "all float32, all bfloat16 or all float16" in triton_gpu.why_not(two, [], [])
    assert triton_gpu.why_not([], [], []) == "needs a weight"
    assert "with elements" in triton_gpu.why_not([torch.empty(0, 3, device=device)], [], [])
    assert triton_gpu.why_not_backward(two[:1], two[1:]) == "takes gradients of their weights' dtype"
    with pytest.raises(NotImplementedError, match="spectral_norm: triton needs a weight"):
        triton_gpu.spectral_norm([], [], [], 1, 1e-12, [])
