"""The dispatcher: torch's own checks of every op, the choice of a backend, and what is said when none can serve."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.library import opcheck

import fastvid
from fastvid import laws, ops
from fastvid.ops._op import Backend, Op, never, op

# ops that settle all of their arguments, and what they are called with in place of what the schema has
WHOLE = {
    "conv_gru": ([], []), "gated_causal_conv": ([], []), "spectral_norm": ([], []),
    "axial_attention": (["axis"], []), "image_conv": ([], []),
    "axial_self_attention": (["projections", "axes", "scale"], ["weights", "boxes", "scales"]),
}  # fmt: skip
TOYS = itertools.count()  # torch keeps the names of ops for good
DIFFERENTIABLE = [torch.float32, torch.float64, torch.bfloat16]


def rows(*shape, dtype=torch.float32, grad=False):
    return torch.randn(*shape, dtype=dtype, requires_grad=grad)


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("dtype", DIFFERENTIABLE, ids=str)
def test_opcheck_lookup(dtype, statistics):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    given = rows(20, 5, dtype=dtype, grad=True), rows(6, 5, dtype=wide, grad=True)
    told = opcheck(torch.ops.fastvid.nearest_codebook, given, {"statistics": statistics})
    assert len(told) == 4 and set(told.values()) == {"SUCCESS"}


@pytest.mark.parametrize("subject", laws.subjects(), ids=lambda subject: subject.op)
@pytest.mark.parametrize("backend", ["", "cpu", "reference"])
def test_opcheck_every_op(subject, backend):
    if backend == "cpu" and (reason := laws.why_not(subject, backend)):
        pytest.skip(reason)
    args = ops.OPS[subject.op]._positional(subject.make(subject.cases[2], "cpu", subject.dtypes[0]), {})
    told = opcheck(getattr(torch.ops.fastvid, subject.op), args, {"backend": backend})
    assert len(told) == 4 and set(told.values()) == {"SUCCESS"}


@pytest.mark.parametrize("field", ["quantized", "squared_distance", "sums"])
def test_gradcheck(field):
    x, codebook = rows(12, 3, dtype=torch.float64, grad=True), rows(5, 3, dtype=torch.float64, grad=True)
    assert torch.autograd.gradcheck(lambda *given: getattr(ops.nearest_codebook(*given), field), (x, codebook))


def test_gradient_of_a_row_that_is_not_finite_is_nought():
    x, codebook = rows(6, 3), rows(4, 3)
    x[2, 1] = torch.inf
    x.requires_grad_()
    near = ops.nearest_codebook(x, codebook)
    (near.squared_distance[near.squared_distance.isfinite()].sum() + near.sums.sum()).backward()
    assert x.grad.isfinite().all() and (x.grad[2] == 0).all() and (x.grad[0] != 0).any()


def training_step(x, codebook, size, total, steps):
    near = ops.nearest_codebook(x, codebook)
    ops.nearest_codebook_ema_(codebook, size, total, near.counts, near.sums, 0.9, steps=steps)
    return (x + (near.quantized - x).detach()).sum() + near.squared_distance.mean()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_training_step_compiles_whole(backend):
    compiled = torch.compile(training_step, fullgraph=True, backend=backend)
    plain = [rows(50, 7, grad=True), rows(9, 7), torch.rand(9), rows(9, 7), torch.tensor(0)]
    other = [t.detach().clone().requires_grad_(t.requires_grad) for t in plain]
    for _ in range(3):
        training_step(*plain).backward()
        compiled(*other).backward()
    for a, b in zip([*plain, plain[0].grad], [*other, other[0].grad], strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_a_training_step_compiles_with_inductor():
    test_a_training_step_compiles_whole("inductor")


def test_who_watches_torch_sees_every_call():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    x, codebook = rows(5, 3), rows(4, 3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert type(ops.nearest_codebook(x, codebook).quantized) is not torch.Tensor
    traced = make_fx(lambda x: ops.nearest_codebook(x, codebook).indices)(x)
    assert "nearest_codebook" in traced.code
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ops.nearest_codebook(x, codebook)
    assert "fastvid::nearest_codebook" in {event.key for event in profile.key_averages()}
    assert ops.nearest_codebook(x.to("meta"), codebook.to("meta")).indices.is_meta


class Lookup(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("codebook", rows(9, 7))

    def forward(self, x):
        return ops.nearest_codebook(x, self.codebook, statistics=False).indices


def test_export():
    module, N = Lookup(), torch.export.Dim("N", min=2)
    exported = torch.export.export(module, (rows(50, 7),), dynamic_shapes={"x": {0: N}})
    x = rows(13, 7)
    assert torch.equal(exported.module()(x), module(x))
    assert [node.name for node in exported.graph.nodes].count("nearest_codebook") == 1


def test_autocast_keeps_distances_and_sums_in_float32():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = torch.nn.functional.linear(rows(8, 4), rows(4, 4))
        near = ops.nearest_codebook(x, rows(5, 4))
    assert x.dtype == near.quantized.dtype == torch.bfloat16
    assert near.squared_distance.dtype == near.sums.dtype == torch.float32


def toy(*backends: Backend) -> Op:
    """An op that belongs to this test alone."""

    def toy_op(x: torch.Tensor, scale: float = 2.0) -> None:
        """Nothing to check."""

    toy_op.__name__ = f"toy_{next(TOYS)}"
    made = op("(Tensor(a!) x, float scale=2.0) -> ()", list(backends), fake=lambda *_: None)(toy_op)
    del ops.OPS[made.name]
    return made


def scaled(factor):
    return lambda x, scale: x.mul_(scale * factor)


def test_the_first_that_can_serves():
    made = toy(Backend("triton", scaled(100), lambda *_: "no card"), Backend("cpu", scaled(1), never),
               Backend("reference", scaled(10), never))  # fmt: skip
    x = torch.ones(2)
    made(x)
    assert x.tolist() == [2, 2]
    made(x, backend="reference")
    assert x.tolist() == [40, 40]
    with fastvid.backend("reference"):
        made(x, scale=0.1)
        assert x.tolist() == pytest.approx([40, 40])
        made(x, scale=0.5, backend="cpu")  # a call's own wish comes first
    assert x.tolist() == pytest.approx([20, 20])
    with fastvid.backend("triton", "cpu"):
        made(x, scale=0.5)
    assert x.tolist() == pytest.approx([10, 10])


def test_the_environment_chooses(monkeypatch):
    made = toy(Backend("cpu", scaled(1), never), Backend("reference", scaled(10), never))
    monkeypatch.setenv("FASTVID_BACKEND", "reference")
    x = torch.ones(1)
    made(x)
    assert x.item() == 20
    with fastvid.backend("cpu"):
        made(x)
    assert x.item() == 40
    monkeypatch.setenv("FASTVID_BACKEND", "cuda, reference")
    made(x)
    assert x.item() == 800
    monkeypatch.setenv("FASTVID_BACKEND", "gpu")
    with pytest.raises(ValueError, match="FASTVID_BACKEND: unknown backend 'gpu'; known: triton, cuda, cpu, reference"):
        made(x)


def test_forcing_the_impossible_names_every_reason():
    made = toy(Backend("triton", scaled(1), lambda *_: "no card"), Backend("reference", scaled(10), never))
    x = torch.ones(1)
    for wish in ("triton", "cuda", "triton,cuda"):
        with pytest.raises(NotImplementedError) as refused:
            made(x, backend=wish)
        assert "no backend that was asked for serves [1] float32 cpu" in str(refused.value)
        assert "reference: not among the backends asked for" in str(refused.value)
        assert ("no card" in str(refused.value)) == ("triton" in wish)
        assert ("cuda:      this op has no such backend" in str(refused.value)) == ("cuda" in wish)
    assert x.item() == 1
    with pytest.raises(ValueError, match="unknown backend"), fastvid.backend("fastest"):
        pass


def test_explain_has_a_line_for_each_backend():
    x, codebook = rows(4, 3), rows(5, 3)
    lines = ops.nearest_codebook.explain(x, codebook=codebook, backend="reference").splitlines()
    assert lines[0] == "nearest_codebook: [4, 3] float32 cpu, [5, 3] float32 cpu"
    assert len(lines) == 1 + len(ops.nearest_codebook.backends)
    assert "  reference: serves" in lines
    with pytest.raises(ValueError, match="codebook's width"):
        ops.nearest_codebook.explain(x, rows(5, 4))


def test_bound_launchers_are_the_backends_own():
    x, codebook = rows(4, 3), rows(5, 3)
    bare = ops.nearest_codebook.bind(x, codebook, backend="reference")
    assert bare is ops.nearest_codebook.backends[-1].run
    for a, b in zip(bare(x, codebook, True, "exact"), ops.nearest_codebook(x, codebook), strict=True):
        torch.testing.assert_close(a, b)


def test_a_compiled_call_obeys_the_block_it_is_called_in():
    served = []
    made = toy(Backend("cpu", lambda x, scale: served.append("cpu"), never),
               Backend("reference", lambda x, scale: served.append("reference"), never))  # fmt: skip
    compiled = torch.compile(lambda x: made(x), fullgraph=True, backend="aot_eager")
    x = torch.ones(1)
    compiled(x)
    with fastvid.backend("reference"):
        compiled(x)
    assert served == ["cpu", "reference"]


def test_triton_is_not_imported_for_cpu_tensors():
    asked = """
