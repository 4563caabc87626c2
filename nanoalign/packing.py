"""A batch of examples -> one row of tokens without padding.

    | prompt 0 | chosen 0 | rejected 0 | prompt 1 | chosen 1 | rejected 1 | ...

The big libraries pad every example to the longest of its batch, and compute the prompt of a pair
twice. Here it is in the row once (arXiv 2410.20305). Both replies see it, but not each other.

An example is a tree, and a text (a prompt with one continuation) is a path in it. Positions are
counted along the path. Texts share the tokens that both begin with. If later turns do not see
earlier thoughts, the tree is a trunk without thoughts, with a branch for each reply.

The row has one text up to its end, then the new tokens of the next text, and so on. So all tokens
that may see a token are one stretch of the row, from this token to just before `until`:

    key <= query < until[key]        (and inside of the sliding window, where a model has one)

The last token of a text is not in the row, since no trained token comes after it.
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

Ids = Sequence[int]  # a list, or an array("i"), which takes 4 bytes an id and not 40
Text = tuple[Ids, Sequence[bool]]  # the ids after a prompt, and which of them train


@dataclass(slots=True)
class Example:
    """A prompt and the texts that continue it. For SFT and KTO there is one completion, for DPO two
    or more. A completion is one text, or several if its replies see different thoughts."""

    prompt: Ids  # with the header of the reply; it does not train
    texts: list[Text]
    label: bool | None = None  # KTO: thumbs up or down
    where: str = ""  # file and line
    number: int = 0  # its index in the data
    mismatch: "Example | None" = None  # KTO: this prompt with the reply to another one
    pairs: Sequence[tuple[int, int]] = ((0, 1),)  # DPO: (better, worse) completion
    completions: Sequence[int] | None = None  # the completion of each text; None: one text each

    def paths(self) -> list[tuple[int, Ids, Text, int]]:
        """The texts in the order of the row. For each: how many ids it shares with the text before
        it, all its ids with the prompt, the text, its completion."""
        ordered: list[tuple[Ids, Text, int]] = []
        for i, text in enumerate(self.texts):
            ids = self.prompt + text[0]
            common = [shared(other, ids) for other, *_ in ordered]
            # after the text that it shares most with, or the row would hold shared tokens twice
            after = max(range(len(common)), key=lambda j: (common[j], j), default=-1)
            completion = i if self.completions is None else self.completions[i]
            ordered.insert(after + 1, (ids, text, completion))
        before = [(), *(ids for ids, *_ in ordered)]
        return [(shared(old, new[0]), *new) for old, new in zip(before, ordered)]

    @property
    def tokens(self) -> int:
        """How many tokens its tree has; the last token of each text counts, too."""
        return sum(len(ids) - common for common, ids, *_ in self.paths())

    def __len__(self) -> int:
        """How many tokens its completions have, each with the prompt. TRL counts so."""
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
    """Of each pair the better and the worse completion, as indices into all of the batch."""
    starts = accumulate((example.count for example in batch), initial=0)
    pairs = [(n + i, n + j) for n, example in zip(starts, batch) for i, j in example.pairs]
    return [i for i, _ in pairs], [j for _, j in pairs]


def shared(a: Ids, b: Ids) -> int:
    """How many ids both texts begin with. It bisects, since slices are compared quickly."""
    return bisect_left(range(1, min(len(a), len(b)) + 1), True, key=lambda n: a[:n] != b[:n])


@dataclass
class Geometry:
    """Which tokens of a row see which. The row has T tokens."""

    position: Tensor  # (T,) in the text, from 0
    until: Tensor  # (T,) the first later index that does not see the token
    runs: list[tuple[int, int]]  # each text: how many tokens it shares and how many are new
    block_masks: dict = field(default_factory=dict)  # of each window, for flex_attention

    def allowed(self, query: Tensor, key: Tensor, window: int | None) -> Tensor:
        """May the token at index `query` see the token at index `key`? The tensors broadcast."""
        seen = (key <= query) & (query < self.until[key])
        if window is not None:
            seen = seen & (self.position[query] - self.position[key] < window)
        return seen

    def longest(self) -> list[int]:
        """For each of the T tokens: the length of the longest text that contains it."""
        longest, path = [], []  # path: the indices in the row of a text's tokens
        for depth, new in self.runs:
            path[depth:] = range(len(longest), len(longest) + new)
            longest += [0] * new
            for i in path:
                longest[i] = max(longest[i], len(path) + 1)
        return longest


@dataclass
class Row:
    """A packed batch of T tokens. N tokens of its C completions train."""

    input_ids: Tensor  # (T,)
    geometry: Geometry
    predictors: Tensor  # (N,) the index in the row of the token before each trained token
    targets: Tensor  # (N,) the ids of the trained tokens
    completion: Tensor  # (N,) the completion of each trained token
    trained: list[int]  # how many trained tokens each of the C completions has


def pack(batch: list[Example], device: torch.device | str = "cpu", windows=(None,)) -> Row:
    """Pack all examples into one row. `windows` are those of the model's layers; None: no limit."""
    ids, position, until, runs = [], [], [], []
    hits, trained = [], []  # hits: (completion, predictor, target) of each trained token
    path: list[int] = []  # the indices in the row of the last text's tokens
    for example in batch:
        first, prompt = len(trained), len(example.prompt)
        trained += [0] * example.count
        for common, text, (_, mask), completion in example.paths():
            depth = min(common, len(path))  # the first `depth` tokens are in the row already
            for i in path[depth:]:  # no later token of the row may see these
                until[i] = len(ids)
            new = text[depth:-1]
            runs += [(depth, len(new))] if new else []
            path[depth:] = range(len(ids), len(ids) + len(new))
            position += range(depth, depth + len(new))
            until += new  # any numbers; they are replaced when the end is known
            ids += new
            at = [j for j, trains in enumerate(mask, prompt) if trains and j]
            hits += [(first + completion, path[j - 1], text[j]) for j in at]
            trained[first + completion] += len(at)
    for i in path:
        until[i] = len(ids)
    hits.sort(key=lambda hit: hit[0])  # put each completion's trained tokens together
    tokens = to_device([ids, position, until], device, torch.int32)  # (3, T)
    completions, predictors, targets = to_device([*zip(*hits)] or [[], [], []], device, torch.int64)
    geometry = prepared(Geometry(*tokens[1:], runs), windows)
    return Row(tokens[0], geometry, predictors, targets, completions, trained)


