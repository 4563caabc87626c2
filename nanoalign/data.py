"""Conversations -> examples, and the order of an epoch.

A Case has messages: a line of a data file, after its layout was read. An Example has token ids and
masks, cut to the limits. Each reply trains after the same tokens that generation would put before
it, so the template writes a text for each reply. If one text begins another, the two become one: in
ChatML they do, unless there are thoughts. All that is cut or left out is counted.
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
    """A prompt and its completions as messages: one completion, or two and more for DPO. In a
    completion all assistant messages train, except those with "train": False."""

    prompt: list[Message]
    completions: list[list[Message]]
    label: bool | None = None  # KTO: thumbs up or down
    where: str = ""  # file and line
    tools: list[dict] = field(default_factory=list)  # JSON schemas of what the model may call
    ranks: list[float] | None = None  # of the completions, lower is better; None: 0, 1, 2 ...


@dataclass
class Limits:
    """How many tokens an example may have. None: no limit."""

    max_length: int | None = 1024  # of each text with its prompt; the end is cut off
    max_prompt_length: int | None = None  # of all that comes before the first trained token
    truncation_mode: str = "keep_end"  # the part of a longer prompt that stays; or keep_start


def make_examples(cases, tokenizer, template, limits=None) -> tuple[Examples, Counter]:
    """Cases -> examples, and a count of what was cut or skipped. The tokenizer gets a thousand
    cases at once, which is faster. InputError: the template can't write a conversation."""

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
    return examples, count + Counter(examples=len(examples))  # the sum drops counts of 0


def texts_of(case: Case, completion: list[Message], template) -> list[list[Piece]]:
    """The texts, in pieces, of a completion's replies. Each reply trains in one of the texts."""
    messages, texts = case.prompt + completion, []
    for end, message in enumerate(completion, len(case.prompt) + 1):
        if message["role"] == "assistant" and message.get("train", True):
            text = list(template.pieces(messages[:end], case.tools))
            last = texts[-1] if texts else []
            if [piece for piece, _ in last] == [piece for piece, _ in text[: len(last)]]:
                # this text begins as the last one and replaces it: the replies of both train in it
                text[: len(last)] = [(p, old or new) for (p, old), (_, new) in zip(last, text)]
                texts = texts[:-1]
            texts.append(text)
    return texts


def make_example(
    case: Case, completions: list[list[Text]], limits: Limits, count: Counter
) -> Example | None:
    """A case's example, from the encoded texts of its completions. None: nothing would train."""
    if not all(completions):
        count["no reply that trains"] += 1
        return None
    asked = completions[0][0][1].index(True)  # how many tokens come before the first trained one
    most = asked if limits.max_prompt_length is None else min(asked, limits.max_prompt_length)
    gone = (0, asked - most) if limits.truncation_mode == "keep_end" else (most, asked)
    full = [[cut(without(text, *gone)) for text in texts] for texts in completions]
    kept = [[cut(text, limits.max_length) for text in texts] for texts in full]
    kept = [[text for text in texts if text[0]] for texts in kept]
    left = [i for i, texts in enumerate(kept) if texts]  # completions with a trained token left
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
    """A text without the ids from `start` to `end`. From the first trained id on all ids stay."""
    ids, mask = text
    end = min(end, mask.index(True))
    return text if start >= end else (ids[:start] + ids[end:], mask[:start] + mask[end:])


def cut(text: Text, room: int | None = None) -> Text:
    """The first `room` ids of a text, up to the last one that trains, since nothing depends on
    later ones. Empty, if none of them trains."""
    ids, mask = text
    mask = mask[:room]
    end = len(mask) - mask[::-1].index(True) if True in mask else 0
    return text if end == len(ids) else (ids[:end], mask[:end])


def epoch_order(examples: Examples, epoch: int, seed: int, shuffle: bool = True) -> Examples:
    """The examples in the order of an epoch, counted from 0. It depends on (seed, epoch) only, so a
    run can be resumed. For KTO both labels are spread evenly, so that each batch has both."""
    if not shuffle:
        return list(examples)
    rng, spread = random.Random(f"{seed} {epoch}"), []
    for label in (True, False, None):
        group = [example for example in examples if example.label is label]
        rng.shuffle(group)
        # example i of n comes after a share (i + 1/2) / n of the epoch
        spread += [((i + 0.5) / len(group), i, example) for i, example in enumerate(group)]
    return [example for *_, example in sorted(spread, key=lambda x: x[:2])]


def with_mismatches(order: Examples, max_length: int | None = None) -> Examples:
    """The examples with a `mismatch` for KTO's z0: prompt x with y', the reply of another example.
    It is the nearest earlier one with another prompt; before the first comes the last. A mismatch
    is cut to `max_length`, but keeps one trained token. InputError: all prompts are equal."""
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
    """(x, y): the ids before the first trained one, and the rest of the first text."""
    ids, mask = example.texts[0]
    n = mask.index(True)
    return (example.prompt + ids[:n], (ids[n:], mask[n:])) if n else (example.prompt, (ids, mask))


if __name__ == "__main__":  # python -m nanoalign.data shows what a model will be trained on
    runpy.run_module("nanoalign.tools.data", run_name="__main__")
