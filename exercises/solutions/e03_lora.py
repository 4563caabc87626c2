import torch.nn.functional as F
from torch import nn


def forward(self, x):
    y = self.base_layer(x)
    if not self.enabled:
        return y
    a, b = self.lora_A.weight.to(x.dtype), self.lora_B.weight.to(x.dtype)
    return y + self.scaling * F.linear(F.linear(self.dropout(x), a), b)


def merge(self):
    base, delta = self.base_layer, self.scaling * self.lora_B.weight @ self.lora_A.weight
    merged = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None)
    merged.weight.data = base.weight.data + delta.detach()
    if base.bias is not None:
        merged.bias.data = base.bias.data.clone()
    return merged
