"""The exports of chat tools in which people judge replies, in the form they have in 2026.

Each thumb becomes a `Judged` case. KTO takes it with its label. DPO joins all judged replies to one
message into one case.
"""

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass

from nanoalign import InputError
from nanoalign.data import Case
from nanoalign.formats.columns import list_of, turns_of
from nanoalign.formats.rows import parsed

# Open WebUI keeps a thought as HTML before the answer; each line of it begins with ">".
THOUGHT = re.compile(
    r'\s*<details type="reasoning"[^>]*>\n<summary>.*?</summary>\n(.*?)\n?</details>\n*', re.DOTALL
)


@dataclass(slots=True)
class Judged(Case):
    """One reply with a label, and what it answers: the chat and the message before it."""

    answers: str = ""


def siblings(judged: list[Judged]) -> Case:
    """The judged replies to one message as one case: first those with a thumb up."""
    once = {}
    for case in judged:
        once.setdefault(repr((case.completions, case.label)), case)
    good, bad = ([c for c in once.values() if c.label is label] for label in (True, False))
    replies, ranks = [c.completions[0] for c in good + bad], [0.0] * len(good) + [1.0] * len(bad)
    return Case(judged[0].prompt, replies, where=judged[0].where, ranks=ranks)


def open_webui(record: dict, *columns: str) -> Judged:
    """Open WebUI's feedback: a rating, and a copy of the chat as a tree of messages."""
    if not record.get("snapshot"):
        expected = "Admin Panel, Evaluations, Feedbacks, Export has it"
        raise InputError(f"snapshot: none; expected Open WebUI's copy of the chat ({expected})")
    rating, at = str(inside(record, "data", "rating")), str(inside(record, "meta", "message_id"))
    if rating not in ("1", "-1"):
        raise InputError(f"data.rating is {rating[:40]}; expected 1 or -1")
    messages = inside(record, "snapshot", "chat", "chat", "history", "messages")
    parent, path = inside(messages, at, "parentId"), {}  # id -> message, from the reply to the root
    while at not in path:
        up = inside(messages, at, "parentId")
        path[at] = dict(messages[at])
        if path[at].get("files"):
            raise InputError(f"snapshot: message {at[:40]} has files; expected text alone")
        if found := THOUGHT.match(str(path[at].get("content"))):
            thought = re.sub("^> ?", "", html.unescape(found[1]), flags=re.MULTILINE)
            path[at] |= {"reasoning_content": thought, "content": found.string[found.end() :]}
        at = at if up is None else str(up)
    if up is not None:
        raise InputError(f"snapshot: message {at[:40]} follows itself; expected a first one")
    *prompt, reply = turns_of({"the chat": [*path.values()][::-1]}, "the chat")
    answers = repr((inside(record, "meta").get("chat_id"), parent))
    return Judged(prompt, [[reply]], rating == "1", answers=answers)


def gradio(record: dict, conversation: str, index: str, flag: str) -> Iterator[Judged]:
    """A record of the log of Gradio's ChatInterface; other flags than these two are passed over."""
    if record[flag] in ("Like", "Dislike"):
        turns, number = list_of(record, conversation, "messages"), str(record[index])
        at = parsed(number, index)
        if not isinstance(at, int) or not 0 < at < len(turns):
            raise InputError(f"{index} is {number[:40]}; expected the place of a reply")
        *prompt, reply = turns_of({conversation: turns[: at + 1]}, conversation)
        yield Judged(prompt, [[reply]], record[flag] == "Like")


def inside(value, *path: str):
    """value[path[0]][path[1]]..., in objects."""
    for key in path:
        if not isinstance(value, dict) or key not in value:
            raise InputError(f"{'.'.join(path)}: no {key[:40]}; expected it in the export")
        value = value[key]
    return value
