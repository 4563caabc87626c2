"""Dropout whose random numbers cost less than the layer: the twin of nn.Dropout.

torch draws a double for each element on a CPU, which takes as long as the product of a LoRA layer.
Here an element's fate is 16 random bits, four elements to a 64-bit word. They become 0 or 1 where
they are, as numbers of 16 bits: torch turns booleans into floats one at a time, which takes longer
than to draw the bits.
"""

import torch
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """nn.Dropout; on a CPU p is rounded to 1 / 65536, and the scale of what stays fits that p."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p in (0, 1) or not x.is_cpu:
            return super().forward(x)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = words.view(torch.int16)[: x.numel()].view_as(x)  # uniform on [-2^15, 2^15)
        dropped = min(max(1, round(self.p * 2**16)), 2**16 - 1)  # of the 2^16 values
        last = dropped - 2**15 - 1  # the last of those that drop: they become 0, and all above 1
        keep = bits.clamp_(last, last + 1).sub_(last).to(x.dtype)
        return x * keep.mul_(2**16 / (2**16 - dropped))
