"""Mixtures of experts: the loss that keeps their experts busy, and experts as linear layers.

Where a dense model has one feed-forward network a layer, a mixture has E, the experts, and a router
that sends each token to the k that it gives the highest probabilities. What is sent to an expert
trains it, and the better it gets, the more is sent to it; left alone, a few experts do all the work
and the others none. So a mixture is trained with a second loss (Switch Transformer, Fedus et al.
2021, arXiv 2101.03961, eq. 4 to 6), which says how uneven the routing is:

    aux = E * sum over the experts e of f_e * P_e

f_e is the share of tokens that go to e (the f_e add up to k), and P_e the mean of e's probability.
aux is k where all experts are equally busy and E where k of them are sure of everything. The
gradient goes through P alone, which is lowered most where f is high.

`balanced` turns any method into one whose loss is loss + router_aux_loss_coef * aux, and which
yields aux as a metric.

**What counts as a token.** aux is that of the row, as it stands: each of its tokens counts once in
each layer, whether it trains or not. There is no padding to leave out. A prompt that chosen and
rejected share is routed once and counts once (the big libraries, which carry it twice, count it
twice), and the last token of a reply, which is not in the row, does not count.

**What is exact.** f_e * P_e is a product of two means, so aux is no sum over tokens: two rows of
four examples have other values than one row of eight. (f of a whole step would be known only after
a forward pass over all of it.) As in transformers, aux belongs to one pass of the model, here to
one row; a step's aux is the mean over its rows, each weighted by what it counts for the loss:
trained tokens (SFT), or examples. So --max_row_tokens, the batch size and the number of processes
change the value of aux; everything else about a step is the same in all splits.

Evaluation gives the method's loss alone, so eval_loss can be compared between coefficients.

**Experts as linear layers.** transformers holds all E experts of a layer in two parameters,
gate_up_proj (E, 2 I, d) and down_proj (E, d, I). No linear layer is there to quantize, so
bitsandbytes passes over them, and nine tenths of a Mixtral stay in 16 bits. Here an expert is once
more what it is in the files, three linear layers under the names that they have there
(model.layers.0.mlp.experts.3.gate_proj):

    y = (act(x G') * x U') D'        G, U: (I, d)    D: (d, I)

Whatever is done to linear layers is then done to each of them: it is streamed from the files and
quantized by itself, decoded for the tokens that are sent to it and again in backward, and never
kept; and `merge` gives back transformers' own module. All experts of a layer are visited in turn,
so one is decoded at a time: little memory, but more and smaller products than transformers' grouped
one.

LoRA passes over experts, in this form as in transformers': PEFT's files name linear layers of
transformers' model, and there experts are none. So an adapter fits its base in 4 bits and in 16.
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
    """What a router of transformers says, (T, E) -> probabilities in fp32.

    Before 5.6 many of its routers gave probabilities under the name of logits, and transformers'
    own loss took their softmax again (huggingface/transformers issue 45120).
    """
    if OLD and bool(((logits.sum(-1) - 1).abs() < 1e-3).all()):
        return logits
    return logits.float().softmax(-1)


@contextmanager
def routing(decoder: nn.Module) -> Iterator[list[Tensor]]:
    """A list to which each pass of the decoder adds its routers' probabilities, one (T, E) a layer.
    A pass without gradient, such as a reference's, is not asked for them."""
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
    """The method with `coef` (None: the model's own) times the load-balancing loss in its loss.

    Where `coef` is 0, or transformers gives the model no such loss, it is the method itself. Some
    mixtures are balanced otherwise (DeepSeek-V3's routers by biases): InputError for a `coef`.
    """
    of_model, kind = vars(model), model.config.model_type  # where transformers looks it up
    own = of_model.get("router_aux_loss_coef", of_model.get("aux_loss_coef"))  # JetMoE's name
    if own is None and coef:
        if {"output_router_logits", "num_experts_per_tok"} & model.config.to_dict().keys():
            fault = f"transformers gives {kind} no load-balancing loss"
            raise InputError(f"--router_aux_loss_coef {coef:g}: {fault}; leave the flag out")
        print("--router_aux_loss_coef has nothing to do in this run: the model shows no routers")
    coef = own if coef is None else coef
    if own is None or not coef:
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


def in_model(stored: dict[str, Stored], model_type: str) -> dict[str, Stored]:
    """Tensors in files, under the names that the model has for them."""
    new = MIXTRAL if model_type == "mixtral" else {}
    return {".".join(new.get(p, p) for p in key.split(".")): at for key, at in stored.items()}
