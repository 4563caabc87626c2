"""Log-probs of tokens without their logits: the twin of logps.token_logps.

The definition makes an (N, V) matrix and autograd keeps it. Here the head is applied to a chunk of
rows at a time, and a chunk's logits are gone before the next one's are made.

The usual way to get there (Cut Cross-Entropy, arXiv 2411.09009; Liger; checkpointing) computes the
logits a second time in backward. A frozen head does not need that. With p = softmax(z), z = W h,

    d (-logp) / d h = (p - onehot(target)) W

is known in forward but for the factor that arrives in backward, and that is one number a token. So
forward makes this (N, d) gradient while it has the logits at hand, and backward only scales it: two
products of vocabulary size instead of three. A head that trains needs its chunks again in
backward, where its own gradient is accumulated chunk by chunk.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS = {"cpu": 2**24, "gpu": 2**27}  # made at a time: 64 MB and 512 MB in fp32


def token_logps(h: Tensor, head, targets: Tensor, chunk: int | None = None) -> Tensor:
    """As logps.token_logps: h (N, d), targets (N,) -> (N,) in nats, fp32.

    `chunk` rows of h are multiplied with the head at a time: None for so many that their logits
    take the same memory whatever the vocabulary.
    """
    if chunk is None:
        chunk = max(16, LOGITS["cpu" if h.is_cpu else "gpu"] // len(head.weight))
    return TokenLogps.apply(h, head.weight, head.bias, head.row_weight, targets, head, chunk)


@torch.no_grad()
def mean_weight(head) -> Tensor | None:
    """The mean over the vocabulary is linear: mean_v(w_v . h) = mean_v(w_v) . h. So TRL's metric
    logits/* takes one vector (d,) and no logits; None where a head does more than a product."""
    if head.scale != 1.0 or head.softcap is not None or head.bias is not None:
        return None
    return head.weight.mean(0, dtype=torch.float32)


def logits(head, h: Tensor, out: Tensor) -> Tensor:
    """Head.logits of a chunk, into the first rows of `out`. `weight[rows]` is up to date."""
    bias = None if head.bias is None else head.bias.to(h.dtype)
    z = out[: len(h)].copy_(F.linear(h, head.weight.to(h.dtype), bias))
    if head.scale != 1.0:
        z *= head.scale
    if head.softcap is not None:
        z.div_(head.softcap).tanh_().mul_(head.softcap)
    return z


def slope(head, z: Tensor) -> Tensor | float:
    """d logits / d (h @ weight.T + bias), where z are the logits."""
    return head.scale if head.softcap is None else head.scale * (1 - (z / head.softcap) ** 2)


def d_nll(logp: Tensor, target: Tensor, slope: Tensor | float) -> Tensor:
    """d (-logp[target]) / d (h @ weight.T + bias) = (softmax - onehot) * slope: in place, (n, V)"""
    dz = logp.exp_()
    dz.scatter_add_(1, target, torch.full_like(target, -1, dtype=dz.dtype))
    return dz if isinstance(slope, float) and slope == 1.0 else dz.mul_(slope)


class TokenLogps(torch.autograd.Function):
    """See the top of this file. All chunks use one fp32 buffer: on a CPU, touching new memory
    costs as much as the softmax."""

    @staticmethod
    def forward(ctx, h, weight, bias, row_weight, targets, head, chunk):
        head = replace(head, weight=weight.to(h.dtype))  # one cast for all chunks
        logps = torch.empty(len(h), dtype=torch.float32, device=h.device)  # (N,)
        buffer = logps.new_empty(min(chunk, len(h)), len(weight))
        need_h, need_weight, need_bias, need_rows = ctx.needs_input_grad[:4]
        head_trains = need_weight or need_bias
        dh = torch.empty_like(h) if (need_h or need_rows) and not head_trains else None
        drows = h.new_empty(len(h), len(head.rows)) if need_rows else None
        for i in range(0, len(h), chunk):
            part = slice(i, i + chunk)
            z, target = logits(head, h[part], buffer), targets[part, None]
            dz_du = slope(head, z) if dh is not None else None
            logp = torch.log_softmax(z, 1, out=z)  # (n, V)
            logps[part] = logp.gather(1, target)[:, 0]
            if dh is not None:
                dz = d_nll(logp, target, dz_du).to(h.dtype)
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
            z = logits(head, h[part], buffer)
            dz_du = slope(head, z)
            dz = d_nll(torch.log_softmax(z, 1, out=z), targets[part, None], dz_du).mul_(grad[part])
            if dbias is not None:
                dbias += dz.sum(0)
            dz = dz.to(h.dtype)
            torch.mm(dz, head.weight, out=dh[part])
            dweight += dz.T @ h[part]
        return dh, dweight, dbias, None, None, None, None
