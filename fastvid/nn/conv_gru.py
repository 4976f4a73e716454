"""The convolutional GRU as a module over videos."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvid import ops


class ConvGRU(nn.Module):
    """A GRU whose products are convolutions: one state [C, H, W], moved on by every frame.

    r = sigmoid(Wr * [x; h]), u = sigmoid(Wu * [x; h]), c = activation(Wc * [x; r . h]), h' = u . h + (1 - u) . c. What
    the input adds is computed for all frames at once, what the state adds by fastvid.ops.conv_gru.

    in_channels, hidden_channels: of a frame of x, and of the state. kernel_size: odd; zero-padded to keep the size.
    activation:  of the candidate, "relu" or "tanh". bias: whether the convolutions have one.
    Submodules:  reset, update, candidate: nn.Conv2d(in_channels + hidden_channels, hidden_channels), the input's
                 channels first. Their weights are read at each forward, so parametrizations of them hold.
    Raises:      ValueError for an even kernel or an activation that is not known.
    Source:      Ballas et al. 2016, arXiv:1511.06432, eq. 6 to 9; the ReLU is DVD-GAN's (Clark et al. 2019,
                 arXiv:1907.06571).
    """

    def __init__(
        self, in_channels: int, hidden_channels: int, kernel_size: int = 3, activation: str = "relu",
        bias: bool = True, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"ConvGRU: `kernel_size` must be odd, so that the size stays; got {kernel_size}.")
        if activation not in ("relu", "tanh"):
            raise ValueError(f"ConvGRU: `activation` must be 'relu' or 'tanh', got {activation!r}.")
        self.in_channels, self.hidden_channels = in_channels, hidden_channels
        self.kernel_size, self.activation = kernel_size, activation
        self.reset, self.update, self.candidate = (
            nn.Conv2d(
                in_channels + hidden_channels, hidden_channels, kernel_size, padding=kernel_size // 2, bias=bias,
                device=device, dtype=dtype,
            )
            for _ in range(3)
        )  # fmt: skip

    def forward(self, x: Tensor, hidden: Tensor | None = None, steps: int | None = None) -> Tensor:
        """The state after every frame.

        x:       [B, Cin, T, H, W]; with `steps`, [B, Cin, 1, H, W], the same at every one of so many frames.
        hidden:  [B, C, H, W], the state before the first frame; None for zeros.
        Returns: [B, C, T or steps, H, W], channels last in memory.
        Raises:  ValueError if shapes disagree, or a frame is empty.
        """
        self._check(x, hidden, steps)
        to_gates, weight_gates, weight_candidate = self._weights()
        gates = self._from_input(x, to_gates)  # [B, T or 1, H, W, 3C]
        hidden = None if hidden is None else hidden.movedim(1, -1)
        steps = x.shape[2] if steps is None else steps
        done = ops.conv_gru(gates, hidden, weight_gates, weight_candidate, steps, self.activation)
        return done.states.movedim(-1, 1)

    def step(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        """The next state. x: [B, Cin, H, W]; hidden: [B, C, H, W] or None for zeros -> [B, C, H, W]."""
        return self(x[:, :, None], hidden)[:, :, 0]

    def _weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """The input's weights of all three, [3C, Cin, k, k], and the state's of the gates and of the candidate."""
        split = [self.in_channels, self.hidden_channels]
        from_x, from_h = zip(*(conv.weight.split(split, dim=1) for conv in self._convs()), strict=True)
        return torch.cat(from_x), torch.cat(from_h[:2]), from_h[2]

    def _from_input(self, x: Tensor, weight: Tensor) -> Tensor:
        """What the input adds to the gates, in one convolution. [B, Cin, T, H, W] -> [B, T, H, W, 3C]."""
        bias = None if self.reset.bias is None else torch.cat([conv.bias for conv in self._convs()])
        images = x.movedim(1, -1).flatten(0, 1)  # [B * T, H, W, Cin]
        if self.kernel_size == 3:
            gates = ops.image_conv(images, weight, bias)
        else:
            gates = F.conv2d(images.movedim(-1, 1), weight, bias, padding=self.kernel_size // 2).movedim(1, -1)
        return gates.unflatten(0, (x.shape[0], x.shape[2]))

    def _convs(self) -> tuple[nn.Conv2d, ...]:
        return self.reset, self.update, self.candidate

    def _check(self, x: Tensor, hidden: Tensor | None, steps: int | None) -> None:
        if x.ndim != 5 or x.shape[1] != self.in_channels or 0 in x.shape[2:]:
            raise ValueError(f"ConvGRU: `x` must be [B, {self.in_channels}, T, H, W], got {list(x.shape)}.")
        if steps is not None and (x.shape[2] != 1 or steps < 1):
            raise ValueError(
                f"ConvGRU: `steps` is for one frame that stands for 1 or more; got {steps} steps and {x.shape[2]} "
                f"frames. Leave it out."
            )
        wanted = [x.shape[0], self.hidden_channels, *x.shape[3:]]
        if hidden is not None and [*hidden.shape] != wanted:
            raise ValueError(f"ConvGRU: `hidden` must be {wanted}, got {list(hidden.shape)}.")

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"{self.in_channels}, {self.hidden_channels}, activation={self.activation!r}"
