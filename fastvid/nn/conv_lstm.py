"""The convolutional LSTM as a module over videos."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

State = tuple[Tensor, Tensor]  # h, c: both [B, C, H, W]


class ConvLSTM(nn.Module):
    """An LSTM whose products are convolutions, without the Hadamard terms (peepholes) of the paper.

    i, f, o = sigmoid(W * [x; h]), g = tanh(W * [x; h]), c' = f . c + i . g, h' = o . tanh(c'). What the input adds is
    computed for all frames at once.

    in_channels, hidden_channels: of a frame of x, and of the states. kernel_size: odd; zero-padded to keep the size.
    bias:       whether the convolution has one.
    Submodules: gates, one nn.Conv2d(in_channels + hidden_channels, 4 * hidden_channels), the input's channels first,
                its outputs i, f, g, o. Its weight is read at each forward, so a parametrization of it holds.
    Raises:     ValueError for an even kernel.
    Source:     Shi et al. 2015, arXiv:1506.04214, eq. 3, without the Hadamard terms.
    """

    def __init__(
        self, in_channels: int, hidden_channels: int, kernel_size: int = 3, bias: bool = True, device=None, dtype=None
    ):
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"ConvLSTM: `kernel_size` must be odd, so that the size stays; got {kernel_size}.")
        self.in_channels, self.hidden_channels, self.kernel_size = in_channels, hidden_channels, kernel_size
        self.gates = nn.Conv2d(
            in_channels + hidden_channels, 4 * hidden_channels, kernel_size, padding=kernel_size // 2, bias=bias,
            device=device, dtype=dtype,
        )  # fmt: skip

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """The state h after every frame, and both states after the last.

        x:       [B, Cin, T, H, W]. state: h and c before the first frame, each [B, C, H, W]; None for zeros.
        Returns: h [B, C, T, H, W], channels last in memory, and (h, c) of the last frame, each [B, C, H, W].
        Raises:  ValueError if shapes disagree.
        """
        self._check(x, state)
        from_x, from_h = self.gates.weight.split([self.in_channels, self.hidden_channels], dim=1)
        padding = self.kernel_size // 2
        images = x.movedim(1, -1).flatten(0, 1).movedim(-1, 1)  # [B * T, Cin, H, W], channels last in memory if x is
        given = F.conv2d(images, from_x, self.gates.bias, padding=padding).unflatten(0, (x.shape[0], x.shape[2]))
        zeros = given.new_zeros(x.shape[0], self.hidden_channels, *x.shape[3:])
        h, c = (zeros, zeros) if state is None else state
        states = []
        for frame in given.unbind(1):
            i, f, g, o = (frame + F.conv2d(h, from_h, padding=padding)).chunk(4, dim=1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            states.append(h)
        whole = torch.stack([h.movedim(1, -1) for h in states], dim=1).movedim(-1, 1)
        return whole, (h, c)

    def step(self, x: Tensor, state: State | None = None) -> State:
        """The next h and c. x: [B, Cin, H, W]; state: h and c before it, each [B, C, H, W], or None for zeros."""
        return self(x[:, :, None], state)[1]

    def _check(self, x: Tensor, state: State | None) -> None:
        if x.ndim != 5 or x.shape[1] != self.in_channels or x.shape[2] < 1:
            raise ValueError(f"ConvLSTM: `x` must be [B, {self.in_channels}, T, H, W], got {list(x.shape)}.")
        wanted = [x.shape[0], self.hidden_channels, *x.shape[3:]]
        if state is not None and any([*tensor.shape] != wanted for tensor in state):
            told = " and ".join(str(list(tensor.shape)) for tensor in state)
            raise ValueError(f"ConvLSTM: `state` must be h and c, each {wanted}, got {told}.")

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"{self.in_channels}, {self.hidden_channels}"
