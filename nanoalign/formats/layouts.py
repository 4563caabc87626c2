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
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from nanoalign import InputError
from nanoalign.chatml import ROLES, Message
from nanoalign.data import Case, Example, Limits, describe, make_examples
from nanoalign.formats.rows import rows_of, shown

MESSAGE_KEYS = ("role", "content"), ("from", "value")


def answered(row: dict, asked: str, *replies: str) -> Case:
    """A column with the prompt, and one with each reply to it."""
    return Case(_turns(row[asked], asked, "user"), [_reply(row[name], name) for name in replies])


def whole(row: dict, *columns: str) -> Case:
    """Columns with a whole conversation each: more than a string can say."""
    return Case([], [_turns(row[name], name) for name in columns])


def alpaca(row: dict, asked: str, reply: str) -> Case:
    """Alpaca's instruction; its input, where there is one, follows after a newline."""
    return Case(_instruction(row, asked), [_reply(row[reply], reply)])


def alpaca_pair(row: dict, asked: str, replies: str) -> Case:
    """The same with a list of two replies, the good one first."""
    messages, pair = _instruction(row, asked), row[replies]
    if not isinstance(pair, list) or len(pair) != 2:
        found = f"a list of {len(pair)}" if isinstance(pair, list) else _name(pair)
        raise InputError(f"{replies}: {found}; expected a list of two replies, [good, bad]")
    names = (f"good {replies}", f"bad {replies}")
    return Case(messages, [_turns(r, name, "assistant") for r, name in zip(pair, names)])


@dataclass(frozen=True)
class Layouts:
    """The layouts of a method, and what else its files mean."""

    by_columns: dict[tuple[str, ...], Callable[..., Case]]  # the first whose columns are all there
    every_reply: bool = False  # of a whole conversation every reply trains, not only the last
    labels: bool = False  # each reply has its own label: a pair is two examples


SFT = Layouts(
    {
        ("messages",): whole,
        ("prompt", "completion"): answered,
        ("instruction", "output"): alpaca,
        ("question", "chosen"): answered,
        ("conversations",): whole,
    },
    every_reply=True,
)
DPO = Layouts(
    {
        ("prompt", "chosen", "rejected"): answered,
        ("question", "chosen", "rejected"): answered,
        ("instruction", "output"): alpaca_pair,
        ("conversations", "chosen", "rejected"): answered,
        ("chosen", "rejected"): whole,
    }
)
KTO = Layouts(
    {
        ("prompt", "completion", "label"): answered,  # which is given all columns but `label`
        ("messages", "label"): whole,
        **DPO.by_columns,
    },
    labels=True,
)


# ------------------------------------------------------------------------- sources -> examples


