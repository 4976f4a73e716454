"""What other programs call the tensors of these networks, and what they are called here.

Here they have the names of the flax files, joined by bars, and those files' layouts: kernels [..., in, out].
"""

import hashlib
import re
from collections.abc import Iterator

import torch
from torch import Tensor

from fastvid.errors import WeightsError
from fastvid.metrics.i3d import CLASSES, MIXED, WIDTH

# torchvision: the places of the convolutions in `features`
TRUNKS = {"lpips_alex": (0, 3, 6, 8, 10), "lpips_vgg": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)}
PREFIXES = {"lpips_alex": "AlexNet_0", "lpips_vgg": "VGG16_0"}
# Of DeepMind's rgb_scratch: the first eight digits of each tensor's sha256, in the order of the sorted names. A file
# with names nobody has seen is known by them; the fingerprint of the whole then has to agree.
RGB_SCRATCH = (
    "64100c0e751d92a8e85a8f33cd315c90da7fc151b29d89e617c2e6c1c3ab6431480fe4fe54f10910214d0e1884d596eeca077469e01c84e6"
    "b2088a5431d4aa97de711c695a8f00a8fe401448f0b538ba8adaa1e36a1b3623367c430e211bf28f26cba7ca7266b4578cde04156fc584dc"
    "e0cd0d7c589855642bbbebf871f5814fdd9a2a11b30564de3c8d3659bebfd9546acd09883207d6fe383547eefb184d38afdfdb8f3c8354f6"
    "4b6aa3602d46c85abedb62982d5a0e0fb13037ff90b8e634b364fa54a4d14caee59a4e908db12af06eef746d167d08c6475dc78a9ba96c4b"
    "feef7829f1a1b8905ed66d18f1c958305ed37831ae9b81d42340863ca243f6c9132e007d3d7d1007383fc052d832ce9c2cfcc9add58b83fc"
    "210cf90033476a18dc572f36160738d038141ae99474f4fca5cc380e912ff12afef2961712114fe80c402352d3ad80a1d73b4d0592ea0fd8"
    "bda8d4737bd39f5eec3f534743f1749213845463bb608bab5b8b6859f5c5c3ffcae2ace69dfd6484911aa8b3852aade6b4e85e1fecebb768"
    "3960628fc3b07b22be01a5f505bcd626a1c3aac59f8b36dbcd30c9c36768305cd5c9effc515f52e28d2ef30572d31be881d4e3fc59788554"
    "141f8f6bea65adf1b6dac469db1c4848d2ce085aa13837f8942f3cd3acecbe521a88ebf1b861850bd9014e991285bfe3fdd1e8f25fa13250"
    "13590c1b03aa9de67be683b475c582bd248d723676656db7a4dc506dfdae215f63f6b1867d7ba1ebbbcef63563dda564943eecfd7319e134"
    "912d791ff85969110d477ccce59fccc9c0bf6cd452fb210c1837c2424699b9edda164a140ec52ab977b2e46d649c38d962a85eb05eebecd2"
    "88d1842f98ac8f07835d8e6baeb409344ea9734e9ed2f734153fa3951a869ac4c65a43893bc39178266f1c7c505c298873a4e75ea1c99bd8"
    "d1e9e545ea9034feb8a5e8e4804888a1cac12ca0cabaebce7781d7a58dedc341c82994ee79b5d665d21c3f76a91d969da594ec378cca4bd1"
    "279f440d09602b8b7ea17edc98895ab8d313beca9f446cedfc9d7b75737d1f8a43fa249d8ba4588134d5a38e943c91707550478a6969db78"
    "c0fbaf61e408e7b2ee8f1f6ecd5ff72d71ce6438f95293340348f8db0e93493cf4d81ab8c0db054807a234f9462be223e14c467f8faf5997"
    "991c9ddb7f35de4dbe5883a5f769c65d94dca3b73a64911a79378823e1e48528c6cad3115c6723ba7b06eab85c413e82f3e29530beec69da"
    "3f8e17cab303650d9dd6e73cd1fd053a4d5d7a83018543f1"
)


def i3d_units() -> Iterator[tuple[str, str, str, list[int]]]:
    """Convolutions of the I3D with batch normalisation: name here, two names in PyTorch ports, kernel shape.

    Returns: (name, in pytorch-i3d and what descends from it, in kinetics_i3d_pytorch, [kt, kh, kw, in, out]) each.
    Raises:  nothing.
    Source:  key names of piergiaj/pytorch-i3d (also VideoGPT, TATS) and hassony2/kinetics_i3d_pytorch.
    """
    for name, kernel, C, width in (("Conv3d_1a_7x7", 7, 3, 64), ("Conv3d_2b_1x1", 1, 64, 64),
                                   ("Conv3d_2c_3x3", 3, 64, 192)):  # fmt: skip
        yield name, name, name.lower(), [kernel] * 3 + [C, width]
    C = 192
    for block, (a, b, c, d, e, f) in MIXED.items():
        branches = [("0", "0a_1x1", "b0", "0", C, a), ("1", "0a_1x1", "b1a", "1.0", C, b),
                    ("1", "0b_3x3", "b1b", "1.1", b, c), ("2", "0a_1x1", "b2a", "2.0", C, d),
                    ("2", "0b_3x3", "b2b", "2.1", d, e), ("3", "0b_1x1", "b3b", "3.1", C, f)]  # fmt: skip
        for branch, conv, short, nested, inputs, width in branches:
            yield (f"Mixed_{block}|Branch_{branch}|Conv3d_{conv}", f"Mixed_{block}.{short}",
                   f"mixed_{block}.branch_{nested}", [int(conv[-1])] * 3 + [inputs, width])  # fmt: skip
        C = a + c + e + f


