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

What lies between those products is elementwise but for one sum, and there a GPU only waits for its
memory: step by step in fp32 each chunk would travel twenty times. A compiler makes one kernel of
it, which reads the logits in the head's own precision and writes the gradient in their place.
"""

import math
from dataclasses import replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoalign.fast.flex import has_triton


def token_logps(h: Tensor, head, targets: Tensor, chunk: int | None = None) -> Tensor:
    """As logps.token_logps: h (N, d), targets (N,) -> (N,) in nats, fp32.

    `chunk` rows of h are multiplied with the head at a time; None: as many as chunk_rows says.
    """
    chunk = chunk or chunk_rows(len(head.weight), h.device)
    return TokenLogps.apply(h, head.weight, head.bias, head.row_weight, targets, head, chunk)


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """So many rows that their logits take the same memory whatever the vocabulary: on a CPU 64 MB
    in fp32."""
    if device.type == "cpu":
        return max(16, 2**24 // vocabulary)
    memory = 0 if device.type == "mps" else math.inf
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    return gpu_rows(vocabulary, memory)


def gpu_rows(vocabulary: int, memory: float) -> int:
    """Of a GPU with so many bytes: 256 MB in bf16, or 64 where 16 GB are all there is. A product
    works in tiles of 128 or 256 rows, and one that is not full takes as long as one that is."""
    logits = 2**25 if memory < 20 * 2**30 else 2**27
    return max(256, logits // vocabulary // 256 * 256)


@torch.no_grad()
def mean_weight(head) -> Tensor | None:
    """The mean over the vocabulary is linear: mean_v(w_v . h) = mean_v(w_v) . h. So TRL's metric
    logits/* takes one vector (d,) and no logits; None where a head does more than a product."""
    if head.scale != 1.0 or head.softcap is not None or head.bias is not None:
        return None
    return head.weight.mean(0, dtype=torch.float32)


def expression(z, target, scale, softcap, factor):
    """z = h @ weight.T + bias (n, V) -> log-probs of `target` (n, 1), as (n,) in fp32, and
    factor * d (-logp) / dz in the place of z; with a factor of None only the log-probs.

    A sum finds the target's logit: to gather it would need a second kernel, before z is changed.
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
    """As `expression`, step by step in the first rows of a buffer (chunk, V) in fp32."""
    u = buffer[: len(z)].copy_(z)
    if scale != 1.0:
        u *= scale
    if softcap is not None:
        u.div_(softcap).tanh_().mul_(softcap)
    slope = None if factor is None else factor * scale  # dz / du, times the factor
    if factor is not None and softcap is not None:
        slope = slope * (1 - (u / softcap) ** 2)
    # in place, but for Apple's GPU, of which nobody says that it reads all before it writes
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
    """out = dz @ weight, (n, V) @ (V, d). In torch up to 2.13 a product on Apple's M1 or M2 that
    sums more than LONGEST numbers is wrong (pytorch/pytorch#193487), so there it is made in parts
    of the vocabulary."""
    if not dz.is_mps:
        return torch.mm(dz, weight, out=out)
    return in_parts(dz, weight, out)


def in_parts(dz, weight, out):
    out.zero_()
    for columns, rows in zip(dz.split(LONGEST, dim=1), weight.split(LONGEST)):
        out.addmm_(columns.contiguous(), rows)
    return out


def way_for(h: Tensor, rows: int, vocabulary: int):
    """The quicker of the two: one kernel on a GPU that has a compiler, else steps, all chunks in
    one buffer. (On a CPU, touching new memory costs as much as the softmax.)"""
    if h.is_cuda and has_triton():
        return one_kernel()
    return partial(in_buffer, h.new_empty(min(rows, len(h)), vocabulary, dtype=torch.float32))


class TokenLogps(torch.autograd.Function):
    """See the top of this file."""

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
        how, score = (head.scale, head.softcap), way_for(h, chunk, len(weight))
        for i in range(0, len(h), chunk):
            part = slice(i, i + chunk)
            z = F.linear(h[part], head.weight, head.bias)  # (n, V)
            logps[part], dz = score(z, targets[part, None], *how, 1.0 if keeps_dh else None)
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
        how, score = (head.scale, head.softcap), way_for(h, chunk, len(dweight))
        for i in range(0, len(h), chunk):
            part = slice(i, i + chunk)
            z = F.linear(h[part], head.weight, head.bias)
            _, dz = score(z, targets[part, None], *how, grad[part])  # (n, V)
            if dbias is not None:
                dbias += dz.sum(0, dtype=torch.float32)
            product(dz, head.weight, dh[part])
            dweight += dz.T @ h[part]
        return dh, dweight, dbias, None, None, None, None
