"""A conversation whose replies are judged, and the rows of what people said of them.

A thumb under one reply is a row for train_kto.py; of two replies the better one makes a row for
train_dpo.py. Terminal and page (chat.py, page.py) hold the same conversation and write the same
rows.

A judgement costs a person more than a step costs a machine. So a row is on the disk before the next
word is said: appended, flushed and synced. What a crash left of a half-written one is moved to
FILE.torn, and said, before anything is appended behind it; and a second judgement of the same reply
takes the place of the first.
"""

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from nanoalign import InputError
from nanoalign.chatml import Message
from nanoalign.formats.columns import turns_of
from nanoalign.run.files import saving


def message_of(text: str) -> Message:
    """What a model wrote, as the same words would be read from a file: its thought, its calls and
    the rest. Some templates open the thought in the prompt; then the text holds its end only."""
    if "<think>" not in text.partition("</think>")[0] and "</think>" in text:
        text = "<think>\n" + text
    return turns_of({"reply": text}, "reply", "assistant")[0]


@dataclass
class Offer:
    """Two replies to one question, and the row that says which is the better one."""

    replies: list[Message]  # in the order in which they are shown
    models: list[str]  # that wrote them
    row: dict | None = None


@dataclass
class Conversation:
    """The turns so far, and what was said of the replies among them.

    `file` is for thumbs; choices go to FILE.pairs.jsonl beside it. Without one nothing is judged.
    """

    model: str
    file: Path | None = None
    system: str = ""
    turns: list[Message] = field(default_factory=list)
    rows: dict[int, dict] = field(default_factory=dict)  # the thumbs, by the place of the reply
    offer: Offer | None = None  # at the end of the turns, of which the reply that goes on is one

    @property
    def pairs(self) -> Path:
        return self.file.with_suffix(".pairs.jsonl")

    def prompt(self, until: int | None = None) -> list[Message]:
        """The messages before a turn, or all."""
        start = [{"role": "system", "content": self.system}] if self.system else []
        return start + self.turns[:until]

    def ask(self, text: str) -> None:
        self.turns.append({"role": "user", "content": text})
        self.offer = None

    def answer(self, text: str) -> None:
        self.turns.append(message_of(text))

    def thumb(self, label: bool, place: int = -1) -> None:
        """Thumbs up or down for a reply, the last one unless told otherwise."""
        place %= len(self.turns)
        row = {"prompt": self.prompt(place), "completion": [self.turns[place]], "label": label}
        self.rows[place] = self._keep(self.file, row, self.rows.get(place))

    def offered(self, texts: list[str], models: list[str]) -> bool:
        """Two replies to the last question; until one is chosen the first goes on. Do they differ?
        Equal ones are no pair."""
        self.offer = Offer([message_of(text) for text in texts], models)
        self.turns.append(self.offer.replies[0])
        return self.offer.replies[0] != self.offer.replies[1]

    def choose(self, better: int | None) -> None:
        """The first (0) or second (1) of the two is better and goes on; None: neither is."""
        offer = self.offer
        if better is None:
            if offer.row:
                replace(self.pairs, offer.row, None)
            offer.row = None
            return
        chosen, rejected = offer.replies[better], offer.replies[1 - better]
        names = {"model": offer.models[better], "rejected_model": offer.models[1 - better]}
        row = {"prompt": self.prompt(-1), "chosen": [chosen], "rejected": [rejected]} | names
        offer.row = self._keep(self.pairs, row, offer.row)
        if self.turns[-1] != chosen:
            self.rows.pop(len(self.turns) - 1, None)  # a thumb for the other one stays in its file
            self.turns[-1] = chosen

    def undo(self) -> str:
        """Take the last question and its reply back, and what was said of it. -> the question"""
        if not self.turns:
            return ""
        if self.offer:
            self.choose(None)
            self.offer = None
        self.forget(len(self.turns) - 1)
        *self.turns, question = self.turns[:-1]
        return question["content"]

    def forget(self, place: int) -> None:
        """Take a thumb back."""
        if row := self.rows.pop(place, None):
            replace(self.file, row, None)

    def _keep(self, path: Path, row: dict, old: dict | None) -> dict:
        """Write a row, in the place of the old one if there is one."""
        row = {"model": self.model, **row, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        if old is None:
            append(path, row)
        else:
            replace(path, old, row)
        return row


def tally(chat: Conversation) -> str:
    """37 thumbs: 21 up, 16 down; 4 choices. What a crash has torn is set aside here."""
    labels, choices = [row["label"] for row in read_rows(chat.file)], read_rows(chat.pairs)
    up = labels.count(True)
    return f"{len(labels)} thumbs: {up} up, {len(labels) - up} down; {len(choices)} choices"


def read_rows(path: Path) -> list[dict]:
    """The rows of a JSONL file; none if it is not there. A last line that a crash has torn is moved
    to FILE.torn, and said."""
    with saving(path):
        raw = path.read_bytes() if path.exists() else b""
    *lines, last = raw.split(b"\n")
    if last:
        try:
            json.loads(last)
            _append(path, b"\n")  # only its end was missing
            lines.append(last)
        except ValueError:
            torn = path.with_name(path.name + ".torn")
            _append(torn, last + b"\n")
            with saving(path):
                os.truncate(path, len(raw) - len(last))
            print(f"{path}: its last line was torn; moved to {torn}")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise InputError(f"{path}, line {number}: not JSON; expected a row") from None
    return rows


def append(path: Path, row: dict) -> None:
    """Add a row; when this returns, the disk has it."""
    _append(path, _line(row))


def replace(path: Path, old: dict, new: dict | None) -> None:
    """Put `new` in the place of the last row that is `old`; None takes it out."""
    with saving(path):
        lines = path.read_bytes().splitlines(keepends=True)
        at = len(lines) - 1 - lines[::-1].index(_line(old))
        lines[at : at + 1] = [_line(new)] if new else []
        beside = path.with_name(f"tmp-{path.name}")
        beside.unlink(missing_ok=True)
        _append(beside, b"".join(lines))
        os.replace(beside, path)


def _line(row: dict) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _append(path: Path, data: bytes) -> None:
    with saving(path), open(path, "ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
