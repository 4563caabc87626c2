"""Layouts: a row of a file -> a prompt and its completions, as checked messages.

Each way to store conversations is a layout: the columns that tell it apart, and how a row of them
reads as a Case. A new layout is one more entry in SFT, DPO or KTO. Where a column holds messages,
they may be {"role": ..., "content": ...} or ShareGPT's {"from": ..., "value": ...}; where it holds
one turn, a string will do. A column `system`, if it is there and not empty, is the first turn.

What comes out has been checked: roles are known, turns are in order, contents are text. What is
wrong raises InputError; the caller knows the file and the line and puts them in front.
"""

from dataclasses import dataclass

from nanoalign import InputError
from nanoalign.chatml import ROLES, Message
from nanoalign.formats.rows import shown

MESSAGE_KEYS = ("role", "content"), ("from", "value")


@dataclass(slots=True)
class Case:
    """A row as messages. Without a prompt, the completions are whole conversations."""

    prompt: list[Message]
    completions: list[list[Message]]  # DPO: chosen, rejected
    label: object = None  # KTO: as it stands in the file


# ---------------------------------------------------------------------------- columns -> messages


def prompt(row: dict, column: str) -> list[Message]:
    return _turns(row[column], column, "user")


def reply(row: dict, column: str) -> list[Message]:
    value = row[column]  # a message may stand without a list around it, as ShareGPT has it
    return _turns([value] if isinstance(value, dict) else value, column, "assistant")


def talk(row: dict, column: str) -> list[Message]:
    """A whole conversation: more than a string can say."""
    return _turns(row[column], column)


def instruction(row: dict) -> list[Message]:
    """Alpaca's instruction; its input, where there is one, follows after a newline."""
    messages, extra = prompt(row, "instruction"), _text(row, "input")
    if not extra:
        return messages
    if not messages or messages[-1]["role"] != "user":
        raise InputError("input: follows no user turn; expected one as the end of instruction")
    last = messages[-1]["content"]
    return [*messages[:-1], {"role": "user", "content": f"{last}\n{extra}" if last else extra}]


def pair(row: dict, column: str) -> list[list[Message]]:
    replies = row[column]
    if not isinstance(replies, list) or len(replies) != 2:
        found = f"a list of {len(replies)}" if isinstance(replies, list) else _name(replies)
        raise InputError(f"{column}: {found}; expected a list of two replies, [good, bad]")
    good, bad = replies
    return [_turns(good, f"good {column}", "assistant"), _turns(bad, f"bad {column}", "assistant")]


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
    return [_message(message, f"{column}, message {i}") for i, message in enumerate(value, 1)]


def _message(message, where: str) -> Message:
    known = message.keys() if isinstance(message, dict) else ()
    keys = next((k for k in MESSAGE_KEYS if set(k).issubset(known)), None)
    if keys is None:
        found = f"keys {_list(known)}" if isinstance(message, dict) else _name(message)
        raise InputError(f'{where}: {found}; expected {{"role": ..., "content": ...}}')
    role, content = (message[key] for key in keys)
    if keys[0] == "from":
        role = {"human": "user", "gpt": "assistant"}.get(str(role), role)
    if role not in ROLES:
        raise InputError(f"{where}: {keys[0]} is {_shown(role)}; expected {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise InputError(f"{where}: {keys[1]} is {_name(content)}; expected a string")
    return {"role": role, "content": content}


def _name(value) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", str: "a string"}
    return "null" if value is None else names.get(type(value), "a number")


def _shown(value) -> str:
    return "null" if value is None else shown(value) if isinstance(value, str) else repr(value)[:40]


def _list(names) -> str:
    return ", ".join([shown(name)[1:-1] for name in names][:12]) or "none"


# --------------------------------------------------------------------------------- rows -> cases

# The first layout whose columns are all there is taken.
SFT = {
    ("messages",): lambda row: Case([], [talk(row, "messages")]),
    ("prompt", "completion"): lambda row: Case(prompt(row, "prompt"), [reply(row, "completion")]),
    ("instruction", "output"): lambda row: Case(instruction(row), [reply(row, "output")]),
    ("question", "chosen"): lambda row: Case(prompt(row, "question"), [reply(row, "chosen")]),
    ("conversations",): lambda row: Case([], [talk(row, "conversations")]),
}
DPO = {
    ("prompt", "chosen", "rejected"): lambda row: Case(
        prompt(row, "prompt"), [reply(row, "chosen"), reply(row, "rejected")]
    ),
    ("instruction", "output"): lambda row: Case(instruction(row), pair(row, "output")),
    ("conversations", "chosen", "rejected"): lambda row: Case(
        prompt(row, "conversations"), [reply(row, "chosen"), reply(row, "rejected")]
    ),
    ("chosen", "rejected"): lambda row: Case([], [talk(row, "chosen"), talk(row, "rejected")]),
}
KTO = {
    ("prompt", "completion", "label"): lambda row: Case(
        prompt(row, "prompt"), [reply(row, "completion")], row["label"]
    ),
    ("messages", "label"): lambda row: Case([], [talk(row, "messages")], row["label"]),
    **DPO,  # a pair is two single labels
}


def layout_of(row: dict, layouts: dict) -> tuple[str, ...]:
    for columns in layouts:
        if set(columns) <= row.keys():
            return columns
    known = "; ".join(", ".join(columns) for columns in layouts)
    raise InputError(f"columns {_list(row)} make no known layout; expected one of: {known}")


def read_case(row: dict, columns: tuple[str, ...], layouts: dict, input_as_system: bool) -> Case:
    """A row as a checked prompt and its completions, each of which begins with a reply."""
    for column in columns:
        if column not in row:
            raise InputError(f"no column {column}; expected one, as in the file's first row")
    system, extra = _text(row, "system"), _text(row, "input")
    if input_as_system:
        if system and extra:
            raise InputError("system and input are both there; expected one (--input_as_system)")
        system, row = system or extra, {**row, "input": ""}

    case = layouts[columns](row)
    n = len(case.prompt)  # completions may repeat their prompt
    completions = [c[n:] if c[:n] == case.prompt else c for c in case.completions]
    opening = [{"role": "system", "content": system}] if system else []
    conversations = [opening + case.prompt + completion for completion in completions]
    for conversation in conversations:
        _check_turns(conversation)
    n = len(opening) + n if n else _prompt_length(conversations, whole=layouts is SFT)
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


def _prompt_length(conversations: list[list[Message]], whole: bool) -> int:
    """How many turns of whole conversations are the prompt: what they share, without the last
    reply; but with `whole` (SFT) every reply trains, and it ends before the first one."""
    first, second = conversations[0], conversations[-1]
    if whole:
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
