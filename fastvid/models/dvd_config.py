"""DVD-GAN's sizes: the config of its generator and discriminators, and the presets."""

import math
from dataclasses import dataclass, replace

from fastvid.errors import UsageError

START = 4  # pixels a side where the generator begins and the discriminators end


@dataclass(frozen=True)
class DVDGANConfig:
    """Sizes of a DVD-GAN, checked when made (UsageError).

    frames, size:     of the generated video; size a side in pixels, 4 times a power of two.
    classes:          how many; 0 for none. class_names: of them, where the data names them.
    width, groups:    channels per unit, and units of each resolution from 4x4 up, one a doubling of the size.
    discriminator_width, discriminator: the same of both discriminators, from the full size down.
    latent, embedding: numbers of noise, and of a class's embedding.
    variant:          "v2" has a recurrent unit at every resolution; "v1" one at 4x4, and attention.
    given:            frames that the model goes on from; 0 for generation from noise alone.
    spatial_frames:   frames that the spatial discriminator looks at.
    """

    frames: int = 12
    size: int = 64
    classes: int = 0
    class_names: tuple[str, ...] = ()
    width: int = 128
    groups: tuple[int, ...] = (8, 8, 8, 4)
    discriminator_width: int = 128
    discriminator: tuple[int, ...] = (2, 4, 8, 16)
    latent: int = 120
    embedding: int = 120
    variant: str = "v2"
    given: int = 0
    spatial_frames: int = 8

    def __post_init__(self):
        for name in ("class_names", "groups", "discriminator"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        least = {"width": 1, "discriminator_width": 1, "latent": 1, "embedding": 1, "classes": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise UsageError(f"dvdgan: {name} must be at least {low}, got {getattr(self, name)}.")
        doublings = int(math.log2(self.size / START)) if self.size >= 2 * START else 0
        if doublings < 1 or START << doublings != self.size:
            raise UsageError(f"dvdgan: size must be 4 times a power of two, from 8 pixels on, got {self.size}.")
        for name in ("groups", "discriminator"):
            if len(getattr(self, name)) != doublings or min(getattr(self, name)) < 1:
                raise UsageError(
                    f"dvdgan: {name} must be {doublings} numbers from 1 on, one for each doubling from 4 to "
                    f"{self.size} pixels; got {getattr(self, name)}. Choose a preset of that size."
                )
        if self.frames < 1 or self.given < 0 or self.shown % 4:
            raise UsageError(
                f"dvdgan: the temporal discriminator halves the frames twice, so given + generated frames must be a "
                f"multiple of 4; got {self.given} + {self.frames}."
            )
        if not 1 <= self.spatial_frames <= self.shown:
            raise UsageError(f"dvdgan: spatial_frames must lie in 1..{self.shown}, got {self.spatial_frames}.")
        if self.variant not in ("v1", "v2"):
            raise UsageError(f"dvdgan: variant must be v1 or v2, got {self.variant!r}.")
        if self.variant == "v1" and any(self.width * units % 8 for units in self.widths_in):
            raise UsageError(f"dvdgan: v1's attention needs channels in multiples of 8, got width {self.width}.")
        if self.class_names and len(self.class_names) != self.classes:
            raise UsageError(f"dvdgan: {self.classes} classes and {len(self.class_names)} names of classes.")

    @property
    def shown(self) -> int:
        """Frames that the discriminators see."""
        return self.given + self.frames

    @property
    def widths_in(self) -> tuple[int, ...]:
        """Units that each resolution begins with."""
        return (self.groups[0], *self.groups[:-1])

    @property
    def condition(self) -> int:
        """Numbers that condition every batch norm: the noise and the class's embedding."""
        return self.latent + (self.embedding if self.classes else 0)


def _paper(size: int, frames: int, units: tuple[int, ...], looked: tuple[int, ...], given: int = 0) -> DVDGANConfig:
    return DVDGANConfig(frames, size, 0 if given else 600, groups=units, discriminator=looked, given=given)


_SIZES = {
    64: ((8, 8, 8, 4), (2, 4, 8, 16)),
    128: ((8, 8, 8, 4, 2), (2, 4, 8, 16, 16)),
    256: ((8, 8, 8, 4, 2, 1), (2, 4, 8, 16, 16, 16)),
}
PRESETS = {
    "64x12": _paper(64, 12, *_SIZES[64]),
    "64x48": _paper(64, 48, *_SIZES[64]),
    "128x12": _paper(128, 12, *_SIZES[128]),
    "128x48": _paper(128, 48, *_SIZES[128]),
    "256x12": _paper(256, 12, *_SIZES[256]),
    "64-fp": _paper(64, 11, *_SIZES[64], given=5),  # the paper's task on Kinetics: 16 frames, 5 of them given
    "64-fp4": _paper(64, 12, *_SIZES[64], given=4),
    # little noise: the narrower a layer, the more each number of it moves every channel
    "digits32": DVDGANConfig(
        frames=12, size=32, width=8, groups=(8, 6, 3), discriminator_width=8, discriminator=(4, 8, 8), latent=8,
        embedding=16,
    ),
    "push32-fp": DVDGANConfig(
        frames=12, size=32, width=8, groups=(8, 6, 3), discriminator_width=8, discriminator=(4, 8, 8), latent=8,
        given=4,
    ),
    "tiny": DVDGANConfig(
        frames=4, size=16, width=8, groups=(2, 1), discriminator_width=8, discriminator=(1, 2), latent=8, embedding=4,
        spatial_frames=3,
    ),
    "tiny-fp": DVDGANConfig(
        frames=4, size=16, width=8, groups=(2, 1), discriminator_width=8, discriminator=(1, 2), latent=8, given=4,
        spatial_frames=3,
    ),
}  # fmt: skip
# the paper's first version, of the same widths
PRESETS |= {f"{name}-v1": replace(config, variant="v1") for name, config in PRESETS.items()}
