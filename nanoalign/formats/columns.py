"""One column of a record -> the label, text, tools or messages in it, checked.

Files spell messages in many ways; here they have one form, chatml.Message. The tables below list
the keys and roles that are read. A key that is null or empty counts as missing, because the
datasets library gives each message the keys of all others. It does the same to the objects inside
`tools` and `tool_calls`, so null keys are left out there too; in a string of JSON a null is kept.

The text of a reply may begin with a thought, <think>...</think>, and end with calls,
<tool_call>{"name": ..., "arguments": {...}}</tool_call>. Both are taken out of the text, with the
newlines that ChatML writes around them. Anywhere else, and where the call is no JSON, such words
stay text.

What is wrong raises an InputError that begins with the column's name.
"""

import math
import re
import reprlib
from collections.abc import Iterator

from nanoalign import InputError
from nanoalign.chatml import ROLES, Message
from nanoalign.formats.rows import parsed

ROLE_KEYS, TEXT_KEYS = ("role", "from"), ("content", "value")
CALL_ROLES = "function_call", "tool_call"  # their content is the call, in JSON
SHAREGPT = {"human": "user", "gpt": "assistant"}
KNOWN_ROLES = {*ROLES, *SHAREGPT}
OTHER_ROLES = {  # letters may be capital: "Human"
    **SHAREGPT, **dict.fromkeys(CALL_ROLES, "assistant"), "developer": "system",
    **dict.fromkeys(("function", "observation", "tool_response"), "tool"),
}  # fmt: skip
THOUGHTS = "reasoning_content", "reasoning", "thinking"
CALLS = "tool_calls", "function_call"
TRAINS = "weight", "train", "loss", "loss_mask", "trainable"  # 0 or 1: does the reply train?
REPLY_KEYS = {*THOUGHTS, *CALLS}
MESSAGE_KEYS = {*ROLE_KEYS, *TEXT_KEYS, *REPLY_KEYS, *TRAINS}
CALL_KEYS = {"id", "type", "index", "function", "name", "arguments"}
UNSUPPORTED = {  # refused: without them a conversation would mean something else
    "images", "image", "image_url", "videos", "video", "audios", "audio", "input_audio",
    "chat_template_kwargs",
}  # fmt: skip
THOUGHT = re.compile(r"\s*<think>(.*?)</think>\n*", re.DOTALL)
CALL, CALL_END = "<tool_call>", "</tool_call>"


def label_of(value, csv: bool) -> bool:
    """true or 1, false or 0. In CSV they are text, and letters may be capital."""
    words = {"true": True, "1": True, "false": False, "0": False}
    label = words.get(value.strip().lower()) if csv else value
    if not isinstance(label, int | float) or label not in (0, 1):
        form = ", or 1 or 0" if csv else ", without quotes (or 1 or 0)"
        raise InputError(f"label is {_shown(value)}; expected true or false{form}")
    return bool(label)


def text_of(record: dict, column: str) -> str:
    """A column's text; "" if the column is missing or null."""
    value = record.get(column)
    if not isinstance(value, str | None):
        raise InputError(f"{column}: {kind_of(value)}; expected a string")
    return value or ""


def list_of(record: dict, column: str, what: str) -> list:
    """A column's list, or a list in a string of JSON; [] if the column is missing or empty."""
    value = record.get(column) and _json(record[column], column)
    if not value:
        return []
    if not isinstance(value, list):
        raise InputError(f"{column}: {kind_of(value)}; expected a list of {what}")
    return value


def tools_of(record: dict) -> list[dict]:
    """The column `tools`, or OpenAI's older `functions`."""
    column = "tools" if record.get("tools") else "functions"
    tools = list_of(record, column, "objects")
    tools = [_json(tool, column) if isinstance(tool, str) else tool for tool in tools]
    if wrong := [tool for tool in tools if not isinstance(tool, dict)]:
        raise InputError(f"{column}: {kind_of(wrong[0])} among them; expected objects")
    return tools


def beside(record: dict, columns: tuple) -> tuple[str, list[dict], list[Message]]:
    """(system, tools, history): what stands beside the columns of a layout. `history` is alpaca's
    earlier turns, [[question, answer], ...]."""
    if list_of(record, "loss_mask", "0 and 1") and not {"messages", "conversations"} & {*columns}:
        raise InputError(f"loss_mask: beside {', '.join(columns)}; expected messages there")
    system, tools = text_of(record, "system"), tools_of(record)
    pairs = list_of(record, "history", "pairs")
    if any(not isinstance(pair, list) or len(pair) != 2 for pair in pairs):
        raise InputError("history: expected a list of pairs, [[question, answer], ...]")
    turns = [turn for pair in pairs for turn in zip(("user", "assistant"), pair)]
    history = [_message({"role": role, "content": text}, "history") for role, text in turns]
    return system, tools, history


