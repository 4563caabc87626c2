"""Prompts and completions -> one row without padding, and who sees whom in it.

A batch is one row of tokens. There is no pad token, no attention mask tensor, no left or right:

    | prompt 0 | chosen 0 | rejected 0 | prompt 1 | chosen 1 | rejected 1 | ...

A prompt stands in the row once and its completions branch off it (arXiv 2410.20305), each with
positions that go on from the prompt. So DPO pays once for its prompt instead of twice, and nobody
pays for padding. One predicate says who sees whom:

    same example, the key is not after the query, and it lies in the prompt or in the query's branch
    (and, in a model with a sliding window, its position is less than the window away)

The last token of a completion predicts nothing that trains, so it is not in the row at all.

The big libraries pad every example to the longest one of its batch, and carry the prompt of a
preference pair twice.
"""

from dataclasses import dataclass, field
from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoalign import InputError

Completion = tuple[list[int], list[bool]]  # ids; which of them train


@dataclass(slots=True)
class Example:
    """A prompt and the completions that share it: one for SFT and KTO, two for DPO."""

    prompt: list[int]  # ids, the reply's header included
    completions: list[Completion]
    label: bool | None = None  # KTO: thumbs up or down
    where: str = ""  # file and line
    number: int = 0  # its place in the data, from 0
    mismatch: Completion | None = None  # KTO: y', of another prompt

    def __len__(self) -> int:
        """Tokens of all its sequences, a shared prompt counted in each, as TRL counts them."""
        return sum(len(self.prompt) + len(ids) for ids, _ in self.completions)


@dataclass
class Layout:
    """Where examples and branches lie in a row of T tokens."""

    examples: list[tuple[int, int, list[int]]]  # start, length of the prompt, lengths of branches
    example: Tensor  # (T,) the example a token belongs to
    branch: Tensor  # (T,) the branch within it, -1 for the prompt
    position: Tensor  # (T,) counted from the start of the prompt, through the branch
    block_masks: dict = field(default_factory=dict)  # flex_attention's, by window: made once a row

    def allowed(self, query: Tensor, key: Tensor, window: int | None) -> Tensor:
        """The predicate, for broadcastable indices into the row."""
        same = (self.example[query] == self.example[key]) & (key <= query)
        seen = same & ((self.branch[key] < 0) | (self.branch[key] == self.branch[query]))
        if window is not None:
            seen = seen & (self.position[query] - self.position[key] < window)
        return seen


@dataclass
class Row:
    """A packed batch: T tokens, of which N predictions train, for C completions."""

    input_ids: Tensor  # (T,)
    layout: Layout
    predictors: Tensor  # (N,) where in the row the n-th trained token is predicted
    targets: Tensor  # (N,) that token
    completion: Tensor  # (N,) the completion it belongs to
    trained: list[int]  # trained tokens of each of the C completions
    lengths: list[int]  # tokens of each example, last ones included


def pack(batch: list[Example], device: torch.device | str = "cpu") -> Row:
    """One row of all examples; completions are numbered in the order in which they are given."""
    input_ids, positions, example_of, branch_of = [], [], [], []
    predictors, targets, completion_of = [], [], []
    examples, trained = [], []
    for number, item in enumerate(batch):
        prompt, completions = item.prompt, item.completions
        start, last_of_prompt = len(input_ids), len(input_ids) + len(prompt) - 1
        input_ids += prompt
        positions += range(len(prompt))
        branch_of += [-1] * len(prompt)
        for branch, (ids, mask) in enumerate(completions):
            before = len(input_ids) - 1  # ids[j] is predicted at before + j, ids[0] by the prompt
            hits = [j for j, trains in enumerate(mask) if trains and (j or prompt)]
            predictors += [before + j if j else last_of_prompt for j in hits]
            targets += [ids[j] for j in hits]
            completion_of += [len(trained)] * len(hits)
            trained.append(len(hits))
            input_ids += ids[:-1]
            positions += range(len(prompt), len(prompt) + len(ids) - 1)
            branch_of += [branch] * (len(ids) - 1)
        example_of += [number] * (len(input_ids) - start)
        examples.append((start, len(prompt), [len(ids) - 1 for ids, _ in completions]))

    rows = [input_ids, example_of, branch_of, positions]
    tokens = torch.tensor(rows).to(device, non_blocking=True)  # (4, T): one copy to the device
    wanted = torch.tensor([predictors, targets, completion_of]).to(device, non_blocking=True)
    layout = Layout(examples, *tokens[1:])
    lengths = [prompt + sum(n + 1 for n in branches) for _, prompt, branches in examples]
    return Row(tokens[0], layout, *wanted, trained, lengths)


