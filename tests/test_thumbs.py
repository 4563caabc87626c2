"""Rows that people made are on the disk, whole, whatever happens."""

import os
from collections import Counter

import pytest
from scripts import child, wait

from nanoalign import InputError
from nanoalign.formats.columns import turns_of
from nanoalign.formats.layouts import DPO, KTO, read_cases
from nanoalign.tools import thumbs
from nanoalign.tools.thumbs import Conversation


def test_rows_are_appended_and_replaced(tmp_path):
    path, rows = tmp_path / "a.jsonl", [{"n": i, "text": "日本\n\u2028"} for i in range(3)]
    assert thumbs.read_rows(path) == []
    for row in rows:
        thumbs.append(path, row)
    assert thumbs.read_rows(path) == rows and len(path.read_bytes().splitlines()) == 3
    thumbs.replace(path, rows[1], {"n": 9})
    thumbs.replace(path, rows[0], None)
    assert thumbs.read_rows(path) == [{"n": 9}, rows[2]]
    thumbs.append(path, {"n": 9})
    thumbs.replace(path, {"n": 9}, {"n": 10})  # of equal ones, the last
    assert thumbs.read_rows(path) == [{"n": 9}, rows[2], {"n": 10}]
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_torn_line_moves_aside_and_is_said(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    for torn in ('{"n": 2, "text": "hal', '{"n": 2, "text": "ü'.encode()[:-1].decode("latin1")):
        path.write_bytes(b'{"n": 1}\n' + torn.encode("latin1"))
        assert thumbs.read_rows(path) == [{"n": 1}]
        assert capsys.readouterr().out == (
            f"{path}: its last line was torn; moved to {path}.torn\n"
        )
        thumbs.append(path, {"n": 3})
        assert thumbs.read_rows(path) == [{"n": 1}, {"n": 3}] and not capsys.readouterr().out
    assert (tmp_path / "a.jsonl.torn").read_bytes().count(b"\n") == 2  # both


def test_a_last_line_that_lacks_its_end_only(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 1}\n{"n": 2}')
    assert thumbs.read_rows(path) == [{"n": 1}, {"n": 2}] and not capsys.readouterr().out
    thumbs.append(path, {"n": 3})
    assert thumbs.read_rows(path) == [{"n": 1}, {"n": 2}, {"n": 3}]


def test_a_line_in_the_midst_that_is_no_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 1}\n{"n"\n{"n": 3}\n')
    with pytest.raises(InputError, match="a.jsonl, line 2: "):
        thumbs.read_rows(path)
    assert path.read_bytes() == b'{"n": 1}\n{"n"\n{"n": 3}\n'


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_row_is_on_the_disk_when_append_returns(tmp_path, monkeypatch):
    """It is synced, and a process that dies at once has lost nothing."""
    synced, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(handle), real(handle)))
    thumbs.append(tmp_path / "b.jsonl", {"n": 1})
    assert len(synced) == 1

    def die():
        thumbs.append(tmp_path / "a.jsonl", {"n": 1})
        os.kill(os.getpid(), 9)

    assert wait(child(die)) == -9 and thumbs.read_rows(tmp_path / "a.jsonl") == [{"n": 1}]


def test_a_disk_that_takes_nothing(tmp_path):
    with pytest.raises(InputError, match="not saved: "):
        thumbs.append(tmp_path / "none" / "a.jsonl", {"n": 1})
    with pytest.raises(InputError, match=": "):
        thumbs.read_rows(tmp_path)


# ------------------------------------------------------------------------------------ conversations


def talk(*turns, file=None, system=""):
    chat = Conversation("model", file, system)
    for asked, replied in zip(turns[::2], turns[1::2]):
        chat.ask(asked)
        chat.answer(replied)
    return chat


def kept(path):
    return [{k: v for k, v in row.items() if k != "time"} for row in thumbs.read_rows(path)]


