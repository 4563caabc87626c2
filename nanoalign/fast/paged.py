"""The twin of torch.optim.AdamW in train.py. Its states are in the host's memory, not on the GPU.

AdamW keeps two fp32 numbers for each trained weight: the running means of its gradient and of the
gradient's square. If all weights train, these are half of a GPU's memory before a row is computed,
and they are used once a step. Here they are in pinned memory of the host. The states of a part of
the parameters are copied to the GPU, torch computes AdamW's step, and they are copied back.

Each step copies 16 bytes for a weight, 8 in each direction. For 8 billion weights and a bus of 25
GB/s this takes 5 seconds. So it is for steps of many rows, or for models that fit in no other way.

The flag has the name of bitsandbytes' paged AdamW, which uses memory that CUDA moves page by page,
and another kernel. Here all bits are those of torch's AdamW, and a run may be resumed with either.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

PART = 2**26  # weights at a time: their states take 512 MB on the GPU


class AdamW(torch.optim.AdamW):
    """torch's AdamW, part by part. It has the same name, since a checkpoint stores the name."""

    @torch.no_grad()
    def step(self) -> None:
        groups = self.param_groups
        for group in groups:
            for part in parts([p for p in group["params"] if p.grad is not None], PART):
                hosted = [self.state[p] for p in part]
                for p, state in zip(part, hosted):
                    self.state[p] = {key: to_device(t, p.device) for key, t in state.items()}
                self.param_groups = [{**group, "params": part}]
                super().step()
                for p, state in zip(part, hosted):
                    pages = {key: to_host(t, state.get(key)) for key, t in self.state[p].items()}
                    self.state[p] = pages
        self.param_groups = groups


def parts(parameters: list[nn.Parameter], weights: int) -> Iterator[list[nn.Parameter]]:
    """The parameters in parts of at most `weights` weights. A larger parameter is one part."""
    part, room = [], weights
    for p in parameters:
        if part and p.numel() > room:
            yield part
            part, room = [], weights
        part.append(p)
        room -= p.numel()
    if part:
        yield part


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device. If the tensor is pinned, the program does not wait for it."""
    return tensor.to(device, non_blocking=tensor.is_pinned(), copy=True)


def to_host(tensor: Tensor, page: Tensor | None) -> Tensor:
    """Copy a tensor back to its page in the host's memory. At the first step there is no page, and
    after a checkpoint was read it is not pinned: then a new one is made."""
    if page is None or page.is_pinned() != tensor.is_cuda:
        page = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return page.copy_(tensor)