def i3d_shapes() -> dict[str, list[int]]:
    """Names and shapes of the I3D's 230 tensors.

    Returns: shapes by name.
    Raises:  nothing.
    """
    shapes = {"params|Logits|Conv3d_0c_1x1|Conv_0|kernel": [1, 1, 1, WIDTH, CLASSES],
              "params|Logits|Conv3d_0c_1x1|Conv_0|bias": [CLASSES]}  # fmt: skip
    for name, _, _, kernel in i3d_units():
        shapes[f"params|{name}|Conv_0|kernel"] = kernel
        shapes[f"params|{name}|BatchNorm_0|bias"] = kernel[-1:]
        shapes[f"batch_stats|{name}|BatchNorm_0|mean"] = [1, 1, 1, 1, kernel[-1]]
        shapes[f"batch_stats|{name}|BatchNorm_0|var"] = [1, 1, 1, 1, kernel[-1]]
    return shapes


def i3d_from_torch(tensors: dict[str, Tensor], source: str) -> dict[str, Tensor] | None:
    """An I3D under the names of a PyTorch port.

    tensors: float32 by name. source: what to call them in messages.
    Returns: under the names used here; None if these are not the names of a known port.
    Raises:  WeightsError for a batch normalisation with a scale.
    """
    for dialect, norm, classes in ((1, "bn", "logits"), (2, "batch3d", "conv3d_0c_1x1")):
        names = {f"{classes}.conv3d.weight": "params|Logits|Conv3d_0c_1x1|Conv_0|kernel",
                 f"{classes}.conv3d.bias": "params|Logits|Conv3d_0c_1x1|Conv_0|bias"}  # fmt: skip
        scales = []
        for unit in i3d_units():
            there = unit[dialect]
            scales.append(f"{there}.{norm}.weight")
            names |= {f"{there}.conv3d.weight": f"params|{unit[0]}|Conv_0|kernel",
                      f"{there}.{norm}.bias": f"params|{unit[0]}|BatchNorm_0|bias",
                      f"{there}.{norm}.running_mean": f"batch_stats|{unit[0]}|BatchNorm_0|mean",
                      f"{there}.{norm}.running_var": f"batch_stats|{unit[0]}|BatchNorm_0|var"}  # fmt: skip
        if names.keys() <= tensors.keys():
            for scale in scales:
                if scale in tensors and not bool((tensors[scale] == 1).all()):
                    raise WeightsError(f"{source}: {scale} is not all ones; I3D's batch normalisation has no scale.")
            return {ours: _laid_out(tensors[theirs], ours) for theirs, ours in names.items()}
    return None


def i3d_from_content(tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """DeepMind's rgb_scratch under any names.

    tensors: float32 by name, in PyTorch's layouts or those used here.
    Returns: its 230 tensors; None unless all of them are there, bit for bit.
    Raises:  nothing.
    """
    shapes = i3d_shapes()
    known = {RGB_SCRATCH[8 * i : 8 * i + 8]: name for i, name in enumerate(sorted(shapes))}
    found = {}
    for values in tensors.values():
        for layout in (values, values.permute(2, 3, 4, 1, 0) if values.ndim == 5 else values.flatten()):
            content = layout.contiguous().numpy().tobytes()
            name = known.get(hashlib.sha256(content).hexdigest()[:8])
            if name and layout.numel() == torch.Size(shapes[name]).numel():
                found[name] = layout.reshape(shapes[name])
    return found if found.keys() == shapes.keys() else None


def lpips_trunk(tensors: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]] | None:
    """AlexNet or VGG16 under torchvision's names or those of the lpips package; a classifier is left out.

    tensors: float32 by name.
    Returns: (kind, trunk under the names used here), or None.
    Raises:  nothing.
    """
    features = {}
    for name, values in tensors.items():
        if told := re.fullmatch(r"(?:net\.slice\d+\.|features\.)(\d+)\.(weight|bias)", name):
            features[int(told[1]), told[2]] = values
    for kind, places in TRUNKS.items():
        if features.keys() == {(place, part) for place in places for part in ("weight", "bias")}:
            trunk = {}
            for i, place in enumerate(places):
                trunk[f"{PREFIXES[kind]}|Conv_{i}|kernel"] = features[place, "weight"].permute(2, 3, 1, 0)
                trunk[f"{PREFIXES[kind]}|Conv_{i}|bias"] = features[place, "bias"]
            return kind, trunk
    return None


def lpips_heads(tensors: dict[str, Tensor], source: str) -> tuple[str, dict[str, Tensor]] | None:
    """The 1x1 heads under the names of the lpips package.

    tensors: float32 by name. source: what to call them in messages.
    Returns: (kind, heads under the names used here), or None.
    Raises:  WeightsError for those of SqueezeNet, which no metric here uses.
    """
    heads = {}
    for name, values in tensors.items():
        if (told := re.fullmatch(r"lin(\d)\.model\.1\.weight", name)) and values.ndim == 4:
            heads[f"NetLinLayer_{told[1]}|Conv_0|kernel"] = values.permute(2, 3, 1, 0)
    if len(heads) == 7:
        raise WeightsError(f"{source}: heads of SqueezeNet, which no metric here uses; add those of alex or vgg.")
    if len(heads) != 5:
        return None
    return "lpips_alex" if heads["NetLinLayer_1|Conv_0|kernel"].shape[2] == 192 else "lpips_vgg", heads


def _laid_out(values: Tensor, name: str) -> Tensor:
    if name.endswith("kernel"):
        return values.permute(2, 3, 4, 1, 0)  # [out, in, kt, kh, kw] -> [kt, kh, kw, in, out]
    return values.view(1, 1, 1, 1, -1) if name.startswith("batch_stats") else values