ROW_TOKENS = {"cpu": 2048, "gpu": 4096}  # enough to keep the device busy


def row_tokens(limit: int | None, device: torch.device) -> int:
    """How long a row that backward needs may be: `limit`, or by device."""
    return limit or ROW_TOKENS["cpu" if device.type == "cpu" else "gpu"]


def in_rows(examples: list[Example], tokens: int) -> list[list[Example]]:
    """Examples in parts that make rows of at most `tokens`; a longer one is a part of its own.

    Losses are sums over examples, so the parts' gradients add up to the whole's, and memory is
    that of one part.
    """
    parts, room = [], 0
    for example in examples:
        length = len(example.prompt) + sum(len(ids) for ids, _ in example.completions)
        if not parts or length > room:
            parts.append([])
            room = tokens
        parts[-1].append(example)
        room -= length
    return parts


# Its loops and masks depend on the row: a compiled layer is compiled around it. (_disable_dynamo is
# torch.compiler.disable, but does not import the compiler before it is needed.)
@torch._disable_dynamo
def packed_attention(
    module,
    query: Tensor,  # (1, H, T, D)
    key: Tensor,  # (1, H_kv, T, D)
    value: Tensor,  # (1, H_kv, T, D)
    attention_mask: None,
    *,
    layout: Layout,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_ids: Tensor | None = None,
    use_cache: bool | None = None,
    **unknown,
) -> tuple[Tensor, None]:
    """Attention over a packed row, in the form of transformers' AttentionInterface.

    Returns (1, T, H, D). A keyword that it does not know may change what a model computes
    (attention sinks do), so it is an error, unless it is off.
    """
    unknown = [name for name, on in unknown.items() if on is not None and on is not False]
    if unknown:
        raise NotImplementedError(f"attention with {', '.join(unknown)}")
    if query.is_cuda:
        if dropout > 0:
            raise InputError("attention dropout does not exist on a GPU here: --disable_dropout")
        out = _flex(query, key, value, layout, scaling, sliding_window, softcap)
    else:
        out = _by_example(query, key, value, layout, scaling, dropout, sliding_window, softcap)
    return out.transpose(1, 2), None


@cache
def packed() -> str:
    """The name under which transformers' models find packed_attention."""
    from transformers import AttentionInterface  # half a second, and --help can do without

    AttentionInterface.register("packed", packed_attention)
    return "packed"


def _by_example(query, key, value, layout, scaling, dropout, window, softcap) -> Tensor:
    """The predicate as a few dense calls: an example's prompt and first branch are one causal
    sequence; each further branch attends to the prompt and to itself."""
    prompts, pieces = [], []  # of each call: tokens of a prompt that stands before it; its own
    for _, prompt, branches in layout.examples:
        prompts += [0] + [prompt] * (len(branches) - 1)
        pieces += [prompt + branches[0], *branches[1:]]
    outputs = []  # split, not slices: its backward is one concatenation
    for before, q, k, v in zip(prompts, *(x.split(pieces, dim=2) for x in (query, key, value))):
        if before == 0:
            first_k, first_v = k, v
        else:
            k = torch.cat([first_k[:, :, :before], k], dim=2)
            v = torch.cat([first_v[:, :, :before], v], dim=2)
        if q.shape[2] > 0:
            outputs.append(_attend(q, k, v, scaling, dropout, window, softcap))
    return torch.cat(outputs, dim=2)  # (1, H, T, D)


