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
from functools import cache

import torch
from torch import Tensor

from nanoalign.fast import attention as fast  # attention, as below but without a (T, T) matrix
from nanoalign.fast.transfer import to_device  # torch.tensor, but a GPU is not waited for

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
class Geometry:
    """Where examples and their branches lie in a row of T tokens."""

    examples: list[tuple[int, int, list[int]]]  # start, length of the prompt, lengths of branches
    example: Tensor  # (T,) the example a token belongs to
    branch: Tensor  # (T,) the branch within it, -1 for the prompt
    position: Tensor  # (T,) counted from the start of the prompt, through the branch
    block_masks: dict = field(default_factory=dict)  # by window, for a GPU's kernel

    def allowed(self, query: Tensor, key: Tensor, window: int | None) -> Tensor:
        """May the token at index `query` of the row see the one at `key`? They broadcast."""
        same = (self.example[query] == self.example[key]) & (key <= query)
        seen = same & ((self.branch[key] < 0) | (self.branch[key] == self.branch[query]))
        if window is not None:
            seen = seen & (self.position[query] - self.position[key] < window)
        return seen


@dataclass
class Row:
    """A packed batch: T tokens, of which N predictions train, for C completions."""

    input_ids: Tensor  # (T,)
    geometry: Geometry
    predictors: Tensor  # (N,) where in the row the n-th trained token is predicted
    targets: Tensor  # (N,) that token
    completion: Tensor  # (N,) the completion it belongs to
    trained: list[int]  # trained tokens of each of the C completions
    lengths: list[int]  # tokens of each example, last ones included


def pack(batch: list[Example], device: torch.device | str = "cpu", windows=(None,)) -> Row:
    """One row of all examples, completions in the order given, for layers with these windows."""
    input_ids, positions, example_of, branch_of = [], [], [], []
    predictors, targets, completion_of = [], [], []
    examples, trained = [], []
    for number, example in enumerate(batch):
        prompt, start = example.prompt, len(input_ids)
        input_ids += prompt
        positions += range(len(prompt))
        branch_of += [-1] * len(prompt)
        for branch, (ids, mask) in enumerate(example.completions):
            before = len(input_ids) - 1  # ids[j] is predicted at before + j, ...
            end_of_prompt = start + len(prompt) - 1  # ... but ids[0] at the end of the prompt
            hits = [j for j, trains in enumerate(mask) if trains and (j or prompt)]
            predictors += [before + j if j else end_of_prompt for j in hits]
            targets += [ids[j] for j in hits]
            completion_of += [len(trained)] * len(hits)
            trained.append(len(hits))
            input_ids += ids[:-1]
            positions += range(len(prompt), len(prompt) + len(ids) - 1)
            branch_of += [branch] * (len(ids) - 1)
        example_of += [number] * (len(input_ids) - start)
        branches = [len(ids) - 1 for ids, _ in example.completions]
        examples.append((start, len(prompt), branches))

    rows = [input_ids, example_of, branch_of, positions]
    tokens = to_device(rows, device, torch.int32)  # (4, T)
    wanted = to_device([predictors, targets, completion_of], device, torch.int64)
    lengths = [prompt + sum(n + 1 for n in branches) for _, prompt, branches in examples]
    geometry = fast.prepared(Geometry(examples, *tokens[1:]), windows)
    return Row(tokens[0], geometry, *wanted, trained, lengths)


ROW_TOKENS = {"cpu": 2048, "gpu": 4096}  # enough to keep the device busy


def row_tokens(limit: int | None, device: torch.device) -> int:
    """How long a row that backward needs may be: `limit`, or by device."""
    return limit or ROW_TOKENS["cpu" if device.type == "cpu" else "gpu"]


def in_rows(examples: list[Example], tokens: int) -> list[list[Example]]:
    """Examples in parts that make rows of at most `tokens`; a longer one is a part of its own."""
    parts, room = [], 0
    for example in examples:
        length = len(example.prompt) + sum(len(ids) for ids, _ in example.completions)
        if not parts or length > room:
            parts.append([])
            room = tokens
        parts[-1].append(example)
        room -= length
    return parts


def attention(
    query: Tensor,  # (1, H, T, D)
    key: Tensor,  # (1, H_kv, T, D); H / H_kv query heads share a key and value head
    value: Tensor,  # (1, H_kv, T, D)
    geometry: Geometry,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention over a packed row, by definition: every query with every key of the row, and minus
    infinity where it may not look. -> (1, H, T, D)."""
    index = torch.arange(query.shape[2], device=query.device)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling  # (1, H, T, T)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    allowed = geometry.allowed(index[:, None], index[None, :], window)  # (T, T)
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ value


def packed_attention(
    module, query, key, value, attention_mask: None, *,
    geometry: Geometry, scaling: float, dropout: float = 0.0,
    sliding_window: int | None = None, softcap: float | None = None,
    position_ids=None, use_cache=None, output_router_logits=None, **unknown,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention in the form that transformers' AttentionInterface calls; -> (1, T, H, D). A keyword
    that is not known here may change what a model computes (attention sinks do), so it is an error,
    unless it is off."""
    unknown = [name for name, on in unknown.items() if on is not None and on is not False]
    if unknown:
        raise NotImplementedError(f"attention with {', '.join(unknown)}")
    out = fast.attention(query, key, value, geometry, scaling, sliding_window, softcap, dropout)
    return out.transpose(1, 2).contiguous(), None  # some models take no view


@cache
def packed() -> str:
    """The name under which transformers' models find packed_attention."""
    from transformers import AttentionInterface  # half a second, and --help can do without

    AttentionInterface.register("packed", packed_attention)
    return "packed"
