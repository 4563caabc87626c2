"""Conversations -> examples: ids, masks, what fits the limits; and the order of an epoch.

A CASE is what somebody stored, as messages. An EXAMPLE is the same as ids and masks, cut to the
limits. Each reply that trains stands at the end of a text, which the template writes for this
reply: so it trains where generation would write it. If an earlier reply's text begins a later one
(in ChatML, unless there are thoughts), the two are one text. The big libraries cut in silence; here
all that is cut or left out is counted.
"""

import itertools
import math
import operator
import random
import runpy
from array import array
from collections import Counter
from dataclasses import dataclass, field, replace

from nanoalign import InputError
from nanoalign.chatml import Message, Piece, encode
from nanoalign.packing import Example, Ids, Text, shared

Examples = list[Example]


@dataclass(slots=True)
class Case:
    """A prompt and its completions as messages: one, or for DPO two and more, the best one first.
    The replies in a completion train, except those with "train": False."""

    prompt: list[Message]
    completions: list[list[Message]]
    label: bool | None = None  # KTO: thumbs up or down
    where: str = ""  # file and line
    tools: list[dict] = field(default_factory=list)  # that the model may call: JSON schemas
    ranks: list[float] | None = None  # of the completions, lower is better; None: best first


@dataclass
class Limits:
    """How long an example may be, in tokens; None: no limit."""

    max_length: int | None = 1024  # of each text with its prompt; the end is cut
    max_prompt_length: int | None = None  # of what precedes the first reply that trains
    truncation_mode: str = "keep_end"  # which part of a longer prompt stays; or keep_start


def make_examples(cases, tokenizer, template, limits=None) -> tuple[Examples, Counter]:
    """Cases -> examples, numbered from 0, and a count of what was cut or skipped. The tokenizer
    gets a thousand cases at a time. InputError: the template refuses a conversation."""

    def in_pieces(number: int, case: Case) -> tuple[Case, list[list[list[Piece]]]]:
        try:
            return case, [texts_of(case, completion, template) for completion in case.completions]
        except InputError as error:
            raise InputError(f"{case.where or f'case {number}'}: {error}") from None

    limits, written = limits or Limits(), map(in_pieces, itertools.count(1), cases)
    examples, count = [], Counter()
    while part := list(itertools.islice(written, 1000)):
        texts = [text for _, completions in part for texts in completions for text in texts]
        encoded = ((array("i", ids), bytes(mask)) for ids, mask in encode(tokenizer, texts))
        for case, completions in part:
            completions = [[next(encoded) for _ in texts] for texts in completions]
            if example := make_example(case, completions, limits, count):
                example.number = len(examples)
                examples.append(example)
    return examples, count + Counter(examples=len(examples))  # without what was counted 0 times


def texts_of(case: Case, completion: list[Message], template) -> list[list[Piece]]:
    """The texts, in pieces, in which the replies of a completion train, each reply in one."""
    messages, texts = case.prompt + completion, []
    for end, message in enumerate(completion, len(case.prompt) + 1):
        if message["role"] == "assistant" and message.get("train", True):
            text = list(template.pieces(messages[:end], case.tools))
            last = texts[-1] if texts else []
            if [piece for piece, _ in last] == [piece for piece, _ in text[: len(last)]]:
                # the last text begins this one: their replies train together
                text[: len(last)] = [(p, old or new) for (p, old), (_, new) in zip(last, text)]
                texts = texts[:-1]
            texts.append(text)
    return texts


