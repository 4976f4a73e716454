"""Counter-based noise: the published Philox vectors, the law of Gumbel noise, independence of order and batch; and the
packed format."""

import math

import pytest
import torch
from fastvid.kernels.pixelcnn_sampler import cases, packed, reference

from fastvid import ops
from fastvid.nn import GatedPixelStack, GatedStackConfig
from fastvid.sampling import pack_stack

# known answers of Philox4x32-10 (Random123's kat_vectors): counter, key, output
VECTORS = [
    ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, (0xFFFFFFFF,) * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], (0xA4093822, 0x299F31D0),
     [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
]


@pytest.mark.parametrize("counter, key, words", VECTORS)
def test_philox_known_answers(counter, key, words):
    assert [int(w) for w in reference.philox(tuple(torch.tensor(c) for c in counter), key)] == words


def test_noise_is_gumbel():
    noise = ops.gumbel_row(3, torch.arange(8), 0, 0, 0, 32, 512).double().flatten()
    assert noise.isfinite().all()
    assert abs(noise.mean() - 0.5772156649) < 0.02 and abs(noise.std() - math.pi / math.sqrt(6)) < 0.02


@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_shapes(case, device):
    noise = ops.gumbel_row(0, case.make(device), 1, 2, 3, case.W, case.V)
    assert noise.shape == (case.B, case.W, case.V) and noise.dtype == torch.float32
    assert noise.unique().numel() > 0.99 * noise.numel()


def test_noise_depends_on_every_word_and_not_on_the_batch():
    def row(seed=1, samples=(5,), stream=0, t=2, y=3):
        return ops.gumbel_row(seed, torch.tensor(samples), stream, t, y, 4, 10)

    base = row()
    for other in (row(seed=2), row(seed=1 + (1 << 32)), row(samples=(6,)), row(stream=1), row(t=3), row(y=4)):
        assert (other != base).all()
    assert torch.equal(row(samples=(9, 5, 7))[1:2], base)
    assert base.unique().numel() == base.numel()


def test_draws_follow_the_distribution():
    probability = torch.tensor([0.1, 0.2, 0.3, 0.4])
    noise = ops.gumbel_row(0, torch.arange(500), 0, 0, 0, 64, 4)  # 32,000 draws
    drawn = ops.draw(probability.log().expand_as(noise), noise)
    frequency = drawn.flatten().bincount(minlength=4) / drawn.numel()
    assert (frequency - probability).abs().max() < 0.012  # over four standard errors
    cold = ops.draw(probability.log().expand_as(noise), noise, temperature=0.01)
    assert (cold == 3).double().mean() > 0.99


def test_refusals():
    with pytest.raises(ValueError, match="temperature"):
        ops.draw(torch.zeros(2), torch.zeros(2), temperature=0)
    with pytest.raises(ValueError, match="stream"):
        ops.gumbel_row(0, torch.arange(1), 1 << 15, 0, 0, 4, 4)
    with pytest.raises(ValueError, match="columns"):
        ops.gumbel_row(0, torch.arange(1), 0, 0, 0, 0, 4)


def stack_of(**sizes):
    return GatedPixelStack(GatedStackConfig(codes=19, layers=2, condition_channels=7, attention_every=2, **sizes))


@pytest.mark.parametrize("wavefront", [False, True])
@pytest.mark.parametrize("kernel, frames", [(3, 1), (3, 3), (5, 2)])
def test_cases_have_the_taps_and_names_of_a_stack(kernel, frames, wavefront):
    stack = stack_of(channels=8, heads=2, kernel=kernel, time_kernel=frames, wavefront=wavefront)
    case = cases.GridCase("", (1, 1, 1, 1), K=19, C=8, L=2, kernel=kernel, frames=frames, attended=(1,), condition=7)
    taps = cases.live_taps(kernel, frames, wavefront)
    convolutions = stack.input_vertical, stack.input_horizontal, stack.layers[0].vertical, stack.layers[0].horizontal
    assert taps == tuple(convolution.taps for convolution in convolutions)
    assert {k: v.shape for k, v in case._state(taps).items()} == {k: v.shape for k, v in stack.state_dict().items()}


@pytest.mark.parametrize("channels, heads", [(16, 2), (20, 4), (24, 3)])
def test_unpacked_weights_are_the_packed_ones(channels, heads):
    stack = stack_of(channels=channels, heads=heads)
    model, state = packed.Unpacked(pack_stack(stack, "float32")), stack.state_dict()
    C, E, wide = channels, channels // heads, model.table.width
    assert (wide, model.table.stride, model.table.head_stride) == (-(-C // 8) * 8, -(-C // 16) * 16, -(-E // 8) * 8)
    vertical = torch.cat([model.layers[1]["v_past"], model.layers[1]["v_now"]]).view(-1, wide, 2, wide)
    assert torch.equal(vertical[:, :C, :, :C].flatten(2), state["layers.1.vertical.weight"])
    assert vertical.abs().sum() == vertical[:, :C, :, :C].abs().sum(), "what pads a width is zero"
    link = model.layers[0]["link"].view(2, wide, 2, wide)[:, :C, :, :C].reshape(2 * C, 2 * C)
    assert torch.equal(link.t(), state["layers.0.link.weight"])
    qkv = model.layers[1]["qkv"].view(wide, 3, heads, -1)[:C, ..., :E].flatten(1)
    assert torch.equal(qkv.t(), state["layers.1.attention.qkv.weight"])
    position = model.layers[1]["qkv_position"].view(3, 3, heads, -1)[..., :E].flatten(1)
    assert torch.equal(position.t(), state["layers.1.attention.qkv_position.weight"])
    assert torch.equal(model.globals["head2"][:C].t(), state["head.3.weight"])
    looked_up = model.globals["table_h"][4, 5, :C]
    torch.testing.assert_close(looked_up, state["embed.weight"][5] @ state["input_horizontal.weight"][4])


def test_smaller_weights_are_rounded_to_nearest():
    stack = stack_of(channels=16, heads=2)
    exact, half, eighth = (packed.Unpacked(pack_stack(stack, w)).layers[0]["h_now"] for w in packed.WEIGHTS)
    assert torch.equal(half, exact.bfloat16().float())
    step = exact.abs().amax(dim=0) / 127
    assert ((eighth - exact).abs() <= step * 0.501).all() and (eighth - exact).abs().max() > 0


def test_every_section_is_aligned_and_apart():
    table = packed.Table(pack_stack(stack_of(channels=16, heads=2), "int8").table)
    offsets = [at for group in (table.globals, table.layer(0), table.layer(1)) for at in group.values()]
    there = [at for at in offsets if at != packed.ABSENT]
    assert len(set(there)) == len(there) == len(packed.GLOBALS) + 2 * len(packed.LAYER) - 7
    assert all(at % packed.ALIGNMENT == 0 for at in there)


def test_packing_refuses_a_look_ahead():
    state, ahead = stack_of(channels=8, heads=1).state_dict(), ((0, 0, 1),)
    taps = list(cases.live_taps(3, 3, False))
    for place, wrong in ((0, ((0, 0, 0),)), (1, ahead), (2, ((0, 1, 0),)), (3, ahead)):
        with pytest.raises(ValueError, match="taps"):
            ops.pack_pixelcnn(state, [*taps[:place], wrong, *taps[place + 1 :]], 1)
