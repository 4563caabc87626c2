"""Layouts: rows of files -> cases, which are checked messages; and on to examples.

Each way to store conversations is a layout: the columns that tell it apart, and a function of a row
and these columns that makes a Case. A new layout is one more entry in SFT, DPO or KTO, and here
only. Where a column holds messages, they may be {"role": ..., "content": ...} or ShareGPT's
{"from": ..., "value": ...}; where it holds one turn, a string will do. A column `system`, if it is
there and not empty, is the first turn.

What comes out has been checked: roles are known, turns are in order, contents are text. What is
wrong raises InputError, with file and line in front.
"""

import gc
from collections import Counter
from collections.abc import Callable, Iterator

from nanoalign import InputError
from nanoalign.data import Case, Examples, Limits, make_examples
from nanoalign.formats.columns import kind_of, label_of, listed, text_of, turns_of
from nanoalign.formats.rows import rows_of

Layouts = dict[tuple[str, ...], Callable[..., Case]]  # of a method: columns -> what reads them


def answered(row: dict, asked: str, *replies: str) -> Case:
    """A column with the prompt, and one with each reply to it, which may repeat the prompt."""
    prompt = turns_of(row, asked, "user")
    completions, n = [turns_of(row, reply, "assistant") for reply in replies], len(prompt)
    return Case(prompt, [c[n:] if c[:n] == prompt else c for c in completions])


def every_reply(row: dict, column: str) -> Case:
    """A whole conversation, of which every reply trains: the prompt ends before the first, or, if
    the first ones have OpenAI's weight 0, before the first that has not."""
    messages = turns_of(row, column)
    replies = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    trained = [i for i in replies if "weight" not in messages[i]]
    first = min(trained or replies, default=len(messages))
    return Case(messages[:first], [messages[first:]])


def last_reply(row: dict, *columns: str) -> Case:
    """Whole conversations, of which the last reply is judged. What they share is the prompt."""
    conversations = [turns_of(row, column) for column in columns]
    first, second = conversations[0], conversations[-1]
    last = min(len(first), len(second)) - 1
    n = next((i for i in range(last) if first[i] != second[i]), last)
    return Case(first[:n], [conversation[n:] for conversation in conversations])


def alpaca(row: dict, asked: str, *replies: str) -> Case:
    """Alpaca's instruction; its input, where there is one, follows after a newline."""
    if extra := text_of(row, "input"):
        *before, last = turns_of(row, asked, "user")
        if last["role"] != "user":
            raise InputError(f"input: follows no user turn; expected one as the end of {asked}")
        content = f"{last['content']}\n{extra}" if last["content"] else extra
        row = {**row, asked: [*before, {"role": "user", "content": content}]}
    return answered(row, asked, *replies)


def alpaca_pair(row: dict, asked: str, replies: str) -> Case:
    """The same with a list of two replies, the good one first."""
    pair = row[replies]
    if not isinstance(pair, list) or len(pair) != 2:
        found = f"a list of {len(pair)}" if isinstance(pair, list) else kind_of(pair)
        raise InputError(f"{replies}: {found}; expected a list of two replies, [good, bad]")
    good, bad = f"good {replies}", f"bad {replies}"
    return alpaca({**row, good: pair[0], bad: pair[1]}, asked, good, bad)


SFT = {
    ("messages",): every_reply,
    ("prompt", "completion"): answered,
    ("instruction", "output"): alpaca,
    ("question", "chosen"): answered,
    ("conversations",): every_reply,
}
DPO = {
    ("prompt", "chosen", "rejected"): answered,
    ("question", "chosen", "rejected"): answered,
    ("instruction", "output"): alpaca_pair,
    ("conversations", "chosen", "rejected"): answered,
    ("chosen", "rejected"): last_reply,
}
KTO = {
    ("prompt", "completion", "label"): answered,  # which is given all columns but `label`
    ("messages", "label"): last_reply,
    **DPO,  # in labels, a pair is two examples
}


