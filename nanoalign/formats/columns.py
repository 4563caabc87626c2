"""A column of a row -> the label, the text, the tools or the messages that it holds, checked.

Messages have many spellings in files and one form here, chatml.Message: the tables below say which
keys and roles are read. A null or empty key counts as absent, since the datasets library gives each
message the keys of all others; inside `tools` and `tool_calls` it does so to every object, and null
keys are absent there too. In JSON that stands in a string, null is a value.

A reply's text may hold its thought, <think>...</think> where it begins, and its calls,
<tool_call>{"name": ..., "arguments": {...}}</tool_call> where it ends. With them go the newlines
that ChatML writes around them: those inside and after <think>...</think>, and the one before the
first call. Anywhere else, and where no call can be read, such words are text.

What is wrong raises InputError, with the column in front.
"""

import math
import re
import reprlib
from collections.abc import Iterator

from nanoalign import InputError
from nanoalign.chatml import ROLES, Message
from nanoalign.formats.rows import parsed

ROLE_KEYS, TEXT_KEYS = ("role", "from"), ("content", "value")
CALL_ROLES = "function_call", "tool_call"  # the content is the call, in JSON
SHAREGPT = {"human": "user", "gpt": "assistant"}
KNOWN_ROLES = {*ROLES, *SHAREGPT}
OTHER_ROLES = {  # in any case: "Human"
    **SHAREGPT, **dict.fromkeys(CALL_ROLES, "assistant"), "developer": "system",
    **dict.fromkeys(("function", "observation", "tool_response"), "tool"),
}  # fmt: skip
THOUGHTS = "reasoning_content", "reasoning", "thinking"
CALLS = "tool_calls", "function_call"
TRAINS = "weight", "train", "loss", "loss_mask", "trainable"  # 0 or 1: does the reply train?
REPLY_KEYS = {*THOUGHTS, *CALLS}
MESSAGE_KEYS = {*ROLE_KEYS, *TEXT_KEYS, *REPLY_KEYS, *TRAINS}
CALL_KEYS = {"id", "type", "index", "function", "name", "arguments"}
UNSUPPORTED = {  # columns and keys without which a conversation would mean something else
    "images", "image", "image_url", "videos", "video", "audios", "audio", "input_audio",
    "chat_template_kwargs",
}  # fmt: skip
THOUGHT = re.compile(r"\s*<think>(.*?)</think>\n*", re.DOTALL)
CALL, CALL_END = "<tool_call>", "</tool_call>"


def label_of(value, csv: bool) -> bool:
    """true or false, 1 or 0; in CSV, where all is text, in any case."""
    words = {"true": True, "1": True, "false": False, "0": False}
    label = words.get(value.strip().lower()) if csv else value
    if not isinstance(label, int | float) or label not in (0, 1):
        form = ", or 1 or 0" if csv else ", without quotes (or 1 or 0)"
        raise InputError(f"label is {_shown(value)}; expected true or false{form}")
    return bool(label)


def text_of(row: dict, column: str) -> str:
    """A column that may be missing or null; both are the empty string."""
    value = row.get(column)
    if not isinstance(value, str | None):
        raise InputError(f"{column}: {kind_of(value)}; expected a string")
    return value or ""


def list_of(row: dict, column: str, what: str) -> list:
    """A list, or JSON of one; empty where the column is missing, null or empty."""
    value = row.get(column) and _json(row[column], column)
    if not value:
        return []
    if not isinstance(value, list):
        raise InputError(f"{column}: {kind_of(value)}; expected a list of {what}")
    return value


def tools_of(row: dict) -> list[dict]:
    """The column `tools`, or OpenAI's older `functions`."""
    column = "tools" if row.get("tools") else "functions"
    tools = list_of(row, column, "objects")
    tools = [_json(tool, column) if isinstance(tool, str) else tool for tool in tools]
    if wrong := [tool for tool in tools if not isinstance(tool, dict)]:
        raise InputError(f"{column}: {kind_of(wrong[0])} among them; expected objects")
    return tools


