"""Every law, for every backend of every op, on every device: the regression suite of the kernels."""

import pytest
import torch

from fastvid import laws, ops

SUBJECTS = {subject.op: subject for subject in laws.subjects()}
PAIRS = [(name, backend.name) for name, op in ops.OPS.items() for backend in op.backends]


def bench(name: str, backend: str, device: torch.device, **asked) -> laws.Bench:
    subject = SUBJECTS[name]
    if reason := laws.why_not(subject, backend, str(device)):
        pytest.skip(f"{name} by {backend} on {device}: {reason}")
    if backend == "triton" and device.type == "cpu":
        asked = laws.interpreted(name) | asked
    if backend == "reference":
        asked = {"shapes": 50} | asked  # it is held against itself
    if backend == "cpu":
        asked = {"shapes": 100} | asked  # 2,000 of them are in `-m long`
    return laws.Bench(subject, backend, str(device), **asked)


def test_every_op_has_laws():
    assert set(SUBJECTS) == set(ops.OPS)


@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name, backend", PAIRS)
def test_law(name, backend, law, device):
    law(bench(name, backend, device))


@pytest.mark.long
@pytest.mark.parametrize("name, backend", PAIRS)
def test_two_thousand_shapes(name, backend, device):
    laws.random_shapes(bench(name, backend, device, shapes=2000, seed=1))


@pytest.mark.long
@pytest.mark.parametrize("name, backend", PAIRS)
def test_bits_of_250_repeats(name, backend, device):
    laws.same_bits(bench(name, backend, device, repeats=250))


def test_a_broken_backend_is_found(monkeypatch):
    # one wrong element anywhere in the outputs must break a law
    honest = ops.nearest_codebook.backends[-1].run
    spoilers = {
        "indices": lambda t: t.roll(1), "quantized": lambda t: t + 1e-3, "squared_distance": lambda t: t * 1.001,
        "counts": lambda t: t.roll(1), "sums": lambda t: t + 1e-2, "nonfinite": lambda t: t + 1,
    }  # fmt: skip
    for field, spoil in spoilers.items():
        def broken(*args, field=field, spoil=spoil):
            near = honest(*args)
            return near._replace(**{field: spoil(getattr(near, field))})

        reference = ops._op.Backend("reference", broken, ops._op.never)
        monkeypatch.setattr(ops.nearest_codebook, "backends", (reference,))
        told = dict(laws.hold(laws.Bench(SUBJECTS["nearest_codebook"], "reference", shapes=5)))
        assert told["named_sizes"], f"a spoilt {field} was not found"


def test_an_output_that_nobody_wrote_is_found(monkeypatch):
    honest = ops.nearest_codebook.backends[-1].run

    def forgetful(*args):
        near = honest(*args)
        return near._replace(sums=torch.empty_like(near.sums), indices=torch.empty_like(near.indices))

    monkeypatch.setattr(
        ops.nearest_codebook, "backends", (ops._op.Backend("reference", forgetful, ops._op.never),)
    )
    told = dict(laws.hold(laws.Bench(SUBJECTS["nearest_codebook"], "reference", shapes=5)))
    assert told["named_sizes"] and told["same_bits"]
