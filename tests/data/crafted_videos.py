"""Files that nobody's encoder means to write, each with what must come of it: a shape, or words of the error."""

import os
import struct
import zlib
from pathlib import Path

import av
import numpy as np
import torch
from broken_videos import encode, grain

from fastvid.data.video import write_video

SMALL = grain(6, 32, 48)
ANY = None  # right frames or an error: either is an answer


def _written(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _film(suffix: str = ".mp4", frames: int = 6, height: int = 32, width: int = 48):
    def make(path: Path) -> None:
        write_video(path.with_suffix(suffix), grain(frames, height, width))
        path.with_suffix(suffix).rename(path)
    return make


def _encoded(*arguments, video=SMALL, **options):
    return lambda path: encode(path, video, *arguments, **options)


def _with_alpha(video: torch.Tensor) -> torch.Tensor:
    return torch.cat([video, video[..., :1]], dim=-1)


def _patched(suffix: str, find: bytes, offset: int, new: bytes):
    """A film with some bytes behind the first `find` replaced."""
    def make(path: Path) -> None:
        _film(suffix)(path)
        data = bytearray(path.read_bytes())
        at = data.index(find) + len(find) + offset
        data[at : at + len(new)] = new
        path.write_bytes(data)
    return make


def _sound(path: Path, cover: bool = False, codec: str = "aac") -> None:
    with av.open(str(path), "w", format="wav" if codec == "pcm_s16le" else None) as container:
        stream = container.add_stream(codec, rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts = 8000, 0
        if cover:
            art = container.add_stream("mjpeg", rate=1)
            art.height, art.width, art.pix_fmt = 32, 32, "yuvj420p"
            art.disposition = av.stream.Disposition.attached_pic
            container.mux(art.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
            container.mux(art.encode())
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)


def _two_streams(path: Path) -> None:
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("libx264", rate=25) for _ in range(2)]
        for stream, (height, width) in zip(streams, ((32, 48), (64, 64)), strict=True):
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for stream in streams:
            for image in grain(6, stream.height, stream.width).numpy():
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())


def _two_sizes(path: Path) -> None:
    parts = [encode(path.with_name(f"{n}.h264"), grain(3, n, 48), "libx264", "yuv420p", options={"bf": "0"})
             for n in (32, 64)]  # fmt: skip
    path.write_bytes(b"".join(part.read_bytes() for part in parts))


def _no_index(path: Path) -> None:
    encode(path, SMALL, "mpeg4", "yuv420p")
    path.write_bytes(path.read_bytes().split(b"idx1")[0])


def _no_moov(path: Path) -> None:
    _film()(path)
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"moov") - 4])


def _png(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(bytes(10_000)), b"IEND"]
    packed = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def _list(text: str):
    def make(path: Path) -> None:
        write_video(path.with_name("other.mp4"), SMALL)
        path.write_text(text)
    return make


def _sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(3 << 30)


