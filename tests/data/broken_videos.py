"""Makes damaged videos, and judges each in a child process with limits: `python broken_videos.py` reads their paths."""

import json
import os
import random
import resource
import signal
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

from fastvid.data.video import read_video, write_video
from fastvid.errors import VideoError

# codec and pixels of what write_video does not make
CODECS = {"a.avi": ("mpeg4", "yuv420p"), "a.mkv": ("libx264", "yuv420p")}
CONTAINERS = ("a.mp4", "a.webm", "a.gif", "a.avi", "a.mkv")
DAMAGES = ("cut", "flipped bits", "overwritten", "zeroed header", "deleted range", "inserted bytes")
SECONDS, BYTES = 10, 1 << 30  # a file may take this long, and this much memory beyond what the imports took


def grain(frames=24, height=48, width=64) -> torch.Tensor:
    """A pattern that moves under noise, so that frames take up room in a file."""
    t, y, x, c = torch.meshgrid(*(torch.arange(n) for n in (frames, height, width, 3)), indexing="ij")
    wave = (torch.sin(x / 9 + t / 5 + c) * torch.cos(y / 7 - t / 4) + 1) * 100
    noise = torch.rand(wave.shape, generator=torch.Generator().manual_seed(0))
    return (wave + 30 * noise).round().to(torch.uint8)


def encode(path, video, codec="libx264rgb", pixels="rgb24", source="rgb24", times=None, options=None, muxer=None,
           prepare=None, kind=None):  # fmt: skip
    """Write a file with PyAV alone; times in units of 1/25 s, kind where the suffix is not to decide."""
    with av.open(str(path), "w", format=kind, options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = pixels
        stream.codec_context.time_base = Fraction(1, 25)
        if prepare:
            prepare(stream)
        for when, image in zip(times or range(len(video)), video.numpy(), strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format=source)
            frame.pts, frame.time_base = when, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return Path(path)


def whole_file(folder: Path, name: str) -> Path:
    """An undamaged file of 24 frames."""
    if name not in CODECS:
        write_video(folder / name, grain())
        return folder / name
    codec, pixels = CODECS[name]
    return encode(folder / name, grain(), codec, pixels, prepare=lambda stream: _gop(stream, 8))


def _gop(stream, frames: int) -> None:
    stream.codec_context.gop_size = frames


def damaged(whole: bytes, number: int) -> tuple[str, bytes]:
    """Mutant `number` of a file, and what was done to it; the same in every run."""
    draw, data, what = random.Random(number), bytearray(whole), DAMAGES[number % len(DAMAGES)]
    at = draw.randrange(len(data))
    if what == "cut":
        del data[at:]
    elif what == "flipped bits":
        for _ in range(draw.randint(1, 8)):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif what == "overwritten":
        data[at : at + 32] = draw.randbytes(len(data[at : at + 32]))
    elif what == "zeroed header":
        length = draw.choice((4, 16, 64, 256))
        data[:length] = bytes(length)
    elif what == "deleted range":
        del data[at : at + draw.randint(1, 200)]
    else:
        data[at:at] = draw.randbytes(draw.randint(1, 50))
    return what, bytes(data)


def verdict(path: str | Path, want: torch.Tensor | None) -> tuple[str, str]:
    """"right", "error", "other pixels", "other size" or what else came of reading a file; and the words of it."""
    try:
        video, fps = read_video(path)
    except VideoError as error:
        message = str(error)
        return ("error" if "\n" not in message and str(path) in message else "error of no use"), message
    except BaseException as error:
        return "other exception", f"{type(error).__name__}: {error}"
    if not fps > 0 or video.dtype != torch.uint8:
        return "nonsense", f"{fps} {video.dtype}"
    if want is None:
        return "read", str(list(video.shape))
    if video.shape != want.shape:
        return "other size", str(list(video.shape))
    return ("right" if torch.equal(video, want) else "other pixels"), ""


def confined(path: str, want: torch.Tensor | None) -> dict:
    """`verdict` in a forked child that may take SECONDS and BYTES; a crash or hang is a verdict too."""
    start, (reader, writer) = time.monotonic(), os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            before = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (before + BYTES, before + BYTES))
            held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            signal.alarm(SECONDS)  # its default action ends the child
            kind, words = verdict(path, want)
            took = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held
            os.write(writer, json.dumps({"verdict": kind, "words": words[:400], "mb": took / 1024}).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as told:
        said = told.read()
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        signalled = os.WTERMSIG(status)
        said = json.dumps({"verdict": "hang" if signalled == signal.SIGALRM else "crash", "words": f"{signalled}"})
    return {**json.loads(said or '{"verdict": "crash", "words": ""}'), "s": time.monotonic() - start}


def main() -> None:
    """Each line of the input is JSON: [path, path of the undamaged file or null]; each line of the output a verdict."""
    wanted: dict[str, torch.Tensor] = {}
    for line in sys.stdin:
        path, whole = json.loads(line)
        if whole and whole not in wanted:
            wanted[whole] = torch.load(whole, weights_only=True)
        print(json.dumps(confined(path, wanted.get(whole))), flush=True)


if __name__ == "__main__":
    main()
