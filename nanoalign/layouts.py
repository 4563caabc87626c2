"""Layouts: a row of a file -> a prompt and its completions, as checked messages.

People store conversations in a dozen ways. Each way is a layout: the columns it needs, and how a
row of them reads as a Case, where a string and a list of messages are both welcome. A new layout
is one more entry in SFT, DPO or KTO. Whatever the layout, what comes out has been checked: roles
are known, turns are in order, contents are text. What is wrong raises InputError; the caller knows
the file and the line and puts them in front.
"""

from dataclasses import dataclass

from nanoalign import InputError
from nanoalign.chatml import ROLES, Message

Text = str | list[Message]


@dataclass(slots=True)
class Case:
    """A row as messages: what every layout reads as."""

    prompt: Text
    completions: list[Text]
    label: object = None


def _instruction(row, input_as_system: bool, *replies) -> Case:
    """Alpaca's instruction and input; `system`, where there is such a column, comes first."""
    instruction, extra, system = row["instruction"], row.get("input") or "", row.get("system") or ""
    if input_as_system:
        system, extra = extra, ""
    if isinstance(instruction, str) and isinstance(extra, str):
        instruction += f"\n{extra}" if extra else ""
    return Case(_with_system(system, instruction), list(replies))


def _with_system(system, prompt) -> Text:
    if not system:
        return prompt
    return _messages(system, "system") + _messages(prompt, "user")


def _sharegpt(turns) -> list[Message]:
    """ShareGPT's {"from": ..., "value": ...} turns as messages."""
    names = {"human": "user", "gpt": "assistant"}
    if not isinstance(turns, list):
        turns = [turns]
    for turn in turns:
        if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
            raise InputError('a turn must be {"from": ..., "value": ...}')
    return [{"role": names.get(t["from"], t["from"]), "content": t["value"]} for t in turns]


def _pair(row) -> list:
    if not isinstance(row["output"], list) or len(row["output"]) != 2:
        raise InputError("output must be a list of two replies, [good, bad]")
    return row["output"]


# columns -> f(row, input_as_system) -> Case; the first whose columns are all there is taken
SFT = {
    ("messages",): lambda r, s: Case([], [r["messages"]]),
    ("prompt", "completion"): lambda r, s: Case(r["prompt"], [r["completion"]]),
    ("instruction", "output"): lambda r, s: _instruction(r, s, r["output"]),
    ("question", "chosen"): lambda r, s: Case(
        _with_system(r.get("system"), r["question"]), [r["chosen"]]
    ),
    ("conversations",): lambda r, s: Case(
        [], [_with_system(r.get("system"), _sharegpt(r["conversations"]))]
    ),
}
DPO = {
    ("prompt", "chosen", "rejected"): lambda r, s: Case(r["prompt"], [r["chosen"], r["rejected"]]),
    ("instruction", "output"): lambda r, s: _instruction(r, s, *_pair(r)),
    ("conversations", "chosen", "rejected"): lambda r, s: Case(
        _with_system(r.get("system"), _sharegpt(r["conversations"])),
        [_sharegpt(r["chosen"]), _sharegpt(r["rejected"])],
    ),
    ("chosen", "rejected"): lambda r, s: Case([], [r["chosen"], r["rejected"]]),
}
KTO = {
    ("prompt", "completion", "label"): lambda r, s: Case(
        r["prompt"], [r["completion"]], r["label"]
    ),
    ("messages", "label"): lambda r, s: Case([], [r["messages"]], r["label"]),
    **DPO,  # a pair is two single labels
}


def layout_of(row: dict, layouts: dict) -> tuple[str, ...]:
    for columns in layouts:
        if set(columns) <= row.keys():
            return columns
    known = "; ".join(", ".join(columns) for columns in layouts)
    raise InputError(f"columns {', '.join(row)} make no known layout; known are: {known}")


def require(row: dict, columns: tuple[str, ...]) -> None:
    missing = [column for column in columns if column not in row]
    if missing:
        raise InputError(f"column {', '.join(missing)} is missing; the file's first row has it")


def _messages(text, role: str) -> list[Message]:
    """A string is one turn of `role`; a message list is checked."""
    if isinstance(text, str):
        return [{"role": role, "content": text}]
    if not isinstance(text, list):
        raise InputError(f"{role}: {_name(text)}; expected a string or a list of messages")
    for i, message in enumerate(text, 1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise InputError(f'message {i} must be {{"role": ..., "content": ...}}')
        if message["role"] not in ROLES:
            raise InputError(f"message {i}: role {message['role']!r}; roles are {', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            raise InputError(f"message {i}: content is {_name(message['content'])}, not a string")
    return [{"role": m["role"], "content": m["content"]} for m in text]


def _name(value) -> str:
    names = {
        dict: "an object",
        list: "a list",
        bool: "true/false",
        type(None): "null",
        str: "a string",
    }
    return names.get(type(value), "a number")


def _check_turns(messages: list[Message]) -> None:
    for i, (before, message) in enumerate(zip([None, *messages], messages), 1):
        if message["role"] == "system" and before is not None:
            raise InputError(f"message {i}: a system turn can only come first")
        if before and message["role"] == before["role"] == "assistant":
            raise InputError(f"message {i}: two assistant turns in a row")
    if not any(message["role"] == "assistant" for message in messages):
        raise InputError("no assistant turn")
    if messages[-1]["role"] != "assistant":
        raise InputError(f"the last turn is {messages[-1]['role']}'s; expected assistant's")


def conversations(case: Case, whole: bool) -> tuple[list[Message], list[list[Message]]]:
    """Prompt and completions as checked messages.

    Without a prompt the completions are whole conversations. With `whole` (SFT) every reply trains
    and the prompt ends before the first one; otherwise the prompt is what the completions share.
    """
    prompt = _messages(case.prompt, "user")
    completions = [_messages(c, "assistant") for c in case.completions]
    for i, completion in enumerate(completions):
        if completion[: len(prompt)] == prompt:  # the completion repeats its prompt
            completions[i] = completion[len(prompt) :]
    if not prompt:
        for completion in completions:
            _check_turns(completion)
        if whole:
            shared = next(i for i, m in enumerate(completions[0]) if m["role"] == "assistant")
        elif len(completions) == 1:
            shared = len(completions[0]) - 1
        else:
            pairs = enumerate(zip(*completions))
            shared = next((i for i, (a, b) in pairs if a != b), len(completions[0]) - 1)
        prompt = completions[0][:shared]
        completions = [completion[shared:] for completion in completions]
    for completion in completions:
        if not completion or completion[0]["role"] != "assistant":
            raise InputError("a completion must begin with an assistant turn after a shared prompt")
        _check_turns(prompt + completion)
    return prompt, completions


def untrainable(completions: list[list[Message]]) -> str | None:
    """Why a well-formed row has nothing to teach."""
    if any(not m["content"] for c in completions for m in c[:1]):
        return "empty completion"
    if len(completions) == 2 and completions[0] == completions[1]:
        return "chosen equal to rejected"
    return None


def label_of(value, source: str) -> bool:
    """true or false; in CSV as text in any case, or 1 and 0."""
    text = {"true": True, "1": True, "false": False, "0": False}
    if source.endswith(".csv"):
        value = text.get(value.strip().lower(), value)
    if not isinstance(value, bool):
        raise InputError(f"label is {value!r:.40}; expected true or false")
    return value
