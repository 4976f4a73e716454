"""The dispatcher: an op is its checks, its torch schema and an ordered list of backends that say why they cannot serve.

The public function is the Op. Calling it runs the checks, then torch.ops.fastvid.<name>, which runs the first backend
whose why_not is None: so compile, export and autograd see one torch op, whatever serves it. Who may serve can be
narrowed by `backend=` of a call, by `with fastvid.backend(...)` or by FASTVID_BACKEND, in this order; each takes one
name or several ("cpu,reference"), of which the first that can serve does, and nobody else.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvid.errors import BackendError, UsageError

KNOWN = ("triton", "cuda", "cpu", "reference")
_NONE = torch.empty(0, device="cpu")
PLAIN = (Tensor, torch.nn.Parameter)  # no subclass, which may have ideas of its own
SERVES, LATER = "serves", "comes later in the order"
OPS: dict[str, "Op"] = {}  # every op by name, in the order of their definition

_LIBRARY = torch.library.Library("fastvid", "DEF")
_chosen: ContextVar[str] = ContextVar("fastvid_backend", default="")
_record: ContextVar[dict[str, str] | None] = ContextVar("fastvid_served", default=None)


@dataclass(frozen=True)
class Backend:
    """One way to serve an op.

    run:     takes the op's positional arguments, already checked, and returns its outputs as a tuple.
    why_not: takes the same and says in a few words why `run` cannot serve them; None when it can.
    unasked: takes the same and says why `run` will not serve them unless it is asked for by name.
    """

    name: str
    run: Callable[..., Any]
    why_not: Callable[..., str | None]
    unasked: Callable[..., str | None] = lambda *_: None


def never(*_) -> None:
    """The why_not of a backend that serves everything."""


def triton(run: Callable[..., Any], why_not: Callable[..., str | None]) -> Backend:
    """The backend of a room's Triton module. why_not: what its kernels cannot do; asked where Triton itself can run."""
    return Backend(
        "triton",
        run,
        lambda *args: _without_triton(_first(args)) or why_not(*args),
        unasked=_not_on_a_gpu,
    )


def _not_on_a_gpu(*args) -> str | None:
    return None if _first(args).is_cuda else "runs in Triton's interpreter only when it is asked for"


def lazy(module: str, function: str) -> Callable[..., Any]:
    """A function of a kernel room, imported at its first call. module: "nearest_codebook.triton_gpu"."""

    @functools.cache
    def found() -> Callable[..., Any]:
        return getattr(importlib.import_module(f"fastvid.kernels.{module}"), function)

    return lambda *args: found()(*args)


@contextlib.contextmanager
def backend(*names: str) -> Iterator[None]:
    """Only these backends serve while inside: `with fastvid.backend("cpu", "reference"):`; the first that can.

    A compiled function obeys the block it is called in. Raises UsageError for a name that no backend has.
    """
    token = _chosen.set(",".join(_names(",".join(names), "backend()")))
    try:
        yield
    finally:
        _chosen.reset(token)


@contextlib.contextmanager
def served() -> Iterator[dict[str, str]]:
    """Yields a dict that tells, for each op called while inside, the backend that served it last."""
    record: dict[str, str] = {}
    token = _record.set(record)
    try:
        yield record
    finally:
        _record.reset(token)


def op(
    schema: str, backends: list[Backend], fake: Callable, result: type | None = None,
    backward: Callable | None = None, setup_context: Callable | None = None,
) -> Callable[[Callable], "Op"]:
    """Makes a function of checks into an op of its name; its docstring is the op's documentation.

    The function may return the arguments as the schema wants them, all of them: what users find natural to pass, such
    as a tuple of taps, is not always what a schema can say.

    schema:   as torch writes it, without the op's name: arguments, and returns with the names that `result` has.
    fake:     stands in for a backend where there are only shapes.
    result:   the NamedTuple that is returned, whose order backends and `fake` keep too; the schema may have another,
              which backward and setup_context see. Tensor returns a bare one, list a bare list of them, None nothing,
              as for ops that write into their arguments.
    backward, setup_context: as in torch.library.register_autograd; both None where there is no gradient. ctx.backend is
              who was asked for to serve the forward, "" for nobody.
    """

    def define(checks: Callable) -> Op:
        made = Op(checks, schema, backends, fake, result, differentiable=backward is not None)
        if made.differentiable:
            torch.library.register_autograd(
                f"fastvid::{made.name}", backward,
                setup_context=functools.partial(_set_up, setup_context),
            )  # fmt: skip
        OPS[made.name] = made
        return made

    return define


