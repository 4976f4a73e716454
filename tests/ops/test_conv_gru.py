"""The convolutional GRU against a loop that a user would write, and what only the op itself promises."""

import pytest
import torch
import torch.nn.functional as F
from fastvid.kernels.conv_gru import cases
from fastvid.kernels.conv_gru.cases import Case

import fastvid
from fastvid import ops
from fastvid.testing import assert_within_yardstick

CASE = Case("", (2, 3, 3, 4), 5, hidden=True)


def plain(gates, hidden, weight_gates, weight_candidate, steps, activation="relu"):
    """Frame after frame, from the textbook. -> [B, T, H, W, C]"""
    C, padding = weight_candidate.shape[0], weight_candidate.shape[-1] // 2
    h = torch.zeros_like(gates[:, 0, ..., :C]) if hidden is None else hidden
    states = []
    conv = lambda x, w: F.conv2d(x.permute(0, 3, 1, 2), w, padding=padding).permute(0, 2, 3, 1)  # noqa: E731
    for t in range(steps):
        g = gates[:, 0 if gates.shape[1] == 1 else t]
        r = (g[..., :C] + conv(h, weight_gates[:C])).sigmoid()
        u = (g[..., C : 2 * C] + conv(h, weight_gates[C:])).sigmoid()
        c = g[..., 2 * C :] + conv(h * r, weight_candidate)
        h = h * u + (c.relu() if activation == "relu" else c.tanh()) * (1 - u)
        states.append(h)
    return torch.stack(states, 1)


def differentiable(args, dtype=None):
    return [a.detach().to(dtype or a.dtype).requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]


