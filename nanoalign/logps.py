"""Packed row -> log-probs of the trained tokens, without the logits.

With a vocabulary of 150,000 the logits of one batch outweigh the model: 8 rows of 1,024 tokens in
fp32 are 5 GB, and a plain cross-entropy holds three of them. But a loss needs one number of each
trained token, logits[target] - logsumexp(logits), and nothing at all of prompts. So only positions
that predict a trained token go through the head, a chunk of rows at a time, and a chunk's logits
are gone before the next one's are made: no (tokens, vocabulary) tensor ever exists.

The usual way to get there (Cut Cross-Entropy, arXiv 2411.09009; Liger; checkpointing) computes the
logits a second time in backward. A frozen head does not need that. With p = softmax(z), z = W h,

    d (-logp) / d h = (p - onehot(target)) W

is known in forward but for the factor that arrives in backward, and that is one number a token. So
forward makes this (N, d) gradient while it has the logits at hand, and backward only scales it: two
products of vocabulary size instead of three. A head that trains needs its chunks again in
backward, where its own gradient is accumulated chunk by chunk.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoalign.lora import TokenRows
from nanoalign.packing import Example, pack

LOGITS = {"cpu": 2**24, "gpu": 2**27}  # made at a time: 64 MB and 512 MB in fp32


@dataclass
class Head:
    """Hidden states -> logits: z = scale * (h @ weight.T + bias), then cap * tanh(z / cap).

    `rows` are vocabulary entries (two new ChatML markers, say) whose weights train although the
    rest is frozen: `weight[rows]` holds their present values and `row_weight` is the parameter.
    """

    weight: Tensor  # (V, d)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    softcap: float | None = None
    rows: Tensor | None = None  # (k,) token ids
    row_weight: Tensor | None = None  # (k, d)

    @property
    def plain(self) -> bool:
        return self.scale == 1.0 and self.softcap is None

    def logits(self, h: Tensor, out: Tensor) -> Tensor:
        """(n, d) -> (n, V), into the first rows of `out`; the product itself runs in h's dtype."""
        bias = None if self.bias is None else self.bias.to(h.dtype)
        z = out[: len(h)].copy_(F.linear(h, self.weight.to(h.dtype), bias))
        if self.scale != 1.0:
            z *= self.scale
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z

    def slope(self, z: Tensor) -> Tensor | float:
        """d logits / d (h @ weight.T + bias), where z are the logits."""
        return self.scale if self.softcap is None else self.scale * (1 - (z / self.softcap) ** 2)


def d_nll(logp: Tensor, target: Tensor, slope: Tensor | float) -> Tensor:
    """d (-logp[target]) / d (h @ weight.T + bias) = (softmax - onehot) * slope: in place, (n, V)"""
    dz = logp.exp_()
    dz.scatter_add_(1, target, torch.full_like(target, -1, dtype=dz.dtype))
    return dz if isinstance(slope, float) and slope == 1.0 else dz.mul_(slope)


class _TokenLogps(torch.autograd.Function):
    """logits[target] - logsumexp(logits), chunk by chunk. See the top of this file.

    All chunks use one fp32 buffer: on a CPU, touching new memory costs as much as the softmax.
    """

    @staticmethod
    def forward(ctx, h, weight, bias, row_weight, targets, head, chunk):
        head = replace(head, weight=weight.to(h.dtype))  # one cast for all chunks
        logps = torch.empty(len(h), dtype=torch.float32, device=h.device)  # (N,)
        buffer = torch.empty(min(chunk, len(h)), len(weight), dtype=torch.float32, device=h.device)
        need_h, need_weight, need_bias, need_rows = ctx.needs_input_grad[:4]
        head_trains = need_weight or need_bias
        dh = torch.empty_like(h) if (need_h or need_rows) and not head_trains else None
        drows = h.new_empty(len(h), len(head.rows)) if need_rows else None
        for i in range(0, len(h), chunk):
            part = slice(i, i + chunk)
            z, target = head.logits(h[part], buffer), targets[part, None]
            slope = head.slope(z) if dh is not None else None
            logp = torch.log_softmax(z, 1, out=z)  # (n, V)
            logps[part] = logp.gather(1, target)[:, 0]
            if dh is not None:
                dz = d_nll(logp, target, slope).to(h.dtype)
                torch.mm(dz, head.weight, out=dh[part])
                if need_rows:
                    drows[part] = dz[:, head.rows]
        if head_trains:
            ctx.save_for_backward(h, targets)
        else:
            ctx.save_for_backward(dh, drows, h if need_rows else None)
        ctx.head, ctx.chunk, ctx.head_trains = head, chunk, head_trains
        return logps

    @staticmethod
    def backward(ctx, grad):  # (N,) fp32
        grad = -grad[:, None]  # what is kept is the gradient of -logp
        if not ctx.head_trains:
            dh, drows, h = ctx.saved_tensors
            drows = None if drows is None else (drows.float() * grad).T @ h.float()
            return (dh * grad).to(dh.dtype), None, None, drows, None, None, None

        h, targets = ctx.saved_tensors
        head, chunk = ctx.head, ctx.chunk
        dh = torch.empty_like(h)
        dweight = torch.zeros(head.weight.shape, dtype=torch.float32, device=h.device)
        dbias = None if head.bias is None else dweight.new_zeros(len(dweight))
        buffer = dweight.new_empty(min(chunk, len(h)), len(dweight))
        for i in range(0, len(h), chunk):
            part = slice(i, i + chunk)
            z = head.logits(h[part], buffer)
            slope = head.slope(z)
            dz = d_nll(torch.log_softmax(z, 1, out=z), targets[part, None], slope).mul_(grad[part])
            if dbias is not None:
                dbias += dz.sum(0)
            dz = dz.to(h.dtype)
            torch.mm(dz, head.weight, out=dh[part])
            dweight += dz.T @ h[part]
        return dh, dweight, dbias, None, None, None, None


