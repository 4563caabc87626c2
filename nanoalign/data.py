"""Conversations -> examples: ids, masks, what fits the limits; and the order of an epoch.

A CASE is what somebody stored, as messages. An EXAMPLE is the same as ids and masks, cut to the
limits: completions from the right, and no further than the last token that trains. What is cut or
left out is counted, so that it can be said; the big libraries cut in silence.
"""

import itertools
import math
import random
import runpy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from heapq import merge

from nanoalign import InputError
from nanoalign.chatml import Message, Piece, encode
from nanoalign.fast.many import Kept, Lazy  # sequences, as a list of examples but small
from nanoalign.packing import Completion, Example

Examples = Sequence[Example]  # a list of them, or one that makes each when it is asked for


@dataclass(slots=True)
class Case:
    """A prompt and its completions (DPO: the best first), as messages, each a reply at first."""

    prompt: list[Message]
    completions: list[list[Message]]
    label: bool | None = None  # KTO: thumbs up or down
    where: str = ""  # file and line
    tools: list[dict] = field(default_factory=list)  # what the assistant may call
    ranks: list[float] | None = None  # of completions: lower is better, equal a tie; None: 0, 1, 2


@dataclass
class Limits:
    """How long an example may be, in tokens; None: no limit."""

    max_length: int | None = 1024  # prompt and completion; completions are cut from the right
    max_prompt_length: int | None = None
    truncation_mode: str = "keep_end"  # the end of a longer prompt stays, or keep_start


def make_examples(cases, tokenizer, template, limits=None) -> tuple[Examples, Counter]:
    """Cases -> examples, numbered from 0, and a count of what was cut (see Limits) or skipped.

    A thousand cases are encoded in one call of the tokenizer, and gone before the next are drawn.
    Raises InputError, naming the case, where the template refuses a conversation.
    """

    def in_pieces(number: int, case: Case) -> tuple[Case, list[list[Piece]]]:
        n = len(case.prompt)
        try:
            return case, [list(template.pieces(case.prompt + c, n)) for c in case.completions]
        except InputError as error:
            raise InputError(f"{case.where or f'case {number}'}: {error}") from None

    limits, conversations = limits or Limits(), map(in_pieces, itertools.count(1), cases)
    longest = math.inf if limits.max_length is None else limits.max_length
    examples, count = Kept(Example), Counter()
    while part := list(itertools.islice(conversations, 1000)):
        encoded = iter(encode(tokenizer, [pieces for _, pair in part for pieces in pair]))
        for case, pair in part:
            whole = [next(encoded) for _ in pair]
            start = whole[0][1].index(True)  # the first trained token: the end of the shared prompt
            prompt = cut_prompt(whole[0][0][:start], limits)
            replies = [cut((ids[start:], mask[start:])) for ids, mask in whole]
            kept = [cut(reply, longest - len(prompt)) for reply in replies]
            if not all(ids for ids, _ in kept):
                count["no trained token left"] += 1
            elif len(kept) == 2 and kept[0] == kept[1]:
                count["chosen equal to rejected"] += 1
            else:
                count["prompts cut"] += len(prompt) < start
                count["completions cut"] += sum(a != b for a, b in zip(kept, replies))
                examples.append(prompt, kept, case.label, case.where, len(examples))
    return examples, count + Counter(examples=len(examples))  # without what was counted 0 times


def cut_prompt(ids: list[int], limits: Limits) -> list[int]:
    """The end of a prompt that is longer than it may be, or its start."""
    longest = len(ids) if limits.max_prompt_length is None else limits.max_prompt_length
    start = max(0, len(ids) - longest) if limits.truncation_mode == "keep_end" else 0
    return ids[start : start + longest]


def cut(completion: Completion, room: float = math.inf) -> Completion:
    """A completion up to the last trained one of its first `room` tokens: what follows that token
    need not be computed. Empty, if none of them trains."""
    ids, mask = completion
    mask = mask[: max(0, min(room, len(mask)))]
    end = len(mask) - mask[::-1].index(True) if True in mask else 0
    return completion if end == len(ids) else (ids[:end], mask[:end])


def epoch_order(examples: Examples, epoch: int, seed: int, shuffle: bool = True) -> Examples:
    """The examples as epoch number `epoch` (from 0) sees them: a function of (seed, epoch) alone.

    With labels (KTO) each label's examples are permuted, and the two lists are merged evenly, so
    that every stretch of the epoch has its share of thumbs up, whatever the batch size.
    """
    order = range(len(examples))
    if shuffle:
        rng, labels = random.Random(f"{seed} {epoch}"), [example.label for example in examples]
        groups = [[i for i in order if labels[i] is label] for label in (True, False, None)]
        for group in groups:
            rng.shuffle(group)
        # the i-th of a label's n examples has its place at (i + 1/2) / n of the epoch
        queues = [zip(range(len(group)), itertools.repeat(len(group)), group) for group in groups]
        order = [e for *_, e in merge(*queues, key=lambda x: ((x[0] + 0.5) / x[1], x[0]))]
    return Lazy(examples.__getitem__, order)


def with_mismatches(order: Examples, max_length: int | None = None) -> Examples:
    """For KTO's y': each example with its `mismatch`, the completion of the nearest earlier example
    of the epoch, cyclically, that has another prompt.

    It depends on the order alone, so a batch of one has a partner too. Behind its new prompt y' has
    at most `max_length` tokens with it, one that trains at least. InputError: all prompts are one.
    """
    before, others = order[0].prompt if order else [], []  # of each example: where its y' is
    other = next((i for i in reversed(range(len(order))) if order[i].prompt != before), None)
    if order and other is None:
        files = ", ".join(dict.fromkeys(e.where.rpartition(", ")[0] for e in order))
        raise InputError(f"{files}: KTO needs two different prompts for its mismatches")
    for i, example in enumerate(order):
        if example.prompt != before:
            other, before = i - 1, example.prompt
        others.append(other)

    def paired(i: int) -> Example:
        example, [(ids, mask)] = order[i], order[others[i]].completions
        room = max((max_length or math.inf) - len(example.prompt), mask.index(True) + 1)
        return replace(example, mismatch=cut((ids, mask), room))

    return Lazy(paired, range(len(order)))


if __name__ == "__main__":  # python -m nanoalign.data: see what a model will be trained on
    runpy.run_module("nanoalign.tools.data", run_name="__main__")