import sys, torch
from fastvid import ops
given = torch.ones(2, 2), torch.ones(1, 2)
print(ops.nearest_codebook.explain(*given))
ops.nearest_codebook(*given)
sys.exit("triton" in sys.modules)"""
    environment = {"PYTHONPATH": str(Path(fastvid.__file__).parents[1])}
    told = subprocess.run([sys.executable, "-c", asked], env=environment, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert "triton:" in told.stdout and "needs a CUDA tensor, got cpu" in told.stdout


@pytest.mark.parametrize("name", list(ops.OPS))
def test_the_public_signature_is_the_schemas(name):
    made = ops.OPS[name]
    schema = [a for a in made.torch_op.default._schema.arguments if not a.kwarg_only]
    code = made.__wrapped__.__code__
    public, own = code.co_varnames[: code.co_argcount], tuple(a.name for a in schema)
    if any(differing := WHOLE.get(name, ([], []))):
        assert [sorted({*a} - {*b}) for a, b in ((public, own), (own, public))] == [sorted(d) for d in differing]
    else:
        assert public == own
    defaults = tuple(a.default_value for a in schema if a.has_default_value())
    # an op that settles its arguments hands on all of them, and needs no defaults in its schema
    assert (made.__wrapped__.__defaults__ or ()) == defaults or (name in WHOLE and not defaults)
    assert made.__doc__ and "Raises:" in made.__doc__


def test_the_dispatcher_knows_what_the_triton_kernels_cannot_do():
    if torch.cuda.is_available():
        pytest.skip("asked of tensors on the CPU, which the interpreter takes where there is no GPU")
    codebook = rows(2, 4)
    for x, e, told in [(rows(1, 4).expand(2**27 + 1, 4), codebook, "N up to"), (rows(1, 600), rows(2, 600), "D up to"),
                       (rows(1, 1), rows(1, 1).expand(70000, 1), "K up to"),
                       (rows(1, 4, dtype=torch.float64), codebook, "takes float32")]:  # fmt: skip
        assert told in ops.nearest_codebook.reasons(x, e, backend="triton")["triton"]