def beside(row: dict, columns: tuple) -> tuple[str, list[dict], list[Message]]:
    """The system turn, the tools and alpaca's earlier turns that stand beside the columns of a
    layout."""
    if list_of(row, "loss_mask", "0 and 1") and not {"messages", "conversations"} & {*columns}:
        raise InputError(f"loss_mask: beside {', '.join(columns)}; expected messages there")
    system, tools, pairs = text_of(row, "system"), tools_of(row), list_of(row, "history", "pairs")
    if any(not isinstance(pair, list) or len(pair) != 2 for pair in pairs):
        raise InputError("history: expected a list of pairs, [[question, answer], ...]")
    turns = [turn for pair in pairs for turn in zip(("user", "assistant"), pair)]
    history = [_message({"role": role, "content": text}, "history") for role, text in turns]
    return system, tools, history


def turns_of(row: dict, column: str, role: str | None = None) -> list[Message]:
    """A column's messages: it holds a list of them or, where `role` is known, one turn's text."""
    value = row[column]
    if isinstance(value, str) and role:
        return [_message({"role": role, "content": value}, column)]
    if isinstance(value, dict) and role == "assistant":  # ShareGPT's replies: without a list
        value = [value]
    if not isinstance(value, list):
        expected = "a string or a list of messages" if role else "a list of messages"
        raise InputError(f"{column}: {kind_of(value)}; expected {expected}")
    if not value:
        raise InputError(f"{column}: an empty list; expected at least one message")
    whole = column in ("messages", "conversations")  # what the column loss_mask speaks of
    mask = whole and list_of(row, "loss_mask", "0 and 1") or [None] * len(value)
    if len(mask) != len(value):
        raise InputError(f"loss_mask: {len(mask)} entries; expected {len(value)}, one a message")
    turns = []
    for i, message in enumerate(value):
        where = f"{column}, message {i + 1}"
        turn = _message(message, where, mask[i])
        own = "tool_calls" in turn and message[_key(message, ROLE_KEYS)].lower() in CALL_ROLES
        if own and turns and (reply := turns[-1])["role"] == "assistant":
            if ("train" in turn) != ("train" in reply):
                raise InputError(f"{where}: expected it to train as its reply does")
            reply["tool_calls"] = reply.get("tool_calls", []) + turn["tool_calls"]
        else:
            turns.append(turn)
    return turns


def unread(row: dict, columns: set[str]) -> Iterator[str]:
    """What is passed over in a row of which these columns are read; and roles read as others."""
    for column, value in row.items():
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


def filled(given: dict) -> dict:
    """Without what is null or empty; 0 and false are neither."""
    return {key: value for key, value in given.items() if value or value == 0}


def refuse_unsupported(given: dict, where: str = "") -> None:
    """InputError for columns or keys that hold more than text."""
    for key in [] if UNSUPPORTED.isdisjoint(given) else filled(given):
        if key in UNSUPPORTED:
            raise InputError(f"{where}{key}: {kind_of(given[key])}; expected text alone")