@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_equals_the_loop(case):
    args, results, gradients, upstream = case.make()[:6], [], [], None
    for function, dtype in ((ops.conv_gru, None), (plain, torch.float64), (plain, None)):
        given = differentiable(args, dtype)
        states = function(*given)
        states = states.states if isinstance(states, ops.ConvGRUStates) else states
        upstream = torch.randn_like(states) if upstream is None else upstream
        results.append(states)
        inputs = [tensor for tensor in given if isinstance(tensor, torch.Tensor)]
        gradients.append(torch.autograd.grad(states, inputs, upstream.to(states.dtype)))
    assert_within_yardstick(*results)
    for ours, exact, peer in zip(*gradients, strict=True):
        # what is summed over frames and positions has terms larger than itself
        assert_within_yardstick(ours, exact, peer, largest=4 * float(exact.abs().max()))


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("same", [False, True])
def test_gradcheck(activation, same):
    case = Case("", (2, 3, 2, 3), 2, activation=activation, hidden=not same, same=same)
    gates, hidden, *weights, steps, _, _ = case.make(dtype=torch.float64)
    inputs = differentiable((gates, *([] if same else [hidden]), *weights))

    def both(gates, *rest):
        return tuple(ops.conv_gru(gates, None if same else rest[0], *rest[-2:], steps, activation))

    assert torch.autograd.gradcheck(both, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(both, inputs, fast_mode=True)


def test_a_gradient_of_what_is_kept_alone():
    given = differentiable(CASE.make())
    ops.conv_gru(*given).kept[:, :-1].square().sum().backward()
    assert given[0].grad[:, :-1].ne(0).any() and not given[0].grad[:, -1].any()


def test_gates_of_one_frame_stand_for_every_frame():
    gates, *rest = Case("", (2, 4, 3, 4), 5, same=True).make()
    one, many = differentiable([gates])[0], differentiable([gates.repeat(1, 4, 1, 1, 1)])[0]
    states = [ops.conv_gru(given, *rest).states for given in (one, many, gates.expand(-1, 4, -1, -1, -1))]
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])
    for given in states[:2]:
        given.square().sum().backward()
    torch.testing.assert_close(one.grad, many.grad.sum(dim=1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_frames_one_by_one_are_all_at_once(dtype):
    gates, hidden, *rest, steps, activation, _ = cases.ALL[-1].make(dtype=dtype)
    whole = ops.conv_gru(gates, hidden, *rest, steps, activation, keep=True)
    for t in range(steps):
        done = ops.conv_gru(gates[:, t : t + 1], hidden, *rest, 1, activation, keep=True)
        hidden = done.states[:, 0]
        assert torch.equal(hidden, whole.states[:, t]) and torch.equal(done.kept[:, 0], whole.kept[:, t])


def test_a_later_frame_never_touches_an_earlier_state():
    gates, *rest = CASE.make()
    before = ops.conv_gru(gates, *rest).states
    gates[0, 1] += 1
    after = ops.conv_gru(gates, *rest).states
    changed = (before != after).flatten(2).any(dim=-1)
    assert changed.tolist() == [[False, True, True], [False] * 3]


def test_nothing_is_kept_unasked():
    args = CASE.make()
    assert ops.conv_gru(*args[:6]).kept.shape == (0,)
    with torch.no_grad():
        assert ops.conv_gru(*differentiable(args[:6])).kept.shape == (0,)
    assert ops.conv_gru(*differentiable(args[:6])).kept.shape == (2, 3, 3, 4, 15)


def step(gates, hidden, weight_gates, weight_candidate):
    return ops.conv_gru(gates, hidden, weight_gates, weight_candidate, 3).states.square().sum()


def test_compiles_whole_and_trains_alike():
    given, other = differentiable(CASE.make()[:4]), None
    other = differentiable(given)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(step(*given), compiled(*other), rtol=0, atol=0)
        step(*given).backward()
        compiled(*other).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(given, other, strict=True))


def test_the_gradient_is_served_by_who_served_the_forward():
    given = differentiable(CASE.make()[:4])
    with fastvid.backend("reference"):
        loss = step(*given)
    with ops.served() as record:
        loss.backward()
    assert record == {"conv_gru_backward": "reference"}


def test_autocast_as_convolutions_do():
    given = differentiable(CASE.make()[:4])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        done = ops.conv_gru(*given, 3)
    assert done.states.dtype == torch.bfloat16
    done.states.sum().backward()
    assert {tensor.grad.dtype for tensor in given} == {torch.float32}


@pytest.mark.parametrize(
    "change, told",
    [
        ({"gates": torch.zeros(1, 2, 3, 3, 5)}, r"`gates` must be floating \[B, T or 1, H, W, 6\]"),
        ({"hidden": torch.zeros(1, 3, 2, 2)}, r"`hidden` must be \[1, 3, 3, 2\], got \[1, 3, 2, 2\]"),
        ({"weight_gates": torch.zeros(2, 2, 3, 3)}, r"`weight_gates` must be \[4, 2, 3, 3\]"),
        ({"weight_candidate": torch.zeros(2, 2, 2, 2)}, "k odd"),
        ({"weight_candidate": torch.zeros(2, 2, 3, 3).double()}, "one dtype"),
        ({"steps": 3}, "got 3 steps and 2 frames"),
        ({"steps": 0}, "got 0 steps"),
        ({"activation": "gelu"}, "'relu' or 'tanh', got 'gelu'"),
    ],
)
def test_what_does_not_fit_is_refused(change, told):
    given = {"gates": torch.zeros(1, 2, 3, 3, 6), "hidden": None, "weight_gates": torch.zeros(4, 2, 3, 3),
             "weight_candidate": torch.zeros(2, 2, 3, 3), "steps": 2}  # fmt: skip
    with pytest.raises(ValueError, match=told):
        ops.conv_gru(**given | change)


def test_a_gradient_needs_something_to_start_from():
    grad, _, *rest = CASE.make_backward()
    with pytest.raises(ValueError, match="both"):
        ops.conv_gru_backward(None, None, *rest)
    rest[4] = torch.empty(0)
    with pytest.raises(ValueError, match="keep=True"):
        ops.conv_gru_backward(grad, None, *rest)
