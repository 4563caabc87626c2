"""Prompts and completions -> one row without padding, and who sees whom in it.

A batch is one row of tokens. There is no pad token, no attention mask tensor, no left or right:

    | prompt 0 | chosen 0 | rejected 0 | prompt 1 | chosen 1 | rejected 1 | ...

A row is a forest. Every example is a tree, and every text of it (a prompt and what follows) is a
path in the tree, with positions that count along the path. What texts begin with in common stands
in the row once (arXiv 2410.20305 does so for a pair's prompt). So DPO pays once for its prompt,
however many replies branch off it; and a conversation whose later turns do not see the thoughts of
earlier ones is a trunk without thoughts, and a branch for each reply.

The row lists a tree in the order of a first visit: a text up to its end, then what is new in the
next. So all that continues the text of a token stands in one stretch of the row, which begins with
the token itself and ends at `until`. That one number a token says who sees whom:

    key <= query < until[key]        (and, with a sliding window, their positions are close enough)

The last token of a text predicts nothing that trains, so it is not in the row at all.

The big libraries pad every example to the longest one of its batch, and carry the prompt of a
preference pair twice.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

from nanoalign import InputError
from nanoalign.fast import attention as fast  # attention, as below but without a (T, T) matrix
from nanoalign.fast.transfer import to_device  # torch.tensor, but a GPU is not waited for

Ids = Sequence[int]  # a list, or an array("i"): 4 bytes an id where a list takes 40
Text = tuple[Ids, Sequence[bool]]  # what follows a prompt: ids; which of them train


@dataclass(slots=True)
class Example:
    """A prompt and the texts that continue it: for SFT and KTO one, for DPO a reply each.

    A completion may need several texts (`completions` says which belongs to which): in a
    conversation with thoughts each reply stands in a text of its own.
    """

    prompt: Ids  # the header of the reply included; none of it trains
    texts: list[Text]
    label: bool | None = None  # KTO: thumbs up or down
    where: str = ""  # file and line
    number: int = 0  # its place in the data, from 0
    mismatch: "Example | None" = None  # KTO: (x, y'), y' the reply to another prompt
    pairs: Sequence[tuple[int, int]] = ((0, 1),)  # DPO: completions, the better one first
    completions: Sequence[int] | None = None  # of each text, from 0; None: each is one

    def whole_texts(self) -> list[tuple[int, Ids, Text, int]]:
        """In the order of a first visit: (how many ids a text begins with that the one before it
        begins with too, all ids of it, what of it follows the prompt, its completion)."""
        ordered: list[tuple[Ids, Text, int]] = []
        for i, text in enumerate(self.texts):
            ids = self.prompt + text[0]
            # after the text that it shares the most with, and after all that share as much
            common = [shared(other, ids) for other, *_ in ordered]
            place = max(range(len(common)), key=lambda j: (common[j], j), default=-1)
            completion = i if self.completions is None else self.completions[i]
            ordered.insert(place + 1, (ids, text, completion))
        before = [(), *(ids for ids, *_ in ordered)]
        return [(shared(old, new[0]), *new) for old, new in zip(before, ordered)]

    @property
    def tokens(self) -> int:
        """Tokens of its tree, last ones included: what it takes of a row."""
        return sum(len(ids) - common for common, ids, *_ in self.whole_texts())

    def __len__(self) -> int:
        """Tokens of its completions, a shared prompt counted in each, as TRL counts them."""
        if self.completions is None:
            return sum(len(self.prompt) + len(ids) for ids, _ in self.texts)
        texts_of = {n: [] for n in self.completions}
        for n, text in zip(self.completions, self.texts):
            texts_of[n].append(text)
        return sum(Example(self.prompt, texts).tokens for texts in texts_of.values())

    @property
    def count(self) -> int:
        """How many completions it has."""
        return len(self.texts) if self.completions is None else max(self.completions) + 1


def pairs_of(batch: list[Example]) -> tuple[list[int], list[int]]:
    """The better and the worse completion of each pair, as places among all those of a batch."""
    starts = accumulate((example.count for example in batch), initial=0)
    pairs = [(n + i, n + j) for n, example in zip(starts, batch) for i, j in example.pairs]
    return [i for i, _ in pairs], [j for _, j in pairs]


def shared(a: Ids, b: Ids) -> int:
    """How many ids do two texts begin with in common?"""
    return bisect_left(range(1, min(len(a), len(b)) + 1), True, key=lambda n: a[:n] != b[:n])


@dataclass
class Geometry:
    """Where the texts of a row of T tokens lie."""

    position: Tensor  # (T,) counted along each text, from 0
    until: Tensor  # (T,) the end of what sees a token
    runs: list[tuple[int, int]]  # each text's new tokens: how many precede them in it, their number
    block_masks: dict = field(default_factory=dict)  # by window, for a GPU's kernel

    def allowed(self, query: Tensor, key: Tensor, window: int | None) -> Tensor:
        """May the token at index `query` of the row see the one at `key`? They broadcast."""
        seen = (key <= query) & (query < self.until[key])
        if window is not None:
            seen = seen & (self.position[query] - self.position[key] < window)
        return seen

    def longest(self) -> list[int]:
        """(T,) tokens of the longest text through each token, its last one included."""
        found, below = [], {}  # position -> the greatest one of what was met there, going backwards
        # not of `position`, for which the program would wait until the device has nothing to do
        for p in reversed([p for start, n in self.runs for p in range(start, start + n)]):
            deepest = max(p, below.pop(p + 1, 0))
            below[p] = max(deepest, below.get(p, 0))
            found.append(deepest + 2)
        return found[::-1]


@dataclass
class Row:
    """A packed batch: T tokens, of which N predictions train, for C completions."""

    input_ids: Tensor  # (T,)
    geometry: Geometry
    predictors: Tensor  # (N,) where in the row the n-th trained token is predicted
    targets: Tensor  # (N,) that token
    completion: Tensor  # (N,) the completion it belongs to
    trained: list[int]  # trained tokens of each of the C completions


def pack(batch: list[Example], device: torch.device | str = "cpu", windows=(None,)) -> Row:
    """One row of all examples, completions in the order given, for layers with these windows."""
    ids, position, until, runs = [], [], [], []
    path: list[int] = []  # the places in the row of the text before
    hits, trained = [], []

    def go_back(depth: int) -> None:
        """What lies deeper on the path is seen by nothing that is still to come."""
        for place in path[depth:]:
            until[place] = len(ids)
        del path[depth:]

    for example in batch:
        first, prompt = len(trained), len(example.prompt)
        trained += [0] * example.count
        for common, text, (_, mask), completion in example.whole_texts():
            go_back(depth := min(common, len(path)))
            if new := text[depth:-1]:
                runs.append((depth, len(new)))
                path += range(len(ids), len(ids) + len(new))
                position += range(depth, depth + len(new))
                ids += new
                until += new  # as many, set when it is known
            at = [j for j, trains in enumerate(mask, prompt) if trains and j]
            hits += [(first + completion, path[j - 1], text[j]) for j in at]
            trained[first + completion] += len(at)
        go_back(0)
    hits.sort(key=lambda hit: hit[0])  # a completion's predictions stand together
    tokens = to_device([ids, position, until], device, torch.int32)  # (3, T)
    wanted = to_device([*zip(*hits)] or [[], [], []], device, torch.int64)  # (3, N)
    geometry = fast.prepared(Geometry(*tokens[1:], runs), windows)
    return Row(tokens[0], geometry, wanted[1], wanted[2], wanted[0], trained)


ROW_TOKENS = {"cpu": 2048, "gpu": 4096}  # enough to keep the device busy


def row_tokens(limit: int | None, device: torch.device) -> int:
    """How long a row that backward needs may be: `limit`, or by device."""
    return limit or ROW_TOKENS["cpu" if device.type == "cpu" else "gpu"]


def in_rows(examples: list[Example], tokens: int) -> list[list[Example]]:
    """Examples in parts that make rows of at most `tokens`; a longer one is a part of its own."""
    parts, room = [], 0
    for example in examples:
        length = example.tokens
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
    scaling: float, geometry: Geometry | None = None, dropout: float = 0.0,
    sliding_window: int | None = None, softcap: float | None = None,
    position_ids=None, use_cache=None, output_router_logits=None, **unknown,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention in the form that transformers' AttentionInterface calls; -> (1, T, H, D). A keyword
    that is not known here may change what a model computes (attention sinks do), so it is an error,
    unless it is off."""
    unknown = [name for name, on in unknown.items() if on is not None and on is not False]
    if unknown:
        raise InputError(f"its attention takes {', '.join(unknown)}, which packing does not know")
    if geometry is None:  # StableLM, Nemotron
        raise InputError("its layers do not hand the row's geometry down to their attention")
    out = fast.attention(query, key, value, geometry, scaling, sliding_window, softcap, dropout)
    return out.transpose(1, 2).contiguous(), None  # some models take no view


@cache
def packed() -> str:
    """The name under which transformers' models find packed_attention."""
    from transformers import AttentionInterface  # half a second, and --help can do without

    AttentionInterface.register("packed", packed_attention)
    return "packed"
