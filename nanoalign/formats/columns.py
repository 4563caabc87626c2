"""A column of a row -> the label, the text or the messages that it holds, checked.

Messages are {"role": ..., "content": ...} or ShareGPT's {"from": ..., "value": ...}. What is wrong
raises InputError, with the column in front.
"""

import reprlib

from nanoalign import InputError
from nanoalign.chatml import ROLES, Message

MESSAGE_KEYS = ("role", "content"), ("from", "value")


def label_of(value, csv: bool) -> bool:
    """true or false; in CSV, where all is text, in any case, or 1 and 0."""
    words = {"true": True, "1": True, "false": False, "0": False}
    label = words.get(value.strip().lower()) if csv else value
    if not isinstance(label, bool):
        form = ", or 1 or 0" if csv else ", without quotes"
        raise InputError(f"label is {_shown(value)}; expected true or false{form}")
    return label


def text_of(row: dict, column: str) -> str:
    """A column that may be missing or null; both are the empty string."""
    value = row.get(column)
    if not isinstance(value, str | None):
        raise InputError(f"{column}: {kind_of(value)}; expected a string")
    return value or ""


def turns_of(row: dict, column: str, role: str | None = None) -> list[Message]:
    """A column's messages: it holds a list of them or, where `role` is known, one turn's text."""
    value = row[column]
    if isinstance(value, str) and role:
        return [{"role": role, "content": value}]
    if isinstance(value, dict) and role == "assistant":  # ShareGPT's replies: without a list
        value = [value]
    if not isinstance(value, list):
        expected = "a string or a list of messages" if role else "a list of messages"
        raise InputError(f"{column}: {kind_of(value)}; expected {expected}")
    if not value:
        raise InputError(f"{column}: an empty list; expected at least one message")
    return [_message(message, f"{column}, message {i}") for i, message in enumerate(value, 1)]


def _message(message, where: str) -> Message:
    """Role and content; and the weight of a reply that is not to be learned, which is 0."""
    keyed = isinstance(message, dict)
    keys = next((k for k in MESSAGE_KEYS if keyed and message.keys() >= set(k)), None)
    if keys is None:
        found = f"keys {listed(message)}" if keyed else kind_of(message)
        raise InputError(f'{where}: {found}; expected {{"role": ..., "content": ...}}')
    role, content = (message[key] for key in keys)
    if keys[0] == "from" and isinstance(role, str):
        role = {"human": "user", "gpt": "assistant"}.get(role, role)
    if role not in ROLES:
        raise InputError(f"{where}: {keys[0]} is {_shown(role)}; expected {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise InputError(f"{where}: {keys[1]} is {kind_of(content)}; expected a string")
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise InputError(f"{where}: weight is {_shown(weight)}; expected 0 or 1")
    context = {"weight": 0} if role == "assistant" and weight == 0 else {}
    return {"role": role, "content": content, **context}


def kind_of(value) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", str: "a string"}
    return "null" if value is None else names.get(type(value), "a number")


def _shown(value) -> str:
    return "null" if value is None else reprlib.repr(value)[:40]  # however deep or long it is


def listed(names) -> str:
    return ", ".join([name[:50] for name in names][:12]) or "none"