def said(role, content, **more):
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize(
    "text, message",
    [
        ("Yes.", said("assistant", "Yes.")),
        ("", said("assistant", "")),
        ("<think>\nHm.\n</think>\n\nYes.", said("assistant", "Yes.", reasoning_content="Hm.")),
        ("Hm.\n</think>\n\nYes.", said("assistant", "Yes.", reasoning_content="Hm.")),
        ("<think>\nnever ends", said("assistant", "<think>\nnever ends")),
        ("<think>\n\n</think>\n\nYes.", said("assistant", "Yes.")),
        (
            '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>',
            said("assistant", "", tool_calls=[
                {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
            ]),
        ),
    ],
)  # fmt: skip
def test_what_a_model_wrote_is_read_as_from_a_file(text, message):
    assert thumbs.message_of(text) == message
    row = {"reply": [message]}
    assert turns_of(row, "reply") == [message]  # and again, from the row that is kept


def test_a_thumb_is_a_row_and_a_second_one_replaces_it(tmp_path):
    file = tmp_path / "thumbs.jsonl"
    chat = talk("Hi", "Hm.</think>Hello", "So?", "So.", file=file, system="Be kind.")
    first, second = [said("system", "Be kind."), said("user", "Hi")], said("user", "So?")
    hello = said("assistant", "Hello", reasoning_content="Hm.")
    chat.thumb(True)
    chat.thumb(False, turn=1)
    rows = [
        dict(model="model", prompt=[*first, hello, second],
             completion=[said("assistant", "So.")], label=True),
        dict(model="model", prompt=first, completion=[hello], label=False),
    ]  # fmt: skip
    assert kept(file) == rows and list(thumbs.read_rows(file)[0])[-1] == "time"
    chat.thumb(False)
    rows[0]["label"] = False
    assert kept(file) == rows
    assert chat.undo() == "So?" and kept(file) == rows[1:] and len(chat.turns) == 2
    chat.ask("And?")
    chat.answer("So.")
    chat.thumb(True)
    assert len(kept(file)) == 2
    assert thumbs.tally(chat) == "2 thumbs: 1 up, 1 down; 0 choices"


def test_a_choice_is_a_row_and_a_tie_none(tmp_path):
    chat = talk("Hi", "Hello", file=tmp_path / "t.jsonl")
    chat.ask("So?")
    chat.offered(["One.", "Two."], ["new", "base"])
    assert chat.offer.differ
    assert chat.turns[-1] == said("assistant", "One.")  # until there is a choice
    chat.choose(1)
    row = dict(
        model="base", prompt=[said("user", "Hi"), said("assistant", "Hello"), said("user", "So?")],
        chosen=[said("assistant", "Two.")], rejected=[said("assistant", "One.")],
        rejected_model="new",
    )  # fmt: skip
    assert kept(chat.pairs) == [row] and chat.turns[-1] == said("assistant", "Two.")
    chat.choose(0)  # a mind that changes
    row |= dict(model="new", rejected_model="base", chosen=row["rejected"], rejected=row["chosen"])
    assert kept(chat.pairs) == [row] and chat.turns[-1] == said("assistant", "One.")
    chat.choose(None)
    assert kept(chat.pairs) == []
    chat.choose(0)
    assert chat.undo() == "So?" and kept(chat.pairs) == []  # it goes with its question
    chat.ask("So?")
    chat.offered(["One.", "One."], ["new", "base"])
    assert not chat.offer.differ


def test_a_conversation_that_begins_anew(tmp_path):
    chat = talk("Hi", "Hello", file=tmp_path / "t.jsonl", system="Be kind.")
    chat.begin()
    chat.ask("So?")
    first = [said("system", "Be kind.")]
    assert chat.prompt() == [*first, said("user", "So?")]
    chat.answer("So.")
    chat.thumb(True)
    chat.thumb(False, turn=1)
    prompts = [row["prompt"] for row in thumbs.read_rows(chat.file)]
    assert prompts == [[*first, said("user", text)] for text in ("So?", "Hi")]
    assert chat.undo() == "So?" and chat.prompt() == first  # it is still a new one
    assert chat.undo() == "Hi" and chat.prompt() == first
    chat.ask("Hi")
    assert chat.prompt() == [*first, said("user", "Hi")] and chat.undo() and not chat.undo()


def test_training_reads_the_rows(tmp_path):
    """By what the scripts take them for: no more and no less than what was said."""
    chat = talk(
        "Hi", "Hm.</think>Hello", "So?", "So.", file=tmp_path / "t.jsonl", system="Be kind."
    )
    chat.thumb(True)
    chat.thumb(False, turn=1)
    chat.ask("And?")
    chat.offered(["One.", "Two."], ["new", "base"])
    chat.choose(1)
    for path, layouts, completions in (
        (chat.file, KTO, [["So."], ["Hello"]]), (chat.pairs, DPO, [["Two.", "One."]]),
    ):  # fmt: skip
        notes, count = [], Counter()
        cases = list(read_cases([str(path)], layouts, count, notes))
        assert [[c[0]["content"] for c in case.completions] for case in cases] == completions
        assert cases[0].prompt[:3] == chat.prompt()[:3] and count["rows"] == len(cases)
        assert all("key" not in note for note in notes)
    assert [case.label for case in read_cases([str(chat.file)], KTO, Counter(), [])] == [
        True,
        False,
    ]
