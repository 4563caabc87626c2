"""AdamW whose states live in the host's memory: the twin of torch.optim.AdamW, with its numbers.

AdamW keeps two numbers of 32 bits for each weight that trains: the running means of its gradient
and of the gradient's square. When all weights train that is half of what a GPU holds before a row
is computed, and it is used once a step. Here both live in the host's memory, pinned, which a GPU
can read by itself; a part of the parameters at a time, their states are copied to the device, torch
makes AdamW's step on them, and they are copied back.

So 16 bytes a weight travel a step, 8 in each direction: for 8 billion weights and a bus of 25 GB/s
that is 5 seconds. It pays where a step has many rows, or where there is no other way to fit.

bitsandbytes' paged AdamW, whose name the flag has, takes memory that CUDA moves page by page when
it is touched, and a kernel of its own. Plain copies need neither, the numbers are those of torch's
AdamW to the last bit, and a run may go on from one with the other.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

PART = 2**26  # weights at a time: 512 MB of states on the device


class AdamW(torch.optim.AdamW):
    """torch's, and under its name, by which a checkpoint knows it; but part by part."""

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
    """The parameters, in parts of at most so many weights; a larger one is a part of its own."""
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
    """A copy; the device makes it meanwhile, where the tensor is pinned."""
    return tensor.to(device, non_blocking=tensor.is_pinned(), copy=True)


def to_host(tensor: Tensor, page: Tensor | None) -> Tensor:
    """Write a tensor back to its page of the host's memory. At first there is none, and after a
    checkpoint was read one that is not pinned."""
    if page is None or page.is_pinned() != tensor.is_cuda:
        page = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return page.copy_(tensor)
