"""The race of a whole training step: forward, loss, backward and optimizer of a shipped prior's model.

The torch composition is the same model with every gated causal convolution as a dense one, whose weight is multiplied
by its mask at every step, and the gate as chunk, tanh and sigmoid; see conv_peers.py. The definition in plain torch
(gather and one product) runs beside it. All train on the same fresh batches; peaks count activations and gradients.
"""

import copy
import functools
from collections.abc import Callable

import torch
from conv_peers import FORMATS, densify_, live_gradients
from floors import operations
from peak import floor
from timing import Contestant, GateError, Race
from torch import Tensor, nn

import fastvid
from fastvid import ops
from fastvid.models.bottom_prior import PRESETS as BOTTOM
from fastvid.models.bottom_prior import BottomPrior, BottomPriorConfig
from fastvid.models.top_prior import PRESETS as TOP
from fastvid.models.top_prior import TopPrior, TopPriorConfig
from fastvid.nn.gated import code_loss
from fastvid.ops._op import SERVES

BATCH, TOP_SIDE = 16, 8
RATE = 3e-4  # of the optimizer
OURS, PEERS = 2.0, 8.0  # how many times the definition's error against float64 is allowed: ours, and the compositions
LEAST = 2.0**-21  # relative error below which nobody is asked for more: four roundings of a float32

Batch = tuple[Tensor, ...]  # the target, then what the model takes beside it


def top_race(config: TopPriorConfig = TOP["dino64"], batch: int = BATCH, side: int = TOP_SIDE) -> Race:
    """The top prior on grids of 3 x side x side codes. Tests give it smaller."""
    codes = config.stack.codes
    sizes = ((config.steps, side, side), (1, side, side), (2, 2 * side, 2 * side))
    return _race(_fresh(TopPrior, config), lambda number: _codes(number, codes, batch, sizes), sizes[0])


def bottom_race(config: BottomPriorConfig = BOTTOM["dino64"], batch: int = BATCH, side: int = 2 * TOP_SIDE) -> Race:
    """The bottom prior on slices of side x side codes."""
    codes, T = config.stack.codes, config.steps
    sizes = ((side, side), (T, side // 2, side // 2), (config.window, side, side))

    def inputs(number: int) -> Batch:
        target, top, window = _codes(number, codes, batch, sizes)
        return target, torch.arange(number, number + batch) % (2 * T), top, window

    return _race(_fresh(BottomPrior, config), inputs, (1, side, side))


def _fresh(kind: type[nn.Module], config) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config).train()


def _codes(number: int, codes: int, batch: int, sizes: tuple[tuple[int, ...], ...]) -> Batch:
    generator = torch.Generator().manual_seed(4000 + number)
    return tuple(torch.randint(codes, (batch, *size), generator=generator) for size in sizes)


def _race(model: nn.Module, inputs: Callable[[int], Batch], grid: tuple[int, int, int]) -> Race:
    models = {"fastvid": (copy.deepcopy(model), "cpu")}
    models |= {f"masked conv3d {layout}": (densify_(copy.deepcopy(model), layout), "reference") for layout in FORMATS}
    models["reference"] = copy.deepcopy(model), "reference"
    missing, batch = _why_not(model), len(inputs(0)[0])
    contestants = [
        Contestant(name, None if name == "fastvid" and missing else functools.partial(_step, *one, _optimizer(one[0])),
                   missing if name == "fastvid" else None)
        for name, one in models.items()
    ]  # fmt: skip
    dense = tuple(name for name in models if name.startswith("masked"))
    contestants += [Contestant("masked conv3d", best_of=dense), Contestant("torch", best_of=(*dense, "reference"))]
    able = {name: one for name, one in models.items() if not (name == "fastvid" and missing)}
    return Race(
        gate=lambda: _gate(able, model, inputs(-1)),
        inputs=inputs,
        contestants=contestants,
        # forward, gradients of the values, gradients of the weights
        floor=lambda: floor(3 * batch * operations(model.stack, grid), 0.0, "cpu", torch.get_num_threads()),
    )


def _why_not(model: nn.Module) -> str | None:
    layer = model.stack.layers[0].vertical
    x = torch.zeros(1, 1, 1, 1, layer.weight.shape[1])
    told = ops.gated_causal_conv.reasons(x, layer.weight.detach(), None, layer.taps, backend="cpu")["cpu"]
    return None if told == SERVES else told


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)


def _step(model: nn.Module, backend: str, optimizer: torch.optim.Optimizer, batch: Batch) -> float:
    loss = _backward(model, backend, batch)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def _backward(model: nn.Module, backend: str, batch: Batch) -> Tensor:
    with fastvid.backend(backend):
        loss = code_loss(model(*batch), batch[0])
        loss.backward()
    return loss.detach()


def _gate(models: dict[str, tuple[nn.Module, str]], model: nn.Module, batch: Batch) -> str:
    """Loss and all gradients of one batch against float64, measured by the error of the definition in float32.

    Dropout draws in the order of memory, which a layout changes; here everybody goes without, and leaves it as it was.
    """
    exact, plain = (_judged(copy.deepcopy(model).to(dtype), "reference", batch) for dtype in
                    (torch.float64, torch.float32))  # fmt: skip
    allowed, worst = _errors(plain, exact), 0.0
    for name, one in models.items():
        times = OURS if name == "fastvid" else PEERS
        found = _errors(_judged(*one, batch), exact)
        for what, error, limit in zip(("loss", "gradients"), found, allowed, strict=True):
            if not error <= times * limit + LEAST:
                raise GateError(f"{name}: {what} {error:.1e} away from float64's, the definition's {limit:.1e}")
        worst = max(worst, *found)
    return f"loss and gradients within {worst:.1e} of float64's, ours within twice the definition's error"


def _judged(model: nn.Module, backend: str, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients without dropout."""
    drops = {module: module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    for module in drops:
        module.p = 1e-30  # not 0, which would let the block take another path than the one that is timed
    loss, gradients = _backward(model, backend, batch), live_gradients(model)
    model.zero_grad(set_to_none=True)
    for module, p in drops.items():
        module.p = p
    return loss, gradients


def _errors(found: tuple[Tensor, dict[str, Tensor]], exact: tuple[Tensor, dict[str, Tensor]]) -> tuple[float, float]:
    """Relative errors of the loss, and of all gradients together."""
    if found[1].keys() != exact[1].keys():
        raise GateError(f"gradients of {sorted(found[1].keys() ^ exact[1].keys())} are there for one alone")
    off, scale = ([part.double().square().sum() for part in parts] for parts in
                  ([found[1][name] - exact[1][name] for name in exact[1]], exact[1].values()))  # fmt: skip
    away = (sum(off) / sum(scale)).sqrt().item()
    return ((found[0] - exact[0]) / exact[0]).abs().item(), away
