"""What the clip generators share: seed ranges that keep train and test apart, and checks of a request."""

from fastvid.errors import DataError

SPLITS = {"train": range(1_000_000), "test": range(2_000_000, 3_000_000)}


def split_of(kind: str, seed: int) -> str:
    """Name the split that a seed belongs to.

    kind:    generator name, for the message. seed: whole number.
    Returns: "train" or "test".
    Raises:  DataError for a seed outside every split's range.
    Source:  own convention: clips are split by seed, never by frame.
    """
    for split, seeds in SPLITS.items():
        if seed in seeds:
            return split
    ranges = ", ".join(f"{split} {seeds.start} to {seeds.stop - 1}" for split, seeds in SPLITS.items())
    raise DataError(f"{kind}: wanted a seed in a split's range ({ranges}), got {seed}.")


def check_request(kind: str, frames: int, size: tuple[int, int]) -> None:
    """Refuse a clip that cannot be made.

    kind:    generator name, for the message. frames: wanted length. size: (height, width) in pixels.
    Returns: nothing.
    Raises:  DataError for fewer than 1 frame or a side under 16 pixels.
    Source:  own limits; under 16 pixels the drawn things fall below 7 pixels.
    """
    if frames < 1:
        raise DataError(f"{kind}: `frames` must be at least 1, got {frames}.")
    if min(size) < 16:
        raise DataError(f"{kind}: `size` must be at least 16 pixels a side, got {size[0]}x{size[1]}.")
