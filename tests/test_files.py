"""A file is read as it stands, or refused with one line that says where, what and what else."""

import csv
import functools
import gzip
import io
import json
import math
import pickle
import sys
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanoalign import InputError
from nanoalign.formats.rows import read_records as rows_one_by_one

OK = b'{"prompt": "p", "completion": "c"}\n'
DEEP = b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
TABLE = b"prompt,completion\n"


def read_rows(path):
    return list(rows_one_by_one(path))


def objects(*rows):
    return b"[\n" + b",\n".join(row.strip() for row in rows) + b"\n]\n"


def write(folder, name, data):
    path = folder / name
    path.write_bytes(data)
    return path


def refused(path):
    """The message of the InputError: one line without control characters, and not the whole file"""
    with pytest.raises(InputError) as caught:
        read_rows(path)
    message = str(caught.value)
    assert message.isprintable() and message.startswith(str(path))
    assert len(message) - len(str(path)) < 180
    return message.removeprefix(str(path))


# --- What is wrong inside one object, in both JSON formats: the object, fragments of the message.
BAD_OBJECTS = {
    "no JSON": (b"hello", ["JSON object", "'hello"]),
    "a scalar": (b"12", ["JSON object", "'12"]),
    "a list": (b'["a"]', ["JSON object", "a"]),
    "a string": (b'"text"', ["JSON object", "text"]),
    "bare NaN": (b"NaN", ["JSON object", "'NaN"]),
    "single quotes": (b"{'a': 1}", ["column", "expected"]),
    "unquoted value": (b'{"a": yes}', ["column", "Expecting value", "expected"]),
    "no comma": (b'{"a": 1 "b": 2}', ["',' delimiter", "expected"]),
    "raw tab": (b'{"a": "x\ty"}', ["control character", "expected"]),
    "bad escape": (rb'{"a": "\x41"}', ["escape", "expected"]),
    "NaN": (b'{"a": NaN}', ["'NaN'", "finite number", "expected"]),
    "Infinity": (b'{"a": [1, Infinity]}', ["'Infinity'", "finite number"]),
    "-Infinity": (b'{"a": {"b": -Infinity}}', ["'-Infinity'", "finite number"]),
    "overflow": (b'{"a": 1e999}', ["'1e999'", "finite number"]),
    "negative overflow": (b'{"a": -1E400}', ["'-1E400'", "finite number"]),
    "5,000 digits": (b'{"a": ' + b"7" * 5000 + b"}", ["over 4300 digits", "expected"]),
    "doubled key": (b'{"a": 1, "b": 2, "a": 1}', ["key 'a'", "twice", "expected"]),
    "doubled by escape": (rb'{"a": 1, "\u0061": 2}', ["key 'a'", "twice"]),
    "doubled key inside": (b'{"m": [{"role": "x", "role": "y"}]}', ["key 'role'", "twice"]),
    "doubled empty key": (b'{"": 1, "": 2}', ["key ''", "twice"]),
    "doubled nasty key": (rb'{"\n\u202e": 1, "\n\u202e": 2}', [r"key '\n\u202e'", "twice"]),
    "deep": (DEEP, ["nested too deep", "expected"]),
    "deep and open": (b'{"a": ' * 100_000, ["nested too deep", "expected"]),
    "deep objects": (b'{"a": ' * 9999 + b"1" + b"}" * 9999, ["nested too deep", "expected"]),
    "deep, half a pair": (rb'{"a": "\ud800", "b": ' + DEEP + b"}", ["nested too deep"]),
    "lone high": (rb'{"a": "\ud800"}', ["lone surrogate", "expected"]),
    "lone low": (rb'{"a": "x\uDFFFy"}', ["lone surrogate", "expected"]),
    "wrong order": (rb'{"a": ["\ude00\ud83d"]}', ["lone surrogate"]),
    "lone in a key": (rb'{"a": {"\uD83d": 1}}', ["lone surrogate"]),
    "cut in a string": (b'{"a": "some te', ["cut off", "Unterminated", "expected"]),
    "cut in an object": (b'{"a": "some text"', ["cut off", "expected"]),
    "second BOM": (b'\xef\xbb\xbf{"a": 1}', ["JSON object", "ufeff"]),
    "non-breaking space": (b'\xc2\xa0{"a": 1}', ["JSON object", "xa0"]),
    "control characters": (b"\x1b" * 100, ["JSON object", r"'\x1b"]),
    "long": (b"x" * 10_000, ["JSON object", "xxx"]),
}


