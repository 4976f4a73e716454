"""Tuning without a GPU: a room that is not there, timed by a clock that is not there either."""

import json
from types import SimpleNamespace

import pytest
import torch
import tune
from fastvid.kernels.axial_attention import cases as attention_cases
from fastvid.kernels.axial_attention import reference as attention_reference
from fastvid.kernels.gated_causal_conv import cases as conv_cases
from fastvid.kernels.gated_causal_conv import reference as conv_reference
from fastvid.kernels.nearest_codebook import cases, reference

CONFIGS = [{"rows": 32}, {"rows": 64}, {"rows": 128}]


def room(tmp_path, spoil=lambda config, result: result) -> SimpleNamespace:
    """A room whose kernel is the reference; spoil: what a configuration makes of its result."""
    calls = []

    def launch(x, codebook, statistics, precision, config):
        calls.append(config["rows"])
        return spoil(config, reference.nearest_codebook(x, codebook, statistics))

    return SimpleNamespace(
        TUNED=tmp_path / "tuned.json", calls=calls, nearest_codebook=launch, tunable=lambda *_: CONFIGS,
        bucket=lambda D, K, precision: f"{precision}-D{D}-K{K}",
    )  # fmt: skip


def clock(kernels, seconds: dict[int, float]):
    """Runs what it is given and tells the time of the configuration that was launched."""

    def timer(run):
        run()
        return seconds[kernels.calls[-1]]

    return timer


JOB = tune.Job("exact-D5-K13", cases.Case("small", 77, 13, 5), "exact")
HALF = tune.Job("bf16-D5-K13", cases.Case("small", 77, 13, 5), "bf16")


def test_the_fastest_is_kept_among_others(tmp_path):
    kernels, told = room(tmp_path), []
    kernels.TUNED.write_text(json.dumps({"Another GPU": {"a": {"rows": 1}}, "GPU": {"b": {"rows": 2}}}))
    timer = clock(kernels, {32: 3e-3, 64: 1e-3, 128: 2e-3})
    assert tune.tune_room(kernels, [JOB, HALF], "GPU", "cpu", timer, told.append) == 0
    assert json.loads(kernels.TUNED.read_text()) == {
        "Another GPU": {"a": {"rows": 1}},
        "GPU": {"b": {"rows": 2}, JOB.key: {"rows": 64}, HALF.key: {"rows": 64}},
    }
    assert "1000.0 us, default 3000.0 us" in told[0] and [p.name for p in tmp_path.iterdir()] == ["tuned.json"]


@pytest.mark.parametrize("field", ["indices", "quantized", "squared_distance", "counts", "sums"])
def test_a_fast_wrong_result_is_refused(tmp_path, field):
    def spoil(config, near):
        wrong = {
            "indices": near.indices.roll(1), "quantized": near.quantized + 1, "counts": near.counts.roll(1),
            "squared_distance": near.squared_distance + 1, "sums": near.sums * float("nan"),
        }  # fmt: skip
        return near._replace(**{field: wrong[field]}) if config["rows"] == 64 else near

    kernels, told = room(tmp_path, spoil), []
    timer = clock(kernels, {32: 3e-3, 64: 1e-9, 128: 2e-3})
    assert tune.tune_room(kernels, [JOB], "GPU", "cpu", timer, told.append) == 1
    assert json.loads(kernels.TUNED.read_text())["GPU"][JOB.key] == {"rows": 128}
    assert "refused" in told[0]


def test_a_configuration_that_does_not_run_is_told(tmp_path):
    def spoil(config, near):
        if config["rows"] != 128:
            raise RuntimeError("out of resource: shared memory\nmore")
        return near

    kernels, told = room(tmp_path, spoil), []
    assert tune.tune_room(kernels, [JOB], "GPU", "cpu", lambda run: 1.0, told.append) == 2
    assert told[0].endswith("RuntimeError: out of resource: shared memory")
    assert json.loads(kernels.TUNED.read_text()) == {"GPU": {JOB.key: {"rows": 128}}}
    nothing = room(tmp_path / "none", lambda *_: 1 / 0)
    assert tune.tune_room(nothing, [JOB], "GPU", "cpu", lambda run: 1.0, told.append) == 3
    assert not nothing.TUNED.exists()


def test_a_bucket_is_decided_by_its_largest_size(tmp_path):
    jobs = tune.jobs_of(cases, room(tmp_path))
    assert [job.case.name for job in jobs][:2] == ["16k-codes"] * 2 and len({job.key for job in jobs}) == len(jobs)
    assert {job.case.name for job in jobs if job.key.endswith("D64-K512")} == {"paper-bottom-batch"}
    assert all(job.work >= tune.LEAST_WORK for job in jobs)


