"""Rows that people made are on the disk, whole, whatever happens."""

import os

import pytest
from scripts import child, wait

from nanoalign import InputError
from nanoalign.tools import thumbs


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