def token_logps(h: Tensor, head: Head, targets: Tensor, chunk: int | None = None) -> Tensor:
    """log pi(target | what precedes it) in nats, fp32: h (N, d), targets (N,) -> (N,).

    `chunk` rows of h are multiplied with the head at a time: None for so many that their logits
    take the same memory whatever the vocabulary. The product runs in h's dtype, the softmax in
    fp32.
    """
    if chunk is None:
        chunk = max(16, LOGITS["cpu" if h.is_cpu else "gpu"] // len(head.weight))
    return _TokenLogps.apply(h, head.weight, head.bias, head.row_weight, targets, head, chunk)


@dataclass
class Scores:
    """What a loss may want to know of C completions."""

    logps: Tensor  # (C,) sum of the trained tokens' log-probs, in nats, fp32, with gradient
    tokens: list[int]  # numbers of trained tokens
    logits: Tensor | None  # (C,) sum over trained tokens of the mean logit, a metric; or not known

    @property
    def lengths(self) -> Tensor:
        """(C,) tokens, as a tensor."""
        return torch.tensor(self.tokens, dtype=torch.float32, device=self.logps.device)

    def take(self, index: list[int]) -> "Scores":
        """The scores of some of the completions."""
        logits = None if self.logits is None else self.logits[index]
        return Scores(self.logps[index], [self.tokens[i] for i in index], logits)


class PackedLM(nn.Module):
    """A causal language model of transformers as a function: examples -> scores of completions.

    `model` runs under `packed_attention`; `head` says what its head does beyond a product (its
    weights are read from the model at each call). `autocast` is the dtype to compute in where it
    differs from that of the weights (full fine-tuning: fp32 weights, bf16 products).
    """

    def __init__(self, model, scale: float, softcap: float | None, autocast: torch.dtype | None):
        super().__init__()
        self.model, self.scale, self.softcap, self.autocast = model, scale, softcap, autocast
        self.mean_weight = None

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    def head(self) -> Head:
        layer = self.model.get_output_embeddings()
        head = Head(layer.weight, layer.bias, self.scale, self.softcap)
        if isinstance(layer, TokenRows):
            head.rows, head.row_weight = layer.rows, layer.row_weight
        return head

    def forward(self, examples: list[Example], neftune_alpha: float = 0.0) -> Scores:
        """Scores of all completions, in the order in which `examples` list them.

        neftune_alpha > 0 adds noise to the embeddings in training mode (NEFTune, Jain et al. 2023,
        arXiv 2310.05914): uniform within alpha / sqrt(L d), L the length of the token's example.
        """
        row = pack(examples, self.device)
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            embeds = self.model.get_input_embeddings()(row.input_ids[None])  # (1, T, d)
            if neftune_alpha > 0 and self.training:
                lengths = torch.tensor(row.lengths, device=self.device)[row.geometry.example]
                bound = neftune_alpha / (lengths * embeds.shape[2]).sqrt()  # (T,)
                noise = torch.rand_like(embeds, dtype=torch.float32) * 2 - 1
                embeds = embeds + (noise * bound[:, None]).to(embeds.dtype)
            hidden = self.model.get_decoder()(
                inputs_embeds=embeds,
                position_ids=row.geometry.position[None],
                geometry=row.geometry,
                use_cache=False,
            ).last_hidden_state[0]  # (T, d)
        h = hidden.index_select(0, row.predictors)  # (N, d)
        if self.autocast is not None:
            h = h.to(self.autocast)
        head = self.head()
        count = len(row.trained)
        logps = torch.zeros(count, device=h.device)
        logps = logps.index_add(0, row.completion, token_logps(h, head, row.targets))
        logits = self._mean_logits(h.detach(), head, row.completion, count)
        return Scores(logps, row.trained, logits)

    @torch.no_grad()
    def _mean_logits(self, h, head: Head, completion, count: int) -> Tensor | None:
        """The mean over the vocabulary is linear: mean_v(w_v . h) = mean_v(w_v) . h, one vector."""
        if not head.plain or head.bias is not None:
            return None
        frozen = not head.weight.requires_grad and head.rows is None
        if self.mean_weight is None or not frozen:
            self.mean_weight = head.weight.mean(0, dtype=torch.float32)  # (d,)
        return h.new_zeros(count, dtype=torch.float32).index_add(
            0, completion, h.float() @ self.mean_weight
        )
