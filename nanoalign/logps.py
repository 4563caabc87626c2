"""Packed row -> hidden states -> log-probs of the trained tokens.

Every loss of this package is a function of log pi(y | x). It is the sum over the reply's tokens of

    log p(token) = logits[token] - logsumexp(logits),    logits = h W'

where h is the hidden state of the token before, and W is the output head. Logits take much memory:
with a vocabulary of 150,000 those of 8 texts of 1,024 tokens are 5 GB in fp32, and a plain
cross-entropy holds them three times. So they are computed only where the next token trains. And in
training fast/head.py replaces `token_logps`: it computes a chunk of logits at a time.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoalign.fast import head as fast  # `token_logps`, but without all logits in memory
from nanoalign.fast.head import mean_weight  # for the metric logits/*
from nanoalign.lora import TokenRows
from nanoalign.packing import ROW_TOKENS, Example, Row, pack, to_device


@dataclass
class Head:
    """The output head: z = scale * (h @ weight.T + bias), then softcap * tanh(z / softcap). In a
    frozen head a few tokens may train, two new ChatML markers for example. `rows` are their ids,
    `row_weight` is the parameter, and weight[rows] has the same values."""

    weight: Tensor  # (V, d)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    softcap: float | None = None
    rows: Tensor | None = None  # (k,) token ids
    row_weight: Tensor | None = None  # (k, d)

    def logits(self, h: Tensor) -> Tensor:
        """(N, d) -> (N, V) in fp32. The matrix product is in h's dtype."""
        weight = self.weight
        if self.rows is not None:
            weight = weight.index_copy(0, self.rows, self.row_weight.to(weight.dtype))
        bias = None if self.bias is None else self.bias.to(h.dtype)
        z = self.scale * F.linear(h, weight.to(h.dtype), bias).float()
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


def token_logps(h: Tensor, head: Head, targets: Tensor) -> Tensor:
    """log p(target) in nats: h (N, d), targets (N,) -> (N,)."""
    return head.logits(h).log_softmax(-1).gather(1, targets[:, None])[:, 0]


@dataclass
class Scores:
    """The results of a model for C completions."""

    logps: Tensor  # (C,) sums over the trained tokens of log p, in nats, fp32, with gradient
    tokens: list[int]  # how many trained tokens each completion has
    logits: Tensor | None = None  # (C,) sums over the trained tokens of the mean logit: a metric

    @property
    def lengths(self) -> Tensor:  # (C,)
        return to_device(self.tokens, self.logps.device, torch.float32)

    def take(self, index: list[int]) -> "Scores":
        """The scores of the completions in `index`."""
        at = to_device(index, self.logps.device, torch.int64)
        logits = None if self.logits is None else self.logits[at]
        return Scores(self.logps[at], [self.tokens[i] for i in index], logits)


class PackedLM(nn.Module):
    """A causal language model of transformers as a function: examples -> Scores. `scale` and
    `softcap` belong to its Head. `autocast`: compute products in this dtype and not in that of the
    weights. Full fine-tuning has fp32 weights and bf16 products."""

    def __init__(self, model: nn.Module, scale=1.0, softcap: float | None = None, autocast=None):
        super().__init__()
        self.model, self.scale, self.softcap, self.autocast = model, scale, softcap, autocast
        self.mean_weight = None
        self.longest_row = None  # how many tokens of a row fit in memory, if a run has found out
        self.windows = {None, model.config.to_dict().get("sliding_window")}

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def row_tokens(self) -> int:
        """How long a row of training may be."""
        return self.longest_row or ROW_TOKENS["cpu" if self.device.type == "cpu" else "gpu"]

    def head(self) -> Head:
        layer = self.model.get_output_embeddings()
        rows = (layer.rows, layer.row_weight) if isinstance(layer, TokenRows) else ()
        return Head(layer.weight, layer.bias, self.scale, self.softcap, *rows)

    def forward(self, examples: list[Example], neftune_alpha: float = 0.0) -> Scores:
        """The scores of all completions, in the order of `examples`."""
        row = pack(examples, self.device, self.windows)
        h = self.hidden(row, neftune_alpha).index_select(0, row.predictors)  # (N, d)
        head, zeros = self.head(), torch.zeros(len(row.trained), device=h.device)
        logps = zeros.index_add(0, row.completion, fast.token_logps(h, head, row.targets))
        if head.rows is not None or head.weight.requires_grad or self.mean_weight is None:
            self.mean_weight = mean_weight(head)  # (d,), once for a frozen head
        if self.mean_weight is None:
            return Scores(logps, row.trained)
        mean_logits = h.detach().float() @ self.mean_weight  # (N,)
        return Scores(logps, row.trained, zeros.index_add(0, row.completion, mean_logits))

    def hidden(self, row: Row, neftune_alpha: float = 0.0) -> Tensor:
        """The decoder's last hidden states, (T, d). In training, neftune_alpha > 0 adds noise to
        the embeddings (NEFTune, Jain et al. 2023, arXiv 2310.05914). It is uniform within
        alpha / sqrt(L d). L is the length of the token's longest text."""
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            embeds = self.model.get_input_embeddings()(row.input_ids[None])  # (1, T, d)
            if neftune_alpha > 0 and self.training:
                lengths = to_device(row.geometry.longest(), self.device)
                bound = neftune_alpha / (lengths * embeds.shape[2]).sqrt()  # (T,)
                noise = torch.rand_like(embeds, dtype=torch.float32) * 2 - 1
                embeds = embeds + (noise * bound[:, None]).to(embeds.dtype)
            positions = row.geometry.position[None]
            context = dict(position_ids=positions, geometry=row.geometry, use_cache=False)
            hidden = self.model.get_decoder()(inputs_embeds=embeds, **context).last_hidden_state[0]
        return hidden if self.autocast is None else hidden.to(self.autocast)  # (T, d)
