"""The load-balancing loss of a mixture of experts: its tokens should not all go to the same few.

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
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers
from torch import Tensor, nn

from nanoalign import InputError
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
