"""The published data sets that `open_clips` knows: one file a format, tried in the order of FORMATS.

A format is a module with
    NAME       how people call it; OPTIONS, what may follow the path as ?key=value, each with its meaning in words;
    recognise  (root) -> why a file or folder is of this format, in words, or None. Looks at names and at most at the
               first bytes of one file, and never raises for what lies there;
    open_layout(root, split, options) -> Layout. `split` is what was asked for, or None: `_shared.choose_split` turns
               it into the set's own name. Keys of `options` are known ones, values are text. DataError where nothing
               is usable.
"""

from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from urllib.parse import unquote

from fastvid.data._layouts import GENERATORS, Layout
from fastvid.data.formats import (
    bair,
    bair_hdf5,
    bair_png,
    cityscapes,
    kinetics,
    moving_mnist,
    sky_timelapse,
    something,
    stylegan_v,
    ucf101,
)
from fastvid.data.formats._plain import FOLDER
from fastvid.errors import DataError

# in the order in which they are asked: names that nothing else has come first
FORMATS: tuple[ModuleType, ...] = (
    bair, bair_png, cityscapes, ucf101, sky_timelapse, something, kinetics, stylegan_v, moving_mnist, bair_hdf5,
)  # fmt: skip
ALWAYS = {"split": "the set's own name of a split", "format": "the format, by name, instead of looking for it"}


class Sniffed(NamedTuple):
    """A format's module and why it was taken, in words."""

    format: ModuleType
    why: str


def parse_spec(spec: str | Path) -> tuple[str, dict[str, str]]:
    """Take `path?key=value&key=value` apart.

    spec:    a path or a generator's name, with or without options; %26 and the like stand for their characters in
             values. A path that exists as it is written has no options, whatever marks are in its name.
    Returns: the path or name as text, and the options as text.
    Raises:  DataError for an option without a key or a value, or one that comes twice.
    Source:  own notation, after the query part of a URL (RFC 3986).
    """
    text = str(spec)
    if "?" not in text or Path(text).exists():
        return text, {}
    marks = [i for i, letter in enumerate(text) if letter == "?"]
    mark = next((i for i in marks if text[:i] in GENERATORS or Path(text[:i]).exists()), marks[0])
    options: dict[str, str] = {}
    for pair in text[mark + 1 :].split("&"):
        key, _, value = pair.partition("=")
        if not key or not value:
            raise DataError(f"{text}: options are written ?key=value&key=value, got '{pair}'.")
        if key in options:
            raise DataError(f"{text}: the option '{key}' comes twice; give it once.")
        options[key] = unquote(value)
    return text[:mark], options


def check_options(what: str, options: dict[str, str], known: dict[str, str]) -> None:
    """Refuse options that nobody will look at.

    what:    the format or the path, for the message. options: as `parse_spec` gives them.
    known:   the options there are, each with its meaning; `split` and `format` are always known.
    Returns: nothing.
    Raises:  DataError that lists the known options.
    """
    unknown = sorted(set(options) - set(known) - set(ALWAYS))
    if unknown:
        listed = "; ".join(f"{key} ({meaning})" for key, meaning in {**known, **ALWAYS}.items())
        raise DataError(f"{what}: no option '{unknown[0]}'; there are: {listed}.")


def sniff(root: Path) -> Sniffed | None:
    """The first format that knows a file or folder again.

    root:    an existing file or folder.
    Returns: Sniffed, or None where no format knows it: then it is a plain video or a folder of clips.
    Raises:  nothing; a folder that cannot be listed is of no format.
    """
    for module in FORMATS:
        try:
            why = module.recognise(root)
        except OSError:
            why = None
        if why:
            return Sniffed(module, why)
    return None


def named(name: str) -> ModuleType | None:
    """The format of a name, as in ?format=name.

    name:    of a module of this package, such as "ucf101", or FOLDER.
    Returns: the module; None for FOLDER.
    Raises:  DataError that lists the names.
    """
    names = {module.__name__.rpartition(".")[2]: module for module in FORMATS}
    if name != FOLDER and name not in names:
        raise DataError(f"no format '{name}'; there are: {', '.join([*names, FOLDER])}.")
    return names.get(name)


def open_known(root: Path, split: str | None, options: dict[str, str]) -> Layout | None:
    """Open a file or folder of a known format.

    root:    an existing file or folder. split: what was asked for, or None. options: as `parse_spec` gives them.
    Returns: a Layout whose `found` begins with the format's name and why it was taken; None where no format knows it.
    Raises:  DataError for an unknown option or format, or where nothing is usable.
    """
    if "format" in options:
        module = named(options["format"])
        sniffed = module and Sniffed(module, f"asked for by format={options['format']}")
    else:
        sniffed = sniff(root)
    if sniffed is None:
        return None
    module, why = sniffed
    check_options(f"{root} ({module.NAME})", options, module.OPTIONS)
    own = {key: value for key, value in options.items() if key not in ALWAYS}
    layout = module.open_layout(root, split, own)
    return layout._replace(found=f"{module.NAME} in {root} ({why}), {layout.found}")