def read_examples(
    sources: list[str],
    layouts: Layouts,
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
    count = Counter()
    cases = read_cases(sources, layouts, split, input_as_system, count)
    collects = gc.isenabled()
    gc.disable()  # there are millions of lists: looking for cycles costs a quarter of the time
    try:
        examples, cuts = make_examples(cases, tokenizer, template, limits or Limits())
    finally:
        if collects:
            gc.enable()
    count.update(cuts)
    if not examples:
        names = ", ".join(s if s.isprintable() else repr(s) for s in sources)
        raise InputError(f"{names}: {describe(count)}; expected a row to train on")
    return examples, count


def read_cases(
    sources: list[str], layouts: Layouts, split: str, input_as_system: bool, count: Counter
) -> Iterator[Case]:
    """The rows of all sources as cases, one by one; `count` counts rows, and which are skipped."""
    for source in sources:
        columns, csv = None, source.lower().endswith(".csv")
        for where, row in rows_of(source, split):
            count["rows"] += 1
            try:
                columns = columns or layout_of(row, layouts)
                case = read_case(row, columns, layouts, input_as_system)
                if "label" in columns:
                    case.label = label_of(row["label"], csv)
            except InputError as error:
                raise InputError(f"{where}: {error}") from None
            case.where = where
            if reason := untrainable(case):
                count[reason] += 1
            elif layouts.labels and len(case.completions) == 2:
                for completion, label in zip(case.completions, (True, False)):
                    yield replace(case, completions=[completion], label=label)
            else:
                yield case


def layout_of(row: dict, layouts: Layouts) -> tuple[str, ...]:
    """The columns of the first layout that finds all of them in the row."""
    for columns in layouts.by_columns:
        if set(columns) <= row.keys():
            return columns
    known = "; ".join(", ".join(columns) for columns in layouts.by_columns)
    raise InputError(f"columns {_list(row)} make no known layout; expected one of: {known}")


def read_case(row: dict, columns: tuple, layouts: Layouts, input_as_system: bool = False) -> Case:
    """A row as a checked prompt and its completions, each of which begins with a reply."""
    for column in columns:
        if column not in row:
            raise InputError(f"no column {column}; expected one, as in the file's first row")
    system, extra = _text(row, "system"), _text(row, "input")
    if input_as_system:
        if system and extra:
            raise InputError("system and input are both there; expected one (--input_as_system)")
        system, row = system or extra, {**row, "input": ""}

    case = layouts.by_columns[columns](row, *(c for c in columns if c != "label"))
    n = len(case.prompt)  # completions may repeat their prompt
    completions = [c[n:] if c[:n] == case.prompt else c for c in case.completions]
    opening = [{"role": "system", "content": system}] if system else []
    conversations = [opening + case.prompt + completion for completion in completions]
    for conversation in conversations:
        _check_turns(conversation)
    n = len(opening) + n if n else _prompt_length(conversations, layouts.every_reply)
    case.prompt = conversations[0][:n]
    case.completions = [conversation[n:] for conversation in conversations]
    for completion in case.completions:
        if not completion or completion[0]["role"] != "assistant":
            found = f"begins with the {completion[0]['role']}" if completion else "has no turn"
            raise InputError(f"a completion {found} after the prompt; expected the assistant")
    return case


def _check_turns(messages: list[Message]) -> None:
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise InputError("no assistant turn; expected a reply to learn from")
    if roles[-1] != "assistant":
        raise InputError(f"the last turn is the {roles[-1]}'s; expected the assistant's")
    if "system" in roles[1:]:
        raise InputError(f"turn {roles.index('system', 1) + 1} is a system turn; expected it first")
    for i, both in enumerate(zip(roles, roles[1:]), 1):
        if both == ("assistant", "assistant"):
            raise InputError(f"turns {i} and {i + 1} are both the assistant's; expected another's")


def _prompt_length(conversations: list[list[Message]], every_reply: bool) -> int:
    """How many turns of whole conversations are the prompt: those before the first reply if every
    reply trains, else those that they share, without the last reply."""
    first, second = conversations[0], conversations[-1]
    if every_reply:
        return next(i for i, message in enumerate(first) if message["role"] == "assistant")
    last = min(len(first), len(second)) - 1
    return next((i for i in range(last) if first[i] != second[i]), last)


def untrainable(case: Case) -> str | None:
    """Why a well-formed row has nothing to teach. A reply of white space only is an empty one."""
    replies = [m["content"] for c in case.completions for m in c if m["role"] == "assistant"]
    if not all(map(str.strip, replies)):
        return "empty completion"
    if len(case.completions) == 2 and case.completions[0] == case.completions[1]:
        return "chosen equal to rejected"
    return None


def label_of(value, csv: bool) -> bool:
    """true or false; in CSV, where all is text, in any case, or 1 and 0."""
    words = {"true": True, "1": True, "false": False, "0": False}
    if csv:
        value = words.get(value.strip().lower(), value)
    if not isinstance(value, bool):
        expected = "true or false, or 1 or 0" if csv else "true or false, without quotes"
        raise InputError(f"label is {_shown(value)}; expected {expected}")
    return value


# ---------------------------------------------------------------------------- columns -> messages


def _reply(value, column: str) -> list[Message]:
    """A reply; a message may stand without a list around it, as ShareGPT has it."""
    return _turns([value] if isinstance(value, dict) else value, column, "assistant")


def _instruction(row: dict, column: str) -> list[Message]:
    messages, extra = _turns(row[column], column, "user"), _text(row, "input")
    if not extra:
        return messages
    if messages[-1]["role"] != "user":
        raise InputError(f"input: follows no user turn; expected one as the end of {column}")
    last = messages[-1]["content"]
    return [*messages[:-1], {"role": "user", "content": f"{last}\n{extra}" if last else extra}]


def _text(row: dict, column: str) -> str:
    """A column that may be missing or null; both are the empty string."""
    value = row.get(column)
    if not isinstance(value, str | None):
        raise InputError(f"{column}: {_name(value)}; expected a string")
    return value or ""


def _turns(value, column: str, role: str | None = None) -> list[Message]:
    """A string is one turn of `role`; a list holds messages."""
    if isinstance(value, str) and role:
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        expected = "a string or a list of messages" if role else "a list of messages"
        raise InputError(f"{column}: {_name(value)}; expected {expected}")
    if not value:
        raise InputError(f"{column}: an empty list; expected at least one message")
    return [_message(message, f"{column}, message {i}") for i, message in enumerate(value, 1)]


def _message(message, where: str) -> Message:
    known = message.keys() if isinstance(message, dict) else ()
    keys = next((k for k in MESSAGE_KEYS if set(k).issubset(known)), None)
    if keys is None:
        found = f"keys {_list(known)}" if isinstance(message, dict) else _name(message)
        raise InputError(f'{where}: {found}; expected {{"role": ..., "content": ...}}')
    role, content = (message[key] for key in keys)
    if keys[0] == "from" and isinstance(role, str):
        role = {"human": "user", "gpt": "assistant"}.get(role, role)
    if role not in ROLES:
        raise InputError(f"{where}: {keys[0]} is {_shown(role)}; expected {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise InputError(f"{where}: {keys[1]} is {_name(content)}; expected a string")
    return {"role": role, "content": content}


def _name(value) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", str: "a string"}
    return "null" if value is None else names.get(type(value), "a number")


def _shown(value) -> str:
    if isinstance(value, str):
        return shown(value)
    return "null" if value is None else reprlib.repr(value)[:40]  # however deep the value is


def _list(names) -> str:
    return ", ".join([shown(name)[1:-1] for name in names][:12]) or "none"
