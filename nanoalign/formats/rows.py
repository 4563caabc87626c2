"""Files, folders and data sets of the hub -> records, one dict each.

Each record comes with a text that says where it is, "data.jsonl, line 17", for messages about it.
Lines and records count from 1. A line ends at "\\n" only: str.splitlines would also cut at a U+2028
or U+0085 inside a text.

A file is read as it is, or refused with an InputError of one line. If one record is refused and
the file can be read further, the InputError is yielded in its place, so that the caller may skip
it. A broken file raises the InputError. The usual loaders guess instead: Python's json keeps the
last of two equal keys and accepts NaN; a data frame reads the word "null" as a missing value and
fills up records that are too short.

To users a record is a row, and so messages call it. In code a row is the packed row.
"""

import csv
import glob
import gzip
import io
import json
import math
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from nanoalign import InputError

# The first bytes of files that are no plain text, whatever their names say.
MAGIC = {
    b"\xff\xfe\x00\x00": "UTF-32", b"\x00\x00\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16", b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip (or xlsx)",
    b"\x80": "binary, perhaps a pickle",
}  # fmt: skip
Records = Iterator[tuple[str, dict | InputError]]  # (where, record)
SUFFIXES = ".json", ".jsonl", ".csv", ".gz", ".parquet"
GRADIO = ["conversation", "index", "value", "flag", "timestamp"]  # its records have no `value`


def files_of(sources: list[str]) -> list[str]:
    """The sources; a pattern such as "data/*.jsonl" becomes the files that match it."""
    patterns = {s for s in sources if glob.has_magic(s) and not os.path.exists(s)}
    found = {s: sorted(glob.glob(s, recursive=True)) if s in patterns else [s] for s in sources}
    if empty := [source for source in sources if not found[source]]:
        raise InputError(f"{empty[0]}: no such file; expected at least one that matches")
    return [file for source in sources for file in found[source]]


def records_of(source: str, split: str) -> Records:
    """(where, record) for each of a source. In place of a refused one there is the InputError."""
    kind = storage(source)
    if kind == "file" and not source.lower().endswith(".parquet"):
        return read_records(source, yield_errors=True)
    return table_records(source, split, hub=kind == "hub")


def storage(source: str) -> str:
    """Where a source is stored. "hub": NAME or OWNER/NAME, and no such path exists here. "saved": a
    folder that the datasets library saved. "file": anything else."""
    if any(os.path.exists(f"{source}/{name}") for name in ("state.json", "dataset_dict.json")):
        return "saved"
    named = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source)
    here = os.path.exists(source) or "/" in source and os.path.exists(os.path.dirname(source))
    return "hub" if named and not here and not source.lower().endswith(SUFFIXES) else "file"


def table_records(source: str, split: str, hub: bool) -> Records:
    """The records of Parquet files and of all that the datasets library reads."""
    try:
        import datasets
        from pyarrow.parquet import ParquetFile  # datasets would copy the file first

        if hub:
            table = datasets.load_dataset(source, split=split)
        elif os.path.isdir(source):
            table = datasets.load_from_disk(source)
            if isinstance(table, dict) and split not in table:
                raise InputError(f"no split {split}; expected one of: {', '.join(table)}")
            table = table[split] if isinstance(table, dict) else table
        else:
            batches = ParquetFile(source).iter_batches(1000)
            table = (record for batch in batches for record in batch.to_pylist())
        for number, record in enumerate(table, 1):
            yield f"{source}{f'[{split}]' * hub}, row {number}", record
    except Exception as error:  # no network, no such name, no such split ...
        why = "no such file, and the hub says" if hub else "it can't be read"
        why += ": " + " ".join(str(error).split())[:200]
        if isinstance(error, ImportError):
            why = f"{'no such file; ' * hub}to read it: pip install 'nanoalign[hub]'"
        raise InputError(f"{source}: {why}") from None


