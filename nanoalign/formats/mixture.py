"""Mixtures of experts: the loss that keeps all experts busy, and experts as linear layers.

**The loss.** A dense model has one feed-forward network a layer. A mixture has E of them, the
experts, and a router that sends each token to the k experts to which it gives the highest
probabilities. An expert learns from the tokens that it gets, and the better it is, the more it
gets; left alone, a few experts do all the work. So a second loss says how uneven the routing is
(Switch Transformer, Fedus et al. 2021, arXiv 2101.03961, eq. 4 to 6):

    aux = E * sum over the experts e of f_e * P_e

f_e is the share of tokens that go to e (the f_e add up to k), and P_e the mean of e's probability.
aux is k if all experts are equally busy, and E if all tokens go to the same k with certainty. Its
gradient goes through P alone, and lowers it most where f is high.

Every token of a packed row counts once in each layer, whether it trains or not. A prompt that
chosen and rejected share counts once; the big libraries carry and count it twice. f_e * P_e is a
product of two means, so aux is no sum over tokens: two rows of four examples give another value
than one row of eight. As in transformers, each pass of the model (here each row) has its aux. That
of a step is their mean, weighted by a row's count in the loss. So --max_row_tokens, the batch size
and the number of processes change the value of aux, and nothing else. Evaluation leaves it out, so
that eval_loss can be compared between coefficients.

**Experts as linear layers.** transformers holds all experts of a layer in two parameters,
gate_up_proj (E, 2 I, d) and down_proj (E, d, I). bitsandbytes quantizes linear layers only, so nine
tenths of a Mixtral stay in 16 bits there. Here an expert is three linear layers, under their names
in the files (model.layers.0.mlp.experts.3.gate_proj):

    y = (act(x G') * x U') D'        G, U: (I, d)    D: (d, I)

So each is streamed from the files and quantized like any linear layer, and decoded for the tokens
that are sent to it, again in backward. Only one expert is decoded at a time. That takes little
memory, and more and smaller products than transformers' grouped one. `merge` makes transformers'
module again.

LoRA leaves experts out, in this form and in transformers'. PEFT's files name linear layers of
transformers' model, where experts are none; so an adapter fits its base in 4 bits and in 16.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers
from torch import Tensor, nn

from nanoalign import InputError
from nanoalign.formats.files import Stored
from nanoalign.lora import plain
from nanoalign.train import Batches, Method, Sums

OLD = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 6)


def load_balancing_loss(probabilities: list[Tensor], top_k: int) -> Tensor:
    """aux, as above, over the tokens of all layers together: (T, E) a layer -> ()."""
    p = torch.cat(probabilities)  # (layers * T, E)
    sent = torch.zeros_like(p).scatter(1, p.topk(top_k).indices, 1.0)  # 1 where a token went
    return p.shape[1] * (sent.mean(0) * p.mean(0)).sum()


def to_probabilities(logits: Tensor) -> Tensor:
    """The "logits" of a router of transformers, (T, E) -> probabilities in fp32. Before 5.6 many
    routers named probabilities so, and transformers' loss took the softmax of these
    (huggingface/transformers issue 45120)."""
    if OLD and bool(((logits.sum(-1) - 1).abs() < 1e-3).all()):
        return logits
    return logits.float().softmax(-1)


@contextmanager
def routing(decoder: nn.Module) -> Iterator[list[Tensor]]:
    """A list to which each pass of the decoder appends its routers' probabilities, one (T, E) a
    layer. A pass without gradient (a reference's, say) appends nothing."""
    seen: list[Tensor] = []

    def ask(module, args, kwargs):
        return args, {**kwargs, "output_router_logits": torch.is_grad_enabled()}

    def keep(module, args, output):
        seen.extend(map(to_probabilities, output.router_logits or ()))

    hooks = decoder.register_forward_pre_hook(ask, with_kwargs=True)
    hooks = hooks, decoder.register_forward_hook(keep)
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def balanced(method: Method, model: nn.Module, coef: float | None) -> Method:
    """The method, with `coef` times the load-balancing loss in its loss, and the metric aux_loss.
    None is the model's own coefficient. The method stays as it is if the coefficient is 0, or if
    transformers has no such loss for the model. InputError if the flag then asks for one: some
    mixtures are balanced otherwise (DeepSeek-V3's routers by biases)."""
    of_model, kind = vars(model), model.config.model_type  # where transformers looks it up
    default = of_model.get("router_aux_loss_coef", of_model.get("aux_loss_coef"))  # JetMoE's name
    if default is None and coef:
        if {"output_router_logits", "num_experts_per_tok"} & model.config.to_dict().keys():
            fault = f"transformers gives {kind} no load-balancing loss"
            raise InputError(f"--router_aux_loss_coef {coef:g}: {fault}; leave the flag out")
        print("--router_aux_loss_coef has nothing to do in this run: the model shows no routers")
    coef = default if coef is None else coef
    if default is None or not coef:
        return method
    print(f"the loss has {coef:g} times the routers' load-balancing loss in it")

    def with_aux(batches: Batches) -> Iterator[Sums]:
        with routing(model.get_decoder()) as seen:
            for sums in method(batches):
                if seen:
                    aux = load_balancing_loss(seen, of_model["num_experts_per_tok"])
                    loss, count = sums["loss"]
                    sums |= {
                        "loss": (loss + coef * aux * count, count),
                        "aux_loss": (aux.detach() * count, count),
                    }
                    seen.clear()
                yield sums

    return with_aux


# Mixtral's files have the names of its first release; transformers renames them as it loads.
MIXTRAL = {"block_sparse_moe": "mlp", "w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


class Experts(nn.ModuleList):
    """The experts of a layer: modules with gate_proj, up_proj and down_proj. They take over the
    weights of `dense`, transformers' module."""

    def __init__(self, dense: nn.Module):
        super().__init__(map(Expert, dense.gate_up_proj.detach(), dense.down_proj.detach()))
        dense.gate_up_proj = dense.down_proj = None
        self.dense = (dense,)  # in a tuple, so that it is no submodule

    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """x (T, d), each token's k experts and their weights (T, k) -> (T, d). The k outputs of a
        token are added in fp32."""
        (dense,), k, chosen = self.dense, top_k_index.shape[1], top_k_index.flatten()  # (T * k,)
        by_expert = chosen.argsort(stable=True).split(chosen.bincount(minlength=len(self)).tolist())
        out = torch.zeros_like(x, dtype=torch.float32)
        for expert, slots in zip(self, by_expert):
            if len(slots):
                tokens = slots // k  # (n,)
                gate, up = expert.gate_proj(x[tokens]), expert.up_proj(x[tokens])  # (n, I)
                y = expert.down_proj(dense._apply_gate(torch.cat([gate, up], -1)))  # (n, d)
                out.index_add_(0, tokens, (y * top_k_weights.flatten()[slots, None]).float())
        return out.to(x.dtype)

    def merge(self) -> nn.Module:
        """transformers' module, dense. This one can't be used any more."""
        (dense,), pairs = self.dense, [(expert.gate_proj, expert.up_proj) for expert in self]
        gate_up = [torch.cat([plain(layer).weight for layer in pair]) for pair in pairs]
        down = [plain(expert.down_proj).weight for expert in self]
        dense.gate_up_proj = nn.Parameter(torch.stack(gate_up), requires_grad=False)
        dense.down_proj = nn.Parameter(torch.stack(down), requires_grad=False)
        return dense


class Expert(nn.Module):
    """The linear layers of an expert; gate_up (2 I, d) holds the weights of the first two."""

    def __init__(self, gate_up: Tensor, down: Tensor):
        super().__init__()
        self.gate_proj, self.up_proj = map(linear, gate_up.chunk(2))
        self.down_proj = linear(down)


def linear(weight: Tensor) -> nn.Linear:
    """The frozen linear layer of a weight (out, in), which is not copied."""
    layer = nn.Linear(*weight.T.shape, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def unstack(model: nn.Module) -> None:
    """Turn a model's experts into linear layers, in place."""
    for name, module in list(model.named_modules()):
        parameters = dict(module.named_parameters(recurse=False))
        stacked = parameters.keys() == {"gate_up_proj", "down_proj"}  # all experts of a layer
        if stacked and vars(module).get("is_transposed") is False:
            model.set_submodule(name, Experts(module))


def in_model(stored: dict[str, Stored], model_type: str) -> dict[str, Stored]:
    """Tensors in files by their names in the model."""
    new = MIXTRAL if model_type == "mixtral" else {}
    return {".".join(new.get(p, p) for p in key.split(".")): at for key, at in stored.items()}