def turns_of(record: dict, column: str, role: str | None = None) -> list[Message]:
    """A column's messages. With `role` the column may also hold the text of one turn."""
    value = record[column]
    if isinstance(value, str) and role:
        return [_message({"role": role, "content": value}, column)]
    if isinstance(value, dict) and role == "assistant":  # ShareGPT's reply is one message, no list
        value = [value]
    if not isinstance(value, list):
        expected = "a string or a list of messages" if role else "a list of messages"
        raise InputError(f"{column}: {kind_of(value)}; expected {expected}")
    if not value:
        raise InputError(f"{column}: an empty list; expected at least one message")
    mask = []
    if column in ("messages", "conversations") and "loss_mask" in record:
        mask = list_of(record, "loss_mask", "0 and 1")
    if mask and len(mask) != len(value):
        raise InputError(f"loss_mask: {len(mask)} entries; expected {len(value)}, one a message")
    turns = []
    for i, message in enumerate(value):
        where = f"{column}, message {i + 1}"
        turn = _message(message, where, mask[i] if mask else None)
        is_call = "tool_calls" in turn and message[_key(message, ROLE_KEYS)].lower() in CALL_ROLES
        if is_call and turns and (reply := turns[-1])["role"] == "assistant":  # one turn of both
            if ("train" in turn) != ("train" in reply):
                raise InputError(f"{where}: expected it to train as its reply does")
            reply["tool_calls"] = reply.get("tool_calls", []) + turn["tool_calls"]
        else:
            turns.append(turn)
    return turns


def unread(record: dict, columns: set[str]) -> Iterator[str]:
    """What is lost if only these columns are read, "column x" or "key x" of a message; and "role x
    as y" where a role is read as another one."""
    for column, value in record.items():
        if column not in columns:
            yield from (f"column {name}" for name in filled({column: value}))
            continue
        for message in value if isinstance(value, list) else [value]:
            role = message.get(_key(message, ROLE_KEYS)) if isinstance(message, dict) else None
            if isinstance(role, str):
                if not message.keys() <= MESSAGE_KEYS:
                    yield from (f"key {key}" for key in filled(message) if key not in MESSAGE_KEYS)
                if role not in KNOWN_ROLES:
                    yield f"role {role} as {OTHER_ROLES.get(role.lower(), role.lower())}"


def filled(entries: dict) -> dict:
    """The entries that are neither null nor empty; 0 and false stay."""
    return {key: value for key, value in entries.items() if value or value == 0}


def refuse_unsupported(entries: dict, where: str = "") -> None:
    """InputError for columns or keys that hold more than text."""
    for key in [] if UNSUPPORTED.isdisjoint(entries) else filled(entries):
        if key in UNSUPPORTED:
            raise InputError(f"{where}{key}: {kind_of(entries[key])}; expected text alone")


def _message(message, where: str, mask=None) -> Message:
    """A message of a file as a chatml.Message; `mask` is its entry in the column loss_mask."""
    keys = message if isinstance(message, dict) else {}
    entries, role_key, text_key = filled(keys), _key(keys, ROLE_KEYS), _key(keys, TEXT_KEYS)
    extra = [] if REPLY_KEYS.isdisjoint(entries) else [key for key in entries if key in REPLY_KEYS]
    if not role_key or not (text_key or extra):
        found = f"keys {listed(message)}" if isinstance(message, dict) else kind_of(message)
        raise InputError(f'{where}: {found}; expected {{"role": ..., "content": ...}}')
    name, content = message[role_key], message.get(text_key)
    role = OTHER_ROLES.get(name.lower(), name.lower()) if isinstance(name, str) else None
    if role not in ROLES:
        expected = ", ".join(ROLES)
        raise InputError(f"{where}: {role_key} is {_shown(name)}; expected {expected}")
    refuse_unsupported(message, f"{where}: ")
    if isinstance(content, list):
        content = _joined(content, f"{where}: {text_key}")
    if not isinstance(content, str) and not (content is None and extra):
        raise InputError(f"{where}: {text_key} is {kind_of(content)}; expected a string")
    turn = {"role": role, "content": content or ""}
    if extra and role != "assistant":
        raise InputError(f"{where}: {extra[0]} in the {role}'s turn; expected the assistant's")
    is_call = name.lower() in CALL_ROLES
    if role == "assistant" and (extra or is_call or "<t" in turn["content"]):
        turn |= _reply(entries, turn["content"], is_call, where)
    flags = {key: entries[key] for key in TRAINS if key in entries}
    if mask is not None:
        flags["the column loss_mask"] = mask
    if flags and not _trains(flags, role, where):
        turn["train"] = False
    return turn


def _trains(flags: dict, role: str, where: str) -> bool:
    """False for a reply whose flags, {name: 0 or 1}, are 0. In other turns they must be 0."""
    for key, flag in flags.items():
        if flag not in (0, 1) or flag and role != "assistant":
            expected = "0 or 1" if role == "assistant" else f"0 or none in the {role}'s turn"
            raise InputError(f"{where}: {key} is {_shown(flag)}; expected {expected}")
    if len(set(map(bool, flags.values()))) > 1:
        raise InputError(f"{where}: {' and '.join(flags)} disagree; expected one of them")
    return all(flags.values()) or role != "assistant"


