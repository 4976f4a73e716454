"""The law of the drop-in: fifty training steps beside vector-quantize-pytorch's layer, from one state and one seed."""

import copy
import inspect

import pytest
import torch
from torch import Tensor, nn

from fastvid.nn import VectorQuantize
from fastvid.nn.options import VECTOR_QUANTIZE

peer = pytest.importorskip(
    "vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed: pip install -e '.[bench]'"
)

STEPS = 50
SEQUENCE, IMAGE, VIDEO = (4, 40, 16), (4, 16, 6, 7), (2, 16, 3, 6, 7)
HEADS = {"heads": 2, "separate_codebook_per_head": True}
CASES = {
    "default": ({}, SEQUENCE),
    "one token": ({}, (100, 16)),
    "straight through": ({"rotation_trick": False}, SEQUENCE),
    "no gradient": ({"route_gradients_to_input": False}, SEQUENCE),
    "no loss": ({"commitment_weight": 0.0}, SEQUENCE),
    "decay, eps, weight": ({"decay": 0.99, "eps": 1e-2, "commitment_weight": 0.25}, SEQUENCE),
    "cosine": ({"use_cosine_sim": True}, SEQUENCE),
    "codebook_dim": ({"codebook_dim": 8}, SEQUENCE),
    "layer norm": ({"codebook_dim": 8, "layernorm_after_project_in": True}, SEQUENCE),
    "own codebook per head": ({"codebook_dim": 8, **HEADS}, SEQUENCE),
    "heads, projected": (HEADS, SEQUENCE),
    "shared codebook": ({"codebook_dim": 8, "heads": 2}, SEQUENCE),
    "channels first": ({"channel_last": False}, (4, 16, 40)),
    "image": ({"accept_image_fmap": True}, IMAGE),
    "image, heads": ({"accept_image_fmap": True, "codebook_dim": 8, **HEADS}, IMAGE),
    "video": ({"accept_3d_fmap": True}, VIDEO),
    "frozen": ({"freeze_codebook": True}, SEQUENCE),
    "dead codes": ({"threshold_ema_dead_code": 2}, SEQUENCE),
    "dead codes, cosine": ({"threshold_ema_dead_code": 2, "use_cosine_sim": True}, SEQUENCE),
    "dead codes, heads": ({"threshold_ema_dead_code": 2, "codebook_dim": 8, **HEADS}, SEQUENCE),
    "more codes than rows": ({"threshold_ema_dead_code": 2, "codebook_size": 300}, SEQUENCE),
    "k-means": ({"kmeans_init": True}, SEQUENCE),
    "k-means, few rows": ({"kmeans_init": True, "codebook_size": 200, "kmeans_iters": 3}, SEQUENCE),
    "k-means, cosine": ({"kmeans_init": True, "codebook_size": 60, "use_cosine_sim": True}, SEQUENCE),
    "k-means, heads, dead codes": (
        {"kmeans_init": True, "threshold_ema_dead_code": 1, "codebook_dim": 8, **HEADS}, SEQUENCE
    ),
    "mask": ({}, SEQUENCE),
    "mask, k-means, dead codes": ({"kmeans_init": True, "threshold_ema_dead_code": 1}, SEQUENCE),
    "mask, cosine": ({"use_cosine_sim": True, "return_zeros_for_masked_padding": False}, SEQUENCE),
    "mask, heads": (HEADS, SEQUENCE),
    "lens": ({}, SEQUENCE),
}  # fmt: skip


def pair(options: dict) -> tuple[nn.Module, nn.Module]:
    """Their layer and ours, of one seed."""
    made = []
    for layer in (peer.VectorQuantize, VectorQuantize):
        torch.manual_seed(7)
        made.append(layer(**{"dim": 16, "codebook_size": 32} | options))
    return made[0], made[1]


def padding(name: str, shape: tuple[int, ...], dice: torch.Generator) -> dict[str, Tensor]:
    if name.startswith("mask"):
        return {"mask": torch.rand(shape[:2], generator=dice) > 0.3}
    return {"lens": torch.randint(1, shape[1], shape[:1], generator=dice)} if name == "lens" else {}


