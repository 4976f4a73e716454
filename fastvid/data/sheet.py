"""Contact sheets: clips as rows, frames as columns, in one picture; and the PNG file that carries it."""

import contextlib
import os
from fractions import Fraction
from pathlib import Path

import av
import torch
from torch import Tensor

from fastvid.errors import DataError, VideoError

ROWS, COLUMNS = 32, 64  # of cells, up to which a sheet is a picture that viewers can open
_READABLE = 96  # pixels: shorter frames are enlarged until their short side has at least this many
_BORDER, _GAP = 2, 1
_BACKGROUND = (24, 24, 24)
_GIVEN = (46, 204, 113)
_MADE = (243, 156, 18)


def contact_sheet(rows: list[Tensor], given: int = 0, scale: int | None = None) -> Tensor:
    """Lay clips out as rows and their frames as columns, all frames the same size.

    rows:    list of uint8 [T, H, W, 3]; T may differ from row to row, H and W may not. given: how many leading frames
             of every row were given to a model: they get a green border and all later ones an orange one (0: no
             borders). scale: integer enlargement; None picks the smallest that brings the short side to 96 pixels.
    Returns: uint8 [H', W', 3], RGB in 0..255; every frame's pixels stand unchanged, each repeated scale x scale times.
    Raises:  DataError for no rows, an empty row, another dtype or shape, frames of different sizes, scale below 1,
             given below 0.
    Source:  own layout.
    """
    _check_rows(rows)
    if given < 0:
        raise DataError(f"contact_sheet: `given` must be 0 or more frames, got {given}.")
    H, W = rows[0].shape[1:3]
    scale = max(1, -(-_READABLE // min(H, W))) if scale is None else scale
    if scale < 1:
        raise DataError(f"contact_sheet: `scale` must be a whole number of at least 1, got {scale}.")
    cell_h, cell_w = H * scale + 2 * _BORDER + _GAP, W * scale + 2 * _BORDER + _GAP
    columns = max(len(row) for row in rows)
    sheet = torch.empty(len(rows) * cell_h + _GAP, columns * cell_w + _GAP, 3, dtype=torch.uint8)
    sheet[:] = torch.tensor(_BACKGROUND, dtype=torch.uint8)
    # a view in which every cell has a place of its own, the gap at its end
    cells = sheet[_GAP:, _GAP:].unflatten(0, (len(rows), cell_h)).unflatten(2, (columns, cell_w))
    for r, row in enumerate(rows):
        if given:
            cells[r, :-_GAP, : min(given, len(row)), :-_GAP] = torch.tensor(_GIVEN, dtype=torch.uint8)
            cells[r, :-_GAP, given : len(row), :-_GAP] = torch.tensor(_MADE, dtype=torch.uint8)
        inside = cells[r, _BORDER : -_BORDER - _GAP, : len(row), _BORDER : -_BORDER - _GAP]  # [sH, T, sW, 3]
        # first the pixels within a line, then whole lines: the second step copies long runs
        wide = row.repeat_interleave(scale, dim=2).transpose(0, 1)  # [H, T, sW, 3]
        inside.unflatten(0, (H, scale))[:] = wide[:, None]
    return sheet


def write_png(path: str | Path, image: Tensor) -> None:
    """Write one picture as a PNG file, under a temporary name first.

    path:    file name, normally ending in .png; its folder is made where missing. image: uint8 [H, W, 3], RGB, 0..255.
    Returns: nothing; the file appears whole or not at all, and the same picture gives the same bytes.
    Raises:  DataError for another dtype or shape; VideoError where the file cannot be written.
    Source:  FFmpeg's PNG encoder through PyAV, so that no imaging library is needed.
    """
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise DataError(f"write_png: `image` must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}.")
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(_encode_png(image))
        partial.replace(path)
    except OSError as error:
        raise VideoError(f"{path}: wanted to write a PNG here, got: {error.strerror}; choose another place.") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _encode_png(image: Tensor) -> bytes:
    encoder = av.CodecContext.create("png", "w")
    # beside the encoder's own choice: a third of the time for a fifth more bytes
    encoder.options = {"compression_level": "2", "pred": "up"}
    encoder.height, encoder.width = image.shape[:2]
    encoder.pix_fmt = "rgb24"
    encoder.time_base = Fraction(1)
    # several threads would make the encoder hold the only frame back and cost a pool for one picture
    encoder.thread_count = 1
    frame = av.VideoFrame.from_ndarray(image.contiguous().numpy(), format="rgb24")
    return b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])


def _check_rows(rows: list[Tensor]) -> None:
    if not rows:
        raise DataError("contact_sheet: wanted at least one clip, got none.")
    for i, row in enumerate(rows):
        if row.dtype != torch.uint8 or row.ndim != 4 or row.shape[3] != 3 or 0 in row.shape:
            raise DataError(f"contact_sheet: clip {i} must be uint8 [T, H, W, 3], got {row.dtype} {list(row.shape)}.")
        if row.shape[1:3] != rows[0].shape[1:3]:
            sizes = f"{list(rows[0].shape[1:3])} and {list(row.shape[1:3])}"
            raise DataError(f"contact_sheet: clips must share one frame size, got {sizes}; use fit_frames.")
