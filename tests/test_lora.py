"""The change is added into what the base layer has just made, and no number shows it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nanoalign.lora import LoRALinear
from nanoalign.nf4 import NF4Linear


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("four_bits", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_in_place_is_bit_for_bit_the_sum_of_two_branches(dtype, four_bits, bias):
    torch.manual_seed(0)
    base = nn.Linear(96, 128, bias=bias).to(dtype).requires_grad_(False)
    layer = LoRALinear(NF4Linear.from_linear(base) if four_bits else base, r=4, scaling=0.5)
    nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(1, 20, 96, dtype=dtype, requires_grad=True)
    upstream = torch.randn(1, 20, 128, dtype=dtype)
    trained = [x, layer.lora_A.weight, layer.lora_B.weight]

    def apart(x):
        a, b = (m.weight.to(dtype) for m in (layer.lora_A, layer.lora_B))
        return torch.addmm(layer.base_layer(x[0]), F.linear(x[0], a), b.T, alpha=0.5)[None]

    def recomputed(x):
        return checkpoint(layer, x, use_reentrant=False)

    results = []
    for way in (apart, layer, recomputed):
        y = way(x)
        results.append((y, *torch.autograd.grad(y, trained, upstream)))
    for got in results[1:]:
        assert all(map(torch.equal, got, results[0]))
