"""Around the Triton kernels of axial_attention: what they refuse, how grids are cut, which tiles are chosen."""

import pytest
import torch
from fastvid.kernels.axial_attention import cases

pytest.importorskip("triton", reason="Triton is not installed")

from fastvid.kernels.axial_attention import (  # noqa: E402
    triton_backward,
    triton_bias,
    triton_configs,
    triton_forward,
    triton_gpu,
    triton_launch,
)
from fastvid.kernels.axial_attention.triton_configs import Config  # noqa: E402

Case = cases.Case


@pytest.fixture
def device(device):
    if device.type == "cpu" and not triton_gpu.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is not set: Triton's kernels run on the CUDA device of this machine")
    return device


def flat(args: tuple) -> tuple:
    """A case's arguments as backends see them; a bias keeps its dtype."""
    q, k, v, _, box, mask, bias, _, keep = args
    return q, k, v, bias, [*box], mask, q.shape[-1] ** -0.5, keep


class Recorder:
    """Stands for a kernel: keeps the grids that it is asked for."""

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *args, **kwargs: None


@pytest.mark.parametrize(
    "length, width, forward, programs",
    [(2, 4, "_tile_kernel", 300 * 300 // 16), (80, 4, "_long_kernel", 300 * 300 * 3), (2, 300, "_tile_kernel", 16875)],
)
def test_grids_are_flat_and_large(length, width, forward, programs, monkeypatch):
    # 90,000 lines are more than a grid's second axis could hold; nothing is launched
    launched = {name: Recorder() for name in (forward, "_queries_kernel", "_keys_kernel", "_box_kernel")}
    monkeypatch.setattr(triton_forward, forward, launched[forward])
    for name in [*launched][1:]:
        monkeypatch.setattr(triton_backward, name, launched[name])
    q = torch.zeros((), dtype=torch.float32).expand(1, length, 300, 300, 1, 4)
    v = q[..., :1].expand(*q.shape[:5], width)
    triton_gpu.why_not(q, q, v, None, [length, 1, 1], "none", 1.0, False)
    cut = triton_launch.cut_of(q, q, [length, 1, 1])
    triton_launch.attend(q, q, v, None, v, None, cut, "none", 1.0, None)
    assert launched[forward].grids == [(programs,)]
    if width <= triton_launch.BLOCK_D:
        lse, delta = q[..., 0], q[..., 0]
        call = triton_launch.Gradient(q, q, v, None, v, lse, v, None, delta, cut, "none", 1.0, {})
        found = triton_launch.kinds(q, v, None, cut, True)
        for kind in found:
            getattr(call, kind)(*[None] * {"box": 3, "queries": 1, "keys": 2}[kind])
        wanted = {"keys": [(300 * 300 * 5,)]}  # tiles of 16 keys, of 32 queries
        assert [launched[f"_{kind}_kernel"].grids for kind in found] == [wanted.get(k, [(programs,)]) for k in found]


def test_slots_are_powers_of_two_that_fill_the_tile():
    tile = Config(64, 64, 128, 4, 1)
    for (n, m), wanted in {(4, 4): (16, 4, 4), (3, 7): (8, 4, 8), (64, 64): (1, 64, 64), (1, 48): (1, 16, 64),
                           (1, 8): (8, 2, 8), (100, 33): (1, 64, 64), (1, 1): (64, 1, 1)}.items():  # fmt: skip
        assert tuple(triton_configs.slots(tile, n, m).values()) == wanted


def test_lines_lie_along_the_last_axis():
    cut = triton_configs.cut((4, 6, 8), (4, 6, 8), (4, 1, 1))
    assert cut.order == (1, 2, 0) and cut.line and cut.cells == (6, 8, 1) and cut.box == (1, 1, 4)
    assert triton_configs.position_strides((4, 6, 8), cut.order) == (192, 8, 1, 48)
    assert triton_configs.cut((1, 6, 8), (9, 6, 8), (1, 1, 1)).order == (1, 2, 0), "the keys alone make a line"
    assert not triton_configs.cut((4, 6, 8), (4, 6, 8), (1, 2, 2)).line
    folded, (table,) = triton_configs.folded(cut, 2, [(192, 8, 1, 48)])
    assert folded.cells == (1, 48, 1) and table == (192, 8, 1, 48)


def test_what_it_cannot_do(device):
    args = flat(Case("", (1, 1, 1, 3), 1, 4, (1, 1, 3), bias=True).make(device))
    assert triton_gpu.why_not(*args) is None
    q, k, v, bias, *rest = args
    wide = q[..., :1].expand(1, 1, 1, 3, 1, 200)
    far = torch.empty_strided((1, 3, 3), (0, 2**30, 1), device="meta")
    refused = [
        ((q.double(), k.double(), v.double(), bias, *rest), "float64"),
        ((q, k.half(), v, bias, *rest), "of q's dtype, got torch.float16"),
        ((q, k, v, bias.double(), *rest), "bias in float32"),
        ((q, k, v, far, *rest), "spans less"),
        ((wide, wide, v, bias, *rest), "heads of up to 128"),
        ((*(t[:1].expand(2**30, -1, -1, -1, -1, -1) for t in (q, k, v)), bias, *rest), "positions of a head"),
    ]  # fmt: skip
    for wrong, message in refused:
        assert message in triton_gpu.why_not(*wrong)
        with pytest.raises(NotImplementedError, match=message):
            triton_gpu.axial_attention(*wrong)


def test_what_its_gradient_cannot_do(device):
    q, k, v, bias, out, lse, grad_out, _, *rest = args = Case("", (1, 1, 1, 3), 1, 4, (1, 1, 3)).make_backward(device)
    assert triton_gpu.why_not_backward(*args) is None
    wide = Case("", (1, 1, 1, 70), 1, 4, (1, 1, 70), D=140).make_backward(device)
    refused = [
        ((q, k, v, bias, out, lse, None, None, *rest), "needs a gradient"),
        ((q, k, v, bias, out, lse, grad_out.double(), None, *rest), "float64"),
        (wide, "values wider than 128"),
    ]  # fmt: skip
    for wrong, message in refused:
        assert message in triton_gpu.why_not_backward(*wrong)
        with pytest.raises(NotImplementedError, match=message):
            triton_gpu.axial_attention_backward(*wrong)


def test_a_chip_without_a_tile_is_told(monkeypatch, device):
    monkeypatch.setattr(triton_configs, "device", lambda index: ("small", 64))
    monkeypatch.setattr(triton_configs, "choose", triton_configs.choose.__wrapped__)
    monkeypatch.setattr(triton_configs, "kinds", triton_configs.kinds.__wrapped__)
    line, blocks = (Case("", (1, 2, 2, 2), 1, 4, box) for box in ((1, 1, 2), (1, 2, 2)))
    assert triton_gpu.why_not(*flat(line.make(device))) is None
    assert "lines without a bias" in triton_gpu.why_not(*flat(blocks.make(device)))
    assert "lines without a bias" in triton_gpu.why_not_backward(*blocks.make_backward(device))


def test_a_tuned_config_is_taken(monkeypatch):
    default, other, *_ = triton_configs.fitting("long", torch.bfloat16, 64, 1000, 1000, True, 227)
    key = triton_configs.bucket("long", torch.bfloat16, 64, 1000, True)
    assert key == "long-plain-half-E64-M1024"
    monkeypatch.setattr(triton_configs, "tuned", lambda: {"interpreter": {key: other._asdict()}})
    choose = triton_configs.choose.__wrapped__
    assert choose(None, "long", torch.float16, 33, 64, 1000, 600, True) == other != default
    assert choose(None, "long", torch.float16, 64, 64, 1000, 1100, True) == default


def test_tuned_json_names_shipped_configs():
    shipped = [fit.config._asdict() for fits in triton_configs.FITS.values() for fit in fits]
    assert all(config in shipped for sizes in triton_configs.tuned().values() for config in sizes.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_size_has_a_config(dtype):
    for width in (16, 64, 128):
        for kind in ("long", "queries", "keys", "bias"):
            assert triton_configs.fitting(kind, dtype, width, 9999, 9999, False, 99), (kind, width)
        for kind in ("long", "queries", "keys"):
            assert triton_configs.fitting(kind, dtype, width, 9999, 9999, True, 64), (kind, width)
        assert triton_configs.fitting("tile", dtype, width, 32, 32, False, 163)
    assert triton_configs.fitting("box", dtype, 64, 32, 32, False, 163)


def test_every_kernel_is_compiled_ahead_of_time():
    mine = {
        kernel for module in (triton_forward, triton_backward, triton_bias) for name, kernel in vars(module).items()
        if name.endswith("_kernel")
    }  # fmt: skip
    made = triton_gpu.variants()
    assert mine == {variant.kernel for variant in made}
    assert len({variant.name for variant in made}) == len(made)
    for variant in made:
        assert list(variant.signature) == list(variant.kernel.arg_names)
        assert {name for name, kind in variant.signature.items() if kind == "constexpr"} == set(variant.constants)