SHAPE = (6, 32, 48, 3)
GIF = b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0, 0, 0)
NESTED = b"".join(struct.pack(">I", 8 * (5000 - n)) + b"moov" for n in range(5000))
# name -> (maker, shape or words of the error)
CRAFTED = {
    "empty.mp4": (lambda p: p.touch(), "0 bytes"),
    "text.mp4": (lambda p: p.write_text("not a video\n" * 50), "cannot be read"),
    "page.mp4": (lambda p: p.write_text("<html><body>404</body></html>" * 20), "cannot be read"),
    "archive.mp4": (lambda p: _written(p, b"PK\x03\x04" + bytes(3000)), "cannot be read"),
    "sparse.mp4": (_sparse, "cannot be read"),
    "sound.mp4": (_sound, "no video stream"),
    "wave.mp4": (lambda p: _sound(p, codec="pcm_s16le"), "no video stream"),
    "cover.mp4": (lambda p: _sound(p, cover=True), "no video stream"),
    "folder.mp4": (lambda p: p.mkdir(), "is a folder"),
    "missing.mp4": (lambda p: None, "no such file"),
    "pipe.mp4": (os.mkfifo, "not a regular file"),
    "zero.mp4": (lambda p: p.symlink_to("/dev/zero"), "not a regular file"),
    "loop.mp4": (lambda p: p.symlink_to(p), "no such file"),
    "dangling.mp4": (lambda p: p.symlink_to(p.with_name("nowhere")), "no such file"),
    "playlist.mp4": (_list("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.mp4\n#EXT-X-ENDLIST\n"), "cannot"),
    "list.mp4": (_list("ffconcat version 1.0\nfile other.mp4\n"), "cannot be read"),
    "manifest.mp4": (_list('<?xml version="1.0"?><MPD><BaseURL>other.mp4</BaseURL></MPD>'), "cannot be read"),
    "one_frame.mp4": (_film(frames=1), (1, 32, 48, 3)),
    "odd_size.mp4": (_film(height=33, width=47), (6, 33, 47, 3)),
    "one_pixel.webm": (_film(".webm", height=1, width=1), (6, 1, 1, 3)),
    "renamed.mp4": (_film(".webm"), SHAPE),
    "renamed.avi": (_film(".gif"), SHAPE),
    "a.gif": (_film(".gif"), SHAPE),
    "ten_bit.mkv": (_encoded("libx264", "yuv420p10le"), SHAPE),
    "alpha.webm": (_encoded("libvpx-vp9", "yuva420p", "rgba", video=_with_alpha(SMALL)), SHAPE),
    "alpha.mov": (_encoded("qtrle", "argb", "rgba", video=_with_alpha(SMALL)), SHAPE),
    "alpha.png": (_encoded("png", "rgba", "rgba", video=_with_alpha(SMALL[:1]), muxer={"update": "1"}),
                  (1, 32, 48, 3)),
    "turned.mp4": (_encoded(prepare=lambda stream: stream.set_display_rotation(90)), (6, 48, 32, 3)),
    "turned_vp9.mp4": (_encoded("libvpx-vp9", "yuv420p", prepare=lambda stream: stream.set_display_rotation(90)),
                       (6, 48, 32, 3)),
    "vp8.webm": (_encoded("libvpx", "yuv420p"), SHAPE),
    "variable_rate.mkv": (_encoded("libx264", "yuv420p", times=[0, 1, 2, 10, 30, 49]), SHAPE),
    "edit_list.mp4": (_encoded(times=range(-3, 3), options={"qp": "0", "bf": "0", "g": "1"}), (3, 32, 48, 3)),
    "negative.mkv": (_encoded("libx264", "yuv420p", times=range(-3, 3), muxer={"avoid_negative_ts": "disabled"}),
                     SHAPE),
    "no_time.mkv": (_encoded("ffv1", "bgr0", video=SMALL[:1]), (1, 32, 48, 3)),
    "interlaced.mkv": (_encoded("libx264", "yuv420p", options={"x264-params": "tff=1"}), SHAPE),
    "no_index.avi": (_no_index, SHAPE),
    "no_moov.mp4": (_no_moov, "cannot be read"),
    "two_streams.mp4": (_two_streams, SHAPE),
    "two_sizes.h264": (_two_sizes, "frame size changes"),
    "huge.png": (lambda p: _written(p, _png(30_000, 30_000)), "huge.png"),
    "huge.gif": (lambda p: _written(p, GIF[:6] + b"\xff\xff\xff\xff" + GIF[10:] + b"\x2c" + bytes(20) + b"\x3b"),
                 "huge.gif"),
    "no_images.gif": (lambda p: _written(p, GIF + b"\x3b"), "no_images.gif"),
    "nested.mp4": (lambda p: _written(p, NESTED), "cannot be read"),
    "many_frames.mp4": (_patched(".mp4", b"stsz", 8, b"\x7f\xff\xff\xff"), ANY),
    "many_times.mp4": (_patched(".mp4", b"stts", 8, b"\x7f\xff\xff\xff"), ANY),
    "huge_box.mp4": (_patched(".mp4", b"mdat", -8, b"\x7f\xff\xff\xff"), ANY),
    "huge_element.webm": (_patched(".webm", b"\x1f\x43\xb6\x75", 0, b"\x01\x7f\xff\xff\xff\xff\xff\xff"), ANY),
    "lasts_for_ever.webm": (_patched(".webm", b"\x44\x89\x88", 0, struct.pack(">d", 1e15)), "lasts_for_ever.webm"),
}
