"""Sample a PixelCNN that knows nothing of caches: the codes of its own loop over whole forwards, in less time.

    python examples/sample_your_pixelcnn.py            # the model below, 28x28 pixels of 256 values
    python examples/sample_your_pixelcnn.py --pythae   # the class of that package, as installed (pip install pythae)

The model is written as people write it, after `PixelRCNN` of github.com/axeloh/pixelcnn-pytorch: a masked 7x7
convolution of type A, then residual blocks of 1x1, masked 7x7 of type B and 1x1, batch norm between them, with
one channel of 256 values in place of three of 4.
"""

import argparse
import statistics
import time

import torch
from torch import Tensor, nn

from fastvid.sampling import ConvCache, ConvSteps, Noise, check_steps, sample_steps

# ---- somebody's model: not a word of sampling in it


class MaskedConv2d(nn.Conv2d):
    def __init__(self, mask_type, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", torch.ones_like(self.weight))
        _, _, height, width = self.weight.shape
        self.mask[:, :, height // 2, width // 2 + (mask_type == "B") :] = 0
        self.mask[:, :, height // 2 + 1 :] = 0

    def forward(self, x):
        self.weight.data *= self.mask
        return super().forward(x)


class ResidualBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(channels, channels // 2, 1), nn.ReLU(),
            MaskedConv2d("B", channels // 2, channels // 2, 7, padding=3), nn.ReLU(),
            nn.Conv2d(channels // 2, channels, 1),
        )  # fmt: skip

    def forward(self, x):
        return x + self.net(x)


class PixelCNN(nn.Module):
    def __init__(self, channels=120, blocks=8, values=256):
        super().__init__()
        layers = [MaskedConv2d("A", 1, channels, 7, padding=3), nn.ReLU()]
        for _ in range(blocks):
            layers += [ResidualBlock(channels), nn.ReLU(), nn.BatchNorm2d(channels)]
        self.net = nn.Sequential(*layers, nn.Conv2d(channels, values, 1))

    def forward(self, x):
        return self.net(x)


# ---- what fastvid asks for: logits of a grid of codes, [B, T, H, W] -> [B, T, H, W, K]; an image has T = 1


def logits(net: nn.Module, codes: Tensor) -> Tensor:
    return net(codes / 127.5 - 1).permute(0, 2, 3, 1).unsqueeze(1)


def pythae_logits(net: nn.Module, codes: Tensor) -> Tensor:
    return net({"data": codes.float()})["out"].permute(0, 2, 3, 4, 1)


# ---- the same contract by hand, for a model in which more than convolutions look sideways


class SteppedPixelCNN(PixelCNN):
    def new_cache(self, batch, shape):
        return {m: ConvCache(m, batch, shape) for m in self.modules() if isinstance(m, MaskedConv2d)}

    def step(self, cache, codes, position):
        def run(layer, x):  # [B, C, 1, 1] -> [B, C, 1, 1]
            if isinstance(layer, MaskedConv2d):
                return cache[layer].step(x.flatten(1), position)[:, :, None, None]
            if isinstance(layer, ResidualBlock):
                return x + run(layer.net, x)
            if isinstance(layer, nn.Sequential):
                for part in layer:
                    x = run(part, x)
                return x
            return layer(x)

        codes = torch.zeros(1) if codes is None else codes
        return run(self.net, (codes / 127.5 - 1).view(-1, 1, 1, 1)).flatten(1)


# ---- its own loop: the whole network for every pixel


@torch.no_grad()
def own_loop(forward, shape, noise: Noise) -> Tensor:
    _, H, W = shape
    image = torch.zeros(len(noise.samples), 1, H, W, dtype=torch.int64)
    for y in range(H):
        for x in range(W):
            out = forward(image)[:, 0, y, x]
            if x == 0:
                gumbel = noise.row(0, y, W, out.shape[1], "cpu")
            # a draw from softmax(out), as torch.multinomial makes one, with numbers that do not depend on the order
            image[:, 0, y, x] = (out + gumbel[:, x]).argmax(dim=1)
    return image


def spread_out(net: nn.Module) -> nn.Module:
    """Weights that stand for training: logits that depend on the neighbours, far from uniform."""
    torch.manual_seed(0)
    for part in net.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight)
    return net.eval()


def contestants(pythae: bool, size: int):
    """Each model with a name, and the forward that its own loop calls."""
    if pythae:
        try:
            from pythae.models.normalizing_flows import PixelCNN as Theirs
            from pythae.models.normalizing_flows import PixelCNNConfig
        except ModuleNotFoundError as missing:
            raise SystemExit(f"--pythae needs a package that is not here ({missing}); pip install pythae") from None
        steps = ConvSteps(spread_out(Theirs(PixelCNNConfig(input_dim=(1, size, size), n_layers=5))), pythae_logits)
        return steps.forward, {"ConvSteps": steps}
    net = spread_out(SteppedPixelCNN())
    steps = ConvSteps(net, logits)
    return steps.forward, {"ConvSteps": steps, "step by hand": net}


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Prints and returns how many times faster than its own loop each way of stepping is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=28, help="height and width of the images")
    parser.add_argument("--samples", type=int, default=1, help="images drawn at once")
    parser.add_argument("--runs", type=int, default=1, help="timed runs of each contestant, interleaved; medians count")
    parser.add_argument("--pythae", action="store_true", help="sample that package's PixelCNN instead")
    asked = parser.parse_args(arguments)
    shape, noise = (1, asked.size, asked.size), Noise(seed=0, samples=tuple(range(asked.samples)))
    forward, models = contestants(asked.pythae, asked.size)
    ways = {"own loop": lambda: own_loop(forward, shape, noise)}
    for name, model in models.items():
        check_steps(model, forward, (1, 6, 6))
        ways[name] = lambda model=model: sample_steps(model, shape, noise)

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(asked.runs):
        drawn = []
        for name, way in ways.items():
            start = time.perf_counter()
            drawn.append(way())
            seconds[name].append(time.perf_counter() - start)
        if not all(torch.equal(codes, drawn[0]) for codes in drawn):
            raise SystemExit("the codes differ")
    median = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"{asked.samples} x {asked.size}x{asked.size} codes, the same from all, {drawn[0].unique().numel()} values")
    for name, value in median.items():
        print(f"{name:14} {value:8.3f} s  {median['own loop'] / value:6.1f}x")
    return {name: median["own loop"] / median[name] for name in models}


if __name__ == "__main__":
    main()
