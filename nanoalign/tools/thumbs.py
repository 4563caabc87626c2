"""Rows that people made: each is on the disk before the next word is said.

A thumb costs a person more than a step costs a machine. So a row is appended, flushed and synced;
what a crash left of a half-written one is moved to FILE.torn, and said, before anything is appended
behind it; and a second judgement of the same reply takes the place of the first.
"""

import json
import os
from pathlib import Path

from nanoalign import InputError
from nanoalign.run.files import saving


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
