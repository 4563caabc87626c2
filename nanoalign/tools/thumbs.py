"""A conversation whose replies a person judges, and the files of these judgements.

A thumb for a reply is a line for train_kto.py. A choice between two replies is a line for
train_dpo.py. The terminal (chat.py) and the page (page.py) use the same conversation and files.

Judgements are a person's work, so none may be lost. Each line is appended, flushed and synced at
once. If a crash has left an incomplete line, it is moved to FILE.torn with a message, or the next
line would be appended to it. A second judgement of a reply replaces the first one.
"""

import json
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist

from nanoalign import InputError
from nanoalign.chatml import Message
from nanoalign.formats.columns import turns_of
from nanoalign.run.files import saving


def message_of(text: str) -> Message:
    """A model's text as a message, with its thought and its calls, as if it were read from a file.
    Some templates write <think> into the prompt: then the text has only the end of the thought."""
    if "<think>" not in text.partition("</think>")[0] and "</think>" in text:
        text = "<think>\n" + text
    return turns_of({"reply": text}, "reply", "assistant")[0]


@dataclass(eq=False)
class Offer:
    """Two replies to one question, and the line that says which one is better."""

    replies: list[Message]  # in the order in which they are shown
    models: list[str]  # that wrote them
    judged: bool = False
    better: int | None = None  # the better reply, 0 or 1; None: neither
    row: dict | None = None  # the line in the file

    @property
    def differ(self) -> bool:
        return self.replies[0] != self.replies[1]


@dataclass
class Conversation:
    """The turns so far, and the judgements of their replies.

    Thumbs are written to `file`, and choices to FILE.pairs.jsonl beside it. None: no judgements.
    """

    model: str
    file: Path | None = None
    system: str = ""
    turns: list[Message] = field(default_factory=list)
    starts: list[int] = field(default_factory=lambda: [0])  # turns where a conversation begins
    models: dict[int, str] = field(default_factory=dict)  # {turn: the model that wrote it}
    rows: dict[int, dict] = field(default_factory=dict)  # {turn: its thumb's line in the file}
    offer: Offer | None = None  # two replies for the last turn; turns[-1] is one of them

    @property
    def pairs(self) -> Path:
        return self.file.with_suffix(".pairs.jsonl")

    def prompt(self, until: int | None = None) -> list[Message]:
        """The messages before a turn (None: all), from the last start of a conversation on."""
        until = len(self.turns) if until is None else until
        start = max(turn for turn in self.starts if turn <= until)
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + self.turns[start:until]

    def begin(self) -> None:
        """Start a new conversation: the model does not see the turns so far any more."""
        self.starts.append(len(self.turns))
        self.offer = None

    def ask(self, text: str) -> None:
        self.turns.append({"role": "user", "content": text})
        self.offer = None

    def answer(self, text: str, model: str | None = None) -> None:
        self.models[len(self.turns)] = model or self.model
        self.turns.append(message_of(text))

    def thumb(self, label: bool, turn: int = -1) -> None:
        """Thumbs up or down for a reply, by default for the last one."""
        turn %= len(self.turns)
        row = {"model": self.models[turn], "prompt": self.prompt(turn)}
        row |= {"completion": [self.turns[turn]], "label": label}
        self.rows[turn] = self._keep(self.file, row, self.rows.get(turn))

    def offered(self, texts: list[str], models: list[str]) -> None:
        """Add two replies to the last question. Until one is chosen, the first one is the turn."""
        self.answer(texts[0], models[0])
        self.offer = Offer([message_of(text) for text in texts], models)

    def choose(self, better: int | None) -> None:
        """Judge the offer: the first (0) or the second reply (1) is better and becomes the turn.
        None: neither is better."""
        offer = self.offer
        offer.judged, offer.better = True, better
        if better is None:
            if offer.row:
                replace(self.pairs, offer.row, None)
            offer.row = None
            return
        chosen, rejected = offer.replies[better], offer.replies[1 - better]
        names = offer.models[better], offer.models[1 - better]
        row = {
            "model": names[0],
            "rejected_model": names[1],
            "prompt": self.prompt(len(self.turns) - 1),
        }
        row |= {"chosen": [chosen], "rejected": [rejected]}
        offer.row = self._keep(self.pairs, row, offer.row)
        if self.turns[-1] != chosen:
            self.rows.pop(len(self.turns) - 1, None)  # a thumb for the other one stays in its file
            self.turns[-1], self.models[len(self.turns) - 1] = chosen, names[0]

    def undo(self) -> str:
        """Take back the last question, its reply and the judgement. -> the question"""
        if self.offer:
            self.choose(None)
            self.offer = None
        asked = [i for i, turn in enumerate(self.turns) if turn["role"] == "user"]
        if not asked:
            return ""
        self.forget(asked[-1] + 1)
        question = self.turns[asked[-1]]["content"]
        del self.turns[asked[-1] :]
        self.starts = [turn for turn in self.starts if turn <= asked[-1]]
        return question

    def forget(self, turn: int) -> None:
        """Take back a thumb."""
        if row := self.rows.pop(turn, None):
            replace(self.file, row, None)

    def _keep(self, path: Path, row: dict, old: dict | None) -> dict:
        """Write a line, or replace the old one if there is one."""
        row = {**row, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        if old is None:
            append(path, row)
        else:
            replace(path, old, row)
        return row


def tally(chat: Conversation) -> str:
    """Such as "37 thumbs: 21 up, 16 down; 4 choices"."""
    labels, choices = [row.get("label") for row in read_rows(chat.file)], read_rows(chat.pairs)
    up = labels.count(True)
    return f"{len(labels)} thumbs: {up} up, {len(labels) - up} down; {len(choices)} choices"


def read_rows(path: Path) -> list[dict]:
    """The lines of a JSONL file, or [] if there is no file. If a crash has left the last line
    incomplete, it is moved to FILE.torn, and a message is printed."""
    with saving(path):
        raw = path.read_bytes() if path.exists() else b""
    *lines, last = raw.split(b"\n")
    if last:
        try:
            json.loads(last)
            _append(path, b"\n")  # only the newline was missing
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
            rows.append({**json.loads(line)})
        except (ValueError, TypeError):
            raise InputError(f"{path}, line {number}: expected an object in JSON") from None
    return rows


def append(path: Path, row: dict) -> None:
    """Add a line. It is on the disk when this returns."""
    _append(path, _line(row))


def replace(path: Path, old: dict, new: dict | None) -> None:
    """Replace the last line that equals `old` with `new`. None: remove it."""
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


# Statistics of votes
Z = NormalDist().inv_cdf(0.975)  # 1.96, for an interval of 95 %


def wilson(wins: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927): all probabilities p for which holds

    |wins / n - p| <= 1.96 sqrt(p (1 - p) / n)
    """
    share, spread = wins / n, Z * Z / n
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * share * (1 - share) + spread * spread / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def verdict(wins: int, n: int) -> str:
    """Whether so many wins of n votes are more than chance, in words."""
    if n == 0:
        return "no votes"
    low, high = wilson(wins, n)
    said = f"{wins} of {n} (95 %: {low:.0%} to {high:.0%})"
    if low > 0.5 or high < 0.5:
        return f"{said}: {'more' if low > 0.5 else 'less'} than chance"
    if 2 * wins == n:
        return f"{said}: it may be chance; at this rate more votes would not tell"
    needed = (Z / 2 / (wins / n - 0.5)) ** 2  # with so many votes the interval would end at 0.5
    needed = max(n + 1, round(needed, 1 - int(math.log10(needed))))  # round to two digits
    return f"{said}: it may be chance; at this rate about {needed:,.0f} votes would tell"