def read_records(path: str | Path, yield_errors: bool = False) -> Records:
    """(where, record) for each record of a .json, .jsonl or .csv file, or of one in gzip (.gz).

    A record that is refused raises an InputError, or with `yield_errors` is yielded as one. A file
    without records raises one. A JSONL file is read twice, first as bytes, and never held whole.
    """
    readers = {".json": json_records, ".jsonl": jsonl_records, ".csv": csv_records}
    name, where = str(path), None
    packed = name.lower().endswith(".gz")
    suffix = Path(name[:-3] if packed else name).suffix.lower()
    try:
        with gzip.open(path) if packed else open(path, "rb") as file:
            if suffix not in readers:
                raise InputError(f"{name}: unknown kind of file; expected .json, .jsonl or .csv")
            check_text(file, name)
            file.seek(0)
            text = io.TextIOWrapper(file, "utf-8-sig", newline="\n")
            for where, record in readers[suffix](text, name):
                if isinstance(record, InputError) and not yield_errors:
                    raise InputError(f"{where}: {record}")
                yield where, record
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise InputError(f"{name}: {e}; expected a whole gzip file") from None
    except OSError as e:
        expected = "a .json, .jsonl or .csv file"
        if os.path.isdir(path):
            expected += f": '{name}/*.jsonl' say, or a folder that datasets saved"
        raise InputError(f"{name}: {e.strerror}; expected {expected}") from None
    if not where:
        found = "an empty list" if suffix == ".json" else "a header only"
        raise InputError(f"{name}: {found}; expected rows")


def check_text(file: BinaryIO, name: str) -> None:
    """InputError if a file is not UTF-8 or is blank. A NUL is a fault, too: it stands in UTF-16 and
    in binary files."""
    before, blank = 0, True  # bytes before this line; were all lines so far blank?
    for number, data in enumerate(file, start=1):
        for magic, kind in MAGIC.items() if number == 1 else ():
            if data.startswith(magic):
                raise InputError(f"{name}: the file is {kind}; expected plain text in UTF-8")
        try:
            line, at = data.decode("utf-8"), data.find(b"\0")
        except UnicodeDecodeError as e:
            at = e.start
        if at >= 0:
            byte = f"byte {before + at + 1} of the file, 0x{data[at]:02x},"
            raise InputError(f"{name}, line {number}: {byte} is no text; expected UTF-8")
        before, blank = before + len(data), blank and not line.strip("\ufeff").strip()
    if blank:
        raise InputError(f"{name}: the file is empty; expected rows")


def shown(text: str, start: int = 0) -> str:
    """The first characters from text[start] on, for a message; control characters are escaped."""
    return "the end of the file" if 0 < start >= len(text) else repr(text[start : start + 50])[:60]


def unique_keys(pairs: list) -> dict:
    record = dict(pairs)
    if len(record) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise InputError(f"the key {shown(key)} stands twice in one object; expected once")
    return record


def finite(literal: str) -> float:
    if not math.isfinite(value := float(literal)):  # 1e999, or json's own NaN and Infinity
        raise InputError(f"{shown(literal)} where a finite number was expected")
    return value


DECODER = json.JSONDecoder(object_pairs_hook=unique_keys, parse_float=finite, parse_constant=finite)
LENIENT = json.JSONDecoder()  # says where a value ends that DECODER refuses
SPACE, LONE = re.compile(r"[ \t\r\n]*"), re.compile("[\ud800-\udfff]")


def decode(text: str, start: int, objects: bool = True) -> tuple[object, int | None]:
    """(value, end): the JSON value at text[start], or after white space there; and the index of
    what follows it, white space skipped. With `objects` only an object is accepted.

    A value that is refused is an InputError. If even its end is unknown, `end` is None.
    """
    start, limit = SPACE.match(text, start).end(), sys.getrecursionlimit()
    if objects and not text.startswith("{", start):
        return InputError(f"expected a JSON object {{...}}, found {shown(text, start)}"), None
    sys.setrecursionlimit(min(limit, 3000))  # a higher one would let json overflow C's stack
    try:
        try:
            value, end = DECODER.raw_decode(text, start)
            escaped = re.search(r"\\u[dD]", text[start:end])
            if escaped and LONE.search(json.dumps(value, ensure_ascii=False)):
                raise InputError("a lone surrogate (\\ud800 to \\udfff); expected the whole pair")
        except InputError as refusal:  # DECODER's hooks raise it, too
            value, end = refusal, LENIENT.raw_decode(text, start)[1]
        return value, SPACE.match(text, end).end()
    except json.JSONDecodeError as e:
        at = f"line {e.lineno}, column {e.colno}" if "\n" in text else f"column {e.colno}"
        fault = f"broken or cut off at {at} ({e.msg}); expected a whole JSON object {{...}}"
    except RecursionError:
        fault = "lists and objects nested too deep; expected fewer than a thousand levels"
    except ValueError:  # int() refuses very long numbers
        fault = f"a number of over {sys.get_int_max_str_digits()} digits; expected fewer"
    finally:
        sys.setrecursionlimit(limit)
    return InputError(fault), None