SHORT, BLOCK = 1024, 128  # up to SHORT keys plain products win on a CPU: 1.5 to 3 times as fast


def _attend(q, k, v, scaling, dropout, window, softcap) -> Tensor:
    """Causal attention of the last q.shape[2] tokens of a sequence of k.shape[2]."""
    queries, keys = q.shape[2], k.shape[2]
    if window is not None and window >= keys:
        window = None
    if softcap is None and keys > SHORT:
        causal = window is None and queries == keys
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if causal else _band(queries, keys, window, q.device),
            is_causal=causal,
            scale=scaling,
            dropout_p=dropout,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    outputs = []
    for start in range(0, queries, BLOCK):  # a block of queries, and no key that none of it sees
        end = min(start + BLOCK, queries)
        last = keys - queries + end
        first = 0 if window is None else max(0, last - (end - start) - window + 1)
        part = q[:, :, start:end], k[:, :, first:last], v[:, :, first:last]
        outputs.append(_dense(*part, scaling, dropout, window, softcap))
    return torch.cat(outputs, dim=2)


def _dense(q, k, v, scaling, dropout, window, softcap) -> Tensor:
    """As _attend, with all scores at once."""
    heads, queries, kv_heads, keys = *q.shape[1:3], *k.shape[1:3]
    groups = heads // kv_heads  # query heads that share a key-value head stand one after the other
    bias = _bias(queries, keys, window, groups, q.dtype, q.device)
    q = q.reshape(kv_heads, groups * queries, -1)
    if softcap is None:
        scores = torch.baddbmm(bias, q, k[0].transpose(1, 2), alpha=scaling)
    else:
        scores = torch.tanh(q @ k[0].transpose(1, 2) * (scaling / softcap)) * softcap + bias
    weights = F.dropout(scores.softmax(dim=-1), dropout)  # (H_kv, groups * queries, keys)
    return (weights @ v[0]).view(1, heads, queries, -1)


@lru_cache(maxsize=64)
def _band(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """(queries, keys) bool: causal from the lower right corner, at most `window` wide."""
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return mask if window is None else mask.triu(keys - queries - window + 1)


@lru_cache(maxsize=64)
def _bias(queries, keys, window, groups, dtype, device) -> Tensor:
    """(1, groups * queries, keys): 0 where the band is, -inf elsewhere, for each group."""
    band = _band(queries, keys, window, device).repeat(groups, 1)
    return torch.zeros(band.shape, dtype=dtype, device=device).masked_fill_(~band, -torch.inf)[None]


@cache
def _compiled_flex():
    import torch._dynamo.config as dynamo
    from torch.nn.attention.flex_attention import flex_attention

    dynamo.specialize_float = True  # scale and softcap are constants of the model
    dynamo.recompile_limit = 64  # with and without gradient, short and long rows, windows ...
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def _block_mask(layout: Layout, window: int | None):
    from torch.nn.attention.flex_attention import create_block_mask

    if window not in layout.block_masks:
        tokens, device = len(layout.position), layout.position.device
        layout.block_masks[window] = create_block_mask(
            lambda b, h, q, k: layout.allowed(q, k, window), None, None, tokens, tokens, device
        )
    return layout.block_masks[window]


def _flex(query, key, value, layout, scaling, window, softcap) -> Tensor:
    """The predicate compiled into one kernel."""
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves rotary's in fp32

    def cap(score, b, h, q, k):
        return softcap * torch.tanh(score / softcap)

    return _compiled_flex()(
        query, key, value, score_mod=cap if softcap else None,
        block_mask=_block_mask(layout, window), scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},  # its decoding kernel fails on some rows
    )  # fmt: skip
