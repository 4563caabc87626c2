"""The twin of nn.Dropout in lora.py. On a CPU its random numbers cost less.

torch draws a double for each element there, and that takes as long as the product of a LoRA layer.
Here 16 random bits decide about an element, so one 64-bit number serves four. The bits are turned
into 0 or 1 in place, as 16-bit integers: turning booleans into floats would be slower.
"""

import torch
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """nn.Dropout. On a CPU p is rounded to a multiple of 1 / 65536, and the scale is 1 / (1 - p)
    for this p."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p in (0, 1) or not x.is_cpu:
            return super().forward(x)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = words.view(torch.int16)[: x.numel()].view_as(x)  # uniform on [-2^15, 2^15)
        dropped = min(max(1, round(self.p * 2**16)), 2**16 - 1)  # so many of 2^16 values drop
        last = dropped - 2**15 - 1  # values up to this one become 0, larger ones become 1
        keep = bits.clamp_(last, last + 1).sub_(last).to(x.dtype)
        return x * keep.mul_(2**16 / (2**16 - dropped))