def parsed(text: str, where: str):
    """The value of a text that is JSON, such as a call's arguments."""
    value, end = decode(text, 0, objects=False)
    if end not in (None, len(text)):
        value = InputError(f"expected one JSON value, then {shown(text, end)}")
    if isinstance(value, InputError):
        raise InputError(f"{where}: {value}")
    return value


def jsonl_records(file: TextIO, name: str) -> Records:
    """One JSON object per line. Blank lines are skipped."""
    for i, line in enumerate(file, start=1):
        line = line.removesuffix("\n")
        if line.strip(" \t\r"):
            record, end = decode(line, 0)
            if end not in (None, len(line)):
                record = InputError(f"expected one object per line, then {shown(line, end)}")
            yield f"{name}, line {i}", record


def json_records(file: TextIO, name: str) -> Records:
    """One list of objects. Each is parsed by itself, so that an error can name it."""
    text = file.read()
    at = SPACE.match(text).end()
    if text[at] != "[":
        fault = "expected a list of objects [{...}, ...] (JSONL, one object per line, is .jsonl)"
        raise InputError(f"{name}: {fault}, found {shown(text, at)}")
    if text.startswith("]", SPACE.match(text, at + 1).end()):
        return
    number = 0
    while text[at] != "]":  # at the bracket that opens the list, then at each comma
        number += 1
        where = f"{name}, row {number}"
        record, at = decode(text, at + 1)
        if at is None:
            raise InputError(f"{where}: {record}")
        if text[at : at + 1] not in (",", "]"):
            raise InputError(f"{where}: expected a comma or ] after it, found {shown(text, at)}")
        yield where, record
    end = SPACE.match(text, at + 1).end()
    if end < len(text):
        line = text.count("\n", 0, end) + 1
        raise InputError(f"{name}, line {line}: expected nothing after ], found {shown(text, end)}")


def csv_records(file: TextIO, name: str) -> Records:
    """A header, then records. Each value is text as it stands, "null", "NA" and "" too.

    A record may span lines, inside quotes; `where` is its first line. Blank lines are skipped.
    """
    text = file.read()
    csv.field_size_limit(2**31 - 1)  # the default refuses texts of over 131,072 characters
    reader = csv.reader(io.StringIO(text, newline="\n"), strict=True)
    header, start = [], 1
    try:
        for record in reader:
            where, start = f"{name}, line {start}", reader.line_num + 1
            if record and not header:
                header = record
                if not all(map(str.strip, header)):
                    raise InputError(f"{where}: a column without a name; expected a full header")
                column, times = Counter(header).most_common(1)[0]
                if times > 1:
                    raise InputError(f"{where}: column {shown(column)} stands twice; expected once")
            elif header == GRADIO and len(record) == 4:
                yield where, dict(zip(header[:2] + header[3:], record))
            elif record and len(record) != len(header):
                fault = f"a row of {len(record)}, but the header has {len(header)}"
                yield where, InputError(f"{fault}; expected as many fields in both")
            elif record:
                yield where, dict(zip(header, record))
    except csv.Error as e:  # in the record that begins on line `start`
        if "end of data" in str(e):
            # A quote inside a value is doubled. So the quote that never closes begins the last run
            # of an odd number of quotes.
            opening = [run.start() for run in re.finditer('"+', text) if len(run[0]) % 2][-1]
            start = text.count("\n", 0, opening) + 1
            fault = "a quote opens here and never closes; expected its end"
        elif "new-line" in str(e):
            start = reader.line_num
            fault = "a carriage return outside quotes; expected lines that end in \\n or \\r\\n"
        else:
            fault = f"text after a closing quote on line {reader.line_num}; expected a comma, " \
                    'and a quote inside a quoted value doubled ("")'  # fmt: skip
        raise InputError(f"{name}, line {start}: {fault}") from None
