"""Rows -> examples: ids and masks, truncation, the order of an epoch, batches.

An EXAMPLE is a prompt and its completions: one for SFT and KTO, two (chosen, rejected) for DPO. It
starts as messages, whatever the layout of the file, becomes ids and masks in chatml.py, and is cut
to the limits here. What is cut or skipped is counted and said; a malformed row is an error.
"""

import gc
import math
import random
import re
import runpy
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from nanoalign import InputError
from nanoalign.chatml import encode
from nanoalign.formats.layouts import KTO, label_of, layout_of, read_case, untrainable
from nanoalign.formats.rows import read_rows
from nanoalign.packing import Example

# ------------------------------------------------------------------------ conversations -> examples


@dataclass
class Limits:
    """How long an example may be, in tokens; None: no limit."""

    max_length: int | None = 1024  # prompt and completion; completions are cut from the right
    max_prompt_length: int | None = None
    truncation_mode: str = "keep_end"  # the end of a longer prompt stays, or keep_start


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Millions of lists and no cycle among them: a quarter of the time goes to looking for one."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_no_garbage()
def read_examples(
    sources: list[str],
    layouts: dict,
    tokenizer,
    template,
    limits: Limits | None = None,
    split: str = "train",
    input_as_system: bool = False,
) -> tuple[list[Example], Counter]:
    """Files (or data sets of the hub) -> examples, and a count of what was cut or skipped.

    `layouts` is SFT, DPO or KTO. Raises InputError, naming file and line, for a malformed row, and
    when nothing is left to train on.
    """
    limits, count = limits or Limits(), Counter()
    drafts: list[Example] = []  # their completions whole conversations, and still in pieces
    for source in sources:
        columns, csv = None, source.lower().endswith(".csv")
        for where, row in _rows(source, split):
            count["rows"] += 1
            try:
                columns = columns or layout_of(row, layouts)
                case = read_case(row, columns, layouts, input_as_system)
                labels = [True, False]
                if layouts is KTO and len(case.completions) == 1:
                    labels = [label_of(case.label, csv)]
                if reason := untrainable(case):
                    count[reason] += 1
                    continue
                n = len(case.prompt)
                pieces = [list(template.pieces(case.prompt + c, n)) for c in case.completions]
            except InputError as error:
                raise InputError(f"{where}: {error}") from None
            if layouts is KTO:  # a pair is two examples
                drafts += [Example([], [p], label, where) for p, label in zip(pieces, labels)]
            else:
                drafts.append(Example([], pieces, None, where))

    encoded = iter(encode(tokenizer, [p for draft in drafts for p in draft.completions]))
    examples = []
    for example in drafts:
        whole = [next(encoded) for _ in example.completions]
        start = whole[0][1].index(True)  # the first trained token: the end of the shared prompt
        example.prompt = whole[0][0][:start]
        example.completions = [(ids[start:], mask[start:]) for ids, mask in whole]
        cuts = _cut(example, limits)
        if reason := _lost(example):
            count[reason] += 1
        else:
            count.update(cuts)
            example.number = len(examples)
            examples.append(example)
    count["examples"] = len(examples)
    if not examples:
        names = ", ".join(s if s.isprintable() else repr(s) for s in sources)
        raise InputError(f"{names}: {describe(count)}; expected a row to train on")
    return examples, count


CUTS = ("prompts cut", "completions cut")
SKIPS = ("empty completion", "chosen equal to rejected", "no trained token left")


def describe(count: Counter) -> str:
    """What became of the rows, in one line."""
    cut = [f"{count[key]} {key}" for key in CUTS if count[key]]
    skipped = [f"{count[key]} skipped: {key}" for key in SKIPS if count[key]]
    return "; ".join([f"{count['rows']} rows, {count['examples']} examples", *cut, *skipped])


def on_hub(source: str) -> bool:
    """Is it a data set of the hub: name or owner/name, and no such path here?"""
    path = Path(source)
    named = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source)
    folder = "/" in source and path.parent.exists()
    file = path.exists() or path.suffix.lower() in (".json", ".jsonl", ".csv")
    return bool(named) and not folder and not file


def _rows(source: str, split: str) -> Iterable[tuple[str, dict]]:
    """(where, row) of a file, or of a data set of the hub."""
    if not on_hub(source):
        return read_rows(source)  # says so if it is not there
    try:
        from datasets import load_dataset
    except ImportError:
        extra = "to read it from the hub: pip install 'nanoalign[hub]'"
        raise InputError(f"{source}: no such file; {extra}") from None
    try:
        dataset = load_dataset(source, split=split)
    except Exception as error:  # of many kinds: no network, no such name, no such split
        why = " ".join(str(error).split())[:200]
        raise InputError(f"{source}: no such file, and the hub says: {why}") from None
    return ((f"{source}[{split}], row {i}", row) for i, row in enumerate(dataset, 1))


def _cut(example: Example, limits: Limits) -> Counter:
    """Cut an example to the limits in place, and count what was cut."""
    cuts, longest = Counter(), limits.max_prompt_length
    if longest is not None and len(example.prompt) > longest:
        start = len(example.prompt) - longest if limits.truncation_mode == "keep_end" else 0
        example.prompt = example.prompt[start : start + longest]
        cuts["prompts cut"] += 1
    room = math.inf if limits.max_length is None else limits.max_length - len(example.prompt)
    for i, (ids, mask) in enumerate(example.completions):
        end = _last(mask)  # what follows the last trained token need not be computed
        if end > room:
            end = _last(mask[: max(0, room)])
            cuts["completions cut"] += 1
        example.completions[i] = ids[:end], mask[:end]
    return cuts


def _lost(example: Example) -> str | None:
    """Why there is nothing left to train on."""
    if not all(ids for ids, _ in example.completions):
        return "no trained token left"
    if len(example.completions) == 2 and example.completions[0] == example.completions[1]:
        return "chosen equal to rejected"
    return None


def _last(mask: list[bool]) -> int:
    """The number of tokens up to the last trained one."""
    return len(mask) - mask[::-1].index(True) if True in mask else 0


# -------------------------------------------------------------------------------- order and batches


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


def with_mismatches(order: list[Example]) -> list[Example]:
    """For KTO's y': each example with its `mismatch`, the nearest earlier example of the epoch,
    cyclically, that has another prompt.

    It depends on the order alone, not on the batch size: a batch of one has a partner, and no tail
    meets itself. Raises InputError when all prompts are the same.
    """
    n, other, paired = len(order), None, []
    for i in range(1 - n, n):  # twice round: the first round finds who precedes the first example
        if order[i - 1].prompt != order[i].prompt:
            other = order[i - 1]
        if i >= 0:
            paired.append(replace(order[i], mismatch=other))
    if order and other is None:
        raise InputError("KTO needs two different prompts: no mismatched completion exists")
    return paired


def batches(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]


if __name__ == "__main__":  # python -m nanoalign.data: see what a model will be trained on
    runpy.run_module("nanoalign.tools.data", run_name="__main__")
