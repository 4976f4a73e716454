"""Every case of the benchmark by name, and what one measured case looks like in the JSON file.

A case has one contestant that is ours; its ratios are peer's median over our median, one per peer. A case that cannot
run here is reported with the reason, never left out. Torch is imported when a case is opened, not before.

The JSON of a case: `case`, `size`, `check` ("ok", "failed: why" or "missing: why"), `contestants` (each `name`,
`median_s`, `min_s`, `max_s`, `runs`, `peak_bytes`), `ratio` {peer: x}, `floor_s`, `goal` {peer: x}; what is unknown is
null. Beside that: `ours`, the contestant the ratios are of; `checked`, what the gate compared; `threads`; `floor_from`,
what the floor was counted with; `extra_limit_bytes`, where a limit is set; `ratio_of`, "passes" where the ratios are
not of seconds. A contestant has `extra_bytes`, its peak less what it returned (memory that it kept from an earlier call
is in neither). It may carry `missing`, why it did not run; `scaled_from`, the codes that a run drew where its times are
scaled up to all of them, and `sampled`, which ones; `given`, true for a figure that is not a program's; `passes`, the
sequential evaluations that the job took as {"median", "min", "max"}, and `codes_per_pass`; `best_of`, the contestants
of which it stands for the `fastest`, whose figures it has.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from timing import Contestant, GateError, Race, Times, run_race, threads

FULL_ROUNDS = 7


@dataclass(frozen=True)
class Case:
    """ours: the contestant that the ratios are of, or several in order of preference: the first that can run.
    goal: the least ratio wanted per peer, None where none is set. threads: None takes torch's as found.
    extra_limit: the most bytes that ours may hold beyond inputs and outputs, None where none is set.
    ratio_of: "seconds", or "passes" where sequential evaluations are what is compared.
    quick: opens a smaller company, for runs of few rounds."""

    name: str
    size: str
    ours: str | tuple[str, ...]
    goal: dict[str, float | None]
    open: Callable[[], Race]
    missing: Callable[[], str | None] = lambda: None
    threads: int | None = None
    extra_limit: int | None = None
    ratio_of: str = "seconds"
    quick: Callable[[], Race] | None = None

    @property
    def preferred(self) -> tuple[str, ...]:
        """`ours` as a tuple."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    def one_thread(self, **goal: float | None) -> "Case":
        """The same with one thread for every contestant, and with other goals where given."""
        return replace(self, name=f"{self.name}_1t", threads=1, goal=self.goal | goal)


def _sampling(device: str) -> Race:
    from sampling_cases import sampling_race

    return sampling_race(device)


def _paper(name: str, *given) -> Race:
    import paper_cases

    return getattr(paper_cases, name)(*given)


def _windows(name: str) -> Any:
    import window_cases

    return getattr(window_cases, name)()


def _predict() -> Race:
    from predict_cases import predict_race

    return predict_race()


def _predict_missing() -> str | None:
    from predict_cases import predict_missing

    return predict_missing()


def _vq(name: str) -> Race:
    import vq_cases

    return vq_cases.vq_race(getattr(vq_cases, name))


def _conv(name: str, *given) -> Race:
    import conv_cases
    from jobs import race

    return race(getattr(conv_cases, name)(*given))


def _axial(name: str, *given) -> Race:
    import axial_cases
    from jobs import race

    return race(getattr(axial_cases, name)(*given))


def _axial_layer(name: str, *given) -> Race:
    import axial_layer_cases
    from jobs import race

    return race(getattr(axial_layer_cases, name)(*given))


def _train(name: str) -> Race:
    import train_cases

    return getattr(train_cases, name)()


def _dvdgan(name: str, preset: str, **changes) -> Race:
    import dataclasses

    import dvdgan_cases

    given = changes.pop("given", {})
    config = dataclasses.replace(dvdgan_cases.PRESETS[preset], **changes)
    return getattr(dvdgan_cases, name)(config, **given)


def _no_cuda() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "needs a CUDA device"


