"""Encoding with PyAV: which codec a suffix means, and the same bytes for the same frames."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
from torch import Tensor


def encode(path: Path, video: Tensor, rate: Fraction, lossless: bool) -> None:
    """Write uint8 frames [T, H, W, 3] to `path`, whose suffix is .mp4, .webm or .gif; PyAV's errors pass through."""
    suffix, (height, width) = path.suffix, video.shape[1:3]
    chroma = "yuv420p" if height % 2 == 0 and width % 2 == 0 else "yuv444p"
    codec, pixels, options = {
        ".mp4": ("libx264", chroma, {"crf": "18", "preset": "medium"}),
        ".webm": ("libvpx-vp9", chroma, {"crf": "24", "b": "0", "cpu-used": "4", "row-mt": "0"}),
        ".gif": ("gif", "pal8", {}),
    }[suffix]
    if lossless:
        codec, pixels, options = "libx264rgb", "rgb24", {"qp": "0", "preset": "veryfast"}
    muxer = {"movflags": "+faststart"} if suffix == ".mp4" else {}
    with av.open(str(path), "w", format=suffix[1:], options=muxer) as container:
        container.flags |= av.container.Flags.bitexact.value
        # one thread: x264 and libvpx split work by thread count, and so would the bytes
        stream = container.add_stream(codec, rate=rate, options={**options, "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.codec_context.flags |= av.codec.context.Flags.bitexact.value
        if not lossless and suffix != ".gif":
            # swscale converts by BT.601; untagged files would be guessed as BT.709 by players
            stream.codec_context.colorspace = av.video.reformatter.Colorspace.ITU601
        for frame in _palette(video, rate) if suffix == ".gif" else _video_frames(video, rate):
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _video_frames(video: Tensor, rate: Fraction) -> Iterator[av.VideoFrame]:
    for index, image in enumerate(video):
        frame = av.VideoFrame.from_ndarray(image.contiguous().cpu().numpy(), format="rgb24")
        frame.pts, frame.time_base = index, 1 / rate
        yield frame


def _palette(video: Tensor, rate: Fraction) -> Iterator[av.VideoFrame]:
    """Frames in the best 256 colours for the whole clip; FFmpeg's own conversion would use a fixed, coarse palette."""
    graph = av.filter.Graph()
    height, width = video.shape[1:3]
    source = graph.add_buffer(width=width, height=height, format=av.VideoFormat("rgb24"), time_base=1 / rate)
    split, colours, use, sink = (graph.add(name) for name in ("split", "palettegen", "paletteuse", "buffersink"))
    source.link_to(split)
    split.link_to(colours, 0, 0)
    split.link_to(use, 1, 0)
    colours.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    for frame in _video_frames(video, rate):
        source.push(frame)
    source.push(None)
    for _ in range(len(video)):
        yield sink.pull()
