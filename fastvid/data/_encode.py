"""Encoding with PyAV: which codec a suffix means, and the same bytes for the same frames."""

import contextlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
from torch import Tensor

from fastvid.data._decode import BROKEN


class Encoder:
    """A video file being written: .mp4, .webm or .gif by the suffix of `path`; PyAV's errors pass through."""

    def __init__(self, path: Path, height: int, width: int, rate: Fraction, lossless: bool):
        suffix = path.suffix
        chroma = "yuv420p" if height % 2 == 0 and width % 2 == 0 else "yuv444p"
        codec, pixels, options = {
            ".mp4": ("libx264", chroma, {"crf": "18", "preset": "medium"}),
            ".webm": ("libvpx-vp9", chroma, {"crf": "24", "b": "0", "cpu-used": "4", "row-mt": "0"}),
            ".gif": ("gif", "pal8", {}),
        }[suffix]
        if lossless:
            codec, pixels, options = "libx264rgb", "rgb24", {"qp": "0", "preset": "veryfast"}
        muxer = {"movflags": "+faststart"} if suffix == ".mp4" else {}
        self.rate, self.count = rate, 0
        self.palette = _Palette(height, width, rate) if suffix == ".gif" else None
        self.container = av.open(str(path), "w", format=suffix[1:], options=muxer)
        self.container.flags |= av.container.Flags.bitexact.value
        # one thread: x264 and libvpx split work by thread count, and so would the bytes
        self.stream = self.container.add_stream(codec, rate=rate, options={**options, "threads": "1"})
        self.stream.width, self.stream.height, self.stream.pix_fmt = width, height, pixels
        self.stream.codec_context.flags |= av.codec.context.Flags.bitexact.value
        if not lossless and suffix != ".gif":
            # swscale converts by BT.601; untagged files would be guessed as BT.709 by players
            self.stream.codec_context.colorspace = av.video.reformatter.Colorspace.ITU601

    def add(self, video: Tensor) -> None:
        """Write the next frames, uint8 [T, H, W, 3]."""
        for image in video:
            frame = av.VideoFrame.from_ndarray(image.contiguous().cpu().numpy(), format="rgb24")
            frame.pts, frame.time_base = self.count, 1 / self.rate
            self.count += 1
            if self.palette:
                self.palette.push(frame)
            else:
                self.container.mux(self.stream.encode(frame))

    def finish(self) -> None:
        """Write what the encoder still holds, and the file's end."""
        for frame in self.palette.pull(self.count) if self.palette else ():
            self.container.mux(self.stream.encode(frame))
        self.container.mux(self.stream.encode())
        self.container.close()

    def abandon(self) -> None:
        """Let go of the file, whose content is of no more use."""
        with contextlib.suppress(*BROKEN):
            self.container.close()


class _Palette:
    """Frames in the best 256 colours for the whole clip; FFmpeg's own conversion would use a fixed, coarse palette."""

    def __init__(self, height: int, width: int, rate: Fraction):
        graph = av.filter.Graph()
        self.source = graph.add_buffer(width=width, height=height, format=av.VideoFormat("rgb24"), time_base=1 / rate)
        split, colours, use, self.sink = (
            graph.add(name) for name in ("split", "palettegen", "paletteuse", "buffersink")
        )
        self.source.link_to(split)
        split.link_to(colours, 0, 0)
        split.link_to(use, 1, 0)
        colours.link_to(use, 0, 1)
        use.link_to(self.sink)
        graph.configure()
        self.graph = graph

    def push(self, frame: av.VideoFrame) -> None:
        self.source.push(frame)

    def pull(self, count: int) -> Iterator[av.VideoFrame]:
        self.source.push(None)
        for _ in range(count):
            yield self.sink.pull()
