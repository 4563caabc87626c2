"""Rows -> examples: ids and masks, truncation, the order of an epoch, batches.

An EXAMPLE is a prompt and its completions: one for SFT and KTO, two (chosen, rejected) for DPO. It
starts as messages, whatever the layout of the file, becomes ids and masks in chatml.py, and is cut
to the limits here. What is cut or skipped is counted and said; a malformed row is an error.
"""

import random
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from nanoalign import InputError
from nanoalign.chatml import encode
from nanoalign.files import read_rows
from nanoalign.layouts import KTO, SFT, conversations, label_of, layout_of, require, untrainable
from nanoalign.packing import Completion


@dataclass(slots=True)
class Example:
    prompt: list[int]  # ids, the reply's header included
    completions: list[Completion]  # (ids, mask of trained tokens) each
    label: bool | None = None  # KTO: thumbs up or down
    where: str = ""  # file and line
    number: int = 0  # its place in the data, from 0
    mismatch: "Example | None" = None  # KTO: whose completion stands in for y'

    def __len__(self) -> int:
        """Tokens of all its sequences, a shared prompt counted in each, as TRL counts them."""
        return sum(len(self.prompt) + len(ids) for ids, _ in self.completions)


# ------------------------------------------------------------------------ conversations -> examples


@dataclass
class Limits:
    """How long an example may be, in tokens; None: no limit."""

    max_length: int | None = 1024  # prompt and completion; completions are cut from the right
    max_prompt_length: int | None = None
    truncation_mode: str = "keep_end"  # the end of a longer prompt stays, or keep_start


def read_examples(
    sources: list[str],
    layouts: dict,
    tokenizer,
    template,
    limits: Limits = Limits(),
    split: str = "train",
    input_as_system: bool = False,
) -> tuple[list[Example], Counter]:
    """Files (or data sets of the hub) -> examples, and a count of what was cut or skipped.

    `layouts` is SFT, DPO or KTO. Raises InputError, naming file and line, for a malformed row, and
    when nothing is left to train on.
    """
    count: Counter = Counter()
    pending: list[Example] = []  # completions still in pieces
    for source in sources:
        columns = None
        for where, row in _rows(source, split):
            count["rows"] += 1
            try:
                columns = columns or layout_of(row, layouts)
                require(row, columns)
                case = layouts[columns](row, input_as_system)
                prompt, completions = conversations(case, whole=layouts is SFT)
                if reason := untrainable(completions):
                    count[reason] += 1
                    continue
                pieces = [list(template.pieces(prompt + c, len(prompt))) for c in completions]
                if layouts is not KTO:
                    pending.append(Example([], pieces, None, where))
                elif len(pieces) == 2:
                    pending += [Example([], [p], up, where) for p, up in zip(pieces, (True, False))]
                else:
                    pending.append(Example([], pieces, label_of(case.label, source), where))
            except InputError as error:
                raise InputError(f"{where}: {error}") from None

    encoded = iter(encode(tokenizer, [p for example in pending for p in example.completions]))
    examples = []
    for example in pending:
        whole = [next(encoded) for _ in example.completions]
        starts = [mask.index(True) for _, mask in whole]  # the first trained token: a prompt's end
        example.prompt = whole[0][0][: starts[0]]
        example.completions = [(ids[s:], mask[s:]) for s, (ids, mask) in zip(starts, whole)]
        if _cut(example, limits, count):
            example.number = len(examples)
            examples.append(example)
    if not examples:
        raise InputError(f"{', '.join(sources)}: no row left to train on: {describe(count)}")
    count["examples"] = len(examples)
    return examples, count


def describe(count: Counter) -> str:
    """What became of the rows, in one line."""
    cut = [f"{count[key]} {key}" for key in CUTS if count[key]]
    skipped = [f"{count[key]} skipped: {key}" for key in SKIPS if count[key]]
    return "; ".join([f"{count['rows']} rows, {count['examples']} examples", *cut, *skipped])


CUTS = ("prompts cut", "completions cut")
SKIPS = ("empty completion", "chosen equal to rejected", "no trained token left")


def _rows(source: str, split: str):
    if Path(source).exists() or "." in Path(source).name and "/" not in source:
        return read_rows(source)
    if source.count("/") > 1 or source.startswith((".", "/")):
        return read_rows(source)  # which says that it is not there
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError(
            f"{source}: no such file; to read it from the hub: pip install 'nanoalign[hub]'"
        ) from None
    try:
        dataset = load_dataset(source, split=split)
    except Exception as error:
        raise InputError(f"{source}: no such file, and the hub says: {error!s:.200}") from None
    return ((f"{source}[{split}], row {i}", row) for i, row in enumerate(dataset, 1))


def _cut(example: Example, limits: Limits, count: Counter) -> bool:
    """Cut an example to the limits in place; False when it has nothing left to train on."""
    longest = limits.max_prompt_length
    if longest is not None and len(example.prompt) > longest:
        count["prompts cut"] += 1
        end = limits.truncation_mode == "keep_end"
        example.prompt = example.prompt[-longest:] if end else example.prompt[:longest]
    if limits.max_length is not None:
        room = max(0, limits.max_length - len(example.prompt))
        count["completions cut"] += sum(_last(mask) > room for _, mask in example.completions)
        example.completions = [(ids[:room], mask[:room]) for ids, mask in example.completions]
    example.completions = [(i[: _last(m)], m[: _last(m)]) for i, m in example.completions]
    if not all(ids for ids, _ in example.completions):
        count["no trained token left"] += 1
        return False
    if len(example.completions) == 2 and example.completions[0] == example.completions[1]:
        count["chosen equal to rejected"] += 1
        return False
    return True


def _last(mask: list[bool]) -> int:
    """The number of tokens up to the last trained one: what follows it need not be computed."""
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
    paired = []
    for i, example in enumerate(order):
        earlier = (order[i - back] for back in range(1, len(order)))
        partner = next((e for e in earlier if e.prompt != example.prompt), None)
        if partner is None:
            raise InputError("KTO needs two different prompts: no mismatched completion exists")
        paired.append(replace(example, mismatch=partner))
    return paired


def batches(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]
