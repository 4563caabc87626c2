"""The twin of packing.attention. It makes no (T, T) matrix, and skips keys that a query can't see.

The definition multiplies every query with every key of the row and drops most results: with 16
examples in a row, 15 sixteenths of the work. On a GPU flex_attention makes one kernel that skips
them (flex.py). Elsewhere there is one causal attention for each text: its new tokens attend to
themselves and to the tokens before them in the text.
"""

from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoalign.fast import flex


def attention(
    query, key, value, geometry, scaling, window=None, softcap=None, dropout=0.0
) -> Tensor:
    """packing.attention, also with dropout of the attention weights (not in flex_attention).

    flex_attention is used if `prepared` has made block masks and the heads are large enough.
    """
    if geometry.block_masks and min(query.shape[3], value.shape[3]) >= flex.LEAST_HEAD:
        if dropout > 0:
            raise NotImplementedError("flex_attention has no dropout")
        return flex.flex(query, key, value, geometry, scaling, window, softcap)
    return by_run(query, key, value, geometry, scaling, window, softcap, dropout)


def prepared(geometry, windows):
    """The geometry, with flex_attention's block masks for these windows where it is used. They are
    made here, once for each row, since a compiled layer could not make them."""
    if flex.has_flex(geometry.position.device):
        for window in windows:
            flex.plan(geometry, window)
    return geometry


# ------------------------------------------------- a CPU, Apple's GPU, and cards that lack flex


# Not compiled: the loops differ from row to row, and each row would be compiled anew.
# _disable_dynamo is torch.compiler.disable, but does not import the slow compiler now.
@getattr(torch, "_disable_dynamo", torch.compiler.disable)
def by_run(query, key, value, geometry, scaling, window, softcap, dropout) -> Tensor:
    """Attention text by text; arguments and result as in packing.attention."""
    depths, lengths = zip(*geometry.runs)
    text, outputs = (), []  # keys and values of the last text
    # split and not slices: the backward of split is one concatenation
    for depth, q, k, v in zip(depths, *(x.split(lengths, dim=2) for x in (query, key, value))):
        if depth:  # this text shares its first `depth` tokens with the last one
            k, v = (torch.cat([old[:, :, :depth], new], dim=2) for old, new in zip(text, (k, v)))
        text = k, v
        outputs.append(causal(q, k, v, scaling, window, softcap, dropout))
    return torch.cat(outputs, dim=2)  # (1, H, T, D)


# up to SHORT keys plain products are 1.5 to 3 times as fast as torch's kernel on a CPU
SHORT, BLOCK = 1024, 128


def causal(q, k, v, scaling, window, softcap, dropout) -> Tensor:
    """Causal attention for the last q.shape[2] tokens of a sequence with k.shape[2] tokens."""
    queries, keys = q.shape[2], k.shape[2]
    if window is not None and window >= keys:
        window = None
    # Not on Apple's GPU: in several releases of torch its kernel is wrong for grouped heads or
    # for tensors with gaps (pytorch/pytorch#174861, #181133).
    if softcap is None and (keys > SHORT or q.is_cuda) and not q.is_mps:
        is_causal = window is None and queries == keys
        if q.is_cuda:  # torch's kernels for old cards do not take grouped heads
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return F.scaled_dot_product_attention(
            q, k, v,
            attn_mask=None if is_causal else band(queries, keys, window, q.device),
            is_causal=is_causal,
            scale=scaling,
            dropout_p=dropout,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
    outputs = []
    for start in range(0, queries, BLOCK):  # a block of queries, with only the keys that it sees
        end = min(start + BLOCK, queries)
        last = keys - queries + end
        first = 0 if window is None else max(0, last - (end - start) - window + 1)
        part = q[:, :, start:end], k[:, :, first:last], v[:, :, first:last]
        outputs.append(dense(*part, scaling, window, softcap, dropout))
    return torch.cat(outputs, dim=2)


def dense(q, k, v, scaling, window, softcap, dropout) -> Tensor:
    """`causal` by plain products, which hold all scores in memory."""
    heads, queries, kv_heads, keys = *q.shape[1:3], *k.shape[1:3]
    groups = heads // kv_heads  # so many query heads in a row share a key-value head
    bias = band_bias(queries, keys, window, groups, q.dtype, q.device)
    q = q.reshape(kv_heads, groups * queries, -1)
    if softcap is None:
        scores = torch.baddbmm(bias, q, k[0].transpose(1, 2), alpha=scaling)
    else:
        # scale before the product, or float16 could overflow
        scores = torch.tanh(q * (scaling / softcap) @ k[0].transpose(1, 2)) * softcap + bias
    weights = F.dropout(scores.softmax(dim=-1), dropout)  # (H_kv, groups * queries, keys)
    return (weights @ v[0]).view(1, heads, queries, -1)


KEPT = 32 * 2**20  # bytes


def kept(make):
    """Keep the masks that `make` returned last, up to KEPT bytes, for later layers and rows.
    functools.cache counts masks and not bytes: 64 masks of 4,096 x 4,096 are a gigabyte."""
    masks, size = {}, 0

    @wraps(make)
    def kept_or_made(*key):
        nonlocal size
        mask = masks.pop(key, None)
        if mask is None:
            mask = make(*key)
            size += mask.nbytes
        masks[key] = mask  # now the last one in the dict; the first one is dropped first
        while size > KEPT:
            size -= masks.pop(next(iter(masks))).nbytes
        return mask

    return kept_or_made


@kept
def band(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """(queries, keys) bool, True where the query sees the key. The last query sees the last key,
    and each query at most `window` keys."""
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return mask if window is None else mask.triu(keys - queries - window + 1)


@kept
def band_bias(queries, keys, window, groups, dtype, device) -> Tensor:
    """(1, groups * queries, keys): 0 where `band` is True, -inf elsewhere, for each group."""
    mask = band(queries, keys, window, device).repeat(groups, 1)
    return torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill_(~mask, -torch.inf)[None]