def read_examples(
    sources: list[str], layouts: Layouts, tokenizer, template, limits: Limits | None = None, **how
) -> tuple[Examples, Counter]:
    """Files (or data sets of the hub) -> examples, and a count of what was cut or skipped.

    `layouts` is SFT, DPO or KTO; `how` holds what else read_cases takes. Raises InputError, naming
    file and line, for a malformed row, and when nothing is left to train on.
    """
    count = Counter()
    cases = read_cases(sources, layouts, count, **how)
    collects = gc.isenabled()
    gc.disable()  # millions of lists come and go: looking for cycles costs a third of the time
    try:
        examples, cuts = make_examples(cases, tokenizer, template, limits)
    finally:
        if collects:
            gc.enable()
    count.update(cuts)
    if not examples:
        raise InputError(f"{', '.join(sources)}: {describe(count)}; expected a row to train on")
    return examples, count


def describe(count: Counter) -> str:
    """What became of the rows, in one line."""
    said = [f"{count['rows']} rows, {count['examples']} examples"]
    said += [f"{count[key]} {key}" for key in ("prompts cut", "completions cut") if count[key]]
    skips = ("empty completion", "chosen equal to rejected", "no trained token left")
    return "; ".join(said + [f"{count[key]} skipped: {key}" for key in skips if count[key]])


def read_cases(
    sources: list[str], layouts: Layouts, count: Counter, split="train", input_as_system=False
) -> Iterator[Case]:
    """The rows of all sources as cases, one by one; `count` counts rows, and which are skipped."""
    labelled = any("label" in columns for columns in layouts)
    for source in sources:
        columns = None
        for where, row in rows_of(source, split):
            count["rows"] += 1
            try:
                columns = columns or layout_of(row, layouts)
                case = read_case(row, columns, layouts, input_as_system)
                if "label" in columns:
                    case.label = label_of(row["label"], source.lower().endswith(".csv"))
            except InputError as error:
                raise InputError(f"{where}: {error}") from None
            case.where, pair = where, case.completions
            replies = [m["content"] for c in pair for m in c if m["role"] == "assistant"]
            if not all(map(str.strip, replies)):  # white space teaches nothing either
                count["empty completion"] += 1
            elif pair[1:] == pair[:1]:
                count["chosen equal to rejected"] += 1
            elif labelled and len(pair) == 2:
                for completion, label in zip(pair, (True, False)):
                    yield Case(case.prompt, [completion], label, where)
            else:
                yield case


def layout_of(row: dict, layouts: Layouts) -> tuple[str, ...]:
    """The columns of the first layout that finds all of them in the row."""
    for columns in layouts:
        if set(columns) <= row.keys():
            return columns
    known = "; ".join(", ".join(columns) for columns in layouts)
    raise InputError(f"columns {listed(row)} make no known layout; expected one of: {known}")


def read_case(row: dict, columns: tuple, layouts: Layouts, input_as_system: bool = False) -> Case:
    """A row as a checked prompt and its completions, each of which begins with a reply."""
    for column in columns:
        if column not in row:
            raise InputError(f"no column {column}; expected one, as in the file's first row")
    system = text_of(row, "system")
    if input_as_system and (extra := text_of(row, "input")):
        if system:
            raise InputError("system and input are both there; expected one (--input_as_system)")
        system, row = extra, {**row, "input": ""}
    case = layouts[columns](row, *(c for c in columns if c != "label"))
    if system:
        case.prompt = [{"role": "system", "content": system}, *case.prompt]
    for completion in case.completions:
        _check_turns([m["role"] for m in case.prompt], [m["role"] for m in completion])
        for turn, message in enumerate(completion, len(case.prompt) + 1):
            if "weight" in message:  # all replies of a completion train
                expected = "that only before the first reply that trains"
                raise InputError(f"turn {turn} has weight 0; expected {expected}")
    return case


def _check_turns(prompt: list[str], completion: list[str]) -> None:
    """Are these roles in an order that a template can write, and does a reply come first?"""
    roles = prompt + completion
    if "assistant" not in roles:
        raise InputError("no assistant turn; expected a reply to learn from")
    if roles[-1] != "assistant":
        raise InputError(f"the last turn is the {roles[-1]}'s; expected the assistant's")
    if "system" in roles[1:]:
        raise InputError(f"turn {roles.index('system', 1) + 1} is a system turn; expected it first")
    for i, both in enumerate(zip(roles, roles[1:]), 1):
        if both == ("assistant", "assistant"):
            raise InputError(f"turns {i} and {i + 1} are both the assistant's; expected another's")
    if completion[:1] != ["assistant"]:
        found = f"begins with the {completion[0]}" if completion else "has no turn"
        raise InputError(f"a completion {found} after the prompt; expected the assistant")
