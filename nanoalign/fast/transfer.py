"""Numbers of a program on a device: a helper, torch.tensor(..., device=...) without a wait."""

import torch
from torch import Tensor


def to_device(numbers, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """The same tensor, but a GPU fetches it in its own time, from pinned memory. From ordinary
    memory it would be copied at once: the program would wait until the GPU had done all that it was
    given before, and then the GPU for the program."""
    kind = torch.device(device).type
    here = torch.tensor(numbers, dtype=dtype, pin_memory=kind == "cuda")
    # Apple's GPU would read memory that is no longer this tensor's (pytorch/pytorch#189690)
    return here.to(device, non_blocking=kind != "mps")