def step(layer: nn.Module, x: Tensor, upstream: Tensor, seed: int, padded: dict) -> dict[str, Tensor]:
    """One training step; everything that can be seen of it."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    quantized, indices, loss = layer(x, **padded)
    (loss + (quantized * upstream).mean()).backward()
    with torch.no_grad():
        for p in layer.parameters():
            p -= 0.02 * p.grad
            p.grad = None
    seen = {"quantized": quantized, "indices": indices, "loss": loss, "gradient": x.grad}
    return seen | {"the generator": torch.get_rng_state()} | layer.state_dict()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:Using a target size")  # theirs compares the heads of a mask by broadcasting
def test_fifty_steps_are_the_same(name):
    options, shape = CASES[name]
    theirs, ours = pair(options)
    dice = torch.Generator().manual_seed(3)
    base = torch.randn(shape, generator=dice)
    for n in range(STEPS):
        x = base + 0.5 * torch.randn(shape, generator=dice)
        if n in (20, 21, 35):
            x = x + 3  # codes die of a jump
        padded, upstream = padding(name, shape, dice), torch.randn(shape, generator=dice)
        wanted, got = (step(layer, x, upstream, n, padded) for layer in (theirs, ours))
        assert list(got) == list(wanted)
        for what, value in wanted.items():
            if value is None:
                assert got[what] is None
                continue
            message = f"step {n}, {what}: "
            torch.testing.assert_close(got[what], value, rtol=1e-5, atol=1e-5, msg=lambda m, s=message: s + m)
    theirs.eval(), ours.eval()
    for value, other in zip(ours(x, **padded), theirs(x, **padded), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-5)
    indices = ours(x)[1]
    for look in ("get_codes_from_indices", "get_output_from_indices"):
        if name == "shared codebook" and look == "get_output_from_indices" and ours.has_projections:
            continue
        torch.testing.assert_close(
            getattr(ours, look)(indices), getattr(theirs, look)(indices), rtol=1e-5, atol=1e-5
        )
    torch.testing.assert_close(ours.codebook, theirs.codebook, rtol=1e-5, atol=1e-5)


def test_the_cases_do_what_their_names_say():
    """Codes do die in the cases that are about that, and a mask does hide what would have changed the codebook."""
    theirs, _ = pair({"threshold_ema_dead_code": 2})
    with pytest.MonkeyPatch.context() as patch:
        calls = []
        patch.setattr(type(theirs._codebook), "replace", lambda *_, **__: calls.append(1))
        for n in range(3):
            step(theirs, torch.randn(SEQUENCE), torch.ones(SEQUENCE), n, {})
    assert calls


@pytest.mark.parametrize("name", ["default", "codebook_dim", "layer norm", "own codebook per head", "k-means"])
def test_state_dicts_load_both_ways(name):
    options, shape = CASES[name]
    theirs, ours = pair(options)
    theirs(torch.randn(shape))
    x = torch.randn(shape)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert torch.equal(ours.eval()(x)[1], theirs.eval()(x)[1])
    other, _ = pair(options)
    ours.train()(x)
    other.load_state_dict(copy.deepcopy(ours.state_dict()), strict=True)
    assert torch.equal(other.eval()(x)[1], ours.eval()(x)[1])


def test_their_words_are_ours():
    """Every option of their constructor and forward is taken or refused by name, in their order."""
    def words(function) -> dict:
        return {name: p.default for name, p in inspect.signature(function).parameters.items() if name != "self"}

    theirs, ours = words(peer.VectorQuantize.__init__), words(VectorQuantize.__init__)
    ours.pop("others")
    assert set(theirs) == set(ours) - {"draw"} | set(VECTOR_QUANTIZE)
    assert all(ours[name] == default for name, default in theirs.items() if name in ours)
    assert all(theirs[name] in option.defaults for name, option in VECTOR_QUANTIZE.items())
    positional = [n for n, p in inspect.signature(VectorQuantize.__init__).parameters.items()
                  if p.kind is p.POSITIONAL_OR_KEYWORD and n != "self"]  # fmt: skip
    assert positional == list(theirs)[: len(positional)]
    assert words(peer.VectorQuantize.forward) == words(VectorQuantize.forward)
