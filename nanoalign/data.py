"""Conversations -> examples: ids, masks, what fits the limits; and the order of an epoch.

A CASE is what somebody stored, as messages: a prompt and its completions, one for SFT and KTO, two
(chosen, rejected) for DPO. An EXAMPLE is the same as ids and masks, cut to the limits. Completions
are cut from the right, and no further than the last token that trains. What is cut or left out is
counted, so that it can be said; the big libraries cut in silence.
"""

import math
import random
import runpy
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from nanoalign import InputError
from nanoalign.chatml import Message, encode
from nanoalign.packing import Completion, Example


@dataclass(slots=True)
class Case:
    """A prompt and the completions that share it, as messages; each begins with a reply."""

    prompt: list[Message]
    completions: list[list[Message]]
    label: bool | None = None  # KTO: thumbs up or down
    where: str = ""  # file and line


@dataclass
class Limits:
    """How long an example may be, in tokens; None: no limit."""

    max_length: int | None = 1024  # prompt and completion; completions are cut from the right
    max_prompt_length: int | None = None
    truncation_mode: str = "keep_end"  # the end of a longer prompt stays, or keep_start


def make_examples(
    cases: Iterable[Case], tokenizer, template, limits: Limits | None = None
) -> tuple[list[Example], Counter]:
    """Cases -> examples, numbered from 0, and a count of what was cut or skipped.

    Everything is encoded in one call of the tokenizer. Raises InputError, naming the case, where
    the template refuses a conversation.
    """
    limits = limits or Limits()
    conversations, origins = [], []  # pieces; of each case: how many of them, label, where
    for number, case in enumerate(cases, start=1):
        n = len(case.prompt)
        try:
            conversations += [list(template.pieces(case.prompt + c, n)) for c in case.completions]
        except InputError as error:
            raise InputError(f"{case.where or f'case {number}'}: {error}") from None
        origins.append((len(case.completions), case.label, case.where))

    encoded = iter(encode(tokenizer, conversations))
    longest = math.inf if limits.max_length is None else limits.max_length
    examples, count = [], Counter()
    for completions, label, where in origins:
        whole = [next(encoded) for _ in range(completions)]
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
            examples.append(Example(prompt, kept, label, where, number=len(examples)))
    count["examples"] = len(examples)
    return examples, +count  # without what was counted 0 times


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


def epoch_order(
    examples: list[Example], epoch: int, seed: int, shuffle: bool = True
) -> list[Example]:
    """The examples as epoch number `epoch` (from 0) sees them: a function of (seed, epoch) alone.

    With labels (KTO) each label's examples are permuted, and the two lists are merged evenly, so
    that every stretch of the epoch has its share of thumbs up, whatever the batch size.
    """
    if not shuffle:
        return list(examples)
    rng = random.Random(f"{seed} {epoch}")
    places = []  # (place within the epoch, in 0..1; tie-break; example)
    for label in (True, False, None):
        group = [example for example in examples if example.label is label]
        rng.shuffle(group)
        places += [((i + 0.5) / len(group), i, example) for i, example in enumerate(group)]
    return [example for *_, example in sorted(places, key=lambda place: place[:2])]


def with_mismatches(order: list[Example], max_length: int | None = None) -> list[Example]:
    """For KTO's y': each example with its `mismatch`, the completion of the nearest earlier example
    of the epoch, cyclically, that has another prompt.

    It depends on the order alone, so a batch of one has a partner too. With the prompt that it is
    put behind, y' has at most `max_length` tokens, and at least one that trains. Raises InputError
    when all prompts are the same.
    """
    if not order:
        return []
    other = next((e for e in reversed(order) if e.prompt != order[0].prompt), None)
    if other is None:
        files = dict.fromkeys(e.where.rpartition(", ")[0] for e in order)
        fault = "KTO needs two different prompts: no mismatched completion exists"
        raise InputError(f"{', '.join(files)}: {fault}")
    longest, paired = math.inf if max_length is None else max_length, []
    for before, example in zip([order[0], *order], order):
        if before.prompt != example.prompt:
            other = before
        [(ids, mask)] = other.completions
        room = max(longest - len(example.prompt), mask.index(True) + 1)
        paired.append(replace(example, mismatch=cut((ids, mask), room)))
    return paired


if __name__ == "__main__":  # python -m nanoalign.data: see what a model will be trained on
    runpy.run_module("nanoalign.tools.data", run_name="__main__")