ROW_TOKENS = {"cpu": 2048, "gpu": 4096}  # enough to keep the device busy


def in_rows(examples: list[Example], tokens: int) -> list[list[Example]]:
    """Batches of at most `tokens` tokens, in order. A longer example is alone in its batch."""
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
    """Attention over a packed row. Where a query may not see a key, the score is minus infinity.
    query (1, H, T, D); key, value (1, H_kv, T, D), where H / H_kv query heads share one of H_kv.
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
    """The attention function that transformers calls, by its AttentionInterface; -> (1, T, H, D).
    InputError: a keyword is unknown. It could change the result, as attention sinks do."""
    unknown = [name for name, on in unknown.items() if on is not None and on is not False]
    if unknown:
        raise InputError(f"its attention takes {', '.join(unknown)}, which packing does not know")
    if geometry is None:  # StableLM, Nemotron
        raise InputError("its layers do not pass the row's geometry on to their attention")
    more = {"dropout": dropout} if dropout else {}  # `attention` above has no dropout
    out = fast.attention(query, key, value, geometry, scaling, sliding_window, softcap, **more)
    return out.transpose(1, 2).contiguous(), None  # some models call .view on it


@cache
def packed() -> str:
    """Register packed_attention with transformers, and return its name there."""
    from transformers import AttentionInterface  # here, since it would slow --help by 0.5 seconds

    AttentionInterface.register("packed", packed_attention)
    return "packed"
