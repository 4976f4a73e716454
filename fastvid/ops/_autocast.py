"""What autocast does to an op's arguments."""

import torch
from torch import Tensor


def autocast(x: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in autocast's dtype where that is on: it leaves float64 alone, as it does in torch."""
    device = x.device.type
    known = torch.amp.is_autocast_available(device)  # meta tensors know no autocast
    if not known or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x, *others
    dtype = torch.get_autocast_dtype(device)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in (x, *others))
