"""Prompts and completions -> one row without padding, and who sees whom in it.

A batch is one row of tokens. There is no pad token, no attention mask tensor, no left or right:

    | prompt 0 | chosen 0 | rejected 0 | prompt 1 | chosen 1 | rejected 1 | ...

A row is a forest: each example is a tree, and each of its texts (a prompt and what follows it) is
a path in the tree. Positions count along the path. What texts of an example begin with in common
stands in the row once (arXiv 2410.20305 does so for a pair's prompt). So DPO computes a prompt
once for all replies to it. A conversation whose later turns do not see earlier thoughts is a trunk
without thoughts and a branch for each reply.

The row lists a tree in the order of a first visit: one text up to its end, then what is new in the
next text. So everything that continues a token's text is one stretch of the row. The stretch begins
with the token itself and ends before `until`. One number a token says who sees whom:

    key <= query < until[key]        (with a sliding window, their positions are close enough, too)

The last token of a text predicts nothing that trains, so it is not in the row. The big libraries
pad every example to the longest of its batch, and compute a pair's prompt twice.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

from nanoalign import InputError
from nanoalign.fast import attention as fast  # attention without a (T, T) matrix
from nanoalign.fast.attention import prepared
from nanoalign.fast.transfer import to_device  # torch.tensor that does not wait for a GPU

Ids = Sequence[int]  # a list, or an array("i"): 4 bytes an id where a list takes 40
Text = tuple[Ids, Sequence[bool]]  # what follows a prompt: ids, and which of them train


@dataclass(slots=True)
class Example:
    """A prompt and the texts that continue it. A completion is one text, or more where there are
    thoughts: then each reply has its own. SFT and KTO have one completion, DPO one a reply."""

    prompt: Ids  # with the header of the reply; none of it trains
    texts: list[Text]
    label: bool | None = None  # KTO: thumbs up or down
    where: str = ""  # file and line
    number: int = 0  # which example of the data, from 0
    mismatch: "Example | None" = None  # KTO: (x, y'), y' the reply to another prompt
    pairs: Sequence[tuple[int, int]] = ((0, 1),)  # DPO: completions, the better one first
    completions: Sequence[int] | None = None  # of each text, from 0; None: one text each

    def paths(self) -> list[tuple[int, Ids, Text, int]]:
        """The texts in the order of a first visit: how many ids each shares with the one before it,
        all its ids, what of it follows the prompt, its completion."""
        ordered: list[tuple[Ids, Text, int]] = []
        for i, text in enumerate(self.texts):
            ids = self.prompt + text[0]
            common = [shared(other, ids) for other, *_ in ordered]
            # right after the last one of those that it shares the most with
            after = max(range(len(common)), key=lambda j: (common[j], j), default=-1)
            completion = i if self.completions is None else self.completions[i]
            ordered.insert(after + 1, (ids, text, completion))
        before = [(), *(ids for ids, *_ in ordered)]
        return [(shared(old, new[0]), *new) for old, new in zip(before, ordered)]

    @property
    def tokens(self) -> int:
        """Tokens of its tree, the last ones of texts included: what it takes of a row."""
        return sum(len(ids) - common for common, ids, *_ in self.paths())

    def __len__(self) -> int:
        """Tokens of its completions, each with the prompt, as TRL counts them."""
        if self.completions is None:
            return sum(len(self.prompt) + len(ids) for ids, _ in self.texts)
        texts = list(zip(self.completions, self.texts))
        replies = ([text for n, text in texts if n == i] for i in range(self.count))
        return sum(Example(self.prompt, reply).tokens for reply in replies)

    @property
    def count(self) -> int:
        """How many completions it has."""
        return len(self.texts) if self.completions is None else max(self.completions) + 1


def pairs_of(batch: list[Example]) -> tuple[list[int], list[int]]:
    """The better and the worse completion of each pair: their indices among all of the batch."""
    starts = accumulate((example.count for example in batch), initial=0)
    pairs = [(n + i, n + j) for n, example in zip(starts, batch) for i, j in example.pairs]
    return [i for i, _ in pairs], [j for _, j in pairs]


def shared(a: Ids, b: Ids) -> int:
    """How many ids two texts begin with in common: a bisection, since slices compare quickly."""
    return bisect_left(range(1, min(len(a), len(b)) + 1), True, key=lambda n: a[:n] != b[:n])


@dataclass
class Geometry:
    """Where the texts of a row of T tokens lie."""

    position: Tensor  # (T,) counted along each text, from 0
    until: Tensor  # (T,) where the stretch of the row that sees a token ends
    runs: list[tuple[int, int]]  # of each text: tokens that the row had, and new ones
    block_masks: dict = field(default_factory=dict)  # by window, for a GPU's kernel

    def allowed(self, query: Tensor, key: Tensor, window: int | None) -> Tensor:
        """May the token at index `query` see the one at index `key`? The two tensors broadcast."""
        seen = (key <= query) & (query < self.until[key])
        if window is not None:
            seen = seen & (self.position[query] - self.position[key] < window)
        return seen

    def longest(self) -> list[int]:
        """(T,) tokens of the longest text through each token, its last one included."""
        longest, path = [], []  # path: where in the row the tokens of a text are
        for depth, new in self.runs:
            path[depth:] = range(len(longest), len(longest) + new)
            longest += [0] * new
            for i in path:
                longest[i] = max(longest[i], len(path) + 1)
        return longest


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
    hits, trained = [], []  # (completion, predictor, target) of each trained token; their numbers
    path: list[int] = []  # where in the row the tokens of the text before are
    for example in batch:
        first, prompt = len(trained), len(example.prompt)
        trained += [0] * example.count
        for common, text, (_, mask), completion in example.paths():
            depth = min(common, len(path))  # so much of the text is in the row
            for i in path[depth:]:  # nothing that comes now continues these tokens
                until[i] = len(ids)
            new = text[depth:-1]
            runs += [(depth, len(new))] if new else []
            path[depth:] = range(len(ids), len(ids) + len(new))
            position += range(depth, depth + len(new))
            until += new  # as many numbers, replaced when the end is known
            ids += new
            at = [j for j, trains in enumerate(mask, prompt) if trains and j]
            hits += [(first + completion, path[j - 1], text[j]) for j in at]
            trained[first + completion] += len(at)
    for i in path:
        until[i] = len(ids)
    hits.sort(key=lambda hit: hit[0])  # a completion's predictions stand together
    tokens = to_device([ids, position, until], device, torch.int32)  # (3, T)
    completions, predictors, targets = to_device([*zip(*hits)] or [[], [], []], device, torch.int64)
    geometry = prepared(Geometry(*tokens[1:], runs), windows)
    return Row(tokens[0], geometry, predictors, targets, completions, trained)


ROW_TOKENS = {"cpu": 2048, "gpu": 4096}  # enough to keep the device busy


def row_tokens(limit: int | None, device: torch.device) -> int:
    """How long a row of training may be: `limit`, or by device."""
    return limit or ROW_TOKENS["cpu" if device.type == "cpu" else "gpu"]


def in_rows(examples: list[Example], tokens: int) -> list[list[Example]]:
    """Parts that make rows of at most `tokens`. An example that is longer is a part by itself."""
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
    query: Tensor, key: Tensor, value: Tensor, geometry: Geometry,
    scaling: float, window: int | None = None, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Attention over a packed row, by definition: a score is minus infinity where the query may not
    see the key. query (1, H, T, D); key, value (1, H_kv, T, D), each head for H / H_kv query heads.
    -> (1, H, T, D)."""
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
    that is not known here may change what a model computes (attention sinks do): an error."""
    unknown = [name for name, on in unknown.items() if on is not None and on is not False]
    if unknown:
        raise InputError(f"its attention takes {', '.join(unknown)}, which packing does not know")
    if geometry is None:  # StableLM, Nemotron
        raise InputError("its layers do not hand the row's geometry down to their attention")
    more = {"dropout": dropout} if dropout else {}  # the definition has none
    out = fast.attention(query, key, value, geometry, scaling, sliding_window, softcap, **more)
    return out.transpose(1, 2).contiguous(), None  # some models take no view


@cache
def packed() -> str:
    """The name under which transformers' models find packed_attention."""
    from transformers import AttentionInterface  # half a second, and --help can do without

    AttentionInterface.register("packed", packed_attention)
    return "packed"
