"""Attention over a packed row without a (T, T) matrix: the twin of packing.attention.

The definition computes every query with every key of the row, and throws away what a query may not
see: with 16 examples in a row, 15 sixteenths of the work. On a GPU flex_attention compiles the
predicate into one kernel that skips what nobody sees (flex.py). Elsewhere it is one causal call a
text: what is new in a text attends to what precedes it there, and to itself.
"""

from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoalign.fast import flex


def attention(
    query, key, value, geometry, scaling, window=None, softcap=None, dropout=0.0
) -> Tensor:
    """As packing.attention, and with dropout of the weights (flex_attention has none).

    It is flex_attention where `prepared` has given the row its block masks, and a head is not too
    small for it.
    """
    if geometry.block_masks and min(query.shape[3], value.shape[3]) >= flex.LEAST_HEAD:
        if dropout > 0:
            raise NotImplementedError("flex_attention has no dropout")
        return flex.flex(query, key, value, geometry, scaling, window, softcap)
    return by_run(query, key, value, geometry, scaling, window, softcap, dropout)


def prepared(geometry, windows):
    """The geometry, with what flex_attention asks of it in layers with these windows: made once a
    row and not once a layer, and before them, since a compiled layer could not make it."""
    if flex.has_flex(geometry.position.device):
        for window in windows:
            flex.plan(geometry, window)
    return geometry


# ------------------------------------------------- a CPU, Apple's GPU, and cards that lack flex


# The loops depend on the row, so a compiled layer is compiled around them. (_disable_dynamo is
# torch.compiler.disable, but does not import the compiler before it is needed.)
@getattr(torch, "_disable_dynamo", torch.compiler.disable)
def by_run(query, key, value, geometry, scaling, window, softcap, dropout) -> Tensor:
    depths, lengths = zip(*geometry.runs)
    text, outputs = (), []  # keys and values of the text that was last
    # of split and not of slices: its backward is one concatenation
    for depth, q, k, v in zip(depths, *(x.split(lengths, dim=2) for x in (query, key, value))):
        if depth:  # it begins as that one does
            k, v = (torch.cat([old[:, :, :depth], new], dim=2) for old, new in zip(text, (k, v)))
        text = k, v
        outputs.append(causal(q, k, v, scaling, window, softcap, dropout))
    return torch.cat(outputs, dim=2)  # (1, H, T, D)


SHORT, BLOCK = 1024, 128  # up to SHORT keys plain products win on a CPU: 1.5 to 3 times as fast


def causal(q, k, v, scaling, window, softcap, dropout) -> Tensor:
    """Causal attention of the last q.shape[2] tokens of a sequence of k.shape[2]."""
    queries, keys = q.shape[2], k.shape[2]
    if window is not None and window >= keys:
        window = None
    # Not on Apple's GPU: several releases of torch have a kernel there that is wrong for groups of
    # heads or for tensors with gaps (pytorch/pytorch#174861, #181133).
    if softcap is None and (keys > SHORT or q.is_cuda) and not q.is_mps:
        whole = window is None and queries == keys
        if q.is_cuda:  # of torch's kernels there, those for old cards take no groups of heads
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return F.scaled_dot_product_attention(
            q, k, v,
            attn_mask=None if whole else band(queries, keys, window, q.device),
            is_causal=whole,
            scale=scaling,
            dropout_p=dropout,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
    outputs = []
    for start in range(0, queries, BLOCK):  # a block of queries, and no key that none of it sees
        end = min(start + BLOCK, queries)
        last = keys - queries + end
        first = 0 if window is None else max(0, last - (end - start) - window + 1)
        part = q[:, :, start:end], k[:, :, first:last], v[:, :, first:last]
        outputs.append(dense(*part, scaling, window, softcap, dropout))
    return torch.cat(outputs, dim=2)


def dense(q, k, v, scaling, window, softcap, dropout) -> Tensor:
    """As `causal`, with all scores at once."""
    heads, queries, kv_heads, keys = *q.shape[1:3], *k.shape[1:3]
    groups = heads // kv_heads  # query heads that share a key-value head stand one after the other
    bias = band_bias(queries, keys, window, groups, q.dtype, q.device)
    q = q.reshape(kv_heads, groups * queries, -1)
    if softcap is None:
        scores = torch.baddbmm(bias, q, k[0].transpose(1, 2), alpha=scaling)
    else:
        # scaled before the product, which could overflow in float16
        scores = torch.tanh(q * (scaling / softcap) @ k[0].transpose(1, 2)) * softcap + bias
    weights = F.dropout(scores.softmax(dim=-1), dropout)  # (H_kv, groups * queries, keys)
    return (weights @ v[0]).view(1, heads, queries, -1)


KEPT = 32 * 2**20  # bytes


def kept(make):
    """The masks that `make` made last, for the next layer and row: as many as fit into KEPT bytes.
    A number of masks would be no limit: 64 of 4,096 x 4,096 are a gigabyte."""
    masks, size = {}, 0

    @wraps(make)
    def kept_or_made(*key):
        nonlocal size
        mask = masks.pop(key, None)
        if mask is None:
            mask = make(*key)
            size += mask.nbytes
        masks[key] = mask  # last in the order of use
        while size > KEPT:
            size -= masks.pop(next(iter(masks))).nbytes
        return mask

    return kept_or_made


@kept
def band(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """(queries, keys) bool: causal from the lower right corner, at most `window` wide."""
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return mask if window is None else mask.triu(keys - queries - window + 1)


@kept
def band_bias(queries, keys, window, groups, dtype, device) -> Tensor:
    """(1, groups * queries, keys): 0 where the band is, -inf elsewhere, for each group."""
    mask = band(queries, keys, window, device).repeat(groups, 1)
    return torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill_(~mask, -torch.inf)[None]