def make_example(
    case: Case, completions: list[list[Text]], limits: Limits, count: Counter
) -> Example | None:
    """The example of a case, from all texts of its completions. None, if nothing would train."""
    if not all(completions):
        count["no reply that trains"] += 1
        return None
    asked = completions[0][0][1].index(True)  # tokens before the first that trains
    most = asked if limits.max_prompt_length is None else min(asked, limits.max_prompt_length)
    gone = (0, asked - most) if limits.truncation_mode == "keep_end" else (most, asked)
    full = [[cut(without(text, *gone)) for text in texts] for texts in completions]
    kept = [[cut(text, limits.max_length) for text in texts] for texts in full]
    kept = [[text for text in texts if text[0]] for texts in kept]
    left = [i for i, texts in enumerate(kept) if texts]  # completions that still train
    if len(left) < min(2, len(completions)):
        count["no trained token left"] += 1
        return None
    ranks = case.ranks or range(len(completions))
    full, kept, ranks = ([column[i] for i in left] for column in (full, kept, ranks))
    pairs = [
        (i, j)
        for i, j in itertools.permutations(range(len(left)), 2)
        if ranks[i] < ranks[j] and kept[i] != kept[j]
    ]
    if len(left) > 1 and not pairs:
        count["chosen equal to rejected"] += 1
        return None
    count["prompts cut"] += most < asked
    count["completions cut"] += sum(map(operator.ne, kept, full))
    count["replies with no trained token left"] += len(completions) - len(left)
    count["pairs tied or equal"] += math.comb(len(left), 2) - len(pairs)

    texts = [text for texts in kept for text in texts]
    first, _ = texts[0]
    n = min(min(mask.index(True), shared(first, ids)) for ids, mask in texts)
    texts = [(ids[n:], mask[n:]) for ids, mask in texts]
    example = Example(first[:n], texts, case.label, case.where)
    example.pairs = pairs or example.pairs
    if len(texts) > len(kept):
        example.completions = [i for i, texts in enumerate(kept) for _ in texts]
    return example


def without(text: Text, start: int, end: int) -> Text:
    """A text without the ids from `start` to `end`; those from the first trained one on stay."""
    ids, mask = text
    end = min(end, mask.index(True))
    return text if start >= end else (ids[:start] + ids[end:], mask[:start] + mask[end:])


def cut(text: Text, room: int | None = None) -> Text:
    """A text up to the last trained one of its first `room` ids: what follows need not be computed.
    Empty, if none of them trains."""
    ids, mask = text
    mask = mask[:room]
    end = len(mask) - mask[::-1].index(True) if True in mask else 0
    return text if end == len(ids) else (ids[:end], mask[:end])


def epoch_order(examples: Examples, epoch: int, seed: int, shuffle: bool = True) -> Examples:
    """The order of epoch number `epoch` (from 0): a function of (seed, epoch) alone. For KTO each
    label's examples are spread evenly, so that each batch has its share of thumbs up."""
    if not shuffle:
        return list(examples)
    rng, spread = random.Random(f"{seed} {epoch}"), []
    for label in (True, False, None):
        group = [example for example in examples if example.label is label]
        rng.shuffle(group)
        # the i-th of n examples comes when (i + 1/2) / n of the epoch is over
        spread += [((i + 0.5) / len(group), i, example) for i, example in enumerate(group)]
    return [example for *_, example in sorted(spread, key=lambda x: x[:2])]


def with_mismatches(order: Examples, max_length: int | None = None) -> Examples:
    """For KTO's z0: each example with its `mismatch` (x, y'). y' is the reply of the nearest
    earlier example, cyclically, that has another prompt: so a batch of one has a partner, too.
    (x, y') is cut to `max_length`, but one token trains. InputError: there is only one prompt."""
    asked, replies = zip(*map(split, order)) if order else ((), ())
    other = next((i for i in reversed(range(len(order))) if asked[i] != asked[0]), None)
    if order and other is None:
        files = ", ".join(dict.fromkeys(e.where.rpartition(", ")[0] for e in order))
        raise InputError(f"{files}: KTO needs two different prompts for its mismatches")
    paired = []
    for i, example in enumerate(order):
        if i and asked[i] != asked[i - 1]:
            other = i - 1
        _, mask = replies[other]
        room = max_length and max(max_length - len(asked[i]), mask.index(True) + 1)
        mismatch = Example(asked[i], [cut(replies[other], room)])
        paired.append(replace(example, mismatch=mismatch))
    return paired


def split(example: Example) -> tuple[Ids, Text]:
    """x and y: what precedes the first token that trains, and the rest of its text."""
    ids, mask = example.texts[0]
    n = mask.index(True)
    return (example.prompt + ids[:n], (ids[n:], mask[n:])) if n else (example.prompt, (ids, mask))


if __name__ == "__main__":  # python -m nanoalign.data: see what a model will be trained on
    runpy.run_module("nanoalign.tools.data", run_name="__main__")