def _reply(entries: dict, content: str, is_call: bool, where: str) -> Message:
    """The content, thought and calls of the assistant's message, from its keys or its text."""
    thoughts = [entries[key] for key in THOUGHTS if key in entries]
    if wrong := [thought for thought in thoughts if not isinstance(thought, str)]:
        raise InputError(f"{where}: a thought is {kind_of(wrong[0])}; expected a string")
    if match := THOUGHT.match(content):
        thoughts, content = [*thoughts, match[1]], content[match.end() :]
    thoughts = {thought.strip("\n") for thought in thoughts if thought.strip()}
    calls = [_calls(entries[key], f"{where}: {key}") for key in CALLS if key in entries]
    if is_call:
        calls, content = [*calls, _calls(content, f"{where}: the call")], ""
    content, calls_in_text = _cut_calls(content)
    calls = [found for found in (*calls, calls_in_text) if found]
    if len(thoughts) > 1 or len(set(map(repr, calls))) > 1:
        what = "thoughts" if len(thoughts) > 1 else "sets of tool calls"
        raise InputError(f"{where}: two {what} that disagree; expected one")
    parts = {"reasoning_content": "".join(thoughts), "tool_calls": sum(calls[:1], [])}
    return {"content": content, **filled(parts)}


def _cut_calls(content: str) -> tuple[str, list[dict]]:
    """A reply's text without the <tool_call>...</tool_call> at its end, and these calls."""
    calls, before = [], content
    while (text := before.rstrip()).endswith(CALL_END) and CALL in text:
        start = text.rindex(CALL)
        try:
            calls = _calls(text[start + len(CALL) : -len(CALL_END)].strip(), "") + calls
        except InputError:
            break
        before = text[:start]
    return (before.removesuffix("\n"), calls) if calls else (content, [])


def _calls(value, where: str) -> list[dict]:
    """One call or a list of calls, as objects or as JSON -> the tool_calls of a chatml.Message."""
    value, calls = _json(value, where), []
    for call in value if isinstance(value, list) else [value]:
        call = _json(call, where) if isinstance(call, str) else call
        inner = call.get("function", call) if isinstance(call, dict) else None
        known = isinstance(inner, dict) and {*call, *inner} <= CALL_KEYS
        if not known or call.get("type", "function") != "function" or "name" not in inner:
            found = f"keys {listed(call)}" if isinstance(call, dict) else kind_of(call)
            raise InputError(f'{where}: {found}; expected {{"name": ..., "arguments": {{...}}}}')
        name, arguments = inner["name"], inner.get("arguments") or {}
        arguments = _json(arguments, where) if isinstance(arguments, str) else arguments
        if not isinstance(name, str) or not isinstance(arguments, dict):
            found = f"{kind_of(name)} and {kind_of(arguments)}"
            raise InputError(f"{where}: {found}; expected a function's name and an object")
        calls.append({"type": "function", "function": {"name": name, "arguments": arguments}})
    return calls


def _json(value, where: str):
    """The value of a string of JSON; any other value without the keys that are null. InputError for
    what JSON can't hold."""
    is_text = isinstance(value, str)
    return _data(parsed(value, where) if is_text else value, where, keep_null=is_text)


def _data(value, where: str, keep_null: bool, levels: int = 100):
    """A checked copy of a value, down to 100 levels."""
    if isinstance(value, dict | list) and not levels:
        raise InputError(f"{where}: nested too deep; expected at most 100 levels")
    if isinstance(value, dict):
        items = [(k, v) for k, v in value.items() if keep_null or v is not None]
        return {k: _data(v, where, keep_null, levels - 1) for k, v in items}
    if isinstance(value, list):
        return [_data(v, where, keep_null, levels - 1) for v in value]
    finite = not isinstance(value, float) or math.isfinite(value)
    if not finite or not isinstance(value, str | int | float | None):
        raise InputError(f"{where}: {kind_of(value)}; expected what JSON can hold")
    return value


def _joined(parts: list, where: str) -> str:
    """The text of a content in parts, [{"type": "text", "text": ...}, ...]."""
    texts = []
    for i, part in enumerate(parts, 1):
        part = part if isinstance(part, dict) else {"type": kind_of(part)}
        kind, text = part.get("type") or "text", part.get("text")
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            raise InputError(f"{where}, part {i}: {_shown(kind)}; expected a text")
        refuse_unsupported(part, f"{where}, part {i}: ")
        texts.append(text)
    return "".join(texts)


def _key(message: dict, names: tuple) -> str | None:
    """The first of the names that is a key of the message; one that is not null comes first."""
    for name in names:
        if message.get(name) is not None:
            return name
    return next((name for name in names if name in message), None)


def kind_of(value) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", str: "a string"}
    names |= {int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _shown(value) -> str:
    return "null" if value is None else reprlib.repr(value)[:40]  # however deep or long it is


def listed(names) -> str:
    return ", ".join([name[:50] for name in names][:12]) or "none"
