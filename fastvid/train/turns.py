"""Who moves in a step, in which order, by which loss: one player with one turn, or several, as in a GAN."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Player:
    """Parameters that move together, and how Adam moves them.

    name:          of the player; "" where there is one alone.
    parameters:    by their names in the task's model.
    learning_rate: before the options' schedule. clip_norm: largest L2 norm of the gradient, None for no limit.
    """

    name: str
    parameters: dict[str, Tensor]
    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip_norm: float | None = None


class Turn(NamedTuple):
    """One move of one player: its loss and metrics, of the share of process `rank` of `world` of a step.

    suffix: what tells this turn's gradient norm and loss from another's in the log; "" where there is one alone.
    """

    player: str
    loss: Callable[[int, int, int], tuple[Tensor, dict[str, Tensor]]]
    suffix: str = ""


class Mover:
    """A player's optimizer, which can take its moves of a step back."""

    def __init__(self, player: Player):
        self.player, self.named = player, player.parameters
        self.optimizer = torch.optim.AdamW(
            self.named.values(), lr=player.learning_rate, betas=player.betas, weight_decay=player.weight_decay,
            fused=True,
        )  # fmt: skip
        self.kept: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []

    def move(self, norm: Tensor, rate: float) -> None:
        """Apply the gradients, whose norm is known, at a learning rate."""
        if self.player.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(list(self.named.values()), self.player.clip_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()

    def keep(self) -> None:
        """Remember weights and moments as they are before the first move of a step."""
        moments = self.optimizer.state
        self.kept = [
            (p, p.detach().clone(), {name: value.clone() for name, value in moments[p].items()} if p in moments else {})
            for p in self.named.values()
        ]

    def forget(self) -> None:
        """The step is whole: what `keep` remembered is not needed any more."""
        self.kept = []

    @torch.no_grad()
    def take_back(self) -> None:
        """Set weights and moments to what `keep` remembered in this step, if anything."""
        for parameter, weight, moments in self.kept:
            parameter.copy_(weight)
            if not moments:
                self.optimizer.state.pop(parameter, None)
            for name, value in moments.items():
                self.optimizer.state[parameter][name].copy_(value)
        self.forget()

    def moments(self) -> dict[str, Tensor]:
        """The optimizer's tensors as "<which>/<parameter>"."""
        state = self.optimizer.state
        return {f"{key}/{name}": value for name, p in self.named.items() for key, value in state[p].items()}

    def set_moments(self, moments: dict[str, Tensor]) -> None:
        """The reverse of `moments`. Raises KeyError or ValueError for tensors of another player."""
        expected = {f"{key}/{name}" for name in self.named for key in ("step", "exp_avg", "exp_avg_sq")}
        if moments and set(moments) != expected:
            raise KeyError("the optimizer's tensors have other names")
        for full, value in moments.items():
            key, name = full.split("/", 1)
            parameter = self.named[name]
            if key != "step" and value.shape != parameter.shape:
                raise ValueError(f"the optimizer's {full} has another shape")
            # in the parameter's own memory layout: the fused step walks both as plain memory
            own = value if key == "step" else torch.empty_like(parameter).copy_(value)
            self.optimizer.state[parameter][key] = own.detach().to(parameter.device)
