"""The twin of logps.token_logps. It never has all logits in memory.

The definition makes an (N, V) matrix of logits, and autograd keeps it. Here the head is applied to
a chunk of positions at a time, and the logits of a chunk are freed before those of the next one.

The usual methods (Cut Cross-Entropy, arXiv 2411.09009; Liger; checkpointing) compute the logits
again in backward. With a frozen head this is not needed. With z = W h and p = softmax(z)

    d (-logp) / d h = (p - onehot(target)) W

Backward multiplies this by one number for each token, and everything else is known in forward. So
forward computes this (N, d) gradient while it has the logits, and backward only scales it. This
takes two matrix products of vocabulary size instead of three. If the head trains, backward computes
each chunk again and adds up the head's gradient.

Between the products there are many elementwise operations. On a GPU each of them would read and
write the chunk in fp32, twenty times in all. So the compiler makes one kernel of them. It reads the
logits in the head's precision and writes the gradient over them.
"""

import math
from dataclasses import replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoalign.fast.flex import has_triton


def token_logps(h: Tensor, head, targets: Tensor, chunk: int | None = None) -> Tensor:
    """logps.token_logps: h (N, d), targets (N,) -> (N,) in nats, fp32. `chunk` positions are
    multiplied with the head at a time; None: as many as chunk_rows says."""
    chunk = chunk or chunk_rows(len(head.weight), h.device)
    return TokenLogps.apply(h, head.weight, head.bias, head.row_weight, targets, head, chunk)


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """How many positions a chunk has. Its logits take the same memory for each vocabulary: on a CPU
    64 MB in fp32."""
    if device.type == "cpu":
        return max(16, 2**24 // vocabulary)
    memory = 0 if device.type == "mps" else math.inf
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    return gpu_rows(vocabulary, memory)


def gpu_rows(vocabulary: int, memory: float) -> int:
    """chunk_rows for a GPU with so many bytes: logits of 256 MB in bf16, or 64 MB on a card with 16
    GB. It is a multiple of 256: a product computes 128 or 256 rows at a time, used or not."""
    logits = 2**25 if memory < 20 * 2**30 else 2**27
    return max(256, logits // vocabulary // 256 * 256)


@torch.no_grad()
def mean_weight(head) -> Tensor | None:
    """The mean row of the head, (d,). The mean of all logits is mean_v(w_v . h) = mean_v(w_v) . h,
    so TRL's metric logits/* needs no logits. None: the head does more than a product."""
    if head.scale != 1.0 or head.softcap is not None or head.bias is not None:
        return None
    return head.weight.mean(0, dtype=torch.float32)


def expression(z, target, scale, softcap, factor):
    """z = h @ weight.T + bias (n, V), target (n, 1) -> log-probs (n,) in fp32, and the gradient
    factor * d (-logp) / dz, written over z. If `factor` is None, there is no gradient.

    The target's logit is found by a sum, since `gather` would be a second kernel before z changes.
    """
    u = scale * z.float()
    if softcap is not None:
        u = softcap * torch.tanh(u / softcap)
    total = u.logsumexp(1, keepdim=True)
    hit = torch.arange(z.shape[1], device=z.device) == target
    logp = torch.where(hit, u, 0.0).sum(1) - total[:, 0]
    if factor is None:
        return logp, None
    dz = (torch.exp(u - total) - hit.float()) * (factor * scale)
    if softcap is not None:
        dz = dz * (1 - (u / softcap) ** 2)
    return logp, z.copy_(dz)


@cache
def one_kernel():
    return torch.compile(expression, dynamic=True)


def in_buffer(buffer, z, target, scale, softcap, factor):
    """`expression` without the compiler, in the first rows of a buffer (chunk, V) in fp32."""
    u = buffer[: len(z)].copy_(z)
    if scale != 1.0:
        u *= scale
    if softcap is not None:
        u.div_(softcap).tanh_().mul_(softcap)
    slope = None if factor is None else factor * scale  # factor * du / dz
    if factor is not None and softcap is not None:
        slope = slope * (1 - (u / softcap) ** 2)
    # In place, but not on Apple's GPU: it may write a number before it has read all others.
    log_softmax = torch.log_softmax(u, 1, out=None if u.is_mps else u)
    logp = log_softmax.gather(1, target)[:, 0]
    if factor is None:
        return logp, None
    dz = log_softmax.exp_()
    dz.scatter_add_(1, target, torch.full_like(target, -1, dtype=dz.dtype))
    if not isinstance(slope, float) or slope != 1.0:
        dz *= slope
    return logp, dz.to(z.dtype)


LONGEST = 32_766


def product(dz: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """out = dz @ weight, (n, V) @ (V, d). On Apple's M1 and M2 a product over more than LONGEST
    numbers is wrong in torch up to 2.13 (pytorch/pytorch#193487). There it is made in parts."""
    if not dz.is_mps:
        return torch.mm(dz, weight, out=out)
    return in_parts(dz, weight, out)


def in_parts(dz, weight, out):
    out.zero_()
    for columns, rows in zip(dz.split(LONGEST, dim=1), weight.split(LONGEST)):
        out.addmm_(columns.contiguous(), rows)
    return out


def way_for(h: Tensor, rows: int, vocabulary: int):
    """The faster way: one_kernel on a GPU with triton, otherwise in_buffer. All chunks share one
    buffer, since on a CPU new memory costs as much time as the softmax."""
    if h.is_cuda and has_triton():
        return one_kernel()
    return partial(in_buffer, h.new_empty(min(rows, len(h)), vocabulary, dtype=torch.float32))


class TokenLogps(torch.autograd.Function):
    """The gradients of token_logps; the top of this file explains them."""

    @staticmethod
    def forward(ctx, h, weight, bias, row_weight, targets, head, chunk):
        bias = None if bias is None else bias.to(h.dtype)
        head = replace(head, weight=weight.to(h.dtype), bias=bias)  # one cast for all chunks
        logps = torch.empty(len(h), dtype=torch.float32, device=h.device)  # (N,)
        need_h, need_weight, need_bias, need_rows = ctx.needs_input_grad[:4]
        head_trains = need_weight or need_bias
        keeps_dh = (need_h or need_rows) and not head_trains
        dh = torch.empty_like(h) if keeps_dh else None
        drows = h.new_empty(len(h), len(head.rows)) if need_rows else None
        score, factor = way_for(h, chunk, len(weight)), 1.0 if keeps_dh else None
        for i in range(0, len(h), chunk):
            part = slice(i, i + chunk)
            z = F.linear(h[part], head.weight, head.bias)  # (n, V)
            logps[part], dz = score(z, targets[part, None], head.scale, head.softcap, factor)
            if keeps_dh:
                product(dz, head.weight, dh[part])
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
        grad = -grad[:, None]  # forward kept the gradient of -logp
        if not ctx.head_trains:
            dh, drows, h = ctx.saved_tensors
            drows = None if drows is None else (drows.float() * grad).T @ h.float()
            return (dh * grad).to(dh.dtype), None, None, drows, None, None, None

        h, targets = ctx.saved_tensors
        head, chunk = ctx.head, ctx.chunk
        dh = torch.empty_like(h)
        dweight = torch.zeros(head.weight.shape, dtype=torch.float32, device=h.device)
        dbias = None if head.bias is None else dweight.new_zeros(len(dweight))
        score = way_for(h, chunk, len(dweight))
        for i in range(0, len(h), chunk):
            part = slice(i, i + chunk)
            z = F.linear(h[part], head.weight, head.bias)
            _, dz = score(z, targets[part, None], head.scale, head.softcap, grad[part])  # (n, V)
            if dbias is not None:
                dbias += dz.sum(0, dtype=torch.float32)
            product(dz, head.weight, dh[part])
            dweight += dz.T @ h[part]
        return dh, dweight, dbias, None, None, None, None