def test_the_benchmark_sizes_are_tuned(tmp_path):
    import vq_cases

    sizes = {(job.case.N, job.case.K, job.case.D) for job in tune.jobs_of(cases, room(tmp_path))}
    for size in (vq_cases.GPU_PAPER, vq_cases.GPU_16K):
        assert (size.N, size.K, size.D) in sizes


# ---- the gated convolution


def conv_room(tmp_path, spoil=lambda config, result: result) -> SimpleNamespace:
    """The same for the convolution; the kinds of bucket it was asked for are in `kinds`."""
    calls, kinds = [], []

    def launch(*args):
        calls.append(args[-1]["rows"])
        return spoil(args[-1], conv_reference.gated_causal_conv(*args[:-1]))

    def weight_gradient(x, grad, slices, taps, origin, config):
        calls.append(config["rows"])
        weight = x.new_empty(slices, x.shape[-1], grad.shape[-1])
        args = x, weight, None, grad, None, taps, "none", origin, [False, True, False, False]
        return spoil(config, conv_reference.gated_causal_conv_backward(*args))[1]

    def tunable(kind, x, outputs):
        kinds.append((kind, x.shape[-1], outputs))
        return CONFIGS

    return SimpleNamespace(
        TUNED=tmp_path / "tuned.json", calls=calls, kinds=kinds, gated_causal_conv=launch, tunable=tunable,
        weight_gradient=weight_gradient, bucket=lambda *key: "-".join(map(str, key)),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind, asked", [("gate", ("gate", 8, 16)), ("grad_x", ("plain", 16, 8)),
                                         ("weight", ("weight", 8, 16))])  # fmt: skip
def test_every_kind_of_convolution_is_tuned(tmp_path, kind, asked, dtype):
    def spoil(config, results):
        return [result * 1.1 if config["rows"] == 64 else result for result in results]

    kernels, told = conv_room(tmp_path, spoil), []
    case = conv_cases.Case("small", (2, 2, 3, 9), (8, 16), conv_cases.PLANE_XT, origin=(0, 1, 0), size=(2, 1, 9))
    timer = clock(kernels, {32: 3e-3, 64: 1e-9, 128: 2e-3})
    assert tune.tune_room(kernels, [tune.ConvJob("a", case, kind, dtype)], "GPU", "cpu", timer, told.append) == 1
    assert json.loads(kernels.TUNED.read_text()) == {"GPU": {"a": {"rows": 128}}}
    assert "refused" in told[0] and "roundings" in told[0] and kernels.kinds == [asked]


def test_buckets_of_the_convolution(tmp_path):
    jobs = tune.conv_jobs(conv_cases, conv_room(tmp_path))
    assert jobs[0].case.name.startswith("paper") and len({job.key for job in jobs}) == len(jobs)
    assert {job.kind for job in jobs} == {"gate", "grad_x", "weight"}
    assert all(job.work >= tune.LEAST_WORK for job in jobs)


# ---- attention inside boxes


def attention_room(tmp_path, spoil) -> SimpleNamespace:
    """The same for attention; what it was asked for is in `asked`: whether with gradients, and the box."""
    calls, asked = [], []

    def launch(*args):
        calls.append(args[-1]["rows"])
        return spoil(args[-1], attention_reference.axial_attention(*args[:-1]))

    def launch_backward(*args):
        (config,) = args[-1].values()
        calls.append(config["rows"])
        return spoil(config, attention_reference.axial_attention_backward(*args[:-1]))

    def tunable(q, k, v, bias, box, gradient):
        asked.append((gradient, box))
        return [(kind, kind, CONFIGS) for kind in (("box", "bias") if gradient else ("forward",))]

    return SimpleNamespace(
        TUNED=tmp_path / "tuned.json", calls=calls, asked=asked, tunable=tunable, axial_attention=launch,
        axial_attention_backward=launch_backward,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["forward", "box", "bias"])
def test_every_kind_of_attention_is_tuned(tmp_path, kind, dtype):
    def spoil(config, results):
        return [result * 1.1 if config["rows"] == 64 else result for result in results]

    kernels, told = attention_room(tmp_path, spoil), []
    case = attention_cases.Case("small", (1, 2, 4, 6), 2, 8, (2, 2, 3), "causal", bias=True)
    timer, job = clock(kernels, {32: 3e-3, 64: 1e-9, 128: 2e-3}), tune.AttentionJob("a", case, kind, dtype)
    assert tune.tune_room(kernels, [job], "GPU", "cpu", timer, told.append) == 1
    assert json.loads(kernels.TUNED.read_text()) == {"GPU": {"a": {"rows": 128}}}
    assert "refused" in told[0] and "roundings" in told[0] and kernels.asked == [(kind != "forward", [2, 2, 3])]