def _message(message, where: str, mask=None) -> Message:
    """A message in its one form; `mask` is its entry in the column loss_mask."""
    keyed = isinstance(message, dict)
    given = filled(message) if keyed else {}
    more = [] if REPLY_KEYS.isdisjoint(given) else [key for key in given if key in REPLY_KEYS]
    role_key, text_key = keyed and _key(message, ROLE_KEYS), keyed and _key(message, TEXT_KEYS)
    if not role_key or not (text_key or more):
        found = f"keys {listed(message)}" if keyed else kind_of(message)
        raise InputError(f'{where}: {found}; expected {{"role": ..., "content": ...}}')
    said, content = message[role_key], message.get(text_key)
    role = OTHER_ROLES.get(said.lower(), said.lower()) if isinstance(said, str) else None
    if role not in ROLES:
        expected = ", ".join(ROLES)
        raise InputError(f"{where}: {role_key} is {_shown(said)}; expected {expected}")
    refuse_unsupported(message, f"{where}: ")
    if isinstance(content, list):
        content = _joined(content, f"{where}: {text_key}")
    if not isinstance(content, str) and not (content is None and more):
        raise InputError(f"{where}: {text_key} is {kind_of(content)}; expected a string")
    turn = {"role": role, "content": content or ""}
    if more and role != "assistant":
        raise InputError(f"{where}: {more[0]} in the {role}'s turn; expected the assistant's")
    if role == "assistant" and (more or "<t" in turn["content"] or said.lower() in CALL_ROLES):
        turn |= _reply(given, turn["content"], said.lower() in CALL_ROLES, where)
    flags = {key: given[key] for key in TRAINS if key in given}
    if mask is not None:
        flags["the column loss_mask"] = mask
    if flags and not _trains(flags, role, where):
        turn["train"] = False
    return turn


def _trains(flags: dict, role: str, where: str) -> bool:
    """What the flags say of a turn."""
    for key, flag in flags.items():
        if flag not in (0, 1) or flag and role != "assistant":
            expected = "0 or 1" if role == "assistant" else f"0 or none in the {role}'s turn"
            raise InputError(f"{where}: {key} is {_shown(flag)}; expected {expected}")
    if len(set(map(bool, flags.values()))) > 1:
        raise InputError(f"{where}: {' and '.join(flags)} disagree; expected one of them")
    return all(flags.values()) or role != "assistant"


def _reply(given: dict, content: str, is_call: bool, where: str) -> Message:
    """An assistant's content, thought and calls, wherever the message keeps them."""
    thoughts = [given[key] for key in THOUGHTS if key in given]
    if wrong := [thought for thought in thoughts if not isinstance(thought, str)]:
        raise InputError(f"{where}: a thought is {kind_of(wrong[0])}; expected a string")
    if match := THOUGHT.match(content):
        thoughts, content = [*thoughts, match[1]], content[match.end() :]
    thoughts = {thought.strip("\n") for thought in thoughts if thought.strip()}
    calls = [_calls(given[key], f"{where}: {key}") for key in CALLS if key in given]
    if is_call:
        calls, content = [*calls, _calls(content, f"{where}: the call")], ""
    content, spelled = _spelled_calls(content)
    calls = [some for some in (*calls, spelled) if some]
    if len(thoughts) > 1 or len(set(map(repr, calls))) > 1:
        what = "thoughts" if len(thoughts) > 1 else "sets of tool calls"
        raise InputError(f"{where}: two {what} that disagree; expected one")
    more = {"reasoning_content": "".join(thoughts), "tool_calls": sum(calls[:1], [])}
    return {"content": content, **{key: value for key, value in more.items() if value}}


def _spelled_calls(content: str) -> tuple[str, list[dict]]:
    """A content -> what precedes the <tool_call>...</tool_call> at its end, and these calls."""
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
    """A call, or a list of them, as objects or JSON -> chatml.Message's tool_calls."""
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
    """Objects and lists without null keys; or JSON of them, in which null is a value."""
    text = isinstance(value, str)
    return _data(parsed(value, where) if text else value, where, keep_null=text)


def _data(value, where: str, keep_null: bool, levels: int = 100):
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
    """A content in parts, [{"type": "text", "text": ...}, ...], one after the other."""
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
    """Which of the names the message has: if two, one that is not null."""
    found = [name for name in names if name in message]
    return next((name for name in found if message[name] is not None), found[0] if found else None)


def kind_of(value) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", str: "a string"}
    names |= {int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _shown(value) -> str:
    return "null" if value is None else reprlib.repr(value)[:40]  # however deep or long it is


def listed(names) -> str:
    return ", ".join([name[:50] for name in names][:12]) or "none"
