"""LPIPS: the distance of two images in the features of a network that was trained to recognise objects."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-10  # added to the length of a feature vector
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # version 0.1 brings [-1, 1] to what the trunks expect
PIXELS_AT_ONCE = {"alex": 1 << 19, "vgg": 1 << 17}  # of each of the two: bounds the feature maps that are held


class _Conv(NamedTuple):
    channels: int
    kernel: int
    stride: int = 1
    padding: int = 1
    pool: int = 0  # side of the max pool of stride 2 before it, 0 for none
    tap: bool = True  # whether its output, after the ReLU, is compared


class _Net(NamedTuple):
    prefix: str
    least: int  # side of the smallest image that leaves a value at the last tap
    convs: tuple[_Conv, ...]


def _vgg_stage(channels: int, convs: int, pool: int = 2) -> tuple[_Conv, ...]:
    return tuple(_Conv(channels, 3, pool=0 if i else pool, tap=i == convs - 1) for i in range(convs))


NETS = {
    "alex": _Net("AlexNet_0", 31, (
        _Conv(64, 11, stride=4, padding=2), _Conv(192, 5, padding=2, pool=3), _Conv(384, 3, pool=3), _Conv(256, 3),
        _Conv(256, 3),
    )),
    "vgg": _Net("VGG16_0", 16, (
        *_vgg_stage(64, 2, pool=0), *_vgg_stage(128, 2), *_vgg_stage(256, 3), *_vgg_stage(512, 3), *_vgg_stage(512, 3),
    )),
}  # fmt: skip


class LPIPS(nn.Module):
    """Perceptual distance of frames, version 0.1, without dropout: 0 for equal ones.

    net:     "alex" (the usual one for reports) or "vgg".
    spatial: each layer's map is brought to the frames' size (bilinear, half-pixel centres) before its mean is taken;
             else the mean is over the map as it is.
    tensors: as for `from_tensors`; None draws random ones, for tests. They are buffers: nothing here is trained, but
             gradients reach the frames.
    Raises:  ValueError for another net or other tensors.
    Source:  Zhang, Isola, Efros, Shechtman, Wang 2018, arXiv:1801.03924; the trunks are torchvision's AlexNet, VGG16.
    """

    def __init__(self, net: str = "alex", spatial: bool = False, tensors: dict[str, Tensor] | None = None):
        super().__init__()
        if net not in NETS:
            raise ValueError(f"LPIPS: `net` must be one of {', '.join(NETS)}, got {net!r}.")
        self.net, self.spatial = net, spatial
        for name, values in (_random_tensors(net) if tensors is None else _checked(net, tensors)).items():
            values = values.detach().float()
            if values.ndim == 4:
                values = values.permute(3, 2, 0, 1)  # [kh, kw, in, out] -> [out, in, kh, kw]
                values = values.contiguous(memory_format=torch.channels_last)  # a quarter less time on a CPU
            self.register_buffer(_key(name), values, persistent=False)

    @classmethod
    def from_tensors(cls, net: str, tensors: dict[str, Tensor], spatial: bool = False) -> "LPIPS":
        """The metric with published weights, as `fastvid.weights.load_weights` gives them.

        net:     "alex" or "vgg". tensors: exactly the names and shapes of `tensor_shapes(net)`, floating.
        spatial: as in the constructor.
        Returns: LPIPS in evaluation mode.
        Raises:  ValueError naming the first tensor that is missing, of another shape or too many.
        """
        return cls(net, spatial, tensors).eval()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of each pair of frames.

        a, b:    [..., 3, H, W], floating, the same shape, values in [0, 1]; H and W at least 31 (alex) or 16 (vgg).
                 Where one of them was expanded (one truth, many samples), its features are computed only once.
        Returns: [...] float32, from 0 on.
        Raises:  ValueError for other dtypes, shapes that differ, or frames that are too small.
        """
        _check(self.net, a, b)
        lead = a.shape[:-3]
        (a, of_a), (b, of_b) = _distinct(a), _distinct(b)
        at_once = max(1, PIXELS_AT_ONCE[self.net] // (a.shape[-2] * a.shape[-1]))
        chunks = zip(of_a.split(at_once), of_b.split(at_once), strict=True)
        return torch.cat([self._distances(a, b, i, j) for i, j in chunks]).reshape(lead)

    def _distances(self, a: Tensor, b: Tensor, of_a: Tensor, of_b: Tensor) -> Tensor:
        """Between pairs of frames given by their places. a [m, 3, H, W], b [k, 3, H, W], of_a, of_b [n] -> [n]."""
        (rows_a, i), (rows_b, j) = (places.unique(return_inverse=True) for places in (of_a, of_b))
        total = torch.zeros(len(of_a), device=a.device)
        for layer, features in enumerate(self._features(torch.cat([a[rows_a].float(), b[rows_b].float()]))):
            unit = features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + EPS)
            x, y = unit[i], unit[len(rows_a) + j]  # [n, C, h, w]
            head = self.get_buffer(_key(f"NetLinLayer_{layer}|Conv_0|kernel"))
            distances = F.conv2d((x - y).square(), head)  # [n, 1, h, w]
            if self.spatial:
                distances = F.interpolate(distances, a.shape[-2:], mode="bilinear", align_corners=False)
            total = total + distances.mean(dim=(1, 2, 3))
        return total

    def _features(self, frames: Tensor) -> Iterator[Tensor]:
        shift, scale = (frames.new_tensor(values).view(1, 3, 1, 1) for values in (SHIFT, SCALE))
        x = ((2 * frames - 1 - shift) / scale).contiguous(memory_format=torch.channels_last)
        prefix, _, convs = NETS[self.net]
        for i, conv in enumerate(convs):
            if conv.pool:
                x = F.max_pool2d(x, conv.pool, 2)
            kernel, bias = (self.get_buffer(_key(f"{prefix}|Conv_{i}|{part}")) for part in ("kernel", "bias"))
            x = F.relu(F.conv2d(x, kernel, bias, conv.stride, conv.padding))
            if conv.tap:
                yield x