SMALL_SIZE = "8 layers, 64 hidden, 3x32x32 codes of 512, batch 1, fp32"
SMALL_CPU = Case(
    "sample_cpu_small", SMALL_SIZE, "native", {"naive": 3000.0, "cached": 30.0, "plan": 15.0},
    open=lambda: _sampling("cpu"),
)  # fmt: skip
PAPER_SLICE = Case(
    "sample_cpu_paper_slice",
    "the published top prior (418 M, fresh weights), the last of three 32x32 slices, batch 1, bf16 weights",
    "native", {"naive": 1000.0, "cached": 5.0},
    open=lambda: _paper("slice_race"), quick=lambda: _paper("slice_race", ("bfloat16",)),
)  # fmt: skip
FIXED_POINT = Case(
    "fixed_point_steps", "dino64, examples/dino.mp4, 4 futures of 1,728 codes, windows up to a row's 16", "window 8",
    {"sequential": 2.5}, open=lambda: _windows("fixed_point_race"), missing=lambda: _windows("fixed_point_missing"),
    ratio_of="passes",
)  # fmt: skip
WAVEFRONT = Case(
    "wavefront_axial", "8 layers, 64 hidden, 2 axial attention layers, 64x64 codes of 512, batch 1, fp32", "native",
    {"sequential": 12.0}, open=lambda: _windows("wavefront_race"), missing=lambda: _windows("native_missing"),
    ratio_of="passes",
)  # fmt: skip
DEMO_CPU = Case(
    "predict_demo_cpu", "dino64, examples/dino.mp4, 12 frames of 64x64, 1 sample", "predict", {"playback": 1.0},
    open=_predict, missing=_predict_missing,
)  # fmt: skip
GPU_TIERS = ("cuda", "triton")
SMALL_GPU = Case(
    "sample_gpu_small", SMALL_SIZE, GPU_TIERS, {"naive": None, "cached": None, "plan": None},
    open=lambda: _sampling("cuda"), missing=_no_cuda,
)  # fmt: skip
CLIP_SIZE = "the published priors (418 M, 241 M, fresh weights), 3x32x32 and 6x64x64 codes, conditioning apart, bf16"
CLIP_GPU = Case(
    "sample_gpu_clip_b1", CLIP_SIZE, GPU_TIERS, {"naive": 250.0, "cached": 40.0, "playback": 1.0},
    open=lambda: _paper("clip_race", 1), missing=_no_cuda,
)  # fmt: skip
CLIPS_GPU = Case(
    "sample_gpu_clip_b16", f"16 clips of {CLIP_SIZE}", GPU_TIERS, {"naive": 700.0, "cached": None},
    open=lambda: _paper("clip_race", 16), missing=_no_cuda,
)  # fmt: skip
VQ_512 = Case(
    "vq_ema_cpu_512", "N=131072 K=512 D=64, fp32, train + EMA", "fastvid",
    {"vector-quantize-pytorch": 30.0, "torch": 2.5, "faiss": 1.3}, open=lambda: _vq("CPU_512"),
    extra_limit=131072 * 512 * 4 // 100,
)  # fmt: skip
VQ_8192 = Case(
    "vq_ema_cpu_8192", "N=16384 K=8192 D=64, fp32, train + EMA", "fastvid",
    {"vector-quantize-pytorch": 45.0, "torch": 6.0, "faiss": 2.0}, open=lambda: _vq("CPU_8192"),
    extra_limit=16384 * 8192 * 4 // 100,
)  # fmt: skip
PAPER_PEERS = {"vector-quantize-pytorch": 60.0, "torch": None, "torch.compile": 8.0, "flash-kmeans": 1.5}
VQ_PAPER = Case(
    "vq_ema_gpu_paper", "N=524288 K=512 D=64, fp32, train + EMA", "fastvid", PAPER_PEERS,
    open=lambda: _vq("GPU_PAPER"), missing=_no_cuda, extra_limit=524288 * 512 * 4 // 100,
)  # fmt: skip
VQ_PAPER_BF16 = Case(
    "vq_ema_gpu_paper_bf16", "N=524288 K=512 D=64, bf16, train + EMA", "fastvid", PAPER_PEERS,
    open=lambda: _vq("GPU_PAPER_BF16"), missing=_no_cuda, extra_limit=524288 * 512 * 4 // 100,
)  # fmt: skip
VQ_16K = Case(
    "vq_gpu_16k", "N=1048576 K=16384 D=256, bf16, lookup", "fastvid",
    {"torch": None, "flash-kmeans": None, "flashlib": 1.2}, open=lambda: _vq("GPU_16K"), missing=_no_cuda,
    extra_limit=100_000_000,
)  # fmt: skip
PLANE = "1x3x32x32, C={0} -> 2x{0} + gate, (x, t) plane, 8 of 9 taps, fp32"
CONV_CPU = [
    Case(
        f"conv_gated_cpu_{C}", PLANE.format(C), "fastvid", {"masked conv3d": goal, "gather": None},
        open=lambda C=C: _conv("cpu", C),
    )
    for C, goal in ((64, 4.0), (128, 2.5), (256, 2.0))
]  # fmt: skip
CONV_TRAIN_CPU = [
    Case(
        f"conv_gated_train_cpu_{C}", f"{PLANE.format(C)}, forward + backward", "fastvid",
        {"masked conv3d": 1.5, "gather": None}, open=lambda C=C: _conv("cpu", C, True),
    )
    for C in (64, 128, 256)
]  # fmt: skip
LAYERS = {
    "top": "a layer of the published top prior: 8x3x32x32, 512 -> 2x512 + gate, (x, t) plane, 8 of 9 taps, bf16",
    "bottom": "a layer of the published bottom prior: 8x64x64, 512 -> 2x512 + gate, 15 of 5x5 taps, bf16",
}
CONV_GPU = [
    Case(
        f"conv_gated_gpu_{level}", size, "fastvid", {"masked conv3d ncdhw": 3.0, "tuned conv3d": 1.7, "gather": None},
        open=lambda level=level: _conv(f"gpu_{level}"), missing=_no_cuda,
    )
    for level, size in LAYERS.items()
]  # fmt: skip
CONV_TRAIN_GPU = [
    Case(
        f"conv_gated_train_gpu_{level}", f"{size}, forward + backward", "fastvid",
        {"masked conv3d": 1.5, "tuned conv3d": None, "gather": None},
        open=lambda level=level: _conv(f"gpu_{level}", True), missing=_no_cuda,
    )
    for level, size in LAYERS.items()
]  # fmt: skip
STEP_PEERS = {"torch": 1.5, "masked conv3d": None, "reference": None}
TRAIN_TOP = Case(
    "train_step_prior_cpu", "top prior dino64, a whole step (AdamW) of 16 futures of 3x8x8 codes, fp32", "fastvid",
    STEP_PEERS, open=lambda: _train("top_race"),
)  # fmt: skip
TRAIN_BOTTOM = Case(
    "train_step_bottom_cpu", "bottom prior dino64, a whole step (AdamW) of 16 slices of 16x16 codes, fp32", "fastvid",
    STEP_PEERS, open=lambda: _train("bottom_race"),
)  # fmt: skip
VIDEO = "1x4x32x32, three axes, fp32"
AXIAL = Case(
    "axial_cpu", f"a layer of 256 channels and 8 heads with its projections, {VIDEO}", "fastvid",
    {"axial-attention": 2.5, "sdpa": 2.2}, open=lambda: _axial_layer("cpu_layer"), extra_limit=4 << 20,
)  # fmt: skip
AXIAL_TRAIN = Case(
    "axial_train_cpu", f"{AXIAL.size}, forward + backward", "fastvid", {"axial-attention": None, "sdpa": None},
    open=lambda: _axial_layer("cpu_layer", True),
)  # fmt: skip
AXIAL_CORE = Case(
    "axial_core_cpu", f"8 heads of 32, {VIDEO}", "fastvid", {"axial-attention": 4.0, "sdpa": 4.0},
    open=lambda: _axial("cpu"),
)  # fmt: skip
AXIAL_CORE_TRAIN = Case(
    "axial_core_train_cpu", f"{AXIAL_CORE.size}, forward + backward", "fastvid", {"axial-attention": 3.0, "sdpa": 3.0},
    open=lambda: _axial("cpu", True),
)  # fmt: skip
AXIAL_STEP = Case(
    "axial_step_cpu", "32 queries one by one, each over 3072 keys, 8 heads of 64, batch 1, fp32", "fastvid",
    {"sdpa": None}, open=lambda: _axial_layer("cpu_step"),
)  # fmt: skip
BLOCK_LOCAL = Case(
    "block_local_cpu", "1x4x16x16, 8 heads of 128, blocks of 4x8x8, causal, relative bias, fp32", "fastvid",
    {"sdpa": None}, open=lambda: _axial("cpu_blocks"),
)  # fmt: skip
LARGE_VIDEO, NAMED = "8x16x64x64, 8 heads of 64, bf16", {"t": "T, causal", "h": "H", "w": "W"}
AXIAL_PEERS = {"axial-attention": 8.0, "sdpa": 2.5, "flex_attention": 3.0, "torch.compile": None, "natten": None}
AXIAL_GPU = [
    Case("axial_core_gpu", f"{LARGE_VIDEO}, three axes, T causal", "fastvid", AXIAL_PEERS,
         open=lambda: _axial("gpu"), missing=_no_cuda),
    *(Case(f"axial_core_gpu_{axis}", f"{LARGE_VIDEO}, axis {name}", "fastvid", AXIAL_PEERS,
           open=lambda axis=axis: _axial("gpu", axis), missing=_no_cuda) for axis, name in NAMED.items()),
    Case("axial_core_train_gpu", f"{LARGE_VIDEO}, three axes, T causal, forward + backward", "fastvid",
         dict.fromkeys(AXIAL_PEERS), open=lambda: _axial("gpu", "thw", True), missing=_no_cuda),
]  # fmt: skip
TWO_VIDEOS = "two videos of 48 frames at 64x64, version 2, {} channels at 4x4, 600 classes, {}"
DVDGAN_CPU = Case(
    "dvdgan_sample_cpu", TWO_VIDEOS.format(128, "fp32"), "fastvid", {"torch": 1.5},
    open=lambda: _dvdgan("sample_race", "64x48", width=16),
)  # fmt: skip
DVDGAN_TRAIN_CPU = Case(
    "dvdgan_train_step_cpu", "digits32, a step of both discriminators and one of the generator, 8 clips, fp32",
    "fastvid", {"torch": None}, open=lambda: _dvdgan("train_race", "digits32"),
)  # fmt: skip
DVDGAN_GPU = [
    Case("dvdgan_sample_gpu", TWO_VIDEOS.format(1024, "the paper's widths, bf16"), "fastvid",
         {"torch": 2.0, "15 ms": 1.0}, open=lambda: _dvdgan("sample_race", "64x48", given={"device": "cuda"}),
         missing=_no_cuda),
    Case("dvdgan_train_step_gpu", "64x12, a quarter of the paper's widths, a step of both discriminators and one of "
         "the generator, 8 clips, fp32", "fastvid", {"torch": None}, missing=_no_cuda,
         open=lambda: _dvdgan("train_race", "64x12", width=32, discriminator_width=32, given={"device": "cuda"})),
]  # fmt: skip
CASES = [
    VQ_512, VQ_512.one_thread(**{"vector-quantize-pytorch": 40.0}), VQ_8192, VQ_8192.one_thread(),
    SMALL_CPU, SMALL_CPU.one_thread(), PAPER_SLICE, FIXED_POINT, WAVEFRONT, WAVEFRONT.one_thread(),
    DEMO_CPU, DEMO_CPU.one_thread(),
    *(sized for case in CONV_CPU for sized in (case, case.one_thread())), *CONV_TRAIN_CPU, TRAIN_TOP, TRAIN_BOTTOM,
    AXIAL, AXIAL.one_thread(), AXIAL_TRAIN, AXIAL_CORE, AXIAL_CORE.one_thread(), AXIAL_CORE_TRAIN, AXIAL_STEP,
    BLOCK_LOCAL,
    SMALL_GPU, CLIP_GPU, CLIPS_GPU, VQ_PAPER, VQ_PAPER_BF16, VQ_16K, *CONV_GPU, *CONV_TRAIN_GPU, *AXIAL_GPU,
    DVDGAN_CPU, DVDGAN_CPU.one_thread(), DVDGAN_TRAIN_CPU, *DVDGAN_GPU,
]  # fmt: skip


