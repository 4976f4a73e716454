"""The races of DVD-GAN: drawing two videos of 48 frames, and a training step of generator and discriminators.

The torch composition is the same network in plain torch (dvdgan_peers.py) with the same weights, as the paper draws it:
input and state concatenated, a convolution a gate and frame, 1x1 convolutions after the enlargement. To sample it has
them with spectral norm divided out before the clock runs; to train it has torch's own, cached over a turn.
The floor counts that composition's products, of which ours does fewer.
"""

import contextlib
import copy
import functools

import torch
import torch.nn.functional as F
from dvdgan_peers import FORMATS, Generator, Spatial, Temporal, copied
from peak import floor
from timing import Contestant, GateError, Race
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from fastvid.models.dvd_config import PRESETS, DVDGANConfig
from fastvid.models.dvd_gan import DVDGANGenerator, SpatialDiscriminator, TemporalDiscriminator
from fastvid.testing import assert_within_yardstick

VIDEOS = 2
OURS, PEERS = 2.0, 16.0  # how many times plain torch's error is allowed
RATES = {"generator": 1e-4, "discriminators": 5e-4}
LIMIT = 0.015  # seconds for the two videos on a GPU

Step = tuple[Tensor, Tensor, Tensor, Tensor]  # real video, z, labels, frames that the spatial discriminator looks at


def sample_race(config: DVDGANConfig, device: str = "cpu") -> Race:
    """Two videos from noise and classes, by the generator alone; on a GPU in bfloat16."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    ours = _settled(config)
    plain = {f"torch {layout}": copied(Generator(config, layout), ours, baked=True).to(device, dtype)
             for layout in FORMATS}  # fmt: skip
    generators = {"fastvid": ours.to(device, dtype)} | plain
    contestants = [Contestant(name, functools.partial(_drawn, one)) for name, one in generators.items()]
    contestants.append(Contestant("torch", best_of=tuple(plain)))
    if device == "cuda":
        contestants.append(Contestant("15 ms", given=LIMIT))
    return Race(
        gate=lambda: _gate_sample(generators, _noise(config, -1, device, dtype)),
        inputs=lambda number: _noise(config, number, device, dtype),
        contestants=contestants,
        floor=lambda: floor(_operations(plain["torch nchw"], _noise(config, 0, device, dtype)), 0.0, device,
                            torch.get_num_threads()),
        device=device,
    )  # fmt: skip


def train_race(config: DVDGANConfig = PRESETS["digits32"], batch: int = 8, device: str = "cpu") -> Race:
    """A step of both discriminators, then one of the generator, with Adam."""
    torch.manual_seed(0)
    ours = [kind(config).to(device).train() for kind in (DVDGANGenerator, SpatialDiscriminator, TemporalDiscriminator)]
    teams = {"fastvid": ours}
    for layout in FORMATS:
        plain = [kind(config, layout) for kind in (Generator, Spatial, Temporal)]
        teams[f"torch {layout}"] = [copied(one, mine, False).to(device) for one, mine in zip(plain, ours, strict=True)]
    judged = {name: copy.deepcopy(team) for name, team in teams.items()}
    contestants = [Contestant(name, functools.partial(_step, team, _optimizers(team))) for name, team in teams.items()]
    contestants.append(Contestant("torch", best_of=tuple(teams)[1:]))
    return Race(
        gate=lambda: _gate_train(judged, _batch(config, batch, -1, device)),
        inputs=lambda number: _batch(config, batch, number, device),
        contestants=contestants,
        device=device,
    )


def _settled(config: DVDGANConfig) -> DVDGANGenerator:
    """A fresh generator whose statistics are those of its own features, as after training."""
    torch.manual_seed(0)
    generator = DVDGANGenerator(config).eval()
    generator.standing_statistics(batches=1, batch=4)
    return generator


def _noise(config: DVDGANConfig, number: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    draw = torch.Generator().manual_seed(8000 + number)
    z = torch.randn(VIDEOS, config.latent, generator=draw).to(device, dtype)
    label = torch.randint(max(1, config.classes), (VIDEOS,), generator=draw).to(device)
    return z, label if config.classes else None


@torch.no_grad()
def _drawn(generator: nn.Module, given: tuple[Tensor, Tensor | None]) -> Tensor:
    return generator(*given)


def _gate_sample(generators: dict[str, nn.Module], given: tuple[Tensor, Tensor | None]) -> str:
    """Everybody's video against float64's, measured by the error of plain torch in its own dtype."""
    plain = generators["torch nchw"]
    exact = _drawn(copy.deepcopy(plain).double(), (given[0].double(), given[1]))
    if exact.std() < 0.01:
        raise GateError("the videos are all one grey: nothing is compared")
    results = {name: _drawn(one, given) for name, one in generators.items()}
    for name, result in results.items():
        try:
            assert_within_yardstick(result, exact, results["torch nchw"], OURS if name == "fastvid" else PEERS)
        except AssertionError as error:
            raise GateError(f"{name}: {error}") from None
    return f"videos within {OURS:g} times plain torch's error against float64"


def _operations(plain: nn.Module, given: tuple[Tensor, Tensor | None]) -> float:
    """Of the composition's products."""
    with FlopCounterMode(display=False) as counter:
        _drawn(plain, given)
    return float(counter.get_total_flops())