# ---- on this machine


def test_the_room_has_what_tuning_needs():
    pytest.importorskip("triton", reason="needs triton: pip install triton")
    from fastvid.kernels.nearest_codebook import triton_gpu

    for job in tune.jobs_of(cases, triton_gpu):
        x, codebook = (torch.empty(rows, job.case.D, device="meta") for rows in (job.case.N, job.case.K))
        assert len(triton_gpu.tunable(x, codebook, job.precision)) > 1
    assert triton_gpu.TUNED.name == "tuned.json"


def test_the_room_of_the_convolution_has_what_tuning_needs():
    pytest.importorskip("triton", reason="needs triton: pip install triton")
    from fastvid.kernels.gated_causal_conv import triton_gpu

    for job in tune.conv_jobs(conv_cases, triton_gpu):
        assert job.configs(triton_gpu, job.make("meta")), job
    assert triton_gpu.TUNED.name == "tuned.json"


def test_the_room_of_attention_has_what_tuning_needs():
    pytest.importorskip("triton", reason="needs triton: pip install triton")
    from fastvid.kernels.axial_attention import triton_gpu

    jobs = tune.attention_jobs(attention_cases, triton_gpu)
    assert len({job.key for job in jobs}) == len(jobs) and {job.gradient for job in jobs} == {False, True}
    assert {"video-rows", "video-columns", "video-frames"} & {job.case.name for job in jobs}
    assert all(job.work >= tune.LEAST_WORK for job in jobs)
    for job in jobs:
        q, k, v, _, box, _, bias, _, _ = job.case.make("meta", job.dtype)
        found = {(kind, key): fits for kind, key, fits in triton_gpu.tunable(q, k, v, bias, [*box], job.gradient)}
        assert found[job.kind, job.key], job


def test_the_room_of_the_scan_has_what_tuning_needs():
    pytest.importorskip("triton", reason="needs triton: pip install triton")
    from fastvid.kernels.conv_gru import cases as scan_cases
    from fastvid.kernels.conv_gru import triton_gpu

    jobs = tune.scan_jobs(scan_cases, triton_gpu)
    assert {job.case.name for job in jobs} >= {"paper-head", "paper-8", "paper-16", "paper-32"}
    for job in jobs:
        args = job.make("meta")
        fits = job.configs(triton_gpu, args)
        assert len(fits) > 1 and args[4] <= tune.SCANNED and args[0].shape[1] in (1, args[4]), job
        positions = args[0].shape[0] * args[0].shape[2:4].numel()
        assert triton_gpu.bucket(job.dtype, positions, job.case.channels) == job.key
    assert triton_gpu.TUNED.name == "tuned.json"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_scan_is_tuned(tmp_path, dtype):
    from fastvid.kernels.conv_gru import cases as scan_cases
    from fastvid.kernels.conv_gru import reference as scan_reference

    def launch(*args):
        calls.append(args[-1]["rows"])
        return [result * 1.1 if args[-1]["rows"] == 64 else result for result in scan_reference.conv_gru(*args[:-1])]

    calls, told = [], []
    room = SimpleNamespace(TUNED=tmp_path / "tuned.json", calls=calls, tunable=lambda x: CONFIGS, conv_gru=launch)
    job = tune.ScanJob("a", scan_cases.Case("small", (1, 5, 2, 3), 4, hidden=True), dtype)
    timer = clock(room, {32: 3e-3, 64: 1e-9, 128: 2e-3})
    assert tune.tune_room(room, [job], "GPU", "cpu", timer, told.append) == 1
    assert json.loads(room.TUNED.read_text()) == {"GPU": {"a": {"rows": 128}}} and "roundings" in told[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu():
    told = []
    assert tune.tune(told.append) == 0
    assert len(told) == 1 and "nothing to tune on this machine: torch" in told[0] and "no CUDA device" in told[0]


@pytest.mark.gpu
def test_tuning_on_a_gpu(tmp_path, monkeypatch):
    from fastvid.kernels.nearest_codebook import triton_gpu

    monkeypatch.setattr(triton_gpu, "TUNED", tmp_path / "tuned.json")
    job = tune.Job("exact-D16-K512", cases.Case("small", 4096, 512, 16), "exact")
    assert tune.tune_room(triton_gpu, [job], "GPU", "cuda", tune.device_seconds, print) == 0
    (config,) = json.loads(triton_gpu.TUNED.read_text())["GPU"].values()
    assert config in triton_gpu.tunable(*job.case.make("cuda"), "exact")
