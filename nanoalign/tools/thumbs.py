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
    """What a model wrote, as the same words would be read from a file: its thought, its calls and
    the rest. Some templates open the thought in the prompt; then the text holds its end only."""
    if "<think>" not in text.partition("</think>")[0] and "</think>" in text:
        text = "<think>\n" + text
    return turns_of({"reply": text}, "reply", "assistant")[0]


@dataclass(eq=False)
class Offer:
    """Two replies to one question, and the row that says which is the better one."""

    replies: list[Message]  # in the order in which they are shown
    models: list[str]  # that wrote them
    judged: bool = False
    better: int | None = None  # once it is judged; None: neither
    row: dict | None = None

    @property
    def differ(self) -> bool:
        return self.replies[0] != self.replies[1]


@dataclass
class Conversation:
    """The turns so far, and what was said of the replies among them.

    `file` is for thumbs; choices go to FILE.pairs.jsonl beside it. Without one nothing is judged.
    """

    model: str
    file: Path | None = None
    system: str = ""
    turns: list[Message] = field(default_factory=list)
    starts: list[int] = field(default_factory=lambda: [0])  # the turns that begin anew
    models: dict[int, str] = field(default_factory=dict)  # that wrote a reply, by its place
    rows: dict[int, dict] = field(default_factory=dict)  # the thumbs, by the place of the reply
    offer: Offer | None = None  # at the end of the turns, of which the reply that goes on is one

    @property
    def pairs(self) -> Path:
        return self.file.with_suffix(".pairs.jsonl")

    def prompt(self, until: int | None = None) -> list[Message]:
        """The messages that precede a turn, or all, from where it last began anew."""
        until = len(self.turns) if until is None else until
        start = max(place for place in self.starts if place <= until)
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + self.turns[start:until]

    def begin(self) -> None:
        """What was said until now is not read any more."""
        self.starts.append(len(self.turns))
        self.offer = None

    def ask(self, text: str) -> None:
        self.turns.append({"role": "user", "content": text})
        self.offer = None

    def answer(self, text: str, model: str | None = None) -> None:
        self.models[len(self.turns)] = model or self.model
        self.turns.append(message_of(text))

    def thumb(self, label: bool, place: int = -1) -> None:
        """Thumbs up or down for a reply, the last one unless told otherwise."""
        place %= len(self.turns)
        row = {"model": self.models[place], "prompt": self.prompt(place)}
        row |= {"completion": [self.turns[place]], "label": label}
        self.rows[place] = self._keep(self.file, row, self.rows.get(place))

    def offered(self, texts: list[str], models: list[str]) -> None:
        """Two replies to the last question; until one is chosen the first goes on."""
        self.answer(texts[0], models[0])
        self.offer = Offer([message_of(text) for text in texts], models)

    def choose(self, better: int | None) -> None:
        """The first (0) or second (1) of the two is better and goes on; None: neither is."""
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
        """Take the last question and its reply back, and what was said of it. -> the question"""
        if self.offer:
            self.choose(None)
            self.offer = None
        asked = [place for place, turn in enumerate(self.turns) if turn["role"] == "user"]
        if not asked:
            return ""
        self.forget(asked[-1] + 1)
        question = self.turns[asked[-1]]["content"]
        del self.turns[asked[-1] :]
        self.starts = [place for place in self.starts if place <= asked[-1]]
        return question

    def forget(self, place: int) -> None:
        """Take a thumb back."""
        if row := self.rows.pop(place, None):
            replace(self.file, row, None)

    def _keep(self, path: Path, row: dict, old: dict | None) -> dict:
        """Write a row, in the place of the old one if there is one."""
        row = {**row, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        if old is None:
            append(path, row)
        else:
            replace(path, old, row)
        return row


def tally(chat: Conversation) -> str:
    """37 thumbs: 21 up, 16 down; 4 choices. What a crash has torn is set aside here."""
    labels, choices = [row.get("label") for row in read_rows(chat.file)], read_rows(chat.pairs)
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
            rows.append({**json.loads(line)})
        except (ValueError, TypeError):
            raise InputError(f"{path}, line {number}: expected an object in JSON") from None
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


# What votes say.
Z = NormalDist().inv_cdf(0.975)  # 1.96: of an interval that holds 95 %


def wilson(wins: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927): all p from which `wins` of n is no surprise,

    |wins / n - p| <= 1.96 sqrt(p (1 - p) / n)
    """
    share, spread = wins / n, Z * Z / n
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * share * (1 - share) + spread * spread / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def verdict(wins: int, n: int) -> str:
    """What so many wins of n votes say."""
    if n == 0:
        return "no votes"
    low, high = wilson(wins, n)
    said = f"{wins} of {n} (95 %: {low:.0%} to {high:.0%})"
    if low > 0.5 or high < 0.5:
        return f"{said}: {'more' if low > 0.5 else 'less'} than chance"
    if 2 * wins == n:
        return f"{said}: can't be told from a coin; at this rate no number would"
    needed = (Z / 2 / (wins / n - 0.5)) ** 2  # where the interval ends at a half
    needed = max(n + 1, round(needed, 1 - int(math.log10(needed))))  # two digits
    return f"{said}: can't be told from a coin; about {needed:,.0f} in all at this rate would"