def _batch(config: DVDGANConfig, batch: int, number: int, device: str) -> Step:
    draw = torch.Generator().manual_seed(9000 + number)
    video = torch.rand(batch, 3, config.shown, config.size, config.size, generator=draw) * 2 - 1
    z = torch.randn(batch, config.latent, generator=draw)
    label = torch.randint(max(1, config.classes), (batch,), generator=draw)
    frames = torch.rand(batch, config.shown, generator=draw).topk(config.spatial_frames).indices.sort().values
    return tuple(part.to(device) for part in (video, z, label, frames))


def _optimizers(team: list[nn.Module]) -> list[torch.optim.Optimizer]:
    generator, *discriminators = team
    judges = [p for one in discriminators for p in one.parameters()]
    return [torch.optim.Adam(generator.parameters(), RATES["generator"], (0.0, 0.999), fused=True),
            torch.optim.Adam(judges, RATES["discriminators"], (0.0, 0.999), fused=True)]  # fmt: skip


def _once(team: list[nn.Module]) -> contextlib.AbstractContextManager:
    """torch's spectral norm makes a weight at each reading, in a recurrent unit at each frame; cached, once a turn."""
    return contextlib.nullcontext() if isinstance(team[0], DVDGANGenerator) else parametrize.cached()


def _step(team: list[nn.Module], optimizers: list[torch.optim.Optimizer], step: Step) -> float:
    generating, judging = optimizers
    total = 0.0
    for loss, optimizer in ((_judging_loss, judging), (_generating_loss, generating)):
        optimizer.zero_grad(set_to_none=True)
        with _once(team):
            value = loss(team, step)
        value.backward()
        optimizer.step()
        total += value.item()
    return total


def _judging_loss(team: list[nn.Module], step: Step) -> Tensor:
    generator, spatial, temporal = team
    real, z, label, frames = step
    label = label if generator.config.classes else None
    with torch.no_grad():
        fake = generator(z, label)
    both, twice = torch.cat([real, fake]), None if label is None else label.repeat(2)
    total = 0.0
    for score in (spatial(both, twice, frames.repeat(2, 1)), temporal(both, twice)):
        of_real, of_fake = score.chunk(2)
        total = total + F.relu(1 - of_real).mean() + F.relu(1 + of_fake).mean()
    return total


def _generating_loss(team: list[nn.Module], step: Step) -> Tensor:
    generator, spatial, temporal = team
    _, z, label, frames = step
    label = label if generator.config.classes else None
    fake = generator(z, label)
    return -(spatial(fake, label, frames).mean() + temporal(fake, label).mean())


def _gate_train(teams: dict[str, list[nn.Module]], step: Step) -> str:
    """Gradients of the first step's two losses, ours beside torch's, measured by two layouts of torch."""
    found = {name: _gradients(team, step) for name, team in teams.items()}
    exact = _gradients([copy.deepcopy(one).double() for one in teams["torch nchw"]],
                       tuple(x.double() if x.is_floating_point() else x for x in step))  # fmt: skip
    errors = {name: _away(one, exact) for name, one in found.items()}
    allowed = OURS * max(error for name, error in errors.items() if name != "fastvid")
    if not errors["fastvid"] <= allowed:
        raise GateError(f"fastvid: gradients {errors['fastvid']:.1e} away from float64's, torch's {allowed / OURS:.1e}")
    return f"gradients of all weights {errors['fastvid']:.1e} from float64's, torch's {allowed / OURS:.1e}"


def _gradients(team: list[nn.Module], step: Step) -> dict[str, Tensor]:
    team = copy.deepcopy(team)
    found = {}
    for which, loss in (("judging", _judging_loss), ("generating", _generating_loss)):
        for one in team:
            one.zero_grad(set_to_none=True)
        with _once(team):
            value = loss(team, step)
        value.backward()
        found |= {
            f"{which} {i} {name}": p.grad.detach()
            for i, one in enumerate(team) for name, p in one.named_parameters() if p.grad is not None
        }  # fmt: skip
    return found


def _away(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The relative error of all gradients together."""
    if found.keys() != exact.keys():
        raise GateError(f"gradients of {sorted(found.keys() ^ exact.keys())[:3]} are there for one alone")
    off = sum((found[name].double() - exact[name]).square().sum() for name in exact)
    return float((off / sum(value.square().sum() for value in exact.values())).sqrt())