def measure(case: Case, rounds: int, tell: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Open a case, ask its gate, time its contestants. Returns the case as it stands in the JSON file."""
    reason = case.missing()
    if reason:
        return _entry(case, f"missing: {reason}")
    with threads(case.threads) as count:
        race = case.quick() if case.quick and rounds < FULL_ROUNDS else case.open()
        names = {contestant.name for contestant in race.contestants}
        if not {*case.preferred, *case.goal} <= names:
            wanted = f"{' or '.join(case.preferred)} and {', '.join(case.goal)}"
            raise ValueError(f"{case.name}: wants contestants {wanted}, has {names}.")
        tell("gate")
        try:
            checked = race.gate()
        except GateError as error:
            return _entry(case, f"failed: {error}", threads=count)
        times = run_race(race, rounds, tell)
        floor, counted = race.floor() if race.floor else (None, None)
    rows = [_row(contestant, times.get(contestant.name), race.codes) for contestant in race.contestants]
    rows = [_best(contestant, row, rows) for contestant, row in zip(race.contestants, rows, strict=True)]
    return _entry(case, "ok", rows, floor, floor_from=counted, threads=count, checked=checked)


def _row(contestant: Contestant, times: Times | None, codes: int | None) -> dict[str, Any]:
    row: dict[str, Any] = {"name": contestant.name}
    if times is not None:
        row |= {"median_s": times.median, "min_s": min(times.seconds), "max_s": max(times.seconds)}
        row |= {"runs": len(times.seconds), "peak_bytes": times.peak_bytes, "extra_bytes": times.extra_bytes}
        if times.passes:
            median = statistics.median(times.passes)
            row["passes"] = {"median": median, "min": min(times.passes), "max": max(times.passes)}
            row["codes_per_pass"] = codes / median if codes else None
    else:
        row |= dict.fromkeys(("median_s", "min_s", "max_s"), contestant.given)
        row |= {"runs": 0, "peak_bytes": None, "extra_bytes": None}
    if contestant.given is not None:
        row["given"] = True
    elif times is None:
        row["missing"] = contestant.missing or "cannot run here"
    if contestant.scaled_from:
        row |= {"scaled_from": contestant.scaled_from, "sampled": contestant.sampled}
    return row


def _best(contestant: Contestant, row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of a contestant that stands for the fastest of others; any other contestant's as it is."""
    if not contestant.best_of:
        return row
    timed = [other for other in rows if other["name"] in contestant.best_of and other["median_s"] is not None]
    if not timed:
        return row | {"best_of": list(contestant.best_of), "missing": "none of those it stands for can run here"}
    fastest = min(timed, key=lambda other: other["median_s"])
    return fastest | {"name": row["name"], "best_of": list(contestant.best_of), "fastest": fastest["name"]}


def _entry(case: Case, check: str, rows=(), floor=None, **beside) -> dict[str, Any]:
    figures = {row["name"]: _figure(row, case.ratio_of) for row in rows}
    name = next((name for name in case.preferred if figures.get(name)), case.preferred[0])
    ours = figures.get(name)
    ratio = {peer: figures[peer] / ours if ours and figures.get(peer) else None for peer in case.goal}
    entry = {"case": case.name, "size": case.size, "check": check, "contestants": list(rows), "ratio": ratio}
    entry |= {"floor_s": floor, "goal": dict(case.goal), "ours": name}
    entry |= {"ratio_of": case.ratio_of} if case.ratio_of != "seconds" else {}
    return entry | ({"extra_limit_bytes": case.extra_limit} if case.extra_limit else {}) | beside


def _figure(row: dict[str, Any], of: str) -> float | None:
    return row["median_s"] if of == "seconds" else row.get("passes", {}).get("median")
