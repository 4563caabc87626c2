"""A helper of packing.py: torch.tensor(values, device=...) that does not wait for a GPU."""

import torch
from torch import Tensor


def to_device(values, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on the device. A GPU copies it from pinned memory when it gets there. Copied from
    ordinary memory, the program would wait until the GPU has finished all its earlier work."""
    kind = torch.device(device).type
    on_cpu = torch.tensor(values, dtype=dtype, pin_memory=kind == "cuda")
    # not on Apple's GPU: it may read this memory after it was freed (pytorch/pytorch#189690)
    return on_cpu.to(device, non_blocking=kind != "mps")