def tensor_shapes(net: str) -> dict[str, torch.Size]:
    """Names and shapes of a net's tensors as `fastvid.weights` keeps them; kernels are [kh, kw, in, out].

    net:     "alex" or "vgg".
    Returns: shapes by name: of trunk (kernel and bias of each convolution) and heads (one 1x1 kernel per tap).
    Raises:  KeyError for another net.
    """
    prefix, _, convs = NETS[net]
    shapes, channels = {}, 3
    for i, conv in enumerate(convs):
        shapes[f"{prefix}|Conv_{i}|kernel"] = torch.Size([conv.kernel, conv.kernel, channels, conv.channels])
        shapes[f"{prefix}|Conv_{i}|bias"] = torch.Size([conv.channels])
        channels = conv.channels
    taps = [conv.channels for conv in convs if conv.tap]
    return shapes | {f"NetLinLayer_{i}|Conv_0|kernel": torch.Size([1, 1, C, 1]) for i, C in enumerate(taps)}


def _random_tensors(net: str) -> dict[str, Tensor]:
    made = {}
    for name, shape in tensor_shapes(net).items():
        values = torch.zeros(shape) if len(shape) == 1 else torch.randn(shape) * (2 / shape[:-1].numel()) ** 0.5
        made[name] = values.abs() if name.startswith("NetLinLayer") else values
    return made


def _checked(net: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    wanted = tensor_shapes(net)
    for name in sorted(wanted.keys() | tensors.keys()):
        shape = list(tensors[name].shape) if name in tensors else "nothing"
        if name not in wanted or shape != list(wanted[name]):
            raise ValueError(
                f"LPIPS: {net} wants {list(wanted[name]) if name in wanted else 'nothing'} as {name}, got {shape}; "
                f"pass the tensors of load_weights('lpips_{net}')."
            )
    return tensors


def _distinct(frames: Tensor) -> tuple[Tensor, Tensor]:
    """[..., 3, H, W] -> the frames [m, 3, H, W] that an expanded tensor really has, and [n] which of them each is."""
    lead = frames.shape[:-3]
    kept = frames[tuple(slice(0, 1) if frames.stride(d) == 0 else slice(None) for d in range(len(lead)))]
    count = kept.shape[:-3].numel()
    places = torch.arange(count, device=frames.device).view(kept.shape[:-3]).expand(lead)
    return kept.reshape(count, *frames.shape[-3:]), places.reshape(-1)


def _key(name: str) -> str:
    """A buffer's name has no dots, and bars read badly in one."""
    return name.replace("|", "_")


def _check(net: str, a: Tensor, b: Tensor) -> None:
    if not (a.is_floating_point() and b.is_floating_point()):
        raise ValueError(f"LPIPS: `a` and `b` must be floating, in [0, 1], got {a.dtype} and {b.dtype}.")
    if a.shape != b.shape or a.ndim < 3 or a.shape[-3] != 3 or a.numel() == 0:
        raise ValueError(
            f"LPIPS: `a` and `b` must both be [..., 3, H, W] with pixels in them, got {list(a.shape)} and "
            f"{list(b.shape)}."
        )
    least = NETS[net].least
    if min(a.shape[-2:]) < least:
        raise ValueError(
            f"LPIPS: frames for {net} must be at least {least}x{least}, got {a.shape[-2]}x{a.shape[-1]}; use ssim or "
            f"psnr for smaller ones."
        )