@pytest.mark.parametrize("row, fragments", BAD_OBJECTS.values(), ids=BAD_OBJECTS)
def test_bad_object(tmp_path, row, fragments):
    # With a blank line before it, a physical line is not the number of rows read so far plus one.
    message = refused(write(tmp_path, "data.jsonl", OK + b"\n" + row + b"\n" + OK))
    assert message.startswith(", line 3: ")
    for fragment in fragments:
        assert fragment in message
    message = refused(write(tmp_path, "data.jsonl", OK + OK + row))  # the last line, no newline
    assert message.startswith(", line 3: ")
    message = refused(write(tmp_path, "data.json", objects(OK, OK, OK, row)))
    assert message.startswith(", row 4: ")
    for fragment in fragments:
        assert fragment.replace("Unterminated", "") in message


# --- Whole files: name, bytes, where, fragments of the message.
BAD_FILES = {
    "two on a line": ("a.jsonl", OK + OK.strip() + OK, ", line 2: ", ["one object per line"]),
    "list in JSONL": ("a.jsonl", objects(OK), ", line 1: ", ["JSON object", "'['"]),
    "indented JSONL": ("a.jsonl", b'{\n  "a": 1\n}\n', ", line 1: ", ["cut off at column 2"]),
    "JSONL in JSON": ("a.json", OK + OK, ": ", ["list of objects", "JSONL", ".jsonl"]),
    "object": ("a.json", b'{"a": [\n{}\n,\n{}\n]}', ": ", ["list of objects", "found"]),
    "string": ("a.json", b'"text"', ": ", ["list of objects", "text"]),
    "null": ("a.json", b"null", ": ", ["list of objects", "null"]),
    "no ]": ("a.json", b"[" + OK, ", row 1: ", ["comma or ]", "end of the file"]),
    "cut after a comma": ("a.json", b"[" + OK + b",", ", row 2: ", ["object", "end of the file"]),
    "only [": ("a.json", b"[", ", row 1: ", ["JSON object", "end of the file"]),
    "trailing comma": ("a.json", b"[" + OK + b",]", ", row 2: ", ["JSON object", "']'"]),
    "no comma": ("a.json", b"[" + OK + OK + b"]", ", row 1: ", ["comma or ]", "prompt"]),
    "two lists": ("a.json", objects(OK) + b"[]", ", line 4: ", ["after ]", "'[]'"]),
    "line in a row": ("a.json", objects(OK, b'{"a":\n 1 2}'), ", row 2: ", ["line 4, column 4"]),
    "deep list": ("a.json", b"[" * 100_000, ", row 1: ", ["JSON object"]),
    "empty list": ("a.json", b" [ ] \n", ": ", ["empty list", "expected rows"]),
    "empty list, tight": ("a.json", b"[]", ": ", ["empty list", "expected rows"]),
    "header only": ("a.csv", TABLE, ": ", ["header only", "expected rows"]),
    "header, blank lines": ("a.csv", TABLE + b"\r\n\n", ": ", ["header only"]),
    "too few": ("a.csv", TABLE + b"a,b\n\nc\n", ", line 4: ", ["row of 1", "header has 2"]),
    "too many": ("a.csv", TABLE + b'"a\n",b\nc,d,e', ", line 4: ", ["row of 3", "header has 2"]),
    "space for a row": ("a.csv", TABLE + b"a,b\n \n", ", line 3: ", ["row of 1"]),
    "doubled column": ("a.csv", b"a,b,a\n1,2,3\n", ", line 1: ", ["'a'", "twice"]),
    "unnamed column": ("a.csv", b"\na,,b\n1,2,3\n", ", line 2: ", ["without a name"]),
    "blank column": ("a.csv", b"a, \n1,2\n", ", line 1: ", ["without a name"]),
    "trailing comma, CSV": ("a.csv", b"a,b,\n1,2,\n", ", line 1: ", ["without a name"]),
    "open quote": ("a.csv", TABLE + b'a,b\nc,"d\ne,f\n', ", line 3: ", ["never closes"]),
    "open quote late": ("a.csv", TABLE + b'"a\n\nb","c\nd', ", line 4: ", ["never closes"]),
    "open quote last": ("a.csv", TABLE + b'a,b\nc,"', ", line 3: ", ["never closes"]),
    "open doubled quote": ("a.csv", TABLE + b'a,"b""\n\n', ", line 2: ", ["never closes"]),
    "open quote above": ("a.csv", b'a,"b\n1,2\n', ", line 1: ", ["never closes"]),
    "text after quote": ("a.csv", TABLE + b'a,b\n"c\n"d,e\n', ", line 3: ", ["quote on line 4"]),
    "stray CR": ("a.csv", TABLE + b"a,b\nc\rd,e\n", ", line 3: ", ["carriage return"]),
    "stray CR late": ("a.csv", TABLE + b'"a\n",c\rd\n', ", line 3: ", ["carriage return"]),
    "CR for newlines": ("a.csv", b"a,b\rc,d\r", ", line 1: ", ["carriage return"]),
}


