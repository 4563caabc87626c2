"""Packed row -> hidden states -> log-probs of the trained tokens.

Every loss of this package is a function of log pi(y | x), the sum over a reply's tokens of

    log p(token) = logits[token] - logsumexp(logits),    logits = h W'

where h is the hidden state of the token before and W the output head. `token_logps` is that line.
It makes logits for each trained token, and with a vocabulary of 150,000 they outweigh the model:
those of 8 texts of 1,024 tokens are 5 GB in fp32, and a plain cross-entropy holds them three times.
So only positions that predict a trained token meet the head, and prompts cost nothing. And training
runs the twin in fast/head.py, which takes a chunk of positions at a time and keeps no logits.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoalign.fast import head as fast  # token_logps without the logits
from nanoalign.fast.head import mean_weight  # for the metric logits/*
from nanoalign.lora import TokenRows
from nanoalign.packing import Example, Row, pack, to_device


@dataclass
class Head:
    """Hidden states -> logits: z = scale * (h @ weight.T + bias), then cap * tanh(z / cap). `rows`
    are tokens (two new ChatML markers, say) that train in a head whose rest is frozen: `row_weight`
    is the parameter, and `weight[rows]` holds its present values."""

    weight: Tensor  # (V, d)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    softcap: float | None = None
    rows: Tensor | None = None  # (k,) token ids
    row_weight: Tensor | None = None  # (k, d)

    def logits(self, h: Tensor) -> Tensor:
        """(N, d) -> (N, V) in fp32; the product is computed in h's dtype."""
        weight = self.weight
        if self.rows is not None:
            weight = weight.index_copy(0, self.rows, self.row_weight.to(weight.dtype))
        bias = None if self.bias is None else self.bias.to(h.dtype)
        z = self.scale * F.linear(h, weight.to(h.dtype), bias).float()
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


def token_logps(h: Tensor, head: Head, targets: Tensor) -> Tensor:
    """log p(target) in nats, by definition: h (N, d), targets (N,) -> (N,)."""
    return head.logits(h).log_softmax(-1).gather(1, targets[:, None])[:, 0]


@dataclass
class Scores:
    """What a loss may need of C completions."""

    logps: Tensor  # (C,) sum of the trained tokens' log-probs, in nats, fp32, with gradient
    tokens: list[int]  # C numbers of trained tokens
    logits: Tensor | None = None  # (C,) sums over trained tokens of the mean logit: a metric

    @property
    def lengths(self) -> Tensor:  # (C,)
        return to_device(self.tokens, self.logps.device, torch.float32)

    def take(self, index: list[int]) -> "Scores":
        """The scores of some of the completions."""
        at = to_device(index, self.logps.device, torch.int64)
        logits = None if self.logits is None else self.logits[at]
        return Scores(self.logps[at], [self.tokens[i] for i in index], logits)


class PackedLM(nn.Module):
    """A causal language model of transformers as a function: examples -> scores of completions.
    `scale` and `softcap` say what its head does beyond a product. `autocast` is the dtype of
    products where it is not that of the weights (full fine-tuning: fp32 weights, bf16 products)."""

    def __init__(self, model: nn.Module, scale=1.0, softcap: float | None = None, autocast=None):
        super().__init__()
        self.model, self.scale, self.softcap, self.autocast = model, scale, softcap, autocast
        self.mean_weight = None
        self.longest_row = None  # tokens that fit in memory, where a run has settled that
        self.windows = {None, model.config.to_dict().get("sliding_window")}

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    def head(self) -> Head:
        layer = self.model.get_output_embeddings()
        rows = (layer.rows, layer.row_weight) if isinstance(layer, TokenRows) else ()
        return Head(layer.weight, layer.bias, self.scale, self.softcap, *rows)

    def forward(self, examples: list[Example], neftune_alpha: float = 0.0) -> Scores:
        """Scores of all completions, in the order in which `examples` list them."""
        row = pack(examples, self.device, self.windows)
        h = self.hidden(row, neftune_alpha).index_select(0, row.predictors)  # (N, d)
        head, zeros = self.head(), torch.zeros(len(row.trained), device=h.device)
        logps = zeros.index_add(0, row.completion, fast.token_logps(h, head, row.targets))
        if head.rows is not None or head.weight.requires_grad or self.mean_weight is None:
            self.mean_weight = mean_weight(head)  # (d,); of a frozen head it is computed once
        if self.mean_weight is None:
            return Scores(logps, row.trained)
        mean_logits = h.detach().float() @ self.mean_weight  # (N,)
        return Scores(logps, row.trained, zeros.index_add(0, row.completion, mean_logits))

    def hidden(self, row: Row, neftune_alpha: float = 0.0) -> Tensor:
        """The decoder's last hidden states, (T, d): where a reward or value head would begin.

        In training mode neftune_alpha > 0 adds noise to the embeddings (NEFTune, Jain et al. 2023,
        arXiv 2310.05914), uniform within alpha / sqrt(L d). L: tokens of the token's longest text.
        """
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
