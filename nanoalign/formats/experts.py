"""A mixture's experts as linear layers, which can be frozen in few bits.

transformers holds all E experts of a layer in two parameters, gate_up_proj (E, 2 I, d) and
down_proj (E, d, I). No linear layer is there to quantize, so bitsandbytes passes over them, and
nine tenths of a Mixtral stay in 16 bits. Here an expert is once more what it is in the files, three
linear layers under the names that they have there (model.layers.0.mlp.experts.3.gate_proj):

    y = (act(x G') * x U') D'        G, U: (I, d)    D: (d, I)

Whatever is done to linear layers is then done to each of them: it is streamed from the files and
quantized by itself, decoded for the tokens that are sent to it and again in backward, and never
kept; and `merge` gives back transformers' own module. All experts of a layer are visited in turn,
so one is decoded at a time: little memory, but more and smaller products than transformers' grouped
one.

LoRA passes over experts, in this form as in transformers': PEFT's files name linear layers of
transformers' model, and there experts are none. So an adapter fits its base in 4 bits and in 16.
"""

import torch
from torch import Tensor, nn

from nanoalign.formats.files import Stored
from nanoalign.lora import plain

# Mixtral's files have kept the names of its first release; transformers renames as it loads.
MIXTRAL = {"block_sparse_moe": "mlp", "w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


class Experts(nn.ModuleList):
    """All experts of a layer: a list of modules, each with gate_proj, up_proj and down_proj."""

    def __init__(self, dense: nn.Module):
        """Of transformers' module, which this one takes the weights of."""
        super().__init__(map(Expert, dense.gate_up_proj.detach(), dense.down_proj.detach()))
        dense.gate_up_proj = dense.down_proj = None
        self.dense = (dense,)  # in a tuple: it has no weights, and is no part of the model

    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, d), and the k experts of each token with their weights, (T, k) -> (T, d).

        The k outputs of a token are added in fp32.
        """
        (dense,), k, chosen = self.dense, top_k_index.shape[1], top_k_index.flatten()  # (T * k,)
        by_expert = chosen.argsort(stable=True).split(chosen.bincount(minlength=len(self)).tolist())
        out = torch.zeros_like(x, dtype=torch.float32)
        for expert, places in zip(self, by_expert):
            if len(places):
                tokens = places // k  # (n,)
                gate, up = expert.gate_proj(x[tokens]), expert.up_proj(x[tokens])  # (n, I)
                y = expert.down_proj(dense._apply_gate(torch.cat([gate, up], -1)))  # (n, d)
                out.index_add_(0, tokens, (y * top_k_weights.flatten()[places, None]).float())
        return out.to(x.dtype)

    def merge(self) -> nn.Module:
        """transformers' own module, dense. It uses this one up."""
        (dense,), pairs = self.dense, [(expert.gate_proj, expert.up_proj) for expert in self]
        gate_up = [torch.cat([plain(layer).weight for layer in pair]) for pair in pairs]
        down = [plain(expert.down_proj).weight for expert in self]
        dense.gate_up_proj = nn.Parameter(torch.stack(gate_up), requires_grad=False)
        dense.down_proj = nn.Parameter(torch.stack(down), requires_grad=False)
        return dense


class Expert(nn.Module):
    """The linear layers of an expert; gate_up (2 I, d) has the weights of two, one on the other."""

    def __init__(self, gate_up: Tensor, down: Tensor):
        super().__init__()
        self.gate_proj, self.up_proj = map(linear, gate_up.chunk(2))
        self.down_proj = linear(down)


def linear(weight: Tensor) -> nn.Linear:
    """The frozen linear layer of a weight (out, in), which is not copied."""
    layer = nn.Linear(*weight.T.shape, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def stacks(model: nn.Module) -> dict[str, nn.Module]:
    """transformers' modules that hold all experts of a layer in two parameters, as above."""
    return {
        name: module
        for name, module in model.named_modules()
        if dict(module.named_parameters(recurse=False)).keys() == {"gate_up_proj", "down_proj"}
        and vars(module).get("is_transposed") is False
    }


def unstack(model: nn.Module) -> None:
    """Make linear layers of a model's experts, in place."""
    for name, module in stacks(model).items():
        model.set_submodule(name, Experts(module))


def outside_experts(model: nn.Module, paths: list[str]) -> list[str]:
    """Those of the modules `paths` that belong to no expert."""
    experts = [f"{name}." for name, module in model.named_modules() if isinstance(module, Experts)]
    return [path for path in paths if not path.startswith(tuple(experts))]


def in_model(stored: dict[str, Stored], model_type: str) -> dict[str, Stored]:
    """Tensors in files, under the names that the model has for them."""
    new = MIXTRAL if model_type == "mixtral" else {}
    return {".".join(new.get(p, p) for p in key.split(".")): at for key, at in stored.items()}
