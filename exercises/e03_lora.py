"""3. LoRA's forward and its merge (lora.py; arXiv 2106.09685)

A frozen layer W learns a change of low rank beside it:

    y = W x + b + scaling * B A x        A: (r, in), B: (out, r), scaling = alpha / r

Merged, the same function is one ordinary layer again, of weight W + scaling * B A.

By hand: W = [[1, 0], [0, 1]], A = [[1, 1]], B = [[2], [0]], scaling 0.5, x = [3, 4].
A x = 7, B A x = [14, 0], so y = [3, 4] + 0.5 * [14, 0] = [10, 4].
The merged weight is [[1, 0], [0, 1]] + 0.5 * [[2, 2], [0, 0]] = [[2, 1], [0, 1]].
"""


def forward(self, x):
    """What the layer computes: x (..., in) -> (..., out).

    self is a LoRALinear: self.base_layer (a linear layer), self.lora_A.weight (r, in),
    self.lora_B.weight (out, r), self.scaling, self.dropout (a module for what A reads), and
    self.enabled: False means that the change is off.

    >>> import torch
    >>> from nanoalign.lora import LoRALinear
    >>> layer = LoRALinear(torch.nn.Linear(2, 2, bias=False), r=1, scaling=0.5)
    >>> _ = layer.base_layer.weight.data.copy_(torch.eye(2))
    >>> _ = layer.lora_A.weight.data.copy_(torch.tensor([[1.0, 1.0]]))
    >>> _ = layer.lora_B.weight.data.copy_(torch.tensor([[2.0], [0.0]]))
    >>> forward(layer, torch.tensor([3.0, 4.0])).tolist()
    [10.0, 4.0]
    """
    raise NotImplementedError


def merge(self):
    """The nn.Linear that a LoRALinear amounts to, with the bias of base_layer if it has one.

    >>> import torch
    >>> from nanoalign.lora import LoRALinear
    >>> layer = LoRALinear(torch.nn.Linear(2, 2, bias=False), r=1, scaling=0.5)
    >>> _ = layer.base_layer.weight.data.copy_(torch.eye(2))
    >>> _ = layer.lora_A.weight.data.copy_(torch.tensor([[1.0, 1.0]]))
    >>> _ = layer.lora_B.weight.data.copy_(torch.tensor([[2.0], [0.0]]))
    >>> merge(layer).weight.tolist()
    [[2.0, 1.0], [0.0, 1.0]]
    """
    raise NotImplementedError