def _set_up(setup_context: Callable, ctx, inputs: tuple, keyword_only_inputs: dict, output) -> None:
    # autograd's threads know nothing of the block that the forward ran in; a compiled function obeys its caller's
    block = "" if torch.compiler.is_compiling() else _chosen.get()
    ctx.backend = keyword_only_inputs["backend"] or block
    setup_context(ctx, inputs, output)


class Op:
    """A public function with backends; made by `op`."""

    def __init__(
        self, checks: Callable, schema: str, backends: list[Backend], fake: Callable, result: type | None,
        differentiable: bool,
    ):
        functools.update_wrapper(self, checks)
        self.name, self.checks, self.backends, self.result = checks.__name__, checks, tuple(backends), result
        self.differentiable = differentiable
        inputs, _, returns = schema.partition(") -> ")
        _LIBRARY.define(f'{self.name}{inputs}, *, str backend="") -> {returns}')
        _LIBRARY.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(
            f"fastvid::{self.name}", lambda *args, backend="": self._in_schema_order(fake(*self._whole(args)))
        )
        self.torch_op = getattr(torch.ops.fastvid, self.name)
        positional = [a for a in self.torch_op.default._schema.arguments if not a.kwarg_only]
        self._names = [argument.name for argument in positional]
        self._defaults = [argument.default_value for argument in positional]
        self.writes = self.torch_op.default._schema.is_mutable
        self._returns = [returned.name for returned in self.torch_op.default._schema.returns]

    def __call__(self, *args, backend: str | None = None, **kwargs):
        args, kwargs = self._settled(args, kwargs)
        if not kwargs and len(args) == len(self._names) and self._alone(args):
            outputs = _as_given(self._recorded(args, backend or "").run, args)
            return outputs[0] if self.result in (Tensor, list) else self.result(*outputs)
        # torch would take what an op without a gradient writes for something to differentiate
        with contextlib.nullcontext() if self.differentiable else torch.no_grad():
            outputs = self.torch_op(*args, **kwargs, backend=backend or "")
        if self.result in (None, Tensor, list):
            return outputs
        return self.result(**dict(zip(self._returns, outputs, strict=True)))

    def _alone(self, args: tuple) -> bool:
        """Whether nobody would see the call pass through torch, which takes longer than a small kernel: no gradient, no
        tracing, transforming, faking or profiling, and no argument that is written to."""
        if self.writes or torch.compiler.is_compiling() or torch.autograd._profiler_enabled():
            return False
        if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
            return False
        if torch._C._functorch.peek_interpreter_stack() is not None or torch._C._get_tracing_state() is not None:
            return False
        differentiates = self.differentiable and torch.is_grad_enabled()
        for arg in _tensors(args):
            if type(arg) not in PLAIN or arg.is_meta or (differentiates and arg.requires_grad):
                return False
        return True

    def bind(self, *args, backend: str | None = None, **kwargs) -> Callable[..., Any]:
        """The chosen backend's bare launcher, for inner loops that call it on arguments like these.

        It takes the op's arguments by position, all of them, returns the outputs as a tuple, and neither checks nor
        records gradients.
        """
        args = self._positional(args, kwargs)
        return self._recorded(args, backend or "").run

    def best(self, *args) -> Backend:
        """The first backend that serves these arguments, whatever was asked for: for ops that are a part of others.

        args: all of the torch op's arguments, by position, as they stand in its schema.
        """
        return next(b for b in self.backends if b.why_not(*args) is None and b.unasked(*args) is None)

    def explain(self, *args, backend: str | None = None, **kwargs) -> str:
        """Which backend serves these arguments, and why each other one does not. One line each."""
        args = self._positional(args, kwargs)
        return _told(self.name, args, self._reasons(args, backend or ""))

    def reasons(self, *args, backend: str | None = None, **kwargs) -> dict[str, str]:
        """What each backend says, by name: SERVES for the one that is chosen."""
        return self._reasons(self._positional(args, kwargs), backend or "")

    def _reasons(self, args: tuple, asked: str) -> dict[str, str]:
        told, served, permitted = {}, False, self._permitted(asked)
        for candidate in sorted(self.backends, key=lambda b: _rank(b.name, permitted)):
            reason = candidate.why_not(*args) or (None if permitted else candidate.unasked(*args))
            if permitted and candidate.name not in permitted:
                reason = f"not among the backends asked for ({', '.join(permitted)})"
            told[candidate.name] = reason or (LATER if served else SERVES)
            served = served or reason is None
        return told

    def _settled(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        whole = self.checks(*args, **kwargs)
        return (args, kwargs) if whole is None else (whole, {})

    def _positional(self, args: tuple, kwargs: dict) -> tuple:
        args, kwargs = self._settled(args, kwargs)
        rest = zip(self._names[len(args) :], self._defaults[len(args) :], strict=True)
        return (*args, *(kwargs.get(name, default) for name, default in rest))

    def _whole(self, args: tuple) -> tuple:
        # torch leaves out trailing arguments that have their default value
        return (*args, *self._defaults[len(args) :])

    def _run(self, *args, backend: str = ""):
        args = self._whole(args)
        return self._in_schema_order(_as_given(self._recorded(args, backend).run, args))

    def _in_schema_order(self, outputs: tuple | None) -> tuple | Tensor | None:
        if self.result is None:
            return None
        if self.result in (Tensor, list):
            return outputs[0]
        named = dict(zip(self.result._fields, outputs, strict=True))
        return tuple(named[name] for name in self._returns)

    def _permitted(self, asked: str) -> list[str]:
        if asked:
            return _names(asked, "backend=")
        return _names(_chosen.get(), "backend()") or _names(os.environ.get("FASTVID_BACKEND", ""), "FASTVID_BACKEND")

    def _recorded(self, args: tuple, asked: str) -> Backend:
        chosen, record = self._choose(args, asked), _record.get()
        if record is not None:
            record[self.name] = chosen.name
        return chosen

    def _choose(self, args: tuple, asked: str) -> Backend:
        permitted = self._permitted(asked)
        if not permitted:
            return self.best(*args)
        mine = {candidate.name: candidate for candidate in self.backends}
        for name in permitted:
            if name in mine and mine[name].why_not(*args) is None:
                return mine[name]
        lacking = {name: "this op has no such backend" for name in permitted if name not in mine}
        told = _told(self.name, args, lacking | self._reasons(args, asked))
        raise BackendError(told.replace(":", ": no backend that was asked for serves", 1))


def _as_given(run: Callable, args: tuple):
    """Runs in the dtypes that are given: what autocast wants has been done by the op's checks."""
    if not torch._C._is_any_autocast_enabled():
        return run(*args)
    with torch._C._DisableAutocast():
        return run(*args)


def _names(asked: str, where: str) -> list[str]:
    names = [name.strip() for name in asked.split(",") if name.strip()]
    for name in names:
        if name not in KNOWN:
            raise UsageError(f"{where}: unknown backend {name!r}; known: {', '.join(KNOWN)}.")
    return names


def _rank(name: str, permitted: list[str]) -> int:
    return permitted.index(name) if name in permitted else len(permitted)


def _told(name: str, args: tuple, reasons: dict[str, str]) -> str:
    given = ", ".join(f"{list(a.shape)} {str(a.dtype)[6:]} {a.device}" for a in _tensors(args))
    width = max(map(len, reasons))
    return "\n".join([f"{name}: {given}", *(f"  {who + ':':{width + 1}} {why}" for who, why in reasons.items())])


def _tensors(args: tuple) -> Iterator[Tensor]:
    """Those among the arguments, and those in lists among them."""
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from (entry for entry in arg if isinstance(entry, Tensor))


def _first(args: tuple) -> Tensor:
    """The tensor by which a device is judged; one on the CPU where there is none."""
    return next(_tensors(args), _NONE)


def _without_triton(tensor: Tensor) -> str | None:
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if not (tensor.is_cuda or interpreted):
        return f"needs a CUDA tensor, got {tensor.device.type}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; run: pip install triton"
    return None