@pytest.mark.parametrize("name, data, where, fragments", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file(tmp_path, name, data, where, fragments):
    message = refused(write(tmp_path, name, data))
    assert message.startswith(where)
    for fragment in [*fragments, "expected"]:
        assert fragment in message


# --- What is no UTF-8 text, under each of the three names: bytes, where, fragments.
BAD_BYTES = {
    "empty": (b"", ": ", ["empty"]),
    "only a BOM": (b"\xef\xbb\xbf", ": ", ["empty"]),
    "only blank lines": (b"\n \r\n\t\n", ": ", ["empty"]),
    "UTF-16": (OK.decode().encode("utf-16"), ": ", ["UTF-16"]),
    "UTF-16-BE": (b"\xfe\xff" + OK.decode().encode("utf-16-be"), ": ", ["UTF-16"]),
    "UTF-32": (OK.decode().encode("utf-32"), ": ", ["UTF-32"]),
    "UTF-16 without BOM": ("ab\nc".encode("utf-16-le"), ", line 1: ", ["byte 2 ", "0x00"]),
    "gzip": (gzip.compress(OK), ": ", ["gzip"]),
    "zip": (b"PK\x03\x04rest", ": ", ["zip"]),
    "pickle 2": (pickle.dumps([1], 2), ": ", ["pickle"]),
    "pickle 5": (pickle.dumps([1], 5), ": ", ["pickle"]),
    "Latin-1": (b"a\n\nna\xefve\n", ", line 3: ", ["byte 6 ", "0xef", "UTF-8"]),
    "after a BOM": (b"\xef\xbb\xbfa\n\xff", ", line 2: ", ["byte 6 ", "0xff", "UTF-8"]),
    "cut in a character": (b'a\n"\xf0\x9f\x98', ", line 2: ", ["byte 4 ", "0xf0"]),
    "surrogate in UTF-8": (b'{"a": "\xed\xa0\x80"}', ", line 1: ", ["byte 8 ", "0xed"]),
    "NUL": (b"a,b\nc,\0d\n", ", line 2: ", ["byte 7 ", "0x00", "UTF-8"]),
}


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
@pytest.mark.parametrize("data, where, fragments", BAD_BYTES.values(), ids=BAD_BYTES)
def test_bad_bytes(tmp_path, suffix, data, where, fragments):
    message = refused(write(tmp_path, f"data.{suffix}", data))
    assert message.startswith(where)
    for fragment in [*fragments, "expected"]:
        assert fragment in message


@pytest.mark.parametrize("name", ["data", "data.txt", "data.parquet", ".json"])
def test_unknown_suffix(tmp_path, name):
    message = refused(write(tmp_path, name, OK))
    assert message.endswith("expected .json, .jsonl or .csv")


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_gzip(tmp_path, suffix):
    data = {"json": objects(OK, OK), "jsonl": OK + OK, "csv": TABLE + b"p,c\np,c\n"}[suffix]
    plain = write(tmp_path, f"data.{suffix}", data)
    packed = write(tmp_path, f"data.{suffix}.GZ", gzip.compress(data))
    rows = [row for _, row in read_rows(plain)]
    assert [row for _, row in read_rows(packed)] == rows and len(rows) == 2
    for broken in (OK, gzip.compress(data)[:-5], gzip.compress(data)[:-9] + b"\0" * 9, b""):
        message = refused(write(tmp_path, f"broken.{suffix}.gz", broken))
        assert "expected" in message
    assert "no text" in refused(write(tmp_path, f"x.{suffix}.gz", gzip.compress(b"\xff")))
    assert "unknown kind of file" in refused(write(tmp_path, "data.gz", gzip.compress(data)))


def test_path(tmp_path):
    assert "No such file" in refused(tmp_path / "none.jsonl")
    assert "No such file" in refused(tmp_path / "none")
    assert "directory" in refused(tmp_path)
    (tmp_path / "data.csv").mkdir()
    assert "directory" in refused(tmp_path / "data.csv")
    assert "too long" in refused(tmp_path / ("x" * 999 + ".json"))
    with pytest.raises(InputError) as caught:  # a name cannot break the line, nor colour it
        read_rows(tmp_path / "a\n\x1b[31m.json")
    assert r"a\n\x1b[31m.json" in str(caught.value) and str(caught.value).isprintable()


def test_deep_under_any_recursion_limit(tmp_path):
    """Libraries raise the limit; then the parser would overflow the C stack and kill Python."""
    path, limit = write(tmp_path, "data.jsonl", DEEP), sys.getrecursionlimit()
    sys.setrecursionlimit(10**6)
    try:
        assert "nested too deep" in refused(path)
    finally:
        sys.setrecursionlimit(limit)


# --- What is fine: name, bytes, [(place, row), ...].
ONE = {"a": 1}
FINE = {
    "JSON": ("a.json", b'[{"a": 1}, {"b": [null, true, -0.5, 1e3]}]',
             [("row 1", ONE), ("row 2", {"b": [None, True, -0.5, 1000.0]})]),
    "JSON over lines": ("a.json", b'\xef\xbb\xbf\r\n[\r\n{"a":\r\n1}\r\n,\n\n{}]\r\n',
                        [("row 1", ONE), ("row 2", {})]),
    "upper case": ("A.JSON", b'[{"a": 1}]', [("row 1", ONE)]),
    "JSONL": ("a.jsonl", b'{"a": 1}\n{"a": "x"}\n', [("line 1", ONE), ("line 2", {"a": "x"})]),
    "no last newline": ("a.jsonl", b'{"a": 1}\n{"a": 1}', [("line 1", ONE), ("line 2", ONE)]),
    "blank lines": ("a.jsonl", b'\n \t\n{"a": 1}\n\r\n  {"a": 1} \n\n',
                    [("line 3", ONE), ("line 5", ONE)]),
    "BOM and CRLF": ("a.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n{"a": 1}\r\n',
                     [("line 1", ONE), ("line 2", ONE)]),
    "line separators": ("a.jsonl", '{"a": "x\u2028\u2029\u0085y\x7f"}\n{"a": 1}'.encode(),
                        [("line 1", {"a": "x\u2028\u2029\u0085y\x7f"}), ("line 2", ONE)]),
    "escapes": ("a.jsonl", rb'{"a": "\u2028\r\n\u0000\"[{\\"}',
                [("line 1", {"a": '\u2028\r\n\0"[{\\'})]),
    "surrogate pairs": ("a.jsonl", rb'{"\ud83d\uDE00": "\uD83D\ude00 \\ud800"}',
                        [("line 1", {"\U0001f600": "\U0001f600 \\ud800"})]),
    "brackets in text": ("a.jsonl", b'{"a": "' + b'[{\\"' * 500 + b'"}',
                         [("line 1", {"a": '[{"' * 500})]),
    "brackets side by side": ("a.json", b'[{"a": [' + b"[], " * 500 + b"[]]}]",
                              [("row 1", {"a": [[]] * 501})]),
    "one key, two objects": ("a.jsonl", b'{"m": [{"a": 1}, {"a": 1}], "a": 1}',
                             [("line 1", {"m": [ONE, ONE], "a": 1})]),
    "700 digits": ("a.jsonl", b'{"a": ' + b"7" * 700 + b"}", [("line 1", {"a": int("7" * 700)})]),
    "5,000 decimals": ("a.jsonl", b'{"a": 0.' + b"7" * 4998 + b"}", [("line 1", {"a": 7 / 9})]),
    "100 levels": ("a.jsonl", b'{"a": ' * 100 + b"1" + b"}" * 100,
                   [("line 1", functools.reduce(lambda row, _: {"a": row}, range(100), 1))]),
    "640 digits": ("a.jsonl", b'{"a": ' + b"7" * 640 + b"}", [("line 1", {"a": int("7" * 640)})]),
    "CSV": ("a.csv", b"a,b\nc,d\ne,\n", [("line 2", {"a": "c", "b": "d"}),
                                         ("line 3", {"a": "e", "b": ""})]),
    "CSV words": ("a.csv", b"a\nnull\nNA\nnan\n1.0\ntrue\n",
                  [(f"line {i}", {"a": v}) for i, v in
                   enumerate(["null", "NA", "nan", "1.0", "true"], 2)]),
    "CSV spaces": ("a.csv", b"a,b\n x , y \n", [("line 2", {"a": " x ", "b": " y "})]),
    "CSV newlines": ("a.csv", b'a,b\r\n"c\r\n\r\nd","\re\r"\r\n\r\nf,"g""\n"\r\nh,i',
                     [("line 2", {"a": "c\r\n\r\nd", "b": "\re\r"}),
                      ("line 6", {"a": "f", "b": 'g"\n'}), ("line 8", {"a": "h", "b": "i"})]),
    "CSV separators": ("a.csv", "a\nx\u2028\u2029\u0085\x0b\x0cy\nz".encode(),
                       [("line 2", {"a": "x\u2028\u2029\u0085\x0b\x0cy"}), ("line 3", {"a": "z"})]),
    "CSV BOM": ("a.csv", b'\xef\xbb\xbf"a",b\n1,2', [("line 2", {"a": "1", "b": "2"})]),
    "CSV inch": ("a.csv", b'a,b\n5" nail,5""\n', [("line 2", {"a": '5" nail', "b": '5""'})]),
    "CSV long text": ("a.csv", b'a\n"' + b"x\n" * 500_000 + b'"\ny',
                      [("line 2", {"a": "x\n" * 500_000}), ("line 500003", {"a": "y"})]),
}  # fmt: skip


@pytest.mark.parametrize("name, data, rows", FINE.values(), ids=FINE)
def test_fine(tmp_path, name, data, rows):
    path = write(tmp_path, name, data)
    rows = [(f"{path}, {place}", row) for place, row in rows]
    assert read_rows(path) == read_rows(str(path)) == rows


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_fast(tmp_path, suffix):
    """20,000 chats with escapes: a second. Quadratic work (copies of the text) takes minutes."""
    chat = {"messages": [{"role": r, "content": "\U0001f600 [hi]\n" * 9} for r in "abcdef"]}
    lines = [json.dumps(chat).encode()] * 20_000
    data = objects(*lines) if suffix == "json" else b"\n".join(lines)
    path = write(tmp_path, f"data.{suffix}", data)
    start = time.perf_counter()
    assert len(read_rows(path)) == 20_000
    assert time.perf_counter() - start < 10  # generous: a busy machine is no failure


# --- Fuzz: random bytes, valid files with wounds, and texts that must come back as they were.

VALID = [
    OK + b'{"a": [1, -2.5e3, null, {"b": "\\ud83d\\ude00 \xc3\xa9"}]}\r\n' + OK,
    objects(OK, b'{"a": [1, -2.5e3, null, {"b": "\\ud83d\\ude00 \xc3\xa9"}]}', OK),
    TABLE + b'"a ""quoted"" one,\r\nover lines",b\n\nc,d\r\n',
]
WOUNDS = [b"", b"\0", b"\n", b"\r", b'"', b",", b"{", b"}", b"[", b"]", b"\\", b"\\ud800", b"\xff",
          b"NaN", b"1e999", b"9" * 700, b"[" * 2000, b":", b" ", b"\xe2\x80\xa8", b"\xef\xbb\xbf",
          b"\xff\xfe", b'"a":1,']  # fmt: skip


@st.composite
def wounded(draw):
    data = draw(st.sampled_from(VALID))
    for _ in range(draw(st.integers(1, 3))):
        at, cut = draw(st.integers(0, len(data))), draw(st.integers(0, 3))
        data = data[:at] + draw(st.sampled_from(WOUNDS)) + data[at + cut :]
    return data[: draw(st.integers(1, len(data)))] if draw(st.booleans()) else data


def finite(value):
    if isinstance(value, (dict, list)):
        return all(map(finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


fuzz = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@fuzz
@given(st.one_of(st.binary(max_size=60), wounded(), st.text('{}[]",:\\u\r\n 1ea').map(str.encode)))
def test_fuzz_refused_or_sound(tmp_path, data):
    for suffix in ("json", "jsonl", "csv"):
        path = write(tmp_path, f"data.{suffix}", data)
        try:
            rows = read_rows(path)
        except InputError as error:
            message = str(error)
            assert message.isprintable() and message.startswith(str(path)) and "expected" in message
            assert len(message) - len(str(path)) < 180
            continue
        if suffix != "csv":  # what is accepted means what Python's own parser says
            text = data.decode("utf-8-sig")
            lines = [line for line in text.split("\n") if line.strip()]
            text = "[" + ",".join(lines) + "]" if suffix == "jsonl" else text
            assert [row for _, row in rows] == json.loads(text)
        for where, row in rows:
            assert where.startswith(f"{path}, ") and finite(row)
            assert all(isinstance(key, str) for key in row)
            json.dumps(row, ensure_ascii=False).encode()


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


json_rows = st.lists(st.dictionaries(texts, texts | st.lists(texts), max_size=3), min_size=1)


@fuzz
@given(json_rows, st.booleans())
def test_fuzz_json_comes_back(tmp_path, rows, ascii_only):
    lines = [json.dumps(row, ensure_ascii=ascii_only).encode() for row in rows]
    for name, data in {"a.jsonl": b"\n".join(lines), "a.json": objects(*lines)}.items():
        assert [row for _, row in read_rows(write(tmp_path, name, data))] == rows


@fuzz
@given(st.lists(st.tuples(texts, texts), min_size=1))
def test_fuzz_csv_comes_back(tmp_path, records):
    records = [tuple(text.replace("\0", "") for text in record) for record in records]
    out = io.StringIO(newline="")
    csv.writer(out, quoting=csv.QUOTE_ALL).writerows([("a", "b"), *records])
    rows = read_rows(write(tmp_path, "a.csv", out.getvalue().encode()))
    assert [(row["a"], row["b"]) for _, row in rows] == records
    lines = out.getvalue().split("\n")
    for where, row in rows:  # each place is a line on which that record does start
        start = '"' + row["a"].split("\n")[0].replace('"', '""')
        assert lines[int(where.rsplit(" ", 1)[1]) - 1].startswith(start)
